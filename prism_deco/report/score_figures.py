"""What scores cost in visual tokens: figures, and the best within a budget; and figures of the differences of pairs."""

from __future__ import annotations

from collections.abc import Sequence
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

TOKENS = "visual tokens per image"

_SIDE_BY_SIDE = "Marks with the same number of tokens stand side by side."


@dataclass(frozen=True)
class Point:
    """A line of a table with a score and the visual tokens that it costs."""

    group: SeedGroup
    tokens: int
    score: Summary


def points(table: ScoreTable) -> list[Point]:
    """Mean scores of the lines whose tokens are known and that have all benchmarks, fewest tokens first."""
    found = []
    for group in table.groups:
        score = group.overall(table.benchmarks, table.split)
        if group.tokens is not None and score is not None:
            found.append(Point(group, group.tokens, score))
    return sorted(found, key=lambda point: (point.tokens, -point.score.mean))


def pareto_front(found: Sequence[Point]) -> list[Point]:
    """The points that no other one beats by a higher score for as little or by as high a score for less. Ties in both
    are on the front.

    Args:
        found: sorted as `points` does.
    """
    front: list[Point] = []
    for point in found:
        last = front[-1] if front else None
        ties = last is not None and (point.tokens, point.score.mean) == (last.tokens, last.score.mean)
        if last is None or ties or point.score.mean > last.score.mean:
            front.append(point)
    return front


def budget_table(table: ScoreTable) -> Table | None:
    """The highest mean score for every number of visual tokens at which it changes; None where there is nothing to
    choose from."""
    found = points(table)
    if len(found) < 2:
        return None
    rows = []
    for tokens, tied in groupby(pareto_front(found), key=lambda point: point.tokens):
        best = list(tied)
        within = [point for point in found if point.tokens <= tokens and point not in best]
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
        numbers: dict[str, set[int | None]] = {}
        for group in members:
            numbers.setdefault(group.variant, set()).add(group.tokens)
        if not any(len(tokens) > 1 for tokens in numbers.values()):
            continue
        with settings():
            figure, axes = panels(len(names), width=3.1, height=2.3)
            for name, ax in zip(names, axes, strict=True):
                summaries = [(group, table.summary(group, name)) for group in members]
                _draw(ax, [Point(group, group.tokens or 0, score) for group, score in summaries if score], looks)
                _token_axis(ax, [group.tokens or 0 for group in members])
                label_axes(ax, name, TOKENS, "score (%)" if table.has_mean else "score")
            legend(figure, axes, looks)
            caption = f"{family}: score against the number of visual tokens, with 95 % intervals. {_SIDE_BY_SIDE}"
            found.append(Figure(f"tokens{number or ''}", to_svg(figure), caption))
    return found


def mean_figure(table: ScoreTable) -> Figure | None:
    """Mean score against visual tokens, a panel per family of rows; None unless their number differs."""
    found = points(table)
    if len({point.tokens for point in found}) < 2:
        return None
    families = list(dict.fromkeys(point.group.family for point in found))
    variants = [group.variant for group in table.groups]
    looks = {name: look | {"linestyle": "none", "markersize": 7} for name, look in styles(variants).items()}
    front_look: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 3, "solid_capstyle": "round", "zorder": 1}
    with settings():
        figure, axes = panels(len(families), width=5.0 if len(families) == 1 else 3.5, sharey=True)
        for family, ax in zip(families, axes, strict=True):
            own = [point for point in found if point.group.family == family]
            front = pareto_front(own)
            x = [point.tokens for point in front]
            ax.plot(x, [point.score.mean for point in front], color="#b0b0b0", **front_look)
            _draw(ax, own, looks)
            _token_axis(ax, [point.tokens for point in found])
            label_axes(ax, family, TOKENS, "mean score (%)")
        legend(figure, axes, looks)
        caption = (
            f"Mean score over the benchmarks against {TOKENS}, with 95 % intervals. The grey line joins what nothing "
            f"cheaper beats. {_SIDE_BY_SIDE}"
        )
        return Figure("score-against-visual-tokens", to_svg(figure), caption)


def differences_figure(table: ScoreTable, differences: Sequence[Difference]) -> Figure | None:
    """The differences of pairs with their intervals, a panel per row and pair; None where none is available."""
    percentages = [name for name in table.benchmarks if table.maximum(name) == 100]
    panel_pairs: dict[tuple[str, str, str], list[Difference]] = {}
    for pair in differences:
        if pair.value is not None and pair.benchmark in percentages:
            panel_pairs.setdefault((pair.row, pair.first, pair.second), []).append(pair)
    if not panel_pairs:
        return None
    shown = {pair.benchmark for members in panel_pairs.values() for pair in members}
    names = [name for name in percentages if name in shown]
    with settings():
        figure, axes = panels(len(panel_pairs), width=3.9, height=0.9 + 0.22 * len(names))
        for ((row, first, second), members), ax in zip(panel_pairs.items(), axes, strict=True):
            ax.axvline(0, color="#000000", linewidth=0.8)
            for pair in members:
                y = names.index(pair.benchmark)
                _interval(ax, pair.value, pair.interval, y - 0.15, "over items", "#0072B2", "o")
                _interval(ax, pair.value, pair.over_seeds, y + 0.15, "over seeds", "#D55E00", "D")
            label_axes(ax, row, f"{first} \u2212 {second} (points)", "")
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
        legend(figure, axes)
        caption = "Differences with their 95 % intervals; right of zero the first of the pair is ahead."
        return Figure("differences", to_svg(figure), caption)


def _interval(
    ax: Axes, value: float | None, bounds: tuple[float, float] | None, y: float, label: str, color: str, marker: str
) -> None:
    if bounds is not None:
        ax.plot(bounds, (y, y), color=color, linewidth=1.6, solid_capstyle="butt")
        ax.plot([value or 0.0], [y], color=color, marker=marker, linestyle="none", label=label)


def _draw(ax: Axes, found: Sequence[Point], looks: dict[str, dict[str, Any]]) -> None:
    """Draws points with their intervals, those of a variant joined."""
    order = list(looks)
    found = sorted(found, key=lambda point: (order.index(point.group.variant), point.tokens))
    places = side_by_side([point.tokens for point in found])
    for variant, look in looks.items():
        own = [(x, point.score) for x, point in zip(places, found, strict=True) if point.group.variant == variant]
        if own:
            y = np.array([score.mean for _, score in own])
            low, high = np.array([score.interval for _, score in own]).T
            # A percentile interval need not contain the score.
            errors = np.clip([y - low, high - y], 0, None)
            ax.errorbar([x for x, _ in own], y, yerr=errors, label=variant, capsize=2.5, elinewidth=1, **look)


def side_by_side(tokens: Sequence[int]) -> list[float]:
    """Where to draw marks on a logarithmic axis: those of the same number of tokens on both sides of it, so that none
    covers another; single ones where they are."""
    places = []
    for k, number in enumerate(tokens):
        before, same = tokens[:k].count(number), tokens.count(number)
        places.append(number * 2 ** (0.09 * (before - (same - 1) / 2)))
    return places


def _token_axis(ax: Axes, tokens: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    values = sorted(set(tokens))
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [str(value) for value in values])
    ax.set_xlim(values[0] / 1.6, values[-1] * 1.6)
