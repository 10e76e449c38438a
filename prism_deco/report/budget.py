"""Which entry is best within a budget of visual tokens, and what scores cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from prism_deco.report.cells import Entry, Summary
from prism_deco.report.grid import Grid
from prism_deco.report.tabular import MISSING, Field, Table, interval, number


@dataclass(frozen=True)
class Cost:
    """What a score may be drawn against.

    Attributes:
        label: of an axis, with its unit.
        log: whether its natural scale is logarithmic.
        measured: whether it depends on what else the machine was doing; nothing is best by such a cost.
    """

    label: str
    read: Callable[[Entry], float | None]
    log: bool = False
    measured: bool = False


TOKENS = Cost("visual tokens per image", lambda entry: entry.tokens, log=True)
COSTS = (TOKENS, Cost("time per training step (s)", lambda entry: entry.step_seconds, measured=True))


@dataclass(frozen=True)
class Point:
    """An entry with its mean score over all benchmarks and what it costs."""

    entry: Entry
    cost: float
    score: Summary


def points(grid: Grid, cost: Cost) -> list[Point]:
    """Entries whose cost is known and that have all benchmarks, cheapest first."""
    found = []
    for entry in grid.entries:
        value, score = cost.read(entry), entry.overall(grid.benchmarks, grid.split)
        if value is not None and score is not None:
            found.append(Point(entry, value, score))
    return sorted(found, key=lambda point: (point.cost, -point.score.mean))


def front(found: Sequence[Point]) -> list[Point]:
    """The Pareto front: the points that no other one beats by a higher score for as little or by as high a score for
    less. Ties in both are on it.

    Args:
        found: sorted as `points` does.
    """
    chosen: list[Point] = []
    for point in found:
        last = chosen[-1] if chosen else None
        ties = last is not None and (point.cost, point.score.mean) == (last.cost, last.score.mean)
        if last is None or ties or point.score.mean > last.score.mean:
            chosen.append(point)
    return chosen


def budget(grid: Grid) -> Table | None:
    """The highest mean score for every number of visual tokens at which it changes; None where there is nothing to
    choose from."""
    found, rows = points(grid, TOKENS), []
    if len(found) < 2:
        return None
    for tokens, tied in groupby(front(found), key=lambda point: point.cost):
        best = list(tied)
        within = [point for point in found if point.cost <= tokens and point not in best]
        second = max(within, key=lambda point: point.score.mean, default=None)
        rows.append(
            [
                Field(f"at most {tokens:.0f} visual tokens"),
                Field("; ".join(point.entry.name for point in best)),
                Field(number(best[0].score.mean)),
                Field(interval(best[0].score.interval)),
                Field(second.entry.name if second else MISSING),
                Field(number(second.score.mean if second else None)),
            ]
        )
    columns = ["budget", "highest", "mean score", "95 % interval", "next", "its mean score"]
    caption = (
        "Mean score: over all benchmarks of the first table, in per cent of each one's highest. A row begins where "
        "more tokens bring a higher one, be it by chance: whether two cells differ is a question for their intervals."
    )
    return Table("Highest score within a budget", columns, rows, heads=2, caption=caption)
