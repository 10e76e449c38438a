import math

import numpy as np
import pytest

from prism_deco.bootstrap import bootstrap_interval, combine_strata


@pytest.mark.parametrize(
    ("strata", "mean", "total"),
    [
        ({"a": [100, 0]}, 50, 50),
        ({"a": [100, 0], "b": [100]}, 75, 150),  # strata count the same, whatever their size
        ({"a": [0], "b": [30], "c": [90]}, 40, 120),
    ],
)
def test_strata_are_combined(strata, mean, total):
    assert combine_strata(strata, "mean") == pytest.approx(mean)
    assert combine_strata(strata, "sum") == pytest.approx(total)


def test_interval_of_a_share_is_the_binomial_one():
    n, p = 2000, 0.3
    values = [100.0] * int(n * p) + [0.0] * int(n * (1 - p))
    low, high = bootstrap_interval({"all": values}, "mean")
    error = 100 * math.sqrt(p * (1 - p) / n)
    assert (low, high) == pytest.approx((30 - 1.96 * error, 30 + 1.96 * error), abs=0.2)


def test_interval_of_a_sum_adds_the_variances_of_its_strata():
    rng = np.random.default_rng(1)
    strata = {name: list(rng.normal(50, spread, size=400)) for name, spread in (("a", 3.0), ("b", 4.0))}
    low, high = bootstrap_interval(strata, "sum")
    error = math.sqrt(sum(np.var(values) / 400 for values in strata.values()))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low < combine_strata(strata, "sum") < high


def test_same_seed_same_interval_and_constant_values_have_none():
    values = {"all": list(np.random.default_rng(0).random(50))}
    assert bootstrap_interval(values, "mean", seed=3) == bootstrap_interval(values, "mean", seed=3)
    assert bootstrap_interval(values, "mean", seed=3) != bootstrap_interval(values, "mean", seed=4)
    assert bootstrap_interval({"all": [40.0] * 9}, "mean") == (40.0, 40.0)
