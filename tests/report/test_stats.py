"""The statistics against hand-made sums, enumeration and published quantiles."""

import math
import statistics
from itertools import product

import pytest

from prism_deco.report.stats import (
    Wins,
    average,
    count_wins,
    holm,
    mcnemar,
    seed_interval,
    subtract,
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


def test_differences_are_unit_by_unit():
    first, second = {"a": [100.0, 0.0], "b": [100.0] * 4}, {"a": [0.0, 0.0], "b": [100.0, 100.0, 0.0, 0.0]}
    differences = subtract(first, second)
    assert differences == {"a": [100.0, 0.0], "b": [0.0, 0.0, 100.0, 100.0]}
    with pytest.raises(ValueError, match="same questions"):
        subtract(first, {"a": [0.0, 0.0], "b": [0.0]})
    assert average([{"a": [100.0, 0.0]}, {"a": [0.0, 0.0]}]) == {"a": [50.0, 0.0]}


def test_students_t():
    """From printed tables of its two-sided 95 % quantiles."""
    for degrees, quantile in {1: 12.706, 2: 4.303, 10: 2.228, 11: 2.2010, 15: 2.1314, 30: 2.0423, 120: 1.9799}.items():
        values = [float(k) for k in range(degrees + 1)]
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        mean = statistics.mean(values)
        assert seed_interval(values) == pytest.approx((mean - half, mean + half), abs=5e-4 * half)
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-3)


def test_equal_values_have_an_interval():
    """Their standard error is 0, of which scipy makes nan."""
    assert seed_interval([2.0, 2.0]) == seed_interval([2.0] * 3) == (2, 2)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    assert holm([0.01, None, 0.03]) == [0.02, None, 0.03]  # None is not a test


def test_wins_are_counted_as_printed():
    first = {"a": 50.04, "b": 50.06, "c": 49.0, "d": None, "e": 1.0}
    second = {"a": 50.0, "b": 50.0, "c": 50.0, "d": 1.0, "f": 2.0}
    assert count_wins(first, second) == Wins(ahead=1, behind=1, tied=1, missing=3)
