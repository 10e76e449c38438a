"""The style that all figures share."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from prism_deco.report.cells import PROJECTORS

STEPS = "optimizer steps"

# Okabe and Ito's colour-blind safe palette with a darker yellow and a grey; markers and dashes work without colour.
_STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#000000", "s", "-"),
    ("#0072B2", "o", "-"),
    ("#56B4E9", "^", (0, (6, 2))),
    ("#CC79A7", "D", (0, (1, 1.5))),
    ("#D55E00", "v", (0, (4, 1.5, 1, 1.5))),
    ("#009E73", "P", (0, (3, 1, 1, 1, 1, 1))),
    ("#8C6D00", "X", (0, (8, 2, 2, 2))),
    ("#777777", "*", (0, (2, 3))),
)

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "svg.fonttype": "path",  # with a browser's own fonts, of other widths, labels would collide
    "svg.hashsalt": "prism_deco",  # equal figures get equal ids
    "text.parse_math": False,  # names may contain dollar signs
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        name: file name without suffix.
    """

    name: str
    svg: bytes
    caption: str


def styles(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes by variant; a known projector looks the same in all reports."""
    variants = list(dict.fromkeys(variants))
    order = [*PROJECTORS, *(name for name in variants if name not in PROJECTORS)]
    found = {}
    for name in variants:
        # After each round of colours, they are combined with the next marker.
        round_, place = divmod(order.index(name), len(_STYLES))
        color, *_ = _STYLES[place]
        _, marker, dashes = _STYLES[(place + round_) % len(_STYLES)]
        found[name] = {"color": color, "marker": marker, "linestyle": dashes}
    return found


def panels(number: int, *, width: float, height: float = 2.6, sharey: bool = False) -> tuple[Canvas, list[Axes]]:
    """A figure of `number` panels, three per row, each of the given size in inches; use within `settings`."""
    columns = min(3, number)
    rows = math.ceil(number / columns)
    figure = Canvas(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes: list[Axes] = []
    for k in range(number):
        # With `sharey`, all panels follow the first one's axis.
        axes.append(figure.add_subplot(rows, columns, k + 1, sharey=axes[0] if sharey and axes else None))
    return figure, axes


def settings() -> Any:
    """The matplotlib context to draw and save figures in."""
    return matplotlib.rc_context(_SETTINGS)  # type: ignore[arg-type]  # matplotlib lists its keys as literals


def legend(figure: Canvas, axes: Sequence[Axes]) -> None:
    """One legend below all panels, with the entries of all panels."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    longest = max((len(label) for label in found), default=1)
    # Estimated at 11 characters per inch, with room for 7 more beside each label, for its line and the gaps.
    columns = max(1, min(len(found), int(figure.get_figwidth() * 11 / (longest + 7))))
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 3.2, "columnspacing": 1.6}
    figure.legend(list(found.values()), list(found), **place)


def to_svg(figure: Canvas) -> bytes:
    """The figure as SVG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def label_axes(ax: Axes, title: str, x: str, y: str) -> None:
    """Sets the title and the axis labels; an axis of steps gets integer ticks."""
    ax.set_title("\n".join(textwrap.wrap(title, 36)) or title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if x == STEPS:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
