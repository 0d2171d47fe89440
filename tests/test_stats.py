import math
import random

import pytest

from onnxcar.stats import Interval, mcnemar, mean_interval, median_interval, paired_interval, spread, wilson


def test_wilson_equals_hand_computed_value():
    # p = 0.8, n = 100, z = 1.959964: centre (0.8 + 0.019207) / 1.038415, half 0.077732.
    found = wilson(80, 100)
    assert found.low == pytest.approx(0.711171, abs=1e-6)
    assert found.high == pytest.approx(0.866633, abs=1e-6)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_wilson_of_none_and_all_ends_exactly_at_zero_and_one(n):
    assert wilson(0, n).low == 0.0
    assert wilson(n, n).high == 1.0
    assert wilson(0, n).high == pytest.approx(1 - wilson(n, n).low, abs=1e-12)


def test_wilson_of_no_samples_says_nothing():
    assert wilson(0, 0) == Interval(0.0, 1.0)


def test_mcnemar_is_the_binomial_tail():
    for b, c in [(1, 5), (10, 3), (40, 60)]:
        n = b + c
        tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n
        assert mcnemar(b, c) == pytest.approx(2 * tail, rel=1e-12)
        assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_of_equal_counts_is_one():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(6, 6) == 1.0


def test_mcnemar_of_counts_beyond_floats_is_finite():
    p = mcnemar(3000, 2900)
    assert p == pytest.approx(0.19744, abs=1e-4)


def test_paired_interval_is_second_minus_first():
    found = paired_interval(30, 10, 1000)
    assert -0.02 in found
    assert found.high < 0
    mirrored = paired_interval(10, 30, 1000)
    assert mirrored.low == pytest.approx(-found.high, abs=1e-12)


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(3)
    p_lost, p_won, n, hits, trials = 0.03, 0.01, 300, 0, 2000
    for _ in range(trials):
        draws = [rng.random() for _ in range(n)]
        lost = sum(d < p_lost for d in draws)
        won = sum(p_lost <= d < p_lost + p_won for d in draws)
        hits += (p_won - p_lost) in paired_interval(lost, won, n)
    assert 0.93 < hits / trials < 0.985


def test_paired_interval_narrows_with_samples():
    few, many = paired_interval(3, 1, 100), paired_interval(300, 100, 10_000)
    assert many.high - many.low < (few.high - few.low) / 5


def test_mean_interval_of_constant_values_has_no_width():
    assert mean_interval(0.5, 0.0, 10) == Interval(0.5, 0.5)


def test_median_interval_covers_the_median():
    rng = random.Random(5)
    hits = sum(math.log(2) in median_interval([rng.expovariate(1) for _ in range(21)]) for _ in range(2000))
    assert 0.94 < hits / 2000 < 0.995


def test_median_interval_of_few_values_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == Interval(1.0, 3.0)


def test_spread_has_quartiles():
    found = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.q1, found.q3, found.n_runs) == (3.0, 2.0, 4.0, 5)
    assert found.iqr == 2.0
    assert spread([7.0]).median == 7.0
