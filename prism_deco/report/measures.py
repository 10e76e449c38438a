"""What claims are about: means of benchmarks, and numbers of the relevance maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report import paper
from prism_deco.report.benchmarks import family_of
from prism_deco.report.cells import Cell


@dataclass(frozen=True)
class Scores:
    """The mean of benchmarks, each in per cent of its highest score.

    Attributes:
        boxes: only those that ask for boxes, or only those that do not; None takes all.
    """

    name: str
    boxes: bool | None = None
    unit: str = "points"
    """Measures of one unit share an axis."""

    def words(self, families: Mapping[str, str]) -> str:
        """What it is called, given the benchmarks of the study with their families."""
        count = len(self._own(families))
        return f"{count} {self.name}{'s' if count != 1 else ''}"

    def read(self, cell: Cell, families: Mapping[str, str], split: str) -> float | None:
        """None where the cell was not scored on all of them."""
        scores, own = cell.scores.get(split, {}), self._own(families)
        complete = bool(own) and all(name in scores for name in own)
        return _finite(fmean(scores[name].percent for name in own)) if complete else None

    def asked(self, cell: Cell, families: Mapping[str, str], split: str) -> Any:
        """What identifies the questions of a cell that was read; numbers of different questions do not compare."""
        contents = [cell.scores[split][name].content for name in self._own(families)]
        return [(content["data_hash"], content["prompt_hash"]) for content in contents]

    def paper(self, first: str, second: str) -> float | None:
        """The difference of two projectors in the paper's Table 1, over the columns that Table 3 has as well; they are
        those of the miniature. None where the table lacks one of the two."""
        printed = {line.projector: line.scores for line in paper.lines(1) if not line.cited}
        if first not in printed or second not in printed:
            return None
        columns = {name: family_of(name) for name in paper.COLUMNS[3]}
        return fmean(printed[first][name] - printed[second][name] for name in self._own(columns))

    def _own(self, families: Mapping[str, str]) -> list[str]:
        return [name for name, family in families.items() if self.boxes in (None, family == "refcoco")]


@dataclass(frozen=True)
class Relevance:
    """A mean over the examples that `explain` measured, in hundredths.

    Attributes:
        key: in its `metrics.json`.
    """

    name: str
    key: str
    unit: str = "hundredths"

    def words(self, families: Mapping[str, str]) -> str:
        return self.name

    def read(self, cell: Cell, families: Mapping[str, str], split: str) -> float | None:
        values = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {}).get(self.key)
        return _finite(100 * float(values["mean"])) if values else None

    def asked(self, cell: Cell, families: Mapping[str, str], split: str) -> Any:
        return [cell.relevance.get(key) for key in ("benchmark", "split", "n")]


MEASURES: Mapping[str, Scores | Relevance] = {
    "mean": Scores("benchmark"),
    "boxes": Scores("box benchmark", boxes=True),
    "questions": Scores("question benchmark", boxes=False),
    "energy_in_box": Relevance("relevance in the box", "energy_in_box"),
    "pointing": Relevance("pointing game", "pointing"),
    "query_redundancy": Relevance("redundancy of query maps", "query_redundancy"),
    "query_spread": Relevance("spread of query maps", "query_spread"),
}
"""By their names in a claim. Those of relevance are of R-GAE's maps (see `prism_deco.explain`)."""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
