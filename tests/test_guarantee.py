"""The promise on unseen data: its test in closed form, its coverage in simulation, its split."""

from __future__ import annotations

import functools
from itertools import product
from math import comb

import numpy as np
import pytest

from onnxcar.data import Dataset
from onnxcar.data._sources import ArraySource
from onnxcar.errors import DataError, PlanError
from onnxcar.guarantee import METRICS, NUISANCE, check, images_needed, p_value, split


def exact_tail(s, n, gain, drop):
    """P(S <= s) by convolving the three-valued variable n times; no formula of the code under test."""
    one = np.asarray([gain, 1 - 2 * gain - drop, gain + drop])  # d = -1, 0, 1
    pmf = np.ones(1)
    for _ in range(n):
        pmf = np.convolve(pmf, one)
    return pmf[: s + n + 1].sum()


@pytest.mark.parametrize(("lost", "won", "n", "drop"), [(0, 0, 40, 0.2), (1, 3, 60, 0.15), (2, 2, 80, 0.1)])
def test_p_value_is_the_worst_case_over_gains_within_their_bound(lost, won, n, drop):
    risk = 0.05
    found = p_value(lost, won, n, drop, risk) - NUISANCE * risk
    gains = np.linspace(0, 0.24, 600)
    # Clopper-Pearson by its definition: gains at which so few wins are no rarer than the level.
    likely = [q for q in gains if sum(_binom(k, n, q) for k in range(won + 1)) >= NUISANCE * risk]
    tails = [exact_tail(lost - won, n, q, drop) for q in likely if 4 * q <= (1 - drop) ** 2]
    assert max(tails) - min(tails) > 0.01
    assert found == pytest.approx(max(tails), abs=2e-3)
    assert found >= max(tails)


def _binom(k, n, p):
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def test_more_losses_and_a_smaller_margin_make_it_harder():
    p = [p_value(lost, 4, 1000, 0.02, 0.05) for lost in range(25)]
    assert p == sorted(p)
    assert p[0] < 0.01 < 0.2 < p[-1]
    assert p_value(4, 4, 1000, 0.01, 0.05) > p_value(4, 4, 1000, 0.02, 0.05)
    assert p_value(0, 1000, 1000, 0.02, 0.05) == 1.0  # half of all flips: outside what the closed form covers


@pytest.mark.parametrize(("drop", "confidence"), [(0.01, 0.95), (0.05, 0.9), (0.1, 0.5)])
def test_images_needed_is_the_smallest_number_that_can_pass(drop, confidence):
    n, risk = images_needed(drop, confidence), 1 - confidence
    assert p_value(0, 0, n, drop, risk) <= risk < p_value(0, 0, n - 1, drop, risk)


@pytest.mark.parametrize("gain", [0.0, 0.01, 0.05, 0.2])
def test_a_model_just_beyond_the_limit_passes_no_more_often_than_the_risk(gain):
    """Exact, by summing over all outcomes: no simulation error."""
    n, drop, risk = 130, 0.1, 0.1
    logs = np.cumsum(np.log(np.arange(1, n + 1)))
    fact = np.concatenate([[0], logs])
    chance = 0.0
    for lost, won in product(range(n + 1), range(n + 1)):
        same = n - lost - won
        if same < 0 or (gain == 0 and won):
            continue
        if p_value(lost, won, n, drop, risk) <= risk:
            weight = fact[n] - fact[lost] - fact[won] - fact[same]
            weight += lost * np.log(gain + drop) + same * np.log(1 - 2 * gain - drop)
            chance += np.exp(weight + (won * np.log(gain) if gain else 0))
    assert chance <= risk
    assert chance > (0.01 if gain < 0.2 else 0.0)  # the test has power: it is not valid by never passing


def test_a_walk_along_a_path_keeps_the_confidence():
    """Ten models, flips nested as along a real path; the promise is broken in at most 10 % of 1,000 worlds."""
    rng = np.random.default_rng(0)
    n, drop, risk = 400, 0.05, 0.1
    losses, gains = np.linspace(0.005, 0.16, 32), np.linspace(0.002, 0.04, 32)
    true = losses - gains
    broken = naive = shipped = 0
    p = functools.cache(lambda lost, won: p_value(lost, won, n, drop, risk))
    for _ in range(1000):
        u = rng.random(n)
        lost, won = (u < losses[:, None]).sum(1), (u > 1 - gains[:, None]).sum(1)
        last = -1
        for j in range(len(true)):
            if p(int(lost[j]), int(won[j])) > risk:
                break
            last = j
        shipped += last >= 0
        broken += last >= 0 and true[last] > drop
        within = np.flatnonzero((lost - won) / n <= drop)
        naive += true[within[-1]] > drop
    assert shipped > 900
    assert 0 < broken <= risk * 1000
    assert naive > 2.5 * risk * 1000  # what looking without a test would have promised


def dataset(n, n_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.4, n) - 1, n_classes - 1)
    return Dataset(ArraySource({"": rng.normal(size=(n, 3)).astype(np.float32)}, "x"), labels, path="x")


def test_split_is_seeded_disjoint_and_keeps_the_shares_of_classes():
    data = dataset(1001)
    parts = split(data, 0.05, 0.9, seed=3)
    assert len(parts.choosing) + len(parts.held) == 1001
    assert abs(len(parts.held) - 500) <= 1
    rows = [part.inputs(np.arange(len(part)))[""][:, 0] for part in (parts.choosing, parts.held)]
    assert not set(rows[0].tolist()) & set(rows[1].tolist())
    a, b = (np.bincount(part.labels, minlength=7) for part in (parts.choosing, parts.held))
    assert np.abs(a - b).max() <= 2
    assert a.max() > 5 * a.min()
    assert split(data, 0.05, 0.9, seed=3).held.sha256 == parts.held.sha256
    assert split(data, 0.05, 0.9, seed=4).held.sha256 != parts.held.sha256


def test_too_few_images_are_said_with_the_number_that_is_needed():
    needed = images_needed(0.01, 0.95)
    with pytest.raises(
        DataError, match=rf"at least {needed} images .* {needed * 4 // 3} in all, and there are 900"
    ) as e:
        split(dataset(900), 0.01, 0.95)
    assert "--max-drop 0.02 is possible" in str(e.value)
    assert len(split(dataset(needed * 4 // 3 + 1), 0.01, 0.95).held) >= needed


@pytest.mark.parametrize(
    ("metric", "drop", "confidence", "words"),
    [
        ("loss", 0.01, 0.95, "counts none"),
        ("r2", 0.01, 0.95, "counts none"),
        ("top1", None, 0.95, "--max-drop"),
        ("top1", 0.0, 0.95, "above 0"),
        ("top1", 0.6, 0.95, "at most 0.5"),
        ("top1", 0.01, 1.0, "between 0 and 1"),
    ],
)
def test_what_cannot_be_promised_is_refused(metric, drop, confidence, words):
    with pytest.raises(PlanError, match=words):
        check(metric, drop, confidence)
    for name in METRICS:
        check(name, 0.01, 0.95)
