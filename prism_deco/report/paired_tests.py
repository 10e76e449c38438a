"""Paired differences between the projectors of a row, over questions and seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

from prism_deco.bootstrap import Combine, bootstrap_interval, combine_strata
from prism_deco.errors import UsageError
from prism_deco.evaluation import load_predictions
from prism_deco.report.baselines import benchmark_of, is_of_harness, main_predictions
from prism_deco.report.cells import Score, SeedGroup
from prism_deco.report.stats import average, holm, mcnemar, seed_interval, subtract

log = logging.getLogger(__name__)

BASE = "avgpool"
"""The projector that the others are compared with first: the one that the paper proposes."""

MEAN = "mean"
"""Stands for the mean over all benchmarks, in place of a benchmark's name."""

_ALL_PAIRS = 12
"""Rows with more projectors compare each with the base projector only: all pairs would be hundreds."""

_ROUNDING = 1e-6
"""Tolerance between a score in metrics.json and the one computed from the predictions."""


@dataclass(frozen=True)
class Difference:
    """`first` minus `second` on one benchmark.

    Attributes:
        variant: of the benchmark, in which the questions were asked.
        value: in the benchmark's unit, mean over the seeds that both have; None if not available.
        interval: 95 %, paired bootstrap over the questions.
        over_seeds: 95 % interval over seeds, seed by seed; None with one seed.
        p, adjusted: exact McNemar test, and adjusted for the number of tests of the table.
        note: why there is no value.
    """

    row: str
    benchmark: str
    first: str
    second: str
    variant: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    over_seeds: tuple[float, float] | None = None
    seeds: int = 0
    p: float | None = None
    adjusted: float | None = None
    note: str = ""

    @property
    def is_clear(self) -> bool:
        """Whether all intervals of the difference exclude zero."""
        bounds = [bounds for bounds in (self.interval, self.over_seeds) if bounds is not None]
        return bool(bounds) and not any(low <= 0 <= high for low, high in bounds)


@dataclass(frozen=True)
class _Units:
    """The units that the bootstrap resamples, in the order of the question ids."""

    strata: Mapping[str, Sequence[float]]
    combine: Combine
    data_hash: str
    variant: str


def paired_differences(
    groups: Sequence[SeedGroup], benchmarks: Sequence[str], split: str, mean: bool = False
) -> list[Difference]:
    """All pairs of projectors within each row, those of the base projector first; in long rows only these.

    Args:
        mean: also compare the means over benchmarks, without a test.
    """
    found = []
    for row in dict.fromkeys(group.row for group in groups):
        members = [group for group in groups if group.row == row]
        # The sort is stable: the base projector comes first, the others keep their order.
        members.sort(key=lambda group: group.projector != BASE)
        # By benchmark and variant: the predictions are read once, not once per pair.
        units = {name: {group.variant: _read_units(group, name, split) for group in members} for name in benchmarks}
        pairs = list(combinations(members, 2))
        if len(members) > _ALL_PAIRS and members[0].projector == BASE:
            # `combinations` starts with all pairs of the first member.
            pairs = pairs[: len(members) - 1]
        for first, second in pairs:
            pair = Difference(row, MEAN, first.variant, second.variant)
            own = [_compare(replace(pair, benchmark=name), units[name]) for name in benchmarks]
            found += [*own, *([_mean_difference(pair, first, second, split, own)] if mean else [])]
    # Means have no p-value, so they are not counted as tests.
    adjusted = holm([difference.p for difference in found])
    return [replace(difference, adjusted=p) for difference, p in zip(found, adjusted, strict=True)]


def _mean_difference(
    pair: Difference, first: SeedGroup, second: SeedGroup, split: str, own: Sequence[Difference]
) -> Difference:
    """The difference of the means over benchmarks, whose intervals over items are taken as independent.

    Args:
        own: the differences on each benchmark.
    """
    names = [difference.benchmark for difference in own]
    ours = first.means(names, split)
    theirs = second.means(names, split)
    gains = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    # In the benchmarks' units: means are asked for only where all of them are percentages (`ScoreTable.has_mean`).
    halves = [(one.interval[1] - one.interval[0]) / 2 for one in own if one.interval is not None]
    if not gains or len(halves) < len(own):
        return replace(pair, note="not all benchmarks are available")
    # Of a mean of n independent values: half-widths add in quadrature, divided by n.
    half = math.hypot(*halves) / len(halves)
    value = fmean(gains)
    over_seeds = seed_interval(gains) if len(gains) > 1 else None
    return replace(pair, value=value, interval=(value - half, value + half), over_seeds=over_seeds, seeds=len(gains))


def _compare(pair: Difference, units: Mapping[str, Mapping[str, _Units] | str]) -> Difference:
    first = units[pair.first]
    second = units[pair.second]
    if isinstance(first, str):
        return replace(pair, note=first)
    if isinstance(second, str):
        return replace(pair, note=second)
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return replace(pair, note="no seed that both have")
    if len({own[seed].data_hash for own in (first, second) for seed in seeds}) > 1:
        return replace(pair, note="the questions differ")
    by_seed = [subtract(first[seed].strata, second[seed].strata) for seed in seeds]
    combine = first[seeds[0]].combine
    # All primary metrics are means or sums of the means of strata. They are linear in the units, so the difference of
    # two scores is the score of the units' differences, and resampling these keeps the pairs together.
    mean = average(by_seed)
    values = [combine_strata(strata, combine) for strata in by_seed]
    return replace(
        pair,
        variant=first[seeds[0]].variant,
        value=combine_strata(mean, combine),
        interval=bootstrap_interval(mean, combine),
        over_seeds=seed_interval(values) if len(values) > 1 else None,
        seeds=len(seeds),
        p=mcnemar(mean),
    )


def _read_units(group: SeedGroup, benchmark: str, split: str) -> dict[str, _Units] | str:
    """The units by seed, or why there are none."""
    scores = group.scores(benchmark, split)
    if not scores:
        return f"{group.variant}: {group.missing}"
    try:
        return {seed: _units(score) for seed, score in scores.items()}
    except UsageError as error:
        log.warning("%s, %s: the predictions cannot be compared: %s", group.name, benchmark, error)
        return f"{group.variant}: {error}"


def _units(score: Score) -> _Units:
    path = score.folder / "predictions.jsonl"
    combine: Combine = "mean"
    if is_of_harness(score):
        strata = {"all": [100 * prediction.score for prediction in load_predictions(path)]}
    else:
        benchmark = benchmark_of(score)
        predictions = main_predictions(benchmark, path)
        # Sorted, so that equal places in two runs hold the same question: `subtract` compares place by place.
        strata = benchmark.strata(sorted(predictions, key=lambda prediction: prediction.question_id))
        combine = benchmark.combine
    if abs(combine_strata(strata, combine) - score.value) > _ROUNDING:
        raise UsageError(f"{score.folder}: the predictions do not give the score of metrics.json; score them again.")
    return _Units(dict(sorted(strata.items())), combine, str(score.content["data_hash"]), score.variant)


def difference_records(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """A record per pair and benchmark, for CSV."""
    records = [asdict(difference) for difference in differences if difference.benchmark != MEAN]
    for record in records:
        for name in ("interval", "over_seeds"):
            low, high = record.pop(name) or (None, None)
            record |= {f"{name}_low95": low, f"{name}_high95": high}
    return records
