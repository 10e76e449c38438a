"""Which entry is best within a budget of visual tokens or of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_deco.report.grid import Grid
from prism_deco.report.layout import MISSING, Field, Table, interval, number
from prism_deco.report.study import Entry, Summary


@dataclass(frozen=True)
class Cost:
    """What a budget counts.

    Attributes:
        label: of an axis, with its unit.
        words: pattern of a budget in words.
        log: whether its natural scale is logarithmic.
    """

    label: str
    words: str
    read: Callable[[Entry], float | None]
    log: bool = False


COSTS = (
    Cost("visual tokens per image", "at most {:.0f} visual tokens", lambda entry: entry.tokens, log=True),
    Cost("time per training step (s)", "at most {:.3g} s per step", lambda entry: entry.step_seconds),
)


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
    """The points that no cheaper or equally cheap one beats.

    Args:
        found: sorted as `points` does.
    """
    chosen: list[Point] = []
    for point in found:
        if not chosen or point.score.mean > chosen[-1].score.mean:
            chosen.append(point)
    return chosen


def budget(grid: Grid) -> Table | None:
    """The best entry for every budget at which it changes; None where there is nothing to choose from."""
    rows, starts = [], set()
    for cost in COSTS:
        found = points(grid, cost)
        if len(found) < 2:
            continue
        starts.add(len(rows))
        for best in front(found):
            within = [p for p in found if p.cost <= best.cost and p is not best]
            second = max(within, key=lambda point: point.score.mean, default=None)
            rows.append(
                [
                    Field(cost.words.format(best.cost)),
                    Field(best.entry.name),
                    Field(number(best.score.mean), best=True),
                    Field(interval(best.score.interval)),
                    Field(second.entry.name if second else MISSING),
                    Field(number(second.score.mean if second else None)),
                ]
            )
    if not rows:
        return None
    columns = ["budget", "best cell", "mean score", "95 % interval", "next best", "its mean score"]
    caption = (
        "Mean score: over all benchmarks of the first table, in per cent of each one's highest. A row begins where "
        "more budget brings a better cell. Step times are those of the machine that trained, busy or not."
    )
    return Table("Best cell within a budget", columns, rows, heads=2, caption=caption, starts=frozenset(starts))
