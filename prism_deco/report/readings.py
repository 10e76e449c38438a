"""Second numbers of scores, beside the primary metrics: which of them a paper printed is not always certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from prism_deco.report.grid import Grid, Line
from prism_deco.report.tabular import MISSING, Field, Table, number

SECOND: Mapping[str, str] = {
    "f1": "f1: mean over POPE's subsets, yes is the positive answer.",
    "accuracy_pad_corrected": (
        "accuracy pad corrected: boxes are taken for those of the image padded to a square, as in LLaVA's training "
        "data, and brought back before they are compared."
    ),
}
"""Metrics that stand beside the primary one, and what they are."""

_ANOTHER = "With a slash: the same questions asked another way, a variant of the benchmark."


def records(grid: Grid) -> list[dict[str, Any]]:
    """A record per line, benchmark and metric, for CSV: means over the seeds that have the metric.

    A metric is one of `SECOND`, or it or the primary one for another way to ask (`generate/f1`, `plain/accuracy`).
    Its name is that of `metrics.json`, its unit the benchmark's.
    """
    found = []
    for line in grid.lines:
        for name in grid.benchmarks:
            summary = line.summary(name, grid.split)
            for metric, values in _values(line, name, grid.split).items():
                found.append(
                    {
                        "part": grid.part or None,
                        "table": grid.table,
                        "row": line.row,
                        "projector": line.variant,
                        "benchmark": name,
                        "split": grid.split or None,
                        "metric": metric,
                        "score": fmean(values),
                        "deviation": stdev(values) if len(values) > 1 else None,
                        "seeds": len(values),
                        "planned_seeds": len(line.entry.cells) if line.entry else 0,
                        "primary_metric": _primary(line, name, grid.split),
                        "primary": summary.mean if summary else None,
                        "paper": line.paper.get(name),
                    }
                )
    return found


def table(grid: Grid) -> Table | None:
    """The records, a column per metric; None where there is none."""
    by_line: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for record in records(grid):
        place = (record["benchmark"], record["metric"])
        by_line.setdefault((record["row"], record["projector"]), {})[place] = record
    places = list(dict.fromkeys(place for own in by_line.values() for place in own))
    places.sort(key=lambda place: grid.benchmarks.index(place[0]))
    if not places:
        return None
    rows, starts, last = [], set(), None
    for line in grid.lines:
        own = by_line.get((line.row, line.variant))
        if own is None:
            continue
        if line.row != last:
            starts.add(len(rows))
        fields = [_field(own.get(place), line, place[0], grid.split) for place in places]
        rows.append([Field(line.row if line.row != last else ""), Field(line.variant), *fields])
        last = line.row
    columns = ["row", "projector", *(f"{name}: {metric.replace('_', ' ')}" for name, metric in places)]
    return Table("Other readings", columns, rows, heads=2, caption=_caption(grid, places), starts=frozenset(starts))


def _values(line: Line, benchmark: str, split: str) -> dict[str, list[float]]:
    """Values over the seeds by metric, in the order of `metrics.json`."""
    found: dict[str, list[float]] = {}
    for score in line.entry.scores(benchmark, split).values() if line.entry else ():
        primary = score.content["primary"]
        for name, value in score.content["metrics"].items():
            # `way to ask/metric`; the parts of a metric are `metric/part`.
            if name != primary and name.rpartition("/")[2] in (primary, *SECOND):
                found.setdefault(name, []).append(float(value))
    return found


def _primary(line: Line, benchmark: str, split: str) -> str | None:
    scores = line.entry.scores(benchmark, split).values() if line.entry else ()
    return next((str(score.content["primary"]) for score in scores), None)


def _field(record: Mapping[str, Any] | None, line: Line, benchmark: str, split: str) -> Field:
    if record is None:
        scored = line.summary(benchmark, split) is not None
        return Field(MISSING if scored else line.missing, muted=True)
    spread = f" ±{number(record['deviation'])}" if record["deviation"] is not None else ""
    beside = [f"{record['primary_metric']} {number(record['primary'])}"]
    if record["paper"] is not None:
        beside.append(f"paper {number(record['paper'])}")
    if record["seeds"] < record["planned_seeds"]:
        beside.append(f"{record['seeds']} of {record['planned_seeds']} seeds")
    return Field(f"{number(record['score'])}{spread}", tuple(beside))


def _caption(grid: Grid, places: Sequence[tuple[str, str]]) -> str:
    metrics = [metric for _, metric in places]
    parts = ["Means over seeds; below each the primary metric, of the table above."]
    if grid.table:
        parts.append("The paper does not say which of them its number is.")
    parts += [words for name, words in SECOND.items() if any(m.rpartition("/")[2] == name for m in metrics)]
    return " ".join([*parts, _ANOTHER] if any("/" in metric for metric in metrics) else parts)
