"""Runs `prism-deco explain`: one image with pictures and a page, or a set of examples with measures."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from prism_deco.bootstrap import mean_interval
from prism_deco.data.images import open_image
from prism_deco.errors import UsageError
from prism_deco.explain.gae import DEFAULT_METHOD, MAX_NEW_TOKENS, METHODS, Relevance, image_pixels, relevance
from prism_deco.explain.geometry import Box
from prism_deco.explain.measures import area, curves, energy_in_box, padding_fraction, pointing_hit, redundancy, spread
from prism_deco.explain.page import Panel, Section, write_page
from prism_deco.explain.render import mosaic, overlay
from prism_deco.explain.words import encode_answer
from prism_deco.files import write_json
from prism_deco.inference import answer as generate_answer
from prism_deco.llms import LanguageModel
from prism_deco.projectors import PROJECTORS
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

RANDOM = "random"
"""The baseline: a map of random numbers."""


@dataclass(frozen=True)
class ExplainExample:
    """A question about an image.

    Attributes:
        answer: the text to explain; None takes the model's own.
        box: the object in question, in fractions of the image's width and height; None if unknown.
        id: its name in `examples.jsonl`.
    """

    image: Path
    prompt: str
    answer: str | None = None
    box: Box | None = None
    id: str = ""


def explain_image(vlm: VLM, llm: LanguageModel, example: ExplainExample, out_dir: Path, *, run: str) -> Section:
    """Explains one answer by every method and writes pictures, maps and a page.

    Per method a folder with `sentence.png`, `word_NN.png`, `queries.png` (the mosaic), `maps.safetensors`
    (text_to_query, query_to_patch, text_to_patch) and `words.json`; next to them the page `index.html`.

    Args:
        run: the model's name on the page.

    Returns:
        The page's section, for a page with several runs (`write_page`).
    """
    image = open_image(example.image)
    maps = _by_method(vlm, llm, image, example.prompt, example.answer)
    for method, result in maps.items():
        _write_maps(out_dir / method, image, result)
    section = Section(image, example.prompt, [Panel(run, _projector(vlm), maps)], example.box)
    write_page(out_dir / "index.html", example.prompt, [section])
    return section


def explain_set(
    vlm: VLM,
    llm: LanguageModel,
    examples: Sequence[ExplainExample],
    out_dir: Path,
    *,
    run: str,
    about: Mapping[str, Any] | None = None,
    steps: int = 10,
    seed: int = 0,
    show: int = 8,
) -> tuple[dict[str, Any], list[Section]]:
    """Measures the maps of a set; writes `metrics.json`, `examples.jsonl` and `index.html`.

    Args:
        run: the model's name in the table and on the page.
        about: additional entries for `metrics.json` (benchmark, split).
        steps: steps of the deletion and insertion curves.
        seed: seed of the random maps and of the bootstrap.
        show: number of examples on the page.

    Returns:
        The content of `metrics.json`, and the page's sections.

    Raises:
        UsageError: no example has an answer to explain.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    sections: list[Section] = []
    with (out_dir / "examples.jsonl").open("w", encoding="utf-8") as lines:
        # Logged, as the run's name would take the progress bar's room.
        log.info("%s: explaining %d examples", run, len(examples))
        shown = track(examples, "Explaining", console=Console(stderr=True), disable=not sys.stderr.isatty())
        for number, example in enumerate(shown, start=1):
            if number % 25 == 0 and not sys.stderr.isatty():
                log.info("%s: explaining %d of %d examples", run, number, len(examples))
            image = open_image(example.image)
            answer = example.answer or _own_answer(vlm, llm, image, example.prompt)
            # Counted as skipped in the summary.
            if not answer.strip():
                continue
            maps = _by_method(vlm, llm, image, example.prompt, answer)
            # All maps of an example are measured on the same answer and box; only the scores differ.
            measure = partial(_measure, vlm, llm, image, example, maps[DEFAULT_METHOD], steps)
            values = {m: measure(r.sentence_text_to_patch) | _diversity(r) for m, r in maps.items()}
            # Random maps have no visual tokens, so no diversity.
            values[RANDOM] = measure(torch.rand(vlm.backbone.num_patches, generator=generator))
            rows.append({"id": example.id, "prompt": example.prompt, "answer": answer, "methods": values})
            lines.write(json.dumps(rows[-1]) + "\n")
            if len(sections) < show:
                sections.append(Section(image, example.prompt, [Panel(run, _projector(vlm), maps)], example.box))
    skipped = len(examples) - len(rows)
    if not rows:
        raise UsageError(f"{run}: no example has an answer to explain ({skipped} answers of the model were empty).")
    summary = {
        "run": run,
        "projector": _projector(vlm),
        "grid": list(vlm.projector.in_grid),
        "query_grid": list(vlm.projector.out_grid),
        **(about or {}),
        "n": len(rows),
        "skipped": skipped,
        "steps": steps,
        "seed": seed,
        # Every row has the same methods, each with its measures.
        "methods": {method: _summary([row["methods"][method] for row in rows], seed) for method in rows[0]["methods"]},
    }
    write_json(out_dir / "metrics.json", summary)
    write_page(out_dir / "index.html", f"Where {run} looked", sections)
    return summary, sections


