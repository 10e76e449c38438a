"""Differences between the projectors of a row, question by question."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from prism_deco.bootstrap import Combine, bootstrap_interval, combine_strata
from prism_deco.errors import UsageError
from prism_deco.evaluation import build_benchmark
from prism_deco.report.baselines import main_predictions
from prism_deco.report.cells import Score, SeedGroup
from prism_deco.report.stats import average, holm, mcnemar, seed_interval, subtract

log = logging.getLogger(__name__)

BASE = "avgpool"
"""The projector that the others are compared with first: the one the paper proposes."""

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Difference:
    """`first` minus `second` on one benchmark.

    Attributes:
        value: in the benchmark's unit, mean over the seeds that both have; None where it is not available.
        interval: 95 %, paired bootstrap over the questions.
        over_seeds: 95 % interval over seeds, seed by seed; None with one seed.
        p, adjusted: exact McNemar test, and adjusted for the number of tests of the report.
        note: why there is no value.
    """

    row: str
    benchmark: str
    first: str
    second: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    over_seeds: tuple[float, float] | None = None
    seeds: int = 0
    p: float | None = None
    adjusted: float | None = None
    note: str = ""

    @property
    def is_clear(self) -> bool:
        """Whether no interval of the difference includes zero."""
        bounds = [bounds for bounds in (self.interval, self.over_seeds) if bounds is not None]
        return bool(bounds) and not any(low <= 0 <= high for low, high in bounds)


@dataclass(frozen=True)
class _Units:
    """What an interval resamples, in the order of the question ids."""

    strata: Mapping[str, Sequence[float]]
    combine: Combine
    data_hash: str


def paired_differences(groups: Sequence[SeedGroup], benchmarks: Sequence[str], split: str) -> list[Difference]:
    """All pairs of projectors within each row, the pairs of the base projector first."""
    found = []
    for row in dict.fromkeys(group.row for group in groups):
        members = [group for group in groups if group.row == row]
        members.sort(key=lambda group: group.projector != BASE)
        units = {name: {group.variant: _read_units(group, name, split) for group in members} for name in benchmarks}
        for first, second in combinations([group.variant for group in members], 2):
            found += [_compare(Difference(row, name, first, second), units[name]) for name in benchmarks]
    adjusted = holm([difference.p for difference in found])
    return [replace(difference, adjusted=p) for difference, p in zip(found, adjusted, strict=True)]


def leads(
    first: SeedGroup, second: SeedGroup, benchmarks: Sequence[str], split: str, differences: Sequence[Difference]
) -> bool:
    """Whether the mean over benchmarks, all in per cent, is clearly higher for `first` than for `second`: by the
    differences seed by seed, or with one seed by the intervals of the benchmarks' differences, assumed independent.

    Args:
        differences: between the two.
    """
    ours, theirs = first.means(benchmarks, split), second.means(benchmarks, split)
    gains = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if len(gains) > 1:
        return seed_interval(gains)[0] > 0
    halves = [(pair.interval[1] - pair.interval[0]) / 2 for pair in differences if pair.interval is not None]
    return bool(gains) and len(halves) == len(benchmarks) and gains[0] > math.hypot(*halves) / len(halves)


def _compare(pair: Difference, units: Mapping[str, Mapping[str, _Units] | str]) -> Difference:
    first, second = units[pair.first], units[pair.second]
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
    # The primaries of all benchmarks are means or sums of their strata's means, so the difference of two of them is
    # the same combination of the units' differences, and resampling these keeps the pairs together.
    mean = average(by_seed)
    values = [combine_strata(strata, combine) for strata in by_seed]
    return replace(
        pair,
        value=combine_strata(mean, combine),
        interval=bootstrap_interval(mean, combine),
        over_seeds=seed_interval(values) if len(values) > 1 else None,
        seeds=len(seeds),
        p=mcnemar(mean),
    )


def _read_units(group: SeedGroup, benchmark: str, split: str) -> dict[str, _Units] | str:
    """By seed; or why there are none."""
    scores = group.scores(benchmark, split)
    if not scores:
        return f"{group.variant}: {group.missing}"
    try:
        return {seed: _units(score) for seed, score in scores.items()}
    except UsageError as error:
        log.warning("%s, %s: the predictions cannot be compared: %s", group.name, benchmark, error)
        return f"{group.variant}: {error}"


def _units(score: Score) -> _Units:
    benchmark = build_benchmark(score.choice)
    predictions = main_predictions(benchmark, score.folder / "predictions.jsonl")
    strata = benchmark.strata(sorted(predictions, key=lambda prediction: prediction.question_id))
    if abs(combine_strata(strata, benchmark.combine) - score.value) > _ROUNDING:
        raise UsageError(f"{score.folder}: the predictions do not give the score of metrics.json; score them again.")
    return _Units(dict(sorted(strata.items())), benchmark.combine, str(score.content["data_hash"]))


def difference_records(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """A record per pair and benchmark, for CSV."""
    found = []
    for difference in differences:
        record = asdict(difference)
        for name in ("interval", "over_seeds"):
            low, high = record.pop(name) or (None, None)
            record |= {f"{name}_low95": low, f"{name}_high95": high}
        found.append(record)
    return found
