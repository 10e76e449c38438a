"""Figures of scores: against visual tokens, against costs, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from prism_deco.report.budget import Cost, Point, front, points
from prism_deco.report.cells import Entry, Summary
from prism_deco.report.grid import Grid
from prism_deco.report.paired_tests import Difference
from prism_deco.report.plotting import Figure, label_axes, legend, panels, settings, styles, to_svg

_MOVED = "Points with the same number of tokens are drawn side by side."


def ablation(grid: Grid, beside: Sequence[Entry] = ()) -> list[Figure]:
    """Score against visual tokens, a panel per benchmark (the paper's Figure 8); one figure per family of rows.

    Args:
        beside: entries that stand in other tables of the same part: the paper's own number of tokens is one of many.
    """
    found = []
    entries = [*beside, *grid.entries]
    families = dict.fromkeys(entry.family for entry in entries)
    for number, family in enumerate(families):
        members = [entry for entry in entries if entry.family == family and entry.tokens is not None]
        lines: dict[str, list[Entry]] = {}
        for entry in sorted(members, key=lambda entry: entry.tokens or 0):
            lines.setdefault(entry.variant, []).append(entry)
        if not any(len({entry.tokens for entry in line}) > 1 for line in lines.values()):
            continue
        names = [*grid.benchmarks, *(["mean"] if grid.has_mean else [])]
        looks = styles(entry.variant for entry in entries)
        with settings():
            figure, axes = panels(len(names), width=3.1, height=2.3)
            moved = False
            for name, ax in zip(names, axes, strict=True):
                marks = [
                    (variant, float(entry.tokens or 0), summary)
                    for variant, line in lines.items()
                    for entry in line
                    if (summary := _summary(grid, entry, name)) is not None
                ]
                places = _side_by_side([tokens for _, tokens, _ in marks])
                moved |= places != [tokens for _, tokens, _ in marks]
                for variant in lines:
                    own = [(x, mark[2]) for x, mark in zip(places, marks, strict=True) if mark[0] == variant]
                    _errorbars(ax, own, variant, looks[variant])
                _token_axis(ax, [float(entry.tokens) for entry in members if entry.tokens])
                label_axes(ax, name, "visual tokens per image", "score (%)" if grid.has_mean else "score")
            legend(figure, axes, looks)
            caption = f"{family}: score against the number of visual tokens, with 95 % intervals."
            caption += f" {_MOVED}" if moved else ""
            found.append(Figure(f"tokens{number or ''}", to_svg(figure), caption))
    return found


def pareto(grid: Grid, cost: Cost) -> Figure | None:
    """Mean score against a cost, a panel per family of rows; None unless the cost differs."""
    found = points(grid, cost)
    if len({point.cost for point in found}) < 2:
        return None
    families = list(dict.fromkeys(entry.family for entry in grid.entries))
    families = [family for family in families if any(point.entry.family == family for point in found)]
    variants = list(dict.fromkeys(entry.variant for entry in grid.entries))
    looks = styles(variants)
    low = min(point.score.interval[0] for point in found)
    high = max(point.score.interval[1] for point in found)
    moved = False
    with settings():
        figure, axes = panels(len(families), width=5.0 if len(families) == 1 else 3.5)
        for family, ax in zip(families, axes, strict=True):
            own = [point for point in found if point.entry.family == family]
            own.sort(key=lambda point: variants.index(point.entry.variant))
            costs = [point.cost for point in own]
            places = costs if cost.measured else _side_by_side(costs)
            moved |= places != costs
            if not cost.measured:
                _front(ax, front(sorted(own, key=lambda point: (point.cost, -point.score.mean))))
            for x, point in zip(places, own, strict=True):
                look = looks[point.entry.variant] | {"linestyle": "none", "markersize": 7}
                _errorbars(ax, [(x, point.score)], point.entry.variant, look)
            if cost.log:
                _token_axis(ax, [point.cost for point in found])
            else:
                ax.set_xlim(0, 1.08 * max(point.cost for point in found))
            margin = 0.08 * (high - low)
            ax.set_ylim(low - margin, high + margin)
            label_axes(ax, family, cost.label, "mean score (%)")
        legend(figure, axes, looks)
        caption = f"Mean score over the benchmarks against {cost.label}, with 95 % intervals."
        if cost.measured:
            caption += " Times depend on what else the machine was doing."
        else:
            caption += " The grey line joins what nothing cheaper beats."
        caption += f" {_MOVED}" if moved else ""
        return Figure(f"score-against-{cost.label.split(' per ')[0].replace(' ', '-')}", to_svg(figure), caption)


def forest(grid: Grid, pairs: Sequence[Difference]) -> Figure | None:
    """The differences of pairs with their intervals, a panel per row and pair; None where none is available."""
    shown = [pair for pair in pairs if pair.value is not None and grid.maximum(pair.benchmark) == 100]
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for pair in shown:
        groups.setdefault((pair.row, pair.first, pair.second), []).append(pair)
    names = [name for name in grid.benchmarks if any(pair.benchmark == name for pair in shown)]
    if not groups:
        return None
    with settings():
        figure, axes = panels(len(groups), width=3.9, height=0.9 + 0.22 * len(names))
        for ((row, first, second), members), ax in zip(groups.items(), axes, strict=True):
            ax.axvline(0, color="#000000", linewidth=0.8)
            for pair in members:
                place = names.index(pair.benchmark)
                _interval(ax, place - 0.15, pair.value, pair.interval, "over items", "#0072B2", "o")
                _interval(ax, place + 0.15, pair.value, pair.over_seeds, "over seeds", "#D55E00", "D")
            label_axes(ax, row, f"{first} \u2212 {second} (points)", "")
            ax.yaxis.set_major_locator(FixedLocator(range(len(names))))
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
        legend(figure, axes)
        caption = "Differences with their 95 % intervals; right of zero the first of the pair is ahead."
        return Figure("differences", to_svg(figure), caption)


def _interval(
    ax: Axes,
    y: float,
    value: float | None,
    bounds: tuple[float, float] | None,
    label: str,
    color: str,
    marker: str,
) -> None:
    if value is None or bounds is None:
        return
    ax.plot(bounds, (y, y), color=color, linewidth=1.6, solid_capstyle="butt")
    ax.plot([value], [y], color=color, marker=marker, linestyle="none", label=label)


def _front(ax: Axes, best: Sequence[Point]) -> None:
    x, y = [point.cost for point in best], [point.score.mean for point in best]
    ax.plot(x, y, color="#b0b0b0", drawstyle="steps-post", linewidth=3, solid_capstyle="round", zorder=1)


def _side_by_side(costs: Sequence[float]) -> list[float]:
    """Where to draw marks on a logarithmic axis: those of the same cost on both sides of it, so that none covers
    another; single ones where they are."""
    places = []
    for k, cost in enumerate(costs):
        before, number = costs[:k].count(cost), costs.count(cost)
        places.append(cost * 2 ** (0.09 * (before - (number - 1) / 2)))
    return places


def _errorbars(ax: Axes, values: Sequence[tuple[float, Summary]], label: str, look: dict[str, Any]) -> None:
    """Points with their intervals."""
    if not values:
        return
    x = [place for place, _ in values]
    y = np.array([summary.mean for _, summary in values])
    bounds = np.array([summary.interval for _, summary in values]).T
    # A percentile interval need not contain the score.
    below, above = np.clip(y - bounds[0], 0, None), np.clip(bounds[1] - y, 0, None)
    ax.errorbar(x, y, yerr=[below, above], label=label, capsize=2.5, elinewidth=1, **look)


def _token_axis(ax: Axes, tokens: Sequence[float]) -> None:
    ax.set_xscale("log", base=2)
    values = sorted(set(tokens))
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [f"{value:.0f}" for value in values])
    ax.set_xlim(values[0] / 1.6, values[-1] * 1.6)


def _summary(grid: Grid, entry: Entry, name: str) -> Summary | None:
    return entry.overall(grid.benchmarks, grid.split) if name == "mean" else entry.summary(name, grid.split)
