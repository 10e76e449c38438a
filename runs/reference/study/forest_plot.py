"""The forest plots of claims: every contrast's effect with its interval, and the numbers next to it."""

from __future__ import annotations

from collections.abc import Sequence

from claim_tables import TEXTS, Record, by_claim, contrast_texts, measure, pair
from contrasts import HOLDS, REVERSED
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from prism_deco.report.plotting import Figure, legend, settings, to_svg

_COLORS = {HOLDS: "#0072B2", REVERSED: "#D55E00"}
_OTHERWISE = "#000000"
_ROW = 0.24  # height in inches
_CHARACTER = 0.078  # width in inches


def forests(records: Sequence[Record]) -> list[Figure]:
    """A forest plot per unit; contrasts of which nothing is known have a line without a mark."""
    units = dict.fromkeys(record["unit"] for record in records)
    return [_forest([record for record in records if record["unit"] == unit], unit) for unit in units]


def _forest(records: Sequence[Record], unit: str) -> Figure:
    lines: list[tuple[str, Record | None]] = []
    for name, own in by_claim(records).items():
        lines.append((name, None))
        lines += [(f"{pair(record)}, {measure(record)}", record) for record in own]
    columns = ["equal", *TEXTS, "verdict"]
    texts = [[""] * len(columns) if one is None else _texts(one) for _, one in lines]
    widths = [max(len(row[k]) for row in [columns, *texts]) * _CHARACTER + 0.12 for k in range(len(columns))]
    left = max(len(label) for label, _ in lines) * _CHARACTER
    plot = 3.2
    with settings():
        size = (left + plot + sum(widths), (len(lines) + 1) * _ROW + 0.9)
        figure = Canvas(figsize=size, layout="constrained")
        ax, beside = figure.subplots(1, 2, width_ratios=[left + plot, sum(widths)])
        ax.set_ylim(len(lines), -1)  # the first line is that of the table's heads
        ax.set_xlim(*_range(records))
        ax.axvline(0, color="#000000", linewidth=0.9)
        for y, (_, result) in enumerate(lines):
            if result is not None:
                _mark(ax, y + 0.5, result)
        ax.set_yticks([y + 0.5 for y in range(len(lines))], [label for label, _ in lines], fontsize=8)
        for (_, result), tick in zip(lines, ax.get_yticklabels(), strict=True):
            tick.set(fontweight="bold" if result is None else "normal")
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"first \u2212 second ({unit})", fontsize=8)
        beside.axis("off")
        table = beside.table(
            texts,
            colLabels=columns,
            colWidths=[width / sum(widths) for width in widths],
            edges="open",
            bbox=[0, 0, 1, 1],
        )
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        legend(figure, [ax])
    caption = (
        "Effects with their 95 % intervals over seeds, blue where a claim holds and orange where it is reversed; "
        "filled marks: equal steps, hollow marks: equal compute. A claim says that the effect is right of zero, or "
        "right of the dashed margin; an arrow is an interval that goes on. In brackets: details, by which no claim is "
        f"judged. p (Holm) below 0.05 has a star. First, second, blind: means in {unit}."
    )
    return Figure(f"claims-{unit}", to_svg(figure), caption)


def _texts(record: Record) -> list[str]:
    *numbers, p = contrast_texts(record)
    return [record["equal"], *numbers, f"{p}*" if record["after_holm"] else p, record["verdict"]]


def _mark(ax: Axes, y: float, record: Record) -> None:
    effect = record["effect"]
    if record["margin"]:
        null = -record["margin"]
        ax.plot([null, null], [y - 0.4, y + 0.4], color="#000000", linestyle=(0, (3, 2)), label="margin")
    if effect is None:
        return
    color = _COLORS.get(record["verdict"], _OTHERWISE)
    least, most = ax.get_xlim()
    low, high = (effect, effect) if record["low95"] is None else (record["low95"], record["high95"])
    ax.errorbar(
        [effect],
        [y],
        xerr=[[effect - max(low, least)], [min(high, most) - effect]],
        marker="o",
        color=color,
        markerfacecolor=color if record["equal"] == "steps" else "#ffffff",
        linestyle="none",
        label=f"equal {record['equal']}",
    )
    for bound, marker, beyond in ((least, "<", low < least), (most, ">", high > most)):
        if beyond:
            ax.plot([bound], [y], color=color, marker=marker, clip_on=False)


def _range(records: Sequence[Record]) -> tuple[float, float]:
    """Of the axis: all effects, zero and margins, and the intervals of three seeds or more; those of two can be of
    any length, and would hide the others."""
    values = [0.0, *(-record["margin"] for record in records)]
    values += [record["effect"] for record in records if record["effect"] is not None]
    for record in records:
        if len(record["seeds"].split()) > 2 and record["low95"] is not None:
            values += [record["low95"], record["high95"]]
    pad = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - pad, max(values) + pad
