"""Statistics of comparisons: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

from prism_deco.errors import UsageError
from prism_deco.evaluation.metrics.bootstrap import Combine, bootstrap_interval, combine_strata

Strata = Mapping[str, Sequence[float]]

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Wins:
    """In how many places one is ahead of another."""

    ahead: int
    behind: int
    tied: int
    missing: int

    @property
    def total(self) -> int:
        return self.ahead + self.behind + self.tied


def count_wins(first: Mapping[Hashable, float | None], second: Mapping[Hashable, float | None]) -> Wins:
    """Compares scores place by place as they are printed, with one decimal: what looks equal is a tie.

    Args:
        first, second: scores by place (row and benchmark); a place that either lacks, or has None for, is missing.
    """
    signs = []
    places = dict.fromkeys([*first, *second])
    for place in places:
        one, other = first.get(place), second.get(place)
        if one is not None and other is not None:
            difference = round(one, 1) - round(other, 1)
            signs.append((difference > 0) - (difference < 0))
    return Wins(signs.count(1), signs.count(-1), signs.count(0), len(places) - len(signs))


def relative_gain(first: Sequence[float], second: Sequence[float]) -> float:
    """Mean over columns of the gain of `first` over `second`, in per cent of `second`."""
    return fmean(100 * (one - other) / other for one, other in zip(first, second, strict=True))


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two independent values, by Student's t."""
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    Above 10 degrees of freedom by expansion around the normal (Abramowitz and Stegun, 26.7.5), good to 1e-4.
    """
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z, n = NormalDist().inv_cdf(0.975), degrees
    terms = (
        (z**3 + z) / 4 / n,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / n**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / n**3,
    )
    return z + sum(terms)


def t_test(values: Sequence[float], null: float = 0.0) -> float:
    """Two-sided p-value of Student's t for the mean of at least two independent values.

    It is below 0.05 exactly where `seed_interval` leaves `null` out.

    Args:
        null: the mean to test against.
    """
    distance, deviation = fmean(values) - null, stdev(values)
    if deviation == 0:
        return 1.0 if distance == 0 else 0.0
    degrees = len(values) - 1
    angle = math.atan(abs(distance) / deviation * math.sqrt(len(values) / degrees))
    # The probability within +-t, a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1 - within))


def subtract(first: Strata, second: Strata) -> dict[str, list[float]]:
    """Differences unit by unit.

    Raises:
        UsageError: the strata are not those of the same units.
    """
    if {name: len(values) for name, values in first.items()} != {name: len(values) for name, values in second.items()}:
        raise UsageError("The two do not hold the same questions.")
    return {
        name: (np.asarray(values) - np.asarray(second[name], dtype=np.float64)).tolist()
        for name, values in first.items()
    }


def average(several: Sequence[Strata]) -> dict[str, list[float]]:
    """Mean over seeds, unit by unit."""
    return {name: np.mean([strata[name] for strata in several], axis=0).tolist() for name in several[0]}


def paired_difference(differences: Strata, combine: Combine) -> tuple[float, tuple[float, float]]:
    """The difference of two scores and its 95 % paired bootstrap interval.

    The primaries of all benchmarks are means or sums of their strata's means, so the difference of two of them
    is the same combination of the units' differences, and resampling these keeps the pairs together.

    Args:
        differences: of the units, by stratum (see `subtract`).
    """
    return combine_strata(differences, combine), bootstrap_interval(differences, combine)


def mcnemar(differences: Strata) -> float:
    """Exact two-sided McNemar test: the p-value of as uneven a split of the units on which two models differ.

    Where units have scores between right and wrong it is the sign test, which asks only who is ahead on each.
    """
    values = [value for stratum in differences.values() for value in stratum]
    ahead = sum(value > 1e-9 for value in values)  # means over seeds carry rounding errors
    behind = sum(value < -1e-9 for value in values)
    n, k = ahead + behind, min(ahead, behind)
    if ahead == behind:
        return 1.0
    # P(X <= k) for X ~ Binomial(n, 1/2), by logarithms: n may be tens of thousands.
    logs = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): below 0.05, one false alarm in twenty such families."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
