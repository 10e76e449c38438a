"""Differences between the projectors of a row, question by question."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from prism_deco.errors import UsageError
from prism_deco.evaluation import build_benchmark
from prism_deco.evaluation.metrics.bootstrap import Combine, combine_strata
from prism_deco.report.baselines import main_predictions
from prism_deco.report.cells import Entry, Score
from prism_deco.report.stats import average, holm, mcnemar, paired_difference, seed_interval, subtract

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
        """Whether there is a difference, and no interval of it includes zero."""
        bounds = [bounds for bounds in (self.interval, self.over_seeds) if bounds is not None]
        return bool(bounds) and not any(low <= 0 <= high for low, high in bounds)


@dataclass(frozen=True)
class _Units:
    """What an interval resamples, in the order of the question ids."""

    strata: Mapping[str, Sequence[float]]
    combine: Combine
    data_hash: str


def differences(entries: Sequence[Entry], benchmarks: Sequence[str], split: str) -> list[Difference]:
    """All pairs of projectors within each row, the pairs of the base projector first."""
    found = []
    for row in dict.fromkeys(entry.row for entry in entries):
        members = [entry for entry in entries if entry.row == row]
        members.sort(key=lambda entry: entry.projector != BASE)
        units = {name: {entry.variant: _read_units(entry, name, split) for entry in members} for name in benchmarks}
        for first, second in combinations([entry.variant for entry in members], 2):
            found += [_compare(row, name, first, second, units[name]) for name in benchmarks]
    tested = [number for number, difference in enumerate(found) if difference.p is not None]
    adjusted = dict(zip(tested, holm([found[k].p or 0.0 for k in tested]), strict=True))
    return [
        Difference(**{**vars(difference), "adjusted": adjusted.get(number)}) for number, difference in enumerate(found)
    ]


def leads(first: Entry, second: Entry, benchmarks: Sequence[str], split: str, found: Sequence[Difference]) -> bool:
    """Whether the mean over benchmarks, all in per cent, is clearly higher for `first` than for `second`: by the
    differences seed by seed, or with one seed by the intervals of the benchmarks' differences, taken for independent.

    Args:
        found: the differences of the row.
    """
    means = [entry.means(benchmarks, split) for entry in (first, second)]
    gains = [value - means[1][seed] for seed, value in means[0].items() if seed in means[1]]
    if len(gains) > 1:
        return seed_interval(gains)[0] > 0
    own = [pair for pair in found if {pair.first, pair.second} == {first.variant, second.variant}]
    halves = [(pair.interval[1] - pair.interval[0]) / 2 for pair in own if pair.interval is not None]
    return bool(gains) and len(halves) == len(benchmarks) and gains[0] > math.hypot(*halves) / len(halves)


def _compare(
    row: str, benchmark: str, first: str, second: str, units: Mapping[str, Mapping[str, _Units] | str]
) -> Difference:
    pair = Difference(row, benchmark, first, second)
    one, other = units[first], units[second]
    if isinstance(one, str) or isinstance(other, str):
        return _without(pair, one if isinstance(one, str) else str(other))
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return _without(pair, "no seed that both have")
    if len({units.data_hash for seed in seeds for units in (one[seed], other[seed])}) > 1:
        return _without(pair, "the questions differ")
    by_seed = [subtract(one[seed].strata, other[seed].strata) for seed in seeds]
    combine = one[seeds[0]].combine
    mean = average(by_seed)
    value, interval = paired_difference(mean, combine)
    values = [combine_strata(strata, combine) for strata in by_seed]
    return Difference(
        row,
        benchmark,
        first,
        second,
        value=value,
        interval=interval,
        over_seeds=seed_interval(values) if len(values) > 1 else None,
        seeds=len(seeds),
        p=mcnemar(mean),
    )


def _without(pair: Difference, note: str) -> Difference:
    return Difference(pair.row, pair.benchmark, pair.first, pair.second, note=note)


def _read_units(entry: Entry, benchmark: str, split: str) -> dict[str, _Units] | str:
    """By seed; or why there are none."""
    scores = entry.scores(benchmark, split)
    if not scores:
        return f"{entry.variant}: {entry.missing}"
    try:
        return {seed: _units(score) for seed, score in scores.items()}
    except UsageError as error:
        log.warning("%s, %s: the predictions cannot be compared: %s", entry.name, benchmark, error)
        return f"{entry.variant}: {error}"


def _units(score: Score) -> _Units:
    benchmark = build_benchmark(score.choice)
    predictions = main_predictions(benchmark, score.folder / "predictions.jsonl")
    strata = benchmark.strata(sorted(predictions, key=lambda prediction: prediction.question_id))
    if abs(combine_strata(strata, benchmark.combine) - score.value) > _ROUNDING:
        raise UsageError(f"{score.folder}: the predictions do not give the score of metrics.json; score them again.")
    return _Units(dict(sorted(strata.items())), benchmark.combine, str(score.content["data_hash"]))
