"""The statistics against hand-made sums, enumeration and published quantiles."""

import math
from itertools import product

import numpy as np
import pytest

from prism_deco.report.stats import (
    Wins,
    average,
    count_wins,
    holm,
    mcnemar,
    paired_difference,
    seed_interval,
    subtract,
    t_quantile,
)


def _differences(ahead, behind, same=0):
    return {"all": [100.0] * ahead + [-100.0] * behind + [0.0] * same}


def test_mcnemar_is_the_binomial_sum():
    assert mcnemar(_differences(8, 2, same=90)) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(_differences(2, 8)) == mcnemar(_differences(8, 2))
    assert mcnemar(_differences(0, 0, same=5)) == 1 and mcnemar(_differences(4, 4)) == 1
    assert mcnemar(_differences(0, 6)) == pytest.approx(2 / 64)


@pytest.mark.parametrize(("ahead", "behind"), [(7, 4), (9, 2), (6, 5)])
def test_mcnemar_agrees_with_trying_every_outcome(ahead, behind):
    n = ahead + behind
    as_uneven = [
        sum(flips) <= min(ahead, behind) or sum(flips) >= max(ahead, behind) for flips in product((0, 1), repeat=n)
    ]
    assert mcnemar(_differences(ahead, behind)) == pytest.approx(sum(as_uneven) / 2**n)


def test_mcnemar_of_many_units_is_near_the_normal_approximation():
    z = (5150 - 4850 - 1) / math.sqrt(10_000)
    assert mcnemar(_differences(5150, 4850)) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(_differences(30_000, 20_000)) < 1e-300


def test_mcnemar_counts_partial_scores_by_who_is_ahead_and_ignores_rounding():
    assert mcnemar({"all": [30.0, 60.0, 100.0, -10.0, 1e-13, 0.0]}) == pytest.approx(2 * (1 + 4) / 2**4)


def test_the_paired_interval_is_near_the_normal_one():
    rng = np.random.default_rng(3)
    values = rng.choice([-100.0, 0.0, 100.0], p=[0.1, 0.7, 0.2], size=800)
    value, (low, high) = paired_difference({"all": values.tolist()}, "mean")
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_pairing_narrows_the_interval_where_two_models_err_on_the_same_items():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 500) * 100.0
    second = np.where(rng.random(500) < 0.1, 100 - first, first)
    _, (low, high) = paired_difference(subtract({"all": first.tolist()}, {"all": second.tolist()}), "mean")
    unpaired = 2 * 1.96 * math.sqrt(first.var() / 500 + second.var() / 500)
    assert high - low < 0.6 * unpaired


def test_strata_are_combined_as_the_primary_is():
    first, second = {"a": [100.0, 0.0], "b": [100.0] * 4}, {"a": [0.0, 0.0], "b": [100.0, 100.0, 0.0, 0.0]}
    differences = subtract(first, second)
    assert paired_difference(differences, "mean")[0] == pytest.approx((50 + 50) / 2)
    assert paired_difference(differences, "sum")[0] == pytest.approx(100)
    with pytest.raises(ValueError, match="same questions"):
        subtract(first, {"a": [0.0, 0.0], "b": [0.0]})
    assert average([{"a": [100.0, 0.0]}, {"a": [0.0, 0.0]}]) == {"a": [50.0, 0.0]}


def test_students_t():
    # Two-sided 95 %, from printed tables.
    for degrees, quantile in {1: 12.706, 2: 4.303, 10: 2.228, 11: 2.2010, 15: 2.1314, 30: 2.0423, 120: 1.9799}.items():
        assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-3)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_wins_are_counted_as_printed():
    first = {"a": 50.04, "b": 50.06, "c": 49.0, "d": None, "e": 1.0}
    second = {"a": 50.0, "b": 50.0, "c": 50.0, "d": 1.0, "f": 2.0}
    assert count_wins(first, second) == Wins(ahead=1, behind=1, tied=1, missing=3)
