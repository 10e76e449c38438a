"""Confidence intervals by resampling, for benchmarks, relevance maps and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np

Combine = Literal["mean", "sum"]


def combine_strata(strata: Mapping[str, Sequence[float]], combine: Combine) -> float:
    """The mean, or the sum, of the strata's means."""
    means = [fmean(values) for values in strata.values()]
    return fmean(means) if combine == "mean" else sum(means)


def bootstrap_interval(
    strata: Mapping[str, Sequence[float]], combine: Combine, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of `combine_strata`, units resampled within their stratum.

    Args:
        strata: values of the resampled units (items, or pairs that are scored together) by stratum.
    """
    rng = np.random.default_rng(seed)
    means = np.empty((len(strata), resamples))
    for row, values in zip(means, strata.values(), strict=True):
        array = np.asarray(values, dtype=np.float64)
        for k in range(resamples):  # one resample at a time: 200,000 units by 1,000 would not fit in memory
            row[k] = array[rng.integers(len(array), size=len(array))].mean()
    totals = means.mean(axis=0) if combine == "mean" else means.sum(axis=0)
    low, high = np.percentile(totals, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """The mean of a sample, one number per independent example, with its 95 % interval.

    Returns:
        mean, interval95 [low, high], n.
    """
    low, high = bootstrap_interval({"all": values}, "mean", seed=seed, resamples=2000)
    return {"mean": float(np.mean(values)), "interval95": [low, high], "n": len(values)}
