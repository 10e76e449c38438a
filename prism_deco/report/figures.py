"""Figures: training losses, and scores against their cost in visual tokens or time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from prism_deco.report.cells import TRAIN_LOSS, Curve, RunCell, SeedGroup, Summary
from prism_deco.report.grid import ScoreTable
from prism_deco.report.plotting import STEPS, Figure, label_axes, legend, panels, settings, styles, to_svg
from prism_deco.report.tabular import MISSING, Field, Table, format_interval, format_number

TOKENS = "visual tokens per image"

_MARKERS = 8
"""Markers along a loss curve."""

_BAND: dict[str, Any] = {
    "facecolor": "#dcdcdc", "edgecolor": "#b8b8b8", "linewidth": 0.6, "label": "controls", "zorder": 0,
}  # fmt: skip

_SIDE_BY_SIDE = "Points with the same number of tokens are drawn side by side."


@dataclass(frozen=True)
class Cost:
    """What a score costs, the x-axis of a figure.

    Attributes:
        name: the figure's file name.
        label: the axis label, with the unit.
        of: gives the cost of a group; None if it is unknown.
    """

    name: str
    label: str
    of: Callable[[SeedGroup], float | None]


TOKENS_COST = Cost("score-against-visual-tokens", TOKENS, lambda group: group.tokens)
COSTS = (
    TOKENS_COST,
    Cost("score-against-training", "training (minutes, measured)", lambda group: group.training_minutes),
    Cost("score-against-first-token", "time to the first token (ms, measured)", lambda group: group.first_token_ms),
)


@dataclass(frozen=True)
class Point:
    """The mean score of a group and its cost."""

    group: SeedGroup
    cost: float
    score: Summary


def points(table: ScoreTable, cost: Cost = TOKENS_COST) -> list[Point]:
    """Points of the groups that have a known cost and a score on all benchmarks, cheapest first."""
    found = []
    for group in _distinct(table.groups):
        score = group.overall(table.benchmarks, table.split)
        price = cost.of(group)
        if price is not None and score is not None:
            found.append(Point(group, price, score))
    return sorted(found, key=lambda point: (point.cost, -point.score.mean))


def _distinct(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Each group once, even if it is the reference of several rows."""
    by_cells = {tuple(cell.id for cell in group.cells): group for group in groups}
    return list(by_cells.values())


def pareto_front(found: Sequence[Point]) -> list[Point]:
    """The points that no cheaper point matches and no equally expensive one beats, including ties in both.

    Args:
        found: in the order of `points`.
    """
    front: list[Point] = []
    for point in found:
        # Costs rise along `found`, and at equal cost the best comes first: only a higher score than the front's last
        # one adds to it.
        last = front[-1] if front else None
        ties = last is not None and (point.cost, point.score.mean) == (last.cost, last.score.mean)
        if last is None or ties or point.score.mean > last.score.mean:
            front.append(point)
    return front


def budget_table(table: ScoreTable) -> Table | None:
    """The best mean score within each token budget at which it changes; None for fewer than two points."""
    found = points(table)
    if len(found) < 2:
        return None
    rows = []
    # The front is sorted by cost, as `groupby` needs; a group has several points only if they tie.
    for tokens, tied in groupby(pareto_front(found), key=lambda point: point.cost):
        best = list(tied)
        within = [point for point in found if point.cost <= tokens and point not in best]
        second = max(within, key=lambda point: point.score.mean, default=None)
        rows.append(
            [
                Field(f"at most {tokens} visual tokens"),
                Field("; ".join(point.group.name for point in best)),
                Field(format_number(best[0].score.mean)),
                Field(format_interval(best[0].score.interval)),
                Field(second.group.name if second else MISSING),
                Field(format_number(second.score.mean if second else None)),
            ]
        )
    columns = ["budget", "best", "mean score", "95 % interval", "second best", "its mean score"]
    caption = (
        "Mean score: over all benchmarks of the first table, each in per cent of its maximum. There is a row for each "
        "number of tokens at which the best score rises, possibly by chance: compare the intervals."
    )
    return Table("Best score within a token budget", columns, rows, caption=caption)


