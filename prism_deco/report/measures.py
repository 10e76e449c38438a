"""What claims are about: means of benchmarks, and numbers of the relevance maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report import paper
from prism_deco.report.study import Cell

_BOXES = frozenset({"refcoco", "refcocoplus", "refcocog"})


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

    def words(self, benchmarks: Sequence[str]) -> str:
        """What it is called, given the benchmarks of the study."""
        count = len(self._own(benchmarks))
        return f"{count} {self.name}{'s' if count != 1 else ''}"

    def read(self, cell: Cell, benchmarks: Sequence[str], split: str) -> float | None:
        """None where the cell was not scored on all of them."""
        scores, own = cell.scores.get(split, {}), self._own(benchmarks)
        complete = bool(own) and all(name in scores for name in own)
        return _finite(fmean(scores[name].percent for name in own)) if complete else None

    def asked(self, cell: Cell, benchmarks: Sequence[str], split: str) -> Any:
        """What identifies the questions of a cell that was read; numbers of different questions do not compare."""
        contents = [cell.scores[split][name].content for name in self._own(benchmarks)]
        return [(content["data_hash"], content["prompt_hash"]) for content in contents]

    def paper(self, first: str, second: str) -> float | None:
        """The difference of two projectors in the paper's Table 1, over the columns that Table 3 has as well; they are
        those of the miniature. None where the table lacks one of the two."""
        printed = {line.projector: line.scores for line in paper.lines(1) if not line.cited}
        if first not in printed or second not in printed:
            return None
        return fmean(printed[first][name] - printed[second][name] for name in self._own(paper.COLUMNS[3]))

    def _own(self, benchmarks: Sequence[str]) -> list[str]:
        return [n for n in benchmarks if self.boxes is None or (n.removeprefix("mini_") in _BOXES) == self.boxes]


@dataclass(frozen=True)
class Relevance:
    """A mean over the examples that `explain` measured, in hundredths.

    Attributes:
        key: in its `metrics.json`.
    """

    name: str
    key: str
    unit: str = "hundredths"

    def words(self, benchmarks: Sequence[str]) -> str:
        return self.name

    def read(self, cell: Cell, benchmarks: Sequence[str], split: str) -> float | None:
        values = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {}).get(self.key)
        return _finite(100 * float(values["mean"])) if values else None

    def asked(self, cell: Cell, benchmarks: Sequence[str], split: str) -> Any:
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
