"""The sequential test errs no more often than it says, and decides before all images are run where it can."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.scoring import Scorer, _lowest
from onnxcar.scoring._bet import Bet, draw, forecast, risk_of, weights
from onnxcar.scoring._race import Log, Rank, Runner
from tests.test_scoring import opened, plain_net, residual_net


def images_until_sure(before, costs, limit, risk, rng, batch, chances=None, expected=None):
    each = weights(before.astype(float), np.where(before > 0, 0.95, 0.1) if chances is None else chances)
    order = draw(each, rng)
    # What is expected without the candidate may be wrong; only costs are facts.
    stated = (before if expected is None else expected)[order]
    bet = Bet(stated, each[order], 0, limit, risk, 50.0)
    for start in range(0, len(costs), batch):
        bet.see(costs[order[start : start + batch]])
        if bet.sure:
            return start + batch
    return None


@pytest.mark.parametrize("told", ["nothing", "rightly", "wrongly", "wrong base"])
@pytest.mark.parametrize(("n", "wrong", "flips", "batch"), [(200, 40, 20, 5), (500, 250, 20, 16), (150, 0, 9, 7)])
def test_a_true_claim_is_refuted_no_more_often_than_stated(n, wrong, flips, batch, told):
    rng, risk, refuted = np.random.default_rng(n), 0.2, 0
    for _ in range(400):
        before = (rng.permutation(n) < wrong).astype(np.int64)
        costs = before.copy()
        changed = rng.permutation(n)[:flips]
        costs[changed] = 1 - costs[changed]
        chances = {"rightly": 0.9 * costs, "wrongly": 0.9 * (1.0 - costs)}.get(told)
        other = (rng.permutation(n) < wrong).astype(np.int64) if told == "wrong base" else None
        # The claim holds, and only just: the hardest case.
        limit = int(costs.sum())
        refuted += images_until_sure(before, costs, limit, risk, rng, batch, chances, other) is not None
    assert refuted <= 400 * risk + 3 * np.sqrt(400 * risk * (1 - risk))


def test_a_claim_that_is_far_off_is_refuted_early():
    rng = np.random.default_rng(0)
    before = (np.arange(20_000) < 8_000).astype(np.int64)
    costs = np.where(rng.random(20_000) < 0.1, 1, before)
    seen = [images_until_sure(before, costs, 8_100, 1e-6, rng, 32) for _ in range(20)]
    # Counting alone would take more than 8,100 errors.
    assert all(n is not None and n < 1_500 for n in seen)


def test_images_that_are_likely_to_change_are_drawn_first_and_decide_sooner():
    rng = np.random.default_rng(0)
    before = (np.arange(10_000) < 1_500).astype(np.int64)
    near = rng.permutation(10_000)[:1_000]  # nearly all changes are among these
    costs = before.copy()
    costs[near] = np.where(rng.random(1_000) < 0.25, 1, before[near])
    chances = before.astype(float)
    chances[near] = np.where(before[near] == 1, 0.8, 0.25)
    limit = int(before.sum())
    told = [images_until_sure(before, costs, limit, 1e-4, rng, 8, chances) for _ in range(20)]
    blind = [images_until_sure(before, costs, limit, 1e-4, rng, 8, np.full(10_000, 0.5)) for _ in range(20)]
    assert np.median(told) < 400
    assert np.median(told) < 0.6 * np.median(blind)


def test_what_is_forecast_is_about_what_it_takes():
    rng = np.random.default_rng(0)
    before = (np.arange(4_000) < 600).astype(np.int64)
    costs = before.copy()
    costs[rng.permutation(np.arange(600, 4_000))[:80]] = 1
    chances = np.where(before == 1, 0.99, np.where(costs == 1, 0.5, 0.01))
    took = np.median([images_until_sure(before, costs, 600, 1e-4, rng, 1, chances) for _ in range(20)])
    assert 0.4 < took / forecast(before.astype(float), 80, 1e-4) < 2.5
    assert forecast(before.astype(float), 0, 1e-4) == np.inf


def test_costs_of_any_size_are_bet_on():
    rng = np.random.default_rng(0)
    before = rng.integers(0, 50, 2_000)
    costs = before + rng.integers(0, 40, 2_000)
    assert images_until_sure(before, costs, int(before.sum()), 1e-3, rng, 10) < 1_000
    assert images_until_sure(before, costs, int(costs.sum()), 1e-3, rng, 10) is None


def test_what_is_certain_needs_no_probability():
    rng = np.random.default_rng(0)
    before, costs = np.zeros(50, np.int64), np.zeros(50, np.int64)
    costs[:3] = 1
    # Nothing can be gained, so the third error is one too many however small the risk.
    assert images_until_sure(before, costs, 2, 1e-300, rng, 1) is not None
    assert images_until_sure(before, costs, 3, 1e-300, rng, 1) is None


def test_all_steps_of_a_search_stay_below_the_total():
    # Beyond r the rest of the series is 1 / ln(r + 2) / 2.12 at most.
    total = sum(risk_of(0.05, r, 1) for r in range(10_000))
    assert total + 0.05 / 2 / 2.12 / np.log(10_001) < 0.05
    tried_again = sum(k * risk_of(0.05, r, k) for r in range(1_000) for k in (16, 8, 4, 2, 1))
    assert tried_again < 0.05


def test_the_largest_cost_of_a_rank_counts_ties():
    assert Rank().most(7) == 7
    assert Rank(10, 3).most(Rank(10, 3).of(14)) == 14
    assert Rank(10, 7).most(Rank(10, 3).of(12)) == 14  # 4/7 is less than 2/3, 5/7 more
    assert Rank(10, 3).most(Rank(10, 3).of(8)) == 8
    assert Rank(10, 0).most(1.0) is None


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("build", [plain_net, residual_net])
def test_picks_that_may_err_are_nearly_always_the_exact_ones_for_less_work(build, everywhere, make_model, monkeypatch):
    monkeypatch.setattr(_lowest, "BARGAIN", 1e9)  # bet wherever there is a limit
    wrong, rows = 0, np.zeros(2, int)
    for seed in range(4):
        exact, _ = opened(build, make_model, seed=seed, n=600)
        close = Scorer(exact.space, exact.data, provider="cpu", threads=1, approximate=0.3)
        exact.all_sites = close.all_sites = everywhere
        layer = exact.space.layers[-2].groups.tolist()
        left = [g.id for g in exact.space.groups] if everywhere else [g for g in layer if g >= 0]
        removed = frozenset(left[:2])
        left = left[2:]
        want = exact.lowest(removed, left, k=2, per_mac=everywhere)
        got = close.lowest(removed, left, k=2, per_mac=everywhere)
        wrong += [p.group for p in got] != [p.group for p in want]
        assert all(p.score.cost is not None and p.score.samples == 600 for p in got)  # what wins is run to the end
        rows += [exact.work.rows, close.work.rows]
    assert wrong <= 1
    assert (rows > 0).all()


def test_a_bet_that_does_not_come_off_is_given_up_and_the_rest_is_counted():
    rng = np.random.default_rng(0)
    before = (np.arange(1_000) < 300).astype(np.int64)
    each = weights(before.astype(float), np.where(before > 0, 0.95, 0.05))
    order = draw(each, rng)
    bet = Bet(before[order], each[order], 0, 300, 1e-3, 100.0)
    bet.see(before[order[:150]])
    assert not bet.hopeless  # not yet
    bet.see(before[order[150:250]])
    assert bet.hopeless  # the claim is true
    chances = rng.random(1_000)
    runner = Runner(0, None, order, 0, Rank(), Log.empty(1_000), bet=bet)
    runner.line_up(order, chances, 2 * chances)
    runner.at = runner.counted = 250
    runner.fold()
    assert runner.bet is None
    assert sorted(runner.order.tolist()) == list(range(1_000))
    np.testing.assert_array_equal(runner.order[:250], order[:250])
    assert (np.diff(np.diff(runner.risk)[250:]) <= 1e-9).all()
    assert runner.risk[-1] == pytest.approx(chances.sum())
    assert runner.toll[-1] == pytest.approx(2 * chances.sum())
