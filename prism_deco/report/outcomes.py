"""What is measured of a run, and compared by claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report import paper
from prism_deco.report.benchmarks import family_of
from prism_deco.report.cells import RunCell


@dataclass(frozen=True)
class Outcome:
    """The mean of benchmarks, each in per cent of its highest score, or a mean of R-GAE's relevance maps in hundredths.

    Its methods take the families of a study's benchmarks, by name.

    Attributes:
        boxes: only benchmarks that ask for boxes, or only those that do not; None takes all.
        relevance: key in the `metrics.json` of `explain`; empty for benchmarks.
    """

    boxes: bool | None = None
    relevance: str = ""

    @property
    def unit(self) -> str:
        return "hundredths" if self.relevance else "points"

    def benchmarks(self, families: Mapping[str, str]) -> list[str]:
        return [name for name, family in families.items() if self.boxes in (None, family == "refcoco")]

    def read(self, cell: RunCell, families: Mapping[str, str], split: str) -> float | None:
        """None where the cell was not measured, or not scored on all of the benchmarks."""
        if self.relevance:
            values = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {}).get(self.relevance)
            return 100 * float(values["mean"]) if values else None
        scores = cell.scores.get(split, {})
        own = self.benchmarks(families)
        complete = own and all(name in scores for name in own)
        return fmean(scores[name].percent for name in own) if complete else None

    def questions(self, cell: RunCell, families: Mapping[str, str], split: str) -> Any:
        """Identifies what a cell was asked; outcomes of different questions do not compare."""
        if self.relevance:
            return [cell.relevance.get(key) for key in ("benchmark", "split", "n")]
        contents = [cell.scores[split][name].content for name in self.benchmarks(families)]
        return [(content["data_hash"], content["prompt_hash"]) for content in contents]

    def paper_difference(self, first: str, second: str) -> float | None:
        """Of two projectors in the paper's Table 1, over the columns that Table 3 has as well: those of the miniature.
        None where the table does not have both."""
        printed = {row.projector: row.scores for row in paper.rows(1) if not row.cited}
        if self.relevance or first not in printed or second not in printed:
            return None
        names = self.benchmarks({name: family_of(name) for name in paper.COLUMNS[3]})
        return fmean(printed[first][name] - printed[second][name] for name in names)


OUTCOMES: Mapping[str, Outcome] = {
    "mean": Outcome(),
    "boxes": Outcome(boxes=True),
    "questions": Outcome(boxes=False),
    "energy_in_box": Outcome(relevance="energy_in_box"),
    "pointing": Outcome(relevance="pointing"),
    "query_redundancy": Outcome(relevance="query_redundancy"),
    "query_spread": Outcome(relevance="query_spread"),
}
"""By their names in a claim's `measures`."""
