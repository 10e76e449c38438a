"""What scores cost: figures against visual tokens and time, the best within a budget; and differences of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from prism_deco.report.cells import SeedGroup, Summary
from prism_deco.report.grid import ScoreTable
from prism_deco.report.paired_tests import Difference
from prism_deco.report.plotting import Figure, label_axes, legend, panels, settings, styles, to_svg
from prism_deco.report.tabular import MISSING, Field, Table, format_interval, format_number


@dataclass(frozen=True)
class Cost:
    """What a score may be drawn against.

    Attributes:
        label: of an axis, with its unit.
        log: whether its natural scale is logarithmic.
        measured: whether it depends on what else the machine was doing; nothing is best by such a cost.
    """

    label: str
    read: Callable[[SeedGroup], float | None]
    log: bool = False
    measured: bool = False


TOKENS = Cost("visual tokens per image", lambda group: group.tokens, log=True)
COSTS = (TOKENS, Cost("time per training step (s)", lambda group: group.step_seconds, measured=True))


@dataclass(frozen=True)
class Point:
    """A line of a table with its mean score over all benchmarks and what it costs."""

    group: SeedGroup
    cost: float
    score: Summary


def points(table: ScoreTable, cost: Cost) -> list[Point]:
    """Lines whose cost is known and that have all benchmarks, cheapest first."""
    found = []
    for group in table.groups:
        value = cost.read(group)
        score = group.overall(table.benchmarks, table.split)
        if value is not None and score is not None:
            found.append(Point(group, value, score))
    return sorted(found, key=lambda point: (point.cost, -point.score.mean))


def pareto_front(found: Sequence[Point]) -> list[Point]:
    """The points that no other one beats by a higher score for as little or by as high a score for less. Ties in both
    are on the front.

    Args:
        found: sorted as `points` does.
    """
    front: list[Point] = []
    for point in found:
        last = front[-1] if front else None
        ties = last is not None and (point.cost, point.score.mean) == (last.cost, last.score.mean)
        if last is None or ties or point.score.mean > last.score.mean:
            front.append(point)
    return front


def budget_table(table: ScoreTable) -> Table | None:
    """The highest mean score for every number of visual tokens at which it changes; None where there is nothing to
    choose from."""
    found = points(table, TOKENS)
    if len(found) < 2:
        return None
    rows = []
    for tokens, tied in groupby(pareto_front(found), key=lambda point: point.cost):
        best = list(tied)
        within = [point for point in found if point.cost <= tokens and point not in best]
        second = max(within, key=lambda point: point.score.mean, default=None)
        rows.append(
            [
                Field(f"at most {tokens:.0f} visual tokens"),
                Field("; ".join(point.group.name for point in best)),
                Field(format_number(best[0].score.mean)),
                Field(format_interval(best[0].score.interval)),
                Field(second.group.name if second else MISSING),
                Field(format_number(second.score.mean if second else None)),
            ]
        )
    columns = ["budget", "highest", "mean score", "95 % interval", "next", "its mean score"]
    caption = (
        "Mean score: over all benchmarks of the first table, in per cent of each one's highest. A row begins where "
        "more tokens bring a higher one, which may be by chance: compare the intervals."
    )
    return Table("Highest score within a budget", columns, rows, caption=caption)


def tokens_figures(table: ScoreTable, more: Sequence[SeedGroup] = ()) -> list[Figure]:
    """Score against visual tokens, a panel per benchmark (the paper's Figure 8); one figure per family of rows.

    Args:
        more: of other tables of the same part: the paper's own number of tokens is one of many.
    """
    groups = [*more, *table.groups]
    names = [*table.benchmarks, *(["mean"] if table.has_mean else [])]
    looks = styles(group.variant for group in groups)
    found = []
    for number, family in enumerate(dict.fromkeys(group.family for group in groups)):
        members = [group for group in groups if group.family == family and group.tokens is not None]
        members.sort(key=lambda group: group.tokens or 0)
        variants = list(dict.fromkeys(group.variant for group in members))
        if not any(len({group.tokens for group in members if group.variant == name}) > 1 for name in variants):
            continue
        caption = f"{family}: score against the number of visual tokens, with 95 % intervals."
        with settings():
            figure, axes = panels(len(names), width=3.1, height=2.3)
            for name, ax in zip(names, axes, strict=True):
                summaries = [(group, table.summary(group, name)) for group in members]
                known = [Point(group, float(group.tokens or 0), score) for group, score in summaries if score]
                known.sort(key=lambda point: (variants.index(point.group.variant), point.cost))
                caption = _draw(ax, known, looks, TOKENS, caption)
                _token_axis(ax, [float(group.tokens or 0) for group in members])
                label_axes(ax, name, TOKENS.label, "score (%)" if table.has_mean else "score")
            legend(figure, axes, looks)
            found.append(Figure(f"tokens{number or ''}", to_svg(figure), caption))
    return found


def cost_figure(table: ScoreTable, cost: Cost) -> Figure | None:
    """Mean score against a cost, a panel per family of rows; None unless the cost differs."""
    found = points(table, cost)
    if len({point.cost for point in found}) < 2:
        return None
    families = list(dict.fromkeys(group.family for group in table.groups))
    families = [family for family in families if any(point.group.family == family for point in found)]
    variants = list(dict.fromkeys(group.variant for group in table.groups))
    looks = {name: look | {"linestyle": "none", "markersize": 7} for name, look in styles(variants).items()}
    low = min(point.score.interval[0] for point in found)
    high = max(point.score.interval[1] for point in found)
    margin = 0.08 * (high - low)
    caption = f"Mean score over the benchmarks against {cost.label}, with 95 % intervals."
    caption += (
        " Times depend on what else the machine was doing."
        if cost.measured
        else " The grey line joins what nothing cheaper beats."
    )
    with settings():
        figure, axes = panels(len(families), width=5.0 if len(families) == 1 else 3.5)
        for family, ax in zip(families, axes, strict=True):
            own = [point for point in found if point.group.family == family]
            if not cost.measured:
                front = pareto_front(own)
                x, y = [point.cost for point in front], [point.score.mean for point in front]
                look: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 3, "solid_capstyle": "round"}
                ax.plot(x, y, color="#b0b0b0", zorder=1, **look)
            own.sort(key=lambda point: variants.index(point.group.variant))
            caption = _draw(ax, own, looks, cost, caption)
            if cost.log:
                _token_axis(ax, [point.cost for point in found])
            else:
                ax.set_xlim(0, 1.08 * max(point.cost for point in found))
            ax.set_ylim(low - margin, high + margin)
            label_axes(ax, family, cost.label, "mean score (%)")
        legend(figure, axes, looks)
        return Figure(f"score-against-{cost.label.split(' per ')[0].replace(' ', '-')}", to_svg(figure), caption)


def differences_figure(table: ScoreTable, differences: Sequence[Difference]) -> Figure | None:
    """The differences of pairs with their intervals, a panel per row and pair; None where none is available."""
    percentages = [name for name in table.benchmarks if table.maximum(name) == 100]
    shown = [pair for pair in differences if pair.value is not None and pair.benchmark in percentages]
    panel_pairs: dict[tuple[str, str, str], list[Difference]] = {}
    for pair in shown:
        panel_pairs.setdefault((pair.row, pair.first, pair.second), []).append(pair)
    names = [name for name in table.benchmarks if any(pair.benchmark == name for pair in shown)]
    if not panel_pairs:
        return None
    with settings():
        figure, axes = panels(len(panel_pairs), width=3.9, height=0.9 + 0.22 * len(names))
        for ((row, first, second), members), ax in zip(panel_pairs.items(), axes, strict=True):
            ax.axvline(0, color="#000000", linewidth=0.8)
            for pair in members:
                y = names.index(pair.benchmark)
                for bounds, aside, label, color, marker in (
                    (pair.interval, -0.15, "over items", "#0072B2", "o"),
                    (pair.over_seeds, 0.15, "over seeds", "#D55E00", "D"),
                ):
                    if bounds is not None:
                        ax.plot(bounds, (y + aside, y + aside), color=color, linewidth=1.6, solid_capstyle="butt")
                        ax.plot(
                            [pair.value or 0.0], [y + aside], color=color, marker=marker, linestyle="none", label=label
                        )
            label_axes(ax, row, f"{first} \u2212 {second} (points)", "")
            ax.yaxis.set_major_locator(FixedLocator(range(len(names))))
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
        legend(figure, axes)
        caption = "Differences with their 95 % intervals; right of zero the first of the pair is ahead."
        return Figure("differences", to_svg(figure), caption)


_SIDE_BY_SIDE = " Points with the same number of tokens are drawn side by side."


def _draw(ax: Axes, found: Sequence[Point], looks: dict[str, dict[str, Any]], cost: Cost, caption: str) -> str:
    """Draws points with their intervals, those of a variant joined; returns the caption, with a word on points that
    are not drawn where they are."""
    costs = [point.cost for point in found]
    places = side_by_side(costs) if cost.log else costs
    for variant, look in looks.items():
        own = [(x, point.score) for x, point in zip(places, found, strict=True) if point.group.variant == variant]
        if own:
            y = np.array([score.mean for _, score in own])
            low, high = np.array([score.interval for _, score in own]).T
            # A percentile interval need not contain the score.
            errors = np.clip([y - low, high - y], 0, None)
            ax.errorbar([x for x, _ in own], y, yerr=errors, label=variant, capsize=2.5, elinewidth=1, **look)
    moved = places != costs and not caption.endswith(_SIDE_BY_SIDE)
    return caption + _SIDE_BY_SIDE if moved else caption


def side_by_side(costs: Sequence[float]) -> list[float]:
    """Where to draw marks on a logarithmic axis: those of the same cost on both sides of it, so that none covers
    another; single ones where they are."""
    places = []
    for k, cost in enumerate(costs):
        before, number = costs[:k].count(cost), costs.count(cost)
        places.append(cost * 2 ** (0.09 * (before - (number - 1) / 2)))
    return places


def _token_axis(ax: Axes, tokens: Sequence[float]) -> None:
    ax.set_xscale("log", base=2)
    values = sorted(set(tokens))
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [f"{value:.0f}" for value in values])
    ax.set_xlim(values[0] / 1.6, values[-1] * 1.6)