def _by_method(
    vlm: VLM, llm: LanguageModel, image: Image.Image, prompt: str, answer: str | None
) -> dict[str, Relevance]:
    """One answer's maps by every method; R-GAE, which needs the most memory, comes first."""
    maps: dict[str, Relevance] = {}
    for method in METHODS:
        maps[method] = relevance(vlm, llm, image, prompt, answer, method=method)
        # The model answers only once: all further methods explain the same text.
        answer = maps[method].answer
    return maps


def _measure(
    vlm: VLM,
    llm: LanguageModel,
    image: Image.Image,
    example: ExplainExample,
    result: Relevance,
    steps: int,
    scores: Tensor,
) -> dict[str, float]:
    """The measures of `scores`, float[N], as a map of the answer in `result`."""
    encoded, ids = encode_answer(llm, result.prompt, result.answer, vlm.projector.num_tokens)
    deletion, insertion = curves(vlm, encoded, len(ids), image_pixels(vlm, image), scores, steps=steps)
    numbers = {"deletion_auc": area(deletion), "insertion_auc": area(insertion)}
    if example.box is not None:
        width, height = image.size
        x1, y1, x2, y2 = example.box
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        numbers["energy_in_box"] = energy_in_box(scores, result.patches, box)
        numbers["pointing"] = float(pointing_hit(scores, result.patches, box))
    return numbers


def _diversity(result: Relevance) -> dict[str, float]:
    """The measures of the visual tokens' own maps."""
    queries = result.sentence_query_to_patch
    return {"query_redundancy": redundancy(queries), "query_spread": spread(queries, result.patches.grid)}


def _summary(rows: Sequence[Mapping[str, float]], seed: int) -> dict[str, Any]:
    """Mean and interval of each measure, over the examples that have it."""
    # The distinct names in order of appearance; measures of the box are missing where none is known.
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean_interval([row[name] for row in rows if name in row], seed=seed) for name in names}


def _own_answer(vlm: VLM, llm: LanguageModel, image: Image.Image, prompt: str) -> str:
    visual = [list(vlm.visual_tokens(image_pixels(vlm, image)))]
    return generate_answer(vlm, llm, visual, [prompt], max_new_tokens=MAX_NEW_TOKENS)[0]


def _projector(vlm: VLM) -> str:
    """The projector's registered name, or its class name if it is not registered."""
    kind = type(vlm.projector)
    return next((name for name in PROJECTORS.names() if PROJECTORS.get(name) is kind), kind.__name__)


def _write_maps(folder: Path, image: Image.Image, result: Relevance) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    overlay(image, result.sentence_text_to_patch, result.patches).save(folder / "sentence.png")
    for index, values in enumerate(result.by_word(result.text_to_patch)):
        overlay(image, values, result.patches).save(folder / f"word_{index:02d}.png")
    mosaic(image, result.sentence_query_to_patch, result.query_grid, result.patches).save(folder / "queries.png")
    names = ("text_to_query", "query_to_patch", "text_to_patch")
    save_file({name: getattr(result, name).contiguous() for name in names}, folder / "maps.safetensors")
    words = {
        "method": result.method,
        "prompt": result.prompt,
        "answer": result.answer,
        "padding_fraction": padding_fraction(result.sentence_text_to_patch, result.patches),
        "tokens": result.tokens,
        "words": [{"text": word.text, "tokens": list(word.tokens)} for word in result.words],
        "query_grid": list(result.query_grid),
        "grid": list(result.patches.grid),
    }
    write_json(folder / "words.json", words)
