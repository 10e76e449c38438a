"""A self-contained HTML file that shows the maps of several runs side by side."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prism_deco.explain.gae import Relevance
from prism_deco.explain.geometry import Box
from prism_deco.explain.measures import padding_fraction
from prism_deco.explain.render import color_anchors, scaled
from prism_deco.files import refusals_named

_TEMPLATE = Path(__file__).with_name("page.html")
_LONGEST = 640  # pixels of an image's longer side on the page
_LABELS = {"r-gae": "R-GAE", "attention": "Raw attention"}


@dataclass(frozen=True)
class Panel:
    """One run's maps of an image, by method; all of the same answer."""

    run: str
    projector: str
    maps: dict[str, Relevance]


@dataclass(frozen=True)
class Section:
    """An image, a question, and the maps of one or more runs.

    Attributes:
        box: the object in question, in fractions of the image's sides; None if unknown.
    """

    image: Image.Image
    prompt: str
    panels: list[Panel]
    box: Box | None = None


def side_by_side(runs: Sequence[Sequence[Section]]) -> list[Section]:
    """Sections of several runs, merged if image and question are the same, in order."""
    joined: dict[tuple[str, bytes], Section] = {}
    for sections in runs:
        for section in sections:
            # By its pixels, as each run has opened the image anew.
            key = (section.prompt, section.image.tobytes())
            panels = joined[key].panels if key in joined else []
            joined[key] = Section(section.image, section.prompt, [*panels, *section.panels], section.box)
    return list(joined.values())


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, with all text escaped."""
    data = {"colors": color_anchors(), "labels": _LABELS, "sections": [_section(section) for section in sections]}
    # The data must not close the script element that contains it, or start a comment.
    text = json.dumps(data).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    page = _TEMPLATE.read_text(encoding="utf-8")
    filling = {"%TITLE%": html.escape(title), "%DATA%": text}
    # In one pass, as a title may contain "%DATA%".
    page = re.sub("%TITLE%|%DATA%", lambda found: filling[found.group()], page)
    with refusals_named(path, "Name another folder with --out.", "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")


def _section(section: Section) -> dict[str, Any]:
    return {
        "image": _data_uri(section.image),
        "size": section.image.size,
        "prompt": section.prompt,
        "box": section.box,
        "panels": [_panel(panel) for panel in section.panels],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    # Words and grids are the same for all methods.
    first = next(iter(panel.maps.values()))
    return {
        "run": panel.run,
        "projector": panel.projector,
        "words": [word.text for word in first.words],
        "grid": first.patches.grid,
        "queryGrid": first.query_grid,
        "rect": first.patches.rect,
        "methods": {method: _maps(result) for method, result in panel.maps.items()},
    }


def _maps(result: Relevance) -> dict[str, Any]:
    """Maps as bytes, each min-max scaled, and the fraction of each map that lies in padding: the answer's, then each
    word's."""
    words = result.by_word(result.text_to_patch)
    # To compare words at a patch: maps differ in total strength, so each is normalised to sum to one.
    shares = words / words.sum(dim=1, keepdim=True).clamp(min=torch.finfo(words.dtype).tiny)
    # The page looks up `padding` by this order: 0 is the whole answer, k + 1 is word k.
    rows = [result.sentence_text_to_patch, *words]
    return {
        "padding": [padding_fraction(row, result.patches) for row in rows],
        "sentence": _bytes(result.sentence_text_to_patch[None]),
        "words": _bytes(words),
        # One scale for all words, while `_bytes` scales each map by itself.
        "shares": _encode(shares / shares.max().clamp(min=torch.finfo(words.dtype).tiny)),
        "sentenceQueries": _bytes(result.sentence_text_to_query[None]),
        "wordQueries": _bytes(result.by_word(result.text_to_query)),
        "queries": _bytes(result.sentence_query_to_patch),
    }


def _bytes(rows: Tensor) -> str:
    return _encode(torch.stack([scaled(row) for row in rows]))


def _encode(values: Tensor) -> str:
    """float[...] in 0..1 -> base64 of one byte each."""
    return base64.b64encode((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def _data_uri(image: Image.Image) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    kind = "png" if max(shown.size) <= 256 else "jpeg"
    buffer = io.BytesIO()
    shown.save(buffer, kind, quality=88)  # PNG has no quality and ignores it
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
