"""Checks a new GPU, part by part: equal results, memory as planned, and speed."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from prism_deco.bench.train import hardware
from prism_deco.config import load_config
from prism_deco.config.registry import unknown
from prism_deco.files import read_json, write_json

log = logging.getLogger(__name__)

_REAL = ("trainer=gpu", "recipe.packing=true", "recipe.max_text_tokens=512")
_B = ("recipe=prism", "projector=avgpool", *_REAL)
CELLS: dict[str, tuple[str, ...]] = {
    "B1": (*_B, "backbone=siglip_so400m_224", "llm=phi2"),
    "B4": (*_B, "backbone=dinov2_siglip_384", "llm=phi2"),
    "B5": (*_B, "backbone=dinov2_siglip_384", "llm=qwen1_5_0_5b_chat"),
    "B6_lora": (
        *_B, "backbone=dinov2_siglip_384", "llm=vicuna_7b_v1_5", "llm.dtype=bfloat16", "recipe.lm=lora",
    ),
    "vicuna_lora": (
        "recipe=llava_v1_5_finetune", "projector=linear", *_REAL, "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5",
        "llm.dtype=bfloat16",
    ),
}  # fmt: skip
"""Cells of the paper's grid, and LLaVA-1.5 with adapters, for training on one GPU with random weights."""

_MINI = ("recipe=prism", "projector=avgpool", "recipe.num_tokens=16", "recipe.packing=true",
         "recipe.max_text_tokens=40", "trainer=cpu", "backbone.image_size=32")  # fmt: skip
MINIATURES: dict[str, tuple[str, ...]] = {
    "B1": (*_MINI, "backbone=mini_siglip", "llm=mini_phi"),
    "B4": (*_MINI, "backbone=mini_dinov2_siglip", "llm=mini_phi"),
    "B5": (*_MINI, "backbone=mini_dinov2_siglip", "llm=mini_qwen2"),
    "B6_lora": (*_MINI, "backbone=mini_dinov2_siglip", "llm=mini_llama", "recipe.lm=lora", "recipe.lora_r=4"),
    "vicuna_lora": (*_MINI, "backbone=mini_clip", "llm=mini_llama", "recipe.lm=lora", "recipe.lora_r=4"),
}
"""The same cells in miniature, for `--rehearse`."""


@dataclass(frozen=True)
class Finding:
    """The result of a part.

    Attributes:
        text: for the table.
        passed: whether it meets the part's requirement; None if there is none.
        facts: numbers for the JSON file.
    """

    text: str
    passed: bool | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """The settings that all parts share.

    Attributes:
        folder: of the results and of trained runs.
        rehearse: use miniatures instead of the real sizes.
    """

    folder: Path
    device: torch.device
    rehearse: bool = False

    def cell(self, name: str, *settings: str) -> DictConfig:
        """The configuration of a cell."""
        return load_config([*(MINIATURES if self.rehearse else CELLS)[name], *settings])

    def facts(self, part: str) -> dict[str, Any]:
        """The facts of an earlier part; empty if it has no result."""
        path = self.folder / f"{part}.json"
        return read_json(path, ["facts"])["facts"] if path.is_file() else {}


@dataclass(frozen=True)
class Part:
    """One check or measurement.

    Attributes:
        name: of its result's file.
        minutes: estimated time on an H200.
        cuda: it needs a GPU.
    """

    name: str
    minutes: float
    run: Callable[[Bench], Finding]
    cuda: bool = False


def run_parts(
    bench: Bench, parts: Sequence[Part], *, minutes: float, redo: bool = False, names: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Runs the parts that have no result yet, in order, while there is time. Failures do not stop the others.

    Args:
        minutes: for all parts; a part whose estimate exceeds the rest is left for the next call.
        redo: also run parts that have a result.
        names: of the parts; empty is all.

    Returns:
        The result of each part: `name`, `state` (passed, failed, measured, error, or not run), `text`, `seconds`,
        `facts`, `about`.
    """
    known_names = [part.name for part in parts]
    for name in names:
        if name not in known_names:
            raise unknown("part", name, known_names)
    bench.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = []
    about = {"hardware": hardware(bench.device), "torch": torch.__version__, "rehearsal": bench.rehearse}
    chosen = [part for part in parts if not names or part.name in names]
    for number, part in enumerate(chosen, start=1):
        path = bench.folder / f"{part.name}.json"
        known = read_json(path, ["name", "state", "text", "seconds", "facts", "about"]) if path.is_file() else None
        # Results of another device, torch version or rehearsal do not count.
        if known is not None and known["about"] == about and not redo:
            results.append(known)
            continue
        left = minutes - (time.monotonic() - started) / 60
        if part.cuda and bench.device.type != "cuda":
            results.append(_not_run(part, "needs CUDA"))
        elif part.minutes > left:
            results.append(_not_run(part, f"{left:.0f} min left; the same command goes on here"))
        else:
            to_come = sum(other.minutes for other in chosen[number - 1 :])
            log.info(
                "%s (%d of %d): about %.0f min; all that is left: %.0f min",
                *(part.name, number, len(chosen), part.minutes, to_come),
            )
            results.append(_run(bench, part) | {"about": about})
            write_json(path, results[-1])
            log.info("%s: %s, %s", part.name, results[-1]["state"], results[-1]["text"])
            # Cycles would keep the part's models on the device while the next part allocates.
            gc.collect()
            if bench.device.type == "cuda":
                # Raises after an illegal access, which breaks the CUDA context: the next call starts after this part.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    write_json(bench.folder / "results.json", {"about": about, "parts": results})
    return results


def _run(bench: Bench, part: Part) -> dict[str, Any]:
    start = time.monotonic()
    try:
        found = part.run(bench)
        state = {True: "passed", False: "failed", None: "measured"}[found.passed]
    except Exception as error:
        log.exception("%s", part.name)
        # The first line of the message. chr(10): before Python 3.12, f-strings cannot contain a backslash.
        found, state = Finding(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"), "error"
    return {"name": part.name, "state": state, "seconds": time.monotonic() - start} | asdict(found)


def _not_run(part: Part, why: str) -> dict[str, Any]:
    return {"name": part.name, "state": "not run", "text": why, "seconds": 0.0, "facts": {}}


def table(results: Sequence[dict[str, Any]], device: torch.device) -> Table:
    """A table with one row per result."""
    found = Table(title=f"First contact: {hardware(device)}")
    for header in ("part", "result", "s", "found"):
        found.add_column(header, justify="right" if header == "s" else "left", overflow="fold")
    for result in results:
        found.add_row(result["name"], result["state"], f"{result['seconds']:.0f}", result["text"])
    return found
