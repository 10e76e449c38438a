"""Bootstrap confidence intervals, for benchmarks, relevance maps and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np

Combine = Literal["mean", "sum"]


def combine_strata(strata: Mapping[str, Sequence[float]], combine: Combine) -> float:
    """The mean or the sum of the means of all strata."""
    means = [fmean(values) for values in strata.values()]
    return fmean(means) if combine == "mean" else sum(means)


def bootstrap_interval(
    strata: Mapping[str, Sequence[float]], combine: Combine, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of `combine_strata`, resampling units within their stratum.

    Args:
        strata: values of the units (items, or pairs that are scored together) by stratum.
    """
    rng = np.random.default_rng(seed)
    means = np.empty((len(strata), resamples))
    for row, values in zip(means, strata.values(), strict=True):
        array = np.asarray(values, dtype=np.float64)
        for k in range(resamples):  # one at a time: 1,000 resamples of 200,000 units would not fit in memory
            row[k] = array[rng.integers(len(array), size=len(array))].mean()
    totals = means.mean(axis=0) if combine == "mean" else means.sum(axis=0)
    low, high = np.percentile(totals, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """`mean`, `interval95` ([low, high]) and `n` of a sample with one number per independent example."""
    low, high = bootstrap_interval({"all": values}, "mean", seed=seed, resamples=2000)
    return {"mean": float(np.mean(values)), "interval95": [low, high], "n": len(values)}
