"""Secondary metrics of benchmarks: which metric a paper printed is not always certain."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from prism_deco.report.grid import ScoreRow, ScoreTable, place

SECONDARY: Mapping[str, str] = {
    "f1": "f1: mean over POPE's subsets, yes is the positive answer.",
    "accuracy_pad_corrected": (
        "accuracy pad corrected: boxes are taken to be those of the image padded to a square, as in LLaVA's training "
        "data, and mapped back before they are compared."
    ),
}
"""Metrics that are shown below the primary one, and what they are."""


def secondary_records(table: ScoreTable) -> list[dict[str, Any]]:
    """A record per line, benchmark and metric, for CSV: means over the seeds that have the metric."""
    found = []
    for row in table.rows:
        for name in table.benchmarks:
            summary = row.summary(name, table.split)
            scores = list(row.group.scores(name, table.split).values()) if row.group else []
            for metric, values in secondary_values(row, name, table.split).items():
                found.append(
                    place(table, row, name)
                    | {
                        "metric": metric,
                        "score": fmean(values),
                        "deviation": stdev(values) if len(values) > 1 else None,
                        "seeds": len(values),
                        "planned_seeds": row.planned,
                        "primary_metric": str(scores[-1].content["primary"]),
                        "primary": summary.mean if summary else None,
                        "paper": row.paper.get(name),
                    }
                )
    return found


def secondary_values(row: ScoreRow, benchmark: str, split: str) -> dict[str, list[float]]:
    """Values over the seeds by metric, in the order of `metrics.json`.

    A metric is one of `SECONDARY`, or it or the primary one of another variant (`generate/f1`, `plain/accuracy`).
    Its name is that of `metrics.json`, its unit the benchmark's.
    """
    found: dict[str, list[float]] = {}
    for score in row.group.scores(benchmark, split).values() if row.group else ():
        primary = score.content["primary"]
        for name, value in score.content["metrics"].items():
            # `variant/metric`; the parts of a metric are `metric/part`.
            if name != primary and name.rpartition("/")[2] in (primary, *SECONDARY):
                found.setdefault(name, []).append(float(value))
    return found
