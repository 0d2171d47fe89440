"""Bootstrap intervals of metrics on numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import r2_score

from onnxcar import bootstrap
from onnxcar.metrics import Answers, pearson

METRICS = {
    "r2": r2_score,
    "mse": lambda t, y: float(((y - t) ** 2).mean()),
    "mae": lambda t, y: float(np.abs(y - t).mean()),
    "pearson": lambda t, y: pearson(y, t),
}


def answers(n: int = 120, k: int = 2, noise: float = 0.7, seed: int = 0) -> Answers:
    rng = np.random.default_rng(seed)
    targets = rng.standard_normal((n, k)) * [3, 0.2][:k] + [100, -1][:k]
    return Answers(targets + noise * targets.std(0) * rng.standard_normal((n, k)), targets)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_the_same_function_of_sums_over_samples(name: str) -> None:
    given = answers()
    rows, of = bootstrap._STATISTICS[name](given)
    at = np.random.default_rng(1).integers(120, size=120)
    weights = np.bincount(at, minlength=120)[None].astype(float)
    value = of(weights @ rows, np.array([120.0]))[0]
    assert value == pytest.approx(METRICS[name](given.targets[at], given.outputs[at]), rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_ends_are_those_of_scipy_within_the_noise_of_resampling(name: str) -> None:
    given = answers()
    found = bootstrap.score(name, given)
    assert found is not None
    want = scipy_stats.bootstrap(
        (np.arange(120),),
        lambda at: METRICS[name](given.targets[at], given.outputs[at]),
        n_resamples=2000,
        vectorized=False,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = want.high - want.low
    assert found.low == pytest.approx(want.low, abs=0.12 * width)
    assert found.high == pytest.approx(want.high, abs=0.12 * width)
    assert bootstrap.score(name, given) == found  # the seed is fixed


@pytest.mark.parametrize("name", METRICS)
def test_a_difference_is_paired(name: str) -> None:
    first = answers()
    worse = 0.3 * first.targets.std(0) * np.random.default_rng(3).standard_normal(first.targets.shape)
    second = Answers(first.outputs + worse, first.targets)
    found = bootstrap.difference(name, first, second)
    one, two = bootstrap.score(name, first), bootstrap.score(name, second)
    assert found is not None
    assert one is not None
    assert two is not None
    change = METRICS[name](second.targets, second.outputs) - METRICS[name](first.targets, first.outputs)
    assert change in found
    assert found.high - found.low < 0.8 * np.hypot(one.high - one.low, two.high - two.low)
    same = bootstrap.difference(name, first, first)
    assert same is not None
    assert (same.low, same.high) == (0.0, 0.0)


def test_the_interval_of_r2_holds_its_level() -> None:
    rng = np.random.default_rng(0)
    inside, runs, n = 0, 150, 80
    for _ in range(runs):
        t = rng.standard_normal((n, 1))
        interval = bootstrap.score("r2", Answers(t + 0.6 * rng.standard_normal((n, 1)), t))
        assert interval is not None
        inside += 1 - 0.36 in interval
    assert 0.90 <= inside / runs <= 0.99


def test_too_few_samples_have_none() -> None:
    assert bootstrap.score("mse", answers(1)) is None
    two = Answers(np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]]))
    assert bootstrap.score("r2", two) is None  # a resample of one value alone has no R2
    assert bootstrap.known("pearson")
    assert not bootstrap.known("top1")
