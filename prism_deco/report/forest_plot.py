"""The forest plots of claims: every contrast's effect with its interval, and the numbers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.textpath import TextPath

from prism_deco.report.claim_report import is_clear, ordered, with_deviation
from prism_deco.report.contrasts import UNRESOLVED, Result
from prism_deco.report.plotting import Figure, legend, settings, to_svg
from prism_deco.report.tables import p_value
from prism_deco.report.tabular import MISSING, interval, number

_SIZE = 8.0  # of all texts, in points
_ROW, _HEAD = 0.22, 0.36  # heights in inches
_TOP, _BOTTOM, _GAP = 0.3, 0.75, 0.16
_PLOT = 3.2  # width in inches
_COLUMNS = ("equal", "effect", "95 % interval", "first", "second", "blind", "p (Holm)", "verdict")
_HEADS, _DETAIL = "#000000", "#555555"


@dataclass(frozen=True)
class _Line:
    """A line of the plot: a contrast, or above those of a claim its name.

    Attributes:
        y: of its middle, in inches above the axis.
        texts: by column.
    """

    label: str
    y: float
    result: Result | None = None
    texts: Sequence[str] = field(default_factory=tuple)


def forests(results: Sequence[Result]) -> list[Figure]:
    """A forest plot per unit; contrasts of which nothing is known have a line without a mark."""
    units = dict.fromkeys(result.unit for result in results)
    return [_forest([result for result in results if result.unit == unit], unit) for unit in units]


def _forest(results: Sequence[Result], unit: str) -> Figure:
    lines, height = _lines(results)
    with settings():
        labels = max(_width(line.label, line.result is None) for line in lines)
        widths = [
            max(_width(text) for text in (name, *(line.texts[k] for line in lines if line.texts)))
            for k, name in enumerate(_COLUMNS)
        ]
        left = labels + 2 * _GAP
        size = (left + _PLOT + sum(widths) + (len(widths) + 1) * _GAP, _TOP + height + _BOTTOM)
        figure = Canvas(figsize=size)
        ax = figure.add_axes((left / size[0], _BOTTOM / size[1], _PLOT / size[0], height / size[1]))
        ax.set_ylim(0, height)
        ax.set_xlim(*_range(results))
        ax.axvline(0, color="#000000", linewidth=0.9)
        for line in lines:
            if line.result is not None:
                _mark(ax, line.y, line.result)
            elif line.y < height - _HEAD:
                ax.axhline(line.y + _HEAD / 2, color="#e4e4e4", linewidth=0.8)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(f"first \u2212 second ({unit})", fontsize=_SIZE)
        ax.tick_params(axis="x", labelsize=_SIZE)
        _write(figure, lines, left, widths)
        legend(figure, [ax], ("equal steps", "equal compute", "margin"))
        caption = (
            "Effects with their 95 % intervals over seeds; filled marks: equal steps, hollow marks: equal compute. A "
            "claim says that the effect is right of zero, or right of the dashed margin; an arrow is an interval that "
            "goes on. Details, by which no claim is judged, are grey and in brackets. Verdicts are by the interval; "
            f"p (Holm) below 0.05 has a star. First, second, blind: means in {unit}."
        )
        return Figure(f"claims-{unit}", to_svg(figure), caption)


def _lines(results: Sequence[Result]) -> tuple[list[_Line], float]:
    """From top to bottom, and the height of all in inches."""
    heights, made = [], []
    previous = ""
    for result in ordered(results):
        if result.claim.name != previous:
            previous = result.claim.name
            made.append((previous, None))
            heights.append(_HEAD)
        words = result.words if result.judged else f"({result.words})"
        made.append((f"{result.pair}, {words}", result))
        heights.append(_ROW)
    total, above, lines = sum(heights), 0.0, []
    for (label, result), height in zip(made, heights, strict=True):
        y = total - above - height / 2
        lines.append(_Line(label, y, result, _texts(result) if result is not None else ()))
        above += height
    return lines, total


def _texts(result: Result) -> Sequence[str]:
    star = "*" if is_clear(result) else ""
    return (
        result.contrast.equal,
        number(result.effect, sign="+"),
        interval(result.interval, sign="+"),
        with_deviation(result.first),
        with_deviation(result.second),
        number(result.blind.mean),
        f"{p_value(result.adjusted)}{star}",
        result.verdict if result.effect is not None else f"{UNRESOLVED} ({MISSING})",
    )


def _write(figure: Canvas, lines: Sequence[_Line], left: float, widths: Sequence[float]) -> None:
    """All texts, placed in inches: labels left of the plot, numbers right of it."""
    width, height = figure.get_size_inches()

    def put(x: float, y: float, text: str, side: str, **look: Any) -> None:
        figure.text(x / width, (y + _BOTTOM) / height, text, ha=side, va="center", fontsize=_SIZE, **look)

    top = height - _BOTTOM - _TOP / 2
    x = left + _PLOT + _GAP
    for k, (name, span) in enumerate(zip(_COLUMNS, widths, strict=True)):
        words = name in ("equal", "verdict")
        place, side = (x, "left") if words else (x + span, "right")
        put(place, top, name, side, color=_DETAIL)
        for line in lines:
            if line.result is not None:
                put(place, line.y, line.texts[k], side, color=_color(line.result))
        x += span + _GAP
    for line in lines:
        if line.result is None:
            put(_GAP / 2, line.y - 0.03, line.label, "left", color=_HEADS, fontweight="bold")
        else:
            put(left - _GAP, line.y, line.label, "right", color=_color(line.result))


def _mark(ax: Axes, y: float, result: Result) -> None:
    if result.contrast.margin:
        null = result.contrast.null
        ax.plot([null, null], [y - 0.4 * _ROW, y + 0.4 * _ROW], color="#000000", linestyle=(0, (3, 2)), label="margin")
    if result.effect is None:
        return
    color, (least, most) = _color(result), ax.get_xlim()
    if result.interval is not None:
        low, high = result.interval
        ax.plot([max(low, least), min(high, most)], [y, y], color=color, linewidth=1.3, solid_capstyle="butt")
        for bound, marker, beyond in ((least, "<", low < least), (most, ">", high > most)):
            if beyond:
                ax.plot([bound], [y], color=color, marker=marker, markersize=5, clip_on=False)
    filled = result.contrast.equal == "steps"
    ax.plot(
        [result.effect],
        [y],
        marker="o",
        linestyle="none",
        color=color,
        markerfacecolor=color if filled else "#ffffff",
        label=f"equal {result.contrast.equal}",
        zorder=3,
    )


def _range(results: Sequence[Result]) -> tuple[float, float]:
    """Of the axis: all effects, zero and margins, and the intervals of three seeds or more; those of two can be of
    any length, and would hide the others."""
    values = [0.0, *(result.contrast.null for result in results)]
    values += [result.effect for result in results if result.effect is not None]
    for result in results:
        if result.interval is not None and len(result.seeds) > 2:
            values += result.interval
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def _color(result: Result) -> str:
    return _HEADS if result.judged else _DETAIL


@cache
def _width(text: str, bold: bool = False) -> float:
    """In inches."""
    if not text.strip():
        return 0.0
    extent = TextPath((0, 0), text, size=_SIZE).get_extents().width / 72
    return 1.12 * extent if bold else extent