def tokens_figures(table: ScoreTable, more: Sequence[SeedGroup] = ()) -> list[Figure]:
    """Score against visual tokens, a panel per benchmark (the paper's Figure 8); one figure per family of rows.

    Args:
        more: groups of the part's other tables: runs at the paper's number of tokens are in a table of their own.
    """
    groups = _distinct([*more, *table.groups])
    names = [*table.benchmarks, *(["mean"] if table.has_mean else [])]
    looks = styles(group.variant for group in groups)
    found = []
    for number, family in enumerate(dict.fromkeys(group.family for group in groups)):
        members = [group for group in groups if group.family == family and group.tokens is not None]
        numbers: dict[str, set[int | None]] = {}
        for group in members:
            numbers.setdefault(group.variant, set()).add(group.tokens)
        # Only families in which some projector was run at several numbers have a curve to draw.
        if not any(len(tokens) > 1 for tokens in numbers.values()):
            continue
        with settings():
            figure, axes = panels(len(names), width=3.1, height=2.3)
            for name, ax in zip(names, axes, strict=True):
                summaries = [(group, table.summary(group, name)) for group in members]
                _draw(ax, [Point(group, group.tokens or 0, score) for group, score in summaries if score], looks)
                _token_axis(ax, [group.tokens or 0 for group in members])
                label_axes(ax, name, TOKENS, "score (%)" if table.has_mean else "score")
            legend(figure, axes)
            caption = f"{family}: score against the number of visual tokens, with 95 % intervals. {_notes(members)}"
            found.append(Figure(f"tokens{number or ''}", to_svg(figure), caption))
    return found


def mean_figure(table: ScoreTable, cost: Cost = TOKENS_COST) -> Figure | None:
    """Mean score against a cost, a panel per family of rows; None unless the number of visual tokens differs."""
    found = points(table, cost)
    if len({point.group.tokens for point in found}) < 2:
        return None
    families = list(dict.fromkeys(point.group.family for point in found))
    variants = [group.variant for group in table.groups]
    looks = {name: look | {"linestyle": "none", "markersize": 7} for name, look in styles(variants).items()}
    front_look: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 3, "solid_capstyle": "round", "zorder": 1}
    with settings():
        figure, axes = panels(len(families), width=6.4 if len(families) == 1 else 4.2, height=3.4, sharey=True)
        for family, ax in zip(families, axes, strict=True):
            own = [point for point in found if point.group.family == family]
            front = pareto_front(own)
            x = [point.cost for point in front]
            ax.plot(x, [point.score.mean for point in front], color="#b0b0b0", **front_look)
            _draw(ax, own, looks, spread=cost is TOKENS_COST)
            if cost is TOKENS_COST:
                _token_axis(ax, [point.cost for point in found])
            label_axes(ax, family, cost.label, "mean score (%)")
        legend(figure, axes)
        caption = (
            f"Mean score over the benchmarks against {cost.label}, with 95 % intervals. The grey line is the Pareto "
            f"front: no point has a higher score at that cost. {_notes([point.group for point in found], cost)}"
        )
        return Figure(cost.name, to_svg(figure), caption)


def _notes(groups: Sequence[SeedGroup], cost: Cost = TOKENS_COST) -> str:
    controls = dict.fromkeys(group.variant for group in groups if group.control)
    band = f"Grey bands span the controls at each number of tokens ({', '.join(controls)})." if controls else ""
    return " ".join(filter(None, [band, _SIDE_BY_SIDE if cost is TOKENS_COST else ""]))


def _draw(ax: Axes, found: Sequence[Point], looks: dict[str, dict[str, Any]], spread: bool = True) -> None:
    """Draws points with error bars, joined by variant, and the controls as bands.

    Args:
        spread: draw points of equal cost side by side.
    """
    controls = [point for point in found if point.group.control]
    _draw_bands(ax, controls, spread)
    order = list(looks)
    found = [point for point in found if point not in controls]
    found = sorted(found, key=lambda point: (order.index(point.group.variant), point.cost))
    costs = [point.cost for point in found]
    places = side_by_side(costs) if spread else costs
    for variant, look in looks.items():
        own = [(x, point.score) for x, point in zip(places, found, strict=True) if point.group.variant == variant]
        if own:
            y = np.array([score.mean for _, score in own])
            # [points, 2] -> two arrays of one bound per point.
            low, high = np.array([score.interval for _, score in own]).T
            # A percentile interval need not contain the score.
            errors = np.clip([y - low, high - y], 0, None)
            ax.errorbar([x for x, _ in own], y, yerr=errors, label=variant, capsize=2.5, elinewidth=1, **look)


