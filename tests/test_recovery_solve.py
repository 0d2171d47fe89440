"""The algebra of recovery against numpy, on both sides of the size from which on only one triangle is summed up."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.recovery._solve import _LARGE, Normal, Ridge, best
from onnxcar.recovery._surgeon import RIDGE, Surgeon, inverse

SIZES = [(1, 7, 3), (3, 5, 2), (1, _LARGE + 13, 6), (2, _LARGE, 4)]


def rows(blocks: int, d: int, m: int, n: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs with a mean, targets, weights."""
    rng = np.random.default_rng(d)
    return rng.normal(0.4, 1, (blocks, n, d)), rng.normal(size=(blocks, n, m)), rng.normal(size=(blocks, d, m))


def summed(x: np.ndarray, t: np.ndarray) -> Normal:
    found = Normal(len(x), x.shape[2], t.shape[2])
    for part in np.array_split(np.arange(x.shape[1]), 3):
        found.add(x[:, part], t[:, part])
    return found


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_in_parts_are_those_of_all_rows(sizes):
    x, t, weights = rows(*sizes)
    found = summed(x, t)
    np.testing.assert_allclose(found.xx, x.swapaxes(1, 2) @ x, atol=1e-9)
    centred = x - x.mean(1, keepdims=True)
    np.testing.assert_allclose(found.centred(), centred.swapaxes(1, 2) @ centred, atol=1e-9)
    bias = np.ones((sizes[0], sizes[2]))
    error = np.square(x @ weights + bias[:, None] - t).sum((0, 2)).mean()
    assert found.error(weights, bias) == pytest.approx(error, abs=1e-9)
    assert found.error(weights, bias) != pytest.approx(found.error(weights, 0 * bias), abs=1e-3)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_a_ridge_is_the_lstsq_of_rows_that_pull_toward_the_old_weights(sizes, ridge):
    x, t, near = rows(*sizes)
    regression = Ridge(summed(x, t), near)
    found, again = regression.solve(ridge), regression.solve(ridge)
    np.testing.assert_array_equal(found, again)  # nothing is used up
    for b in range(sizes[0]):
        a, y = x[b] - x[b].mean(0), t[b] - t[b].mean(0)
        pull = np.sqrt(ridge * np.square(a).sum() / sizes[1])
        left = np.concatenate([a, pull * np.eye(sizes[1])])
        right = np.concatenate([y, pull * near[b]])
        np.testing.assert_allclose(found[b], np.linalg.lstsq(left, right, rcond=None)[0], atol=1e-8)
    np.testing.assert_array_equal(regression.solve(np.inf), near)


def test_the_best_ridge_is_chosen_on_the_rows_that_were_held_back():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(1, 60, 3))
    x, held = rng.normal(size=(1, 70, 60)), rng.normal(size=(1, 400, 60))  # few rows: a weak ridge learns the noise
    noise = rng.normal(0, 4, (1, 70, 3))
    fit, other = summed(x, x @ truth + noise), summed(held, held @ truth)
    near = truth + rng.normal(0, 0.3, truth.shape)
    found = best(fit, other, near, np.zeros((1, 3)), np.float64)
    assert found.ridge is not None
    assert found.ridge >= 0.1
    errors = {r: best(fit, other, near, np.zeros((1, 3)), np.float64, (r,)).after for r in (1e-5, 0.1, 1.0)}
    assert found.after == pytest.approx(min(errors.values()), abs=1e-6)
    assert min(errors.values()) < found.before <= errors[1e-5]


@pytest.mark.parametrize("d", [12, 90])
def test_surgery_leaves_the_inverse_and_the_weights_of_a_refit(d):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4 * d, d)) @ rng.normal(size=(d, d))
    moments = x.T @ x / len(x)
    raised = moments + RIDGE * np.trace(moments) / d * np.eye(d)
    inverted = inverse(moments)
    scale = np.abs(inverted).max()
    np.testing.assert_allclose(inverted, np.linalg.inv(raised), atol=1e-8 * scale)
    np.testing.assert_array_equal(inverted, inverted.T)
    weights, groups = rng.normal(size=(d, 5)), np.repeat(np.arange(d // 3), 3)
    surgeon = Surgeon(weights.copy(), inverted.copy(), groups)
    assert surgeon.drop(1)
    assert surgeon.drop(2)
    assert not surgeon.drop(2)
    kept = np.flatnonzero(~np.isin(groups, (1, 2)))
    of_kept = raised[np.ix_(kept, kept)]
    np.testing.assert_allclose(surgeon.inverse[np.ix_(kept, kept)], np.linalg.inv(of_kept), atol=1e-7 * scale)
    refitted = np.linalg.solve(of_kept, raised[kept] @ weights)
    np.testing.assert_allclose(surgeon.weights[kept], refitted, atol=1e-6)
    assert not surgeon.weights[3:9].any()
    assert np.abs(refitted - weights[kept]).max() > 0.1
