"""The runs that a report is about, and groups of runs that differ only in their seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from omegaconf import DictConfig

from prism_deco.report.stats import seed_interval
from prism_deco.training.progress import THROUGH

PROJECTORS = ("linear", "avgpool", "maxpool", "qformer", "c_abstractor", "d_abstractor")
"""Their order in tables and figures; other projectors follow by name."""

MAXIMA = {"mme": 2000.0}
"""Maximum score by benchmark family, where it is not 100 (MME: ten tasks of 200 points)."""

_NOT_IN_ROW = ("part", "row", "backbone", "llm", "projector", "seed", "recipe.blind")
"""Labels that are not part of a row's name: each part has its own table, and an image-blind run is a baseline for all
rows."""

# Names of curves, in metrics.jsonl and TensorBoard.
TRAIN_LOSS = "train/loss"
VAL_LOSS = "val/loss"
SPEED = "train/samples_per_s"

Curve = list[tuple[int, float]]
"""(optimizer step, value)"""


@dataclass(frozen=True)
class Score:
    """The content of a `metrics.json`.

    Attributes:
        value: of the primary metric, in the paper's unit.
        interval: 95 %, over items.
        folder: where the predictions are.
        choice: the benchmark's shipped name, or its YAML file.
    """

    value: float
    interval: tuple[float, float]
    content: Mapping[str, Any]
    folder: Path
    choice: str
    family: str

    @property
    def variant(self) -> str:
        """The variant of the primary metric; empty in results of versions that did not record it."""
        return str((self.content.get("variants") or [""])[0])

    @property
    def maximum(self) -> float:
        return MAXIMA.get(self.family, 100.0)

    @property
    def percent(self) -> float:
        """The score in per cent of its maximum."""
        return 100 * self.value / self.maximum


@dataclass(frozen=True)
class RunCell:
    """One run of a study, in any state.

    Attributes:
        labels: what tables group by: row (or backbone and llm), projector, seed, and further axes.
        control: whether its sweep lists its projector as a control, which a useful compressor must beat.
        compressor: the training-free compressor that reduced the trained model's visual tokens; empty if none did.
        asked: the choices of its benchmarks, by name.
        manifest: empty until the training has finished.
        scores: by split ("" is the benchmarks' own) and benchmark.
        relevance: the content of the `metrics.json` of `explain`; empty if there is none.
        first_token_seconds: from an image and a question to the first token of the answer; None if not measured.
        curves: by the names of metrics.jsonl and TensorBoard, such as `train/loss`.
    """

    id: str
    folder: Path
    labels: Mapping[str, str]
    state: str
    reason: str = ""
    log_tail: str = ""
    attempts: int | None = None
    started: float | None = None
    seconds: float | None = None
    config: DictConfig | None = None
    control: bool = False
    compressor: str = ""
    asked: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    relevance: Mapping[str, Any] = field(default_factory=dict)
    first_token_seconds: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def projector(self) -> str:
        return self.labels.get("projector", "?")

    @property
    def seed(self) -> str:
        return self.labels.get("seed", "?")

    @property
    def part(self) -> str:
        """Its part of the sweep; empty if the sweep has no parts."""
        return self.labels.get("part", "")

    @property
    def blind(self) -> bool:
        """Whether it was trained without its images, as a baseline for the others."""
        labelled = self.labels.get("recipe.blind", "").lower() == "true"  # the configuration may be unreadable
        return labelled or (self.config is not None and bool(self.config.recipe.blind))

    @property
    def variant(self) -> str:
        """The projector, with its settings that are axes of the sweep."""
        # The number of visual tokens belongs to the row: projectors are compared at equal numbers.
        own = [f"{key}={value}" for key, value in self.labels.items() if key.startswith("projector.")]
        return ", ".join([self.projector, *(text for text in own if not text.startswith("projector.num_tokens="))])

    @property
    def row(self) -> str:
        """The group of table lines within which projectors are compared."""
        return self._row(skip="")

    @property
    def family(self) -> str:
        """The row without its number of visual tokens."""
        return self._row(skip="num_tokens")

    def _row(self, skip: str) -> str:
        models = [self.labels[key] for key in ("backbone", "llm") if key in self.labels]
        base = self.labels.get("row") or " + ".join(models)
        parts = [base] if base else []
        # `skip` is the last part of a key, so that `num_tokens` covers recipe and projector; "" skips nothing.
        for key, value in self.labels.items():
            of_projector = key.startswith("projector.") and key != "projector.num_tokens"
            if key not in _NOT_IN_ROW and not of_projector and key.rpartition(".")[2] != skip:
                parts.append(f"{key.removeprefix('recipe.')}={value}")
        return ", ".join(parts) or "all"

    @property
    def tokens(self) -> int | None:
        """Visual tokens per image that the LLM reads; None until the training has finished."""
        return self.manifest["tokens"]["visual_out"] if self.manifest else None

    @property
    def compressed(self) -> bool:
        """Whether the LLM reads fewer visual tokens than there are patches."""
        # Assumed while there is no manifest that says otherwise.
        tokens = self.manifest.get("tokens")
        return tokens is None or tokens["visual_out"] < tokens["visual_in"]

    @property
    def step_seconds(self) -> float | None:
        """Median time of an optimizer step without validation; None if it was not logged."""
        rates = [rate for _, rate in self.curves.get(SPEED, []) if math.isfinite(rate) and rate > 0]
        # The curve holds records per second, and a step takes one global batch.
        records = self.config.recipe.global_batch_size if self.config is not None else None
        return records / median(rates) if rates and records else None

    @property
    def training_seconds(self) -> float | None:
        """Time of all optimizer steps, without validation; None if it was not logged."""
        return self.step_seconds * self.manifest["steps"] if self.step_seconds and self.manifest else None


@dataclass(frozen=True)
class Summary:
    """A score over seeds.

    Attributes:
        mean: over seeds.
        deviation: standard deviation over seeds; None with one seed.
        interval: 95 %, over seeds if there are several, else over items.
        seeds: number of seeds that have a score.
    """

    mean: float
    deviation: float | None
    interval: tuple[float, float]
    seeds: int


@dataclass(frozen=True)
class SeedGroup:
    """The runs that differ only in their seed: one line of a table.

    Attributes:
        cells: none for a line of the paper that was not run.
    """

    row: str
    variant: str
    cells: tuple[RunCell, ...]

    @property
    def projector(self) -> str:
        return self.cells[0].projector

    @property
    def control(self) -> bool:
        return bool(self.cells) and self.cells[0].control

    @property
    def family(self) -> str:
        return self.cells[0].family

    @property
    def name(self) -> str:
        return f"{self.row}: {self.variant}"

    @property
    def tokens(self) -> int | None:
        return next((cell.tokens for cell in self.cells if cell.tokens is not None), None)

    @property
    def training_minutes(self) -> float | None:
        """Median over seeds, as below: whatever else slowed a machine down is no cost of the projector."""
        known = [cell.training_seconds for cell in self.cells if cell.training_seconds is not None]
        return median(known) / 60 if known else None

    @property
    def first_token_ms(self) -> float | None:
        known = [cell.first_token_seconds for cell in self.cells if cell.first_token_seconds is not None]
        return 1000 * median(known) if known else None

    def scores(self, benchmark: str, split: str) -> dict[str, Score]:
        """By seed."""
        found = {cell.seed: cell.scores.get(split, {}).get(benchmark) for cell in self.cells}
        return {seed: score for seed, score in found.items() if score is not None}

    def asked_as(self, benchmark: str, split: str) -> str:
        """The variant of the primary metric (see `Score.variant`)."""
        return "/".join(dict.fromkeys(score.variant for score in self.scores(benchmark, split).values()))

    def summary(self, benchmark: str, split: str) -> Summary | None:
        """The score over seeds; None if no seed has one."""
        scores = list(self.scores(benchmark, split).values())
        if not scores:
            return None
        # `_summary` uses the interval over items only if there is a single seed: the first score's will do.
        values = [score.value for score in scores]
        return _summary(values, scores[0].interval, scores[0].maximum)

    def means(self, benchmarks: Sequence[str], split: str) -> dict[str, float]:
        """The mean over benchmarks, each in per cent of its maximum, by seed; without seeds that lack a score."""
        found = {}
        for cell in self.cells:
            scores = cell.scores.get(split, {})
            if benchmarks and all(name in scores for name in benchmarks):
                found[cell.seed] = fmean(scores[name].percent for name in benchmarks)
        return found

    def overall(self, benchmarks: Sequence[str], split: str) -> Summary | None:
        """The mean over benchmarks, each in per cent of its maximum; None unless a seed has a score on all of them.

        With one seed the interval assumes that the benchmarks are independent.
        """
        means = self.means(benchmarks, split)
        if not means:
            return None
        values = list(means.values())
        # As above, only the interval of the first seed with all scores is needed.
        complete = [cell.scores[split] for cell in self.cells if cell.scores.get(split, {}).keys() >= set(benchmarks)]
        own = [complete[0][name] for name in benchmarks]
        # The half-widths of independent intervals add in quadrature.
        halves = [100 / score.maximum * (score.interval[1] - score.interval[0]) / 2 for score in own]
        half = math.hypot(*halves) / len(halves)
        return _summary(values, (values[0] - half, values[0] + half), 100.0)

    @property
    def missing(self) -> str:
        """The text shown in place of a missing score."""
        states = dict.fromkeys(cell.state for cell in self.cells)
        return "/".join("not scored" if state in THROUGH else state for state in states) or "not run"


def _summary(values: Sequence[float], interval: tuple[float, float], maximum: float) -> Summary:
    low, high = interval if len(values) == 1 else seed_interval(values)
    # Both intervals may leave the range of scores: clip them, but not below or above the scores themselves, since those
    # of a user's own benchmark may exceed the maximum.
    bounds = max(low, min(0.0, *values)), min(high, max(maximum, *values))
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, bounds, len(values))


def projector_rank(name: str) -> tuple[int, str]:
    """Sorting key of projectors."""
    return (PROJECTORS.index(name) if name in PROJECTORS else len(PROJECTORS), name)


def seed_groups(cells: Iterable[RunCell]) -> list[SeedGroup]:
    """Groups the cells that are not image-blind: rows by first appearance, projectors in the order of `PROJECTORS`."""
    groups: dict[tuple[str, str], list[RunCell]] = {}
    order: dict[str, int] = {}
    for cell in cells:
        if not cell.blind:
            order.setdefault(cell.row, len(order))
            groups.setdefault((cell.row, cell.variant), []).append(cell)
    made = [SeedGroup(row, variant, tuple(members)) for (row, variant), members in groups.items()]
    return in_order(made, list(order))


def in_order(groups: Iterable[SeedGroup], rows: Sequence[str]) -> list[SeedGroup]:
    """Sorts groups by row, then by projector."""
    # `projector_rank` is a pair: known projectors by place, then others by name.
    return sorted(groups, key=lambda group: (rows.index(group.row), *projector_rank(group.projector), group.variant))