def _draw_bands(ax: Axes, controls: Sequence[Point], spread: bool) -> None:
    """For each number of visual tokens, a band over the range of the controls' costs and mean scores."""
    for tokens in sorted({point.group.tokens or 0 for point in controls}):
        own = [point for point in controls if point.group.tokens == tokens]
        costs, means = [point.cost for point in own], [point.score.mean for point in own]
        # A factor: the axis of tokens is logarithmic. There the controls have one cost, elsewhere each has its own.
        margin = 1.3 if spread else 1.01
        span = [min(costs) / margin, max(costs) * margin]
        ax.fill_between(span, min(means), max(means), **_BAND)


def side_by_side(tokens: Sequence[float]) -> list[float]:
    """Positions of points on a logarithmic axis: points with the same number of tokens are spread around it, over at
    most half an octave, so that none covers another."""
    places = []
    for k, number in enumerate(tokens):
        before = tokens[:k].count(number)
        same = tokens.count(number)
        octaves = min(0.09, 0.5 / same)  # between neighbours
        # Centred: the offsets of points at the same number add up to zero octaves.
        places.append(number * 2 ** (octaves * (before - (same - 1) / 2)))
    return places


def _token_axis(ax: Axes, tokens: Sequence[float]) -> None:
    values = sorted(set(tokens))
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    ax.set_xlim(values[0] / 1.6, values[-1] * 1.6)


def convergence(table: ScoreTable) -> Figure | None:
    """Training loss against steps: a panel per row, a line per projector (the paper's Figure 5)."""
    groups = [group for group in table.groups if any(_loss(cell) for cell in group.cells)]
    rows = list(dict.fromkeys(group.row for group in groups))
    if not rows:
        return None
    looks = styles(group.variant for group in table.groups)
    with settings():
        figure, axes = panels(len(rows), width=5.0 if len(rows) == 1 else 3.5)
        for row, ax in zip(rows, axes, strict=True):
            for group in groups:
                if group.row == row:
                    _convergence(ax, group, looks[group.variant])
            label_axes(ax, row, STEPS, "training loss (nats per token)")
        legend(figure, axes)
        caption = "Training loss, as a running mean over 1/40 of the run. Faint lines: single seeds of the mean."
        return Figure("convergence", to_svg(figure), caption)


def _convergence(ax: Axes, group: SeedGroup, look: dict[str, Any]) -> None:
    smooth = [_smooth(_loss(cell)) for cell in group.cells if _loss(cell)]
    if len(smooth) > 1:
        for x, y in smooth:
            ax.plot(x, y, color=look["color"], alpha=0.3, linewidth=0.7)
    # The mean ends where the shortest curve does.
    # Seeds may log different steps: each curve is interpolated at the steps of all, up to the end of the shortest.
    steps = np.array(sorted(set().union(*(x.tolist() for x, _ in smooth))))
    steps = steps[steps <= min(x[-1] for x, _ in smooth)]
    mean = np.mean([np.interp(steps, x, y) for x, y in smooth], axis=0)
    ax.plot(steps, mean, label=group.variant, markevery=max(1, len(steps) // _MARKERS), **look)


def _loss(cell: RunCell) -> Curve:
    return list(cell.curves.get(TRAIN_LOSS, []))


def _smooth(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the running mean of the values; the window is truncated at both ends."""
    x, y = np.array(curve).T
    # 1/80 of the curve on each side: 1/40 in all.
    half = len(y) // 80
    means = [y[max(0, k - half) : k + half + 1].mean() for k in range(len(y))]
    return x, np.array(means)
