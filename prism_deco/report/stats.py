"""Statistics of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from prism_deco.errors import UsageError

Strata = Mapping[str, Sequence[float]]
"""Scores of the units (questions, or images) by stratum."""

_ROUNDING = 1e-9
"""Largest rounding error of a mean over seeds."""


class Wins(NamedTuple):
    """Counts of pairwise comparisons."""

    ahead: int
    behind: int
    tied: int
    missing: int


def count_wins(first: Mapping[Any, float | None], second: Mapping[Any, float | None]) -> Wins:
    """Compares scores as printed, to one decimal: scores that look equal are a tie.

    Args:
        first, second: scores by (row, benchmark); absent or None in either counts as missing.
    """
    signs = []
    places = dict.fromkeys([*first, *second])
    for place in places:
        one = first.get(place)
        other = second.get(place)
        if one is not None and other is not None:
            difference = round(one, 1) - round(other, 1)
            # The sign of the difference: 1, 0 or -1.
            signs.append((difference > 0) - (difference < 0))
    return Wins(signs.count(1), signs.count(-1), signs.count(0), len(places) - len(signs))


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of at least two independent values, by Student's t."""
    mean = fmean(values)
    error = float(stats.sem(values))
    if error == 0:  # scipy returns nan
        return mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return float(low), float(high)


def subtract(first: Strata, second: Strata) -> dict[str, list[float]]:
    """Differences unit by unit; `UsageError` if the two do not have the same units."""
    if {name: len(values) for name, values in first.items()} != {name: len(values) for name, values in second.items()}:
        raise UsageError("The two do not hold the same questions.")
    return {
        name: (np.asarray(values) - np.asarray(second[name], dtype=np.float64)).tolist()
        for name, values in first.items()
    }


def average(several: Sequence[Strata]) -> dict[str, list[float]]:
    """Mean over seeds, unit by unit."""
    # By stratum: [seeds, units] -> [units].
    return {name: np.mean([strata[name] for strata in several], axis=0).tolist() for name in several[0]}


def mcnemar(differences: Strata) -> float:
    """The p-value of the exact two-sided McNemar test over the units on which two models differ.

    With partial scores it is the sign test, which only counts who is ahead on each unit.
    """
    values = [value for stratum in differences.values() for value in stratum]
    ahead = sum(value > _ROUNDING for value in values)
    behind = sum(value < -_ROUNDING for value in values)
    # Under the null hypothesis, each unit that differs is as likely ahead as behind: a binomial test of one half.
    return float(stats.binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted by Holm's method (1979), which controls the family-wise error rate; None is not a test."""
    tests = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    # From the smallest p on: the k-th of m tests is multiplied by m - k + 1, and is never below the one before it.
    for rank, (p, number) in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - rank) * p))
        adjusted[number] = highest
    return adjusted
