"""Means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """The mean of a sample and its 95 % interval by the percentile bootstrap.

    Args:
        values: one or more numbers, one per independent example.
        seed: of the bootstrap.

    Returns:
        mean, interval95 [low, high], n.
    """
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(sample), (resamples, len(sample)))
    low, high = np.percentile(sample[drawn].mean(axis=1), [2.5, 97.5])
    return {"mean": float(sample.mean()), "interval95": [float(low), float(high)], "n": len(sample)}
