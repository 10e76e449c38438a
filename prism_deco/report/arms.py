"""What a contrast compares: the outcome of runs, and the two arms whose runs have it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from prism_deco.errors import UsageError
from prism_deco.explain.gae import DEFAULT_METHOD
from prism_deco.report import paper
from prism_deco.report.benchmarks import family_of
from prism_deco.report.cells import RunCell
from prism_deco.report.stats import seed_interval
from prism_deco.training.status import THROUGH

Reader = Callable[[RunCell], float | None]


@dataclass(frozen=True)
class BenchmarkMean:
    """The mean of benchmarks, each in per cent of its highest score.

    Its methods take the families of a study's benchmarks, by name.

    Attributes:
        boxes: only benchmarks that ask for boxes, or only those that do not; None takes all.
        unit: outcomes of one unit share an axis.
    """

    name: str
    boxes: bool | None = None
    unit: str = "points"

    def benchmarks(self, families: Mapping[str, str]) -> list[str]:
        return [name for name, family in families.items() if self.boxes in (None, family == "refcoco")]

    def label(self, families: Mapping[str, str]) -> str:
        count = len(self.benchmarks(families))
        return f"{count} {self.name}{'s' if count != 1 else ''}"

    def read(self, cell: RunCell, families: Mapping[str, str], split: str) -> float | None:
        """None where the cell was not scored on all of them."""
        scores, own = cell.scores.get(split, {}), self.benchmarks(families)
        complete = own and all(name in scores for name in own)
        return fmean(scores[name].percent for name in own) if complete else None

    def questions(self, cell: RunCell, families: Mapping[str, str], split: str) -> Any:
        """Identifies what a cell was asked; outcomes of different questions do not compare."""
        contents = [cell.scores[split][name].content for name in self.benchmarks(families)]
        return [(content["data_hash"], content["prompt_hash"]) for content in contents]

    def paper_difference(self, first: str, second: str) -> float | None:
        """Of two projectors in the paper's Table 1, over the columns that Table 3 has as well: those of the miniature.
        None where the table does not have both."""
        printed = {row.projector: row.scores for row in paper.rows(1) if not row.cited}
        if first not in printed or second not in printed:
            return None
        names = self.benchmarks({name: family_of(name) for name in paper.COLUMNS[3]})
        return fmean(printed[first][name] - printed[second][name] for name in names)


@dataclass(frozen=True)
class MeanRelevance:
    """A mean over the examples that `explain` measured by R-GAE, in hundredths.

    Attributes:
        key: in its `metrics.json`.
    """

    name: str
    key: str
    unit: str = "hundredths"

    def label(self, families: Mapping[str, str]) -> str:
        return self.name

    def read(self, cell: RunCell, families: Mapping[str, str], split: str) -> float | None:
        values = cell.relevance.get("methods", {}).get(DEFAULT_METHOD, {}).get(self.key)
        return 100 * float(values["mean"]) if values else None

    def questions(self, cell: RunCell, families: Mapping[str, str], split: str) -> Any:
        return [cell.relevance.get(key) for key in ("benchmark", "split", "n")]

    def paper_difference(self, first: str, second: str) -> None:
        return None


OUTCOMES: Mapping[str, BenchmarkMean | MeanRelevance] = {
    "mean": BenchmarkMean("benchmark"),
    "boxes": BenchmarkMean("box benchmark", boxes=True),
    "questions": BenchmarkMean("question benchmark", boxes=False),
    "energy_in_box": MeanRelevance("relevance in the box", "energy_in_box"),
    "pointing": MeanRelevance("pointing game", "pointing"),
    "query_redundancy": MeanRelevance("redundancy of query maps", "query_redundancy"),
    "query_spread": MeanRelevance("spread of query maps", "query_spread"),
}
"""By their names in a claim's `measures`."""


@dataclass(frozen=True)
class Arm:
    """One side of a contrast: cells that differ in their seed alone.

    Attributes:
        labels: by which they were chosen.
        cells: by seed.
        values: the outcome by seed, where there is one.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, RunCell] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    def name(self, other: Arm) -> str:
        """The projector, with its visual tokens where the other arm has another number of them."""
        # A part may be of one projector, which its labels need not repeat.
        projectors = [self.labels.get("projector", ""), *(cell.projector for cell in self.cells.values()), "?"]
        name = "blind" if _is_blind(self.labels) else next(filter(None, projectors))
        asked = next((value for key, value in self.labels.items() if key.endswith(".num_tokens")), None)
        tokens = self.tokens or asked
        return f"{name} ({tokens})" if tokens and (asked or self.tokens != other.tokens) else name

    @property
    def tokens(self) -> int | None:
        return next((cell.tokens for cell in self.cells.values() if cell.tokens), None)

    @property
    def mean(self) -> float | None:
        return fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None unless there are two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    def missing(self, planned: Sequence[str]) -> dict[str, list[str]]:
        """The planned seeds that have no value, by the reason."""
        reasons: dict[str, list[str]] = {}
        for seed in planned:
            if seed not in self.values:
                state = self.cells[seed].state if seed in self.cells else "not planned"
                reasons.setdefault("not measured" if state in THROUGH else state, []).append(seed)
        return reasons

    def is_above(self, baseline: Arm) -> bool | None:
        """Whether it is clearly above another one, seed by seed; None with fewer than two common seeds."""
        gains = [value - baseline.values[seed] for seed, value in self.values.items() if seed in baseline.values]
        return seed_interval(gains)[0] > 0 if len(gains) > 1 else None


def choose_arm(cells: Iterable[RunCell], labels: Mapping[str, str], read: Reader, claim: str) -> Arm:
    """The cells that have these labels; those trained blind only where the labels say so.

    Raises:
        UsageError: several cells of one seed have them.
    """
    wanted = {key: value for key, value in labels.items() if key != "recipe.blind"}
    found: dict[str, RunCell] = {}
    for cell in cells:
        if cell.blind == _is_blind(labels) and wanted.items() <= dict(cell.labels).items():
            if cell.seed in found:
                raise UsageError(
                    f"The claim {claim!r} means either {found[cell.seed].id} or {cell.id}: both have the labels "
                    f"{label_text(labels)}. Add a label that tells them apart."
                )
            found[cell.seed] = cell
    return Arm(labels, found, read_values(found.values(), read))


def read_values(cells: Iterable[RunCell], read: Reader) -> dict[str, float]:
    """By seed, where there is a finite value."""
    values = {cell.seed: read(cell) for cell in cells}
    return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


def label_text(labels: Mapping[str, str]) -> str:
    """Labels as on a command line."""
    return " ".join(f"{key}={value}" for key, value in labels.items())


def _is_blind(labels: Mapping[str, str]) -> bool:
    return labels.get("recipe.blind", "").lower() == "true"
