"""Exact elimination over sites and blocks of images: what to race, in which order, with which images in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcar.executors import Pool
from onnxcar.metrics import LOSS_ONE
from onnxcar.scoring._bet import Bet, draw, forecast, weights
from onnxcar.scoring._order import risk_order
from onnxcar.scoring._race import Board, Log, Rank, Runner, race
from onnxcar.scoring._state import State

__all__ = [
    "Contest",
    "compete",
    "few_at_a_time",
    "guess",
    "lowest",
    "nearness",
    "order_images",
    "remember",
    "start",
]

FEW = 200  # images from which a bet can be worth it
UNKNOWN = 0.01  # errors, a part of all images, that a candidate that was never run may cost more than the best
BARGAIN = 0.7  # it must be expected to take so much less than counting
TABLES = 4  # one part in so many of the budget is for what is known of candidates, image by image
RACING_BYTES, KEPT_BYTES = 48, 26  # of these tables for each candidate and image, while it runs and from step to step


@dataclass(frozen=True, eq=False)
class Contest:
    """What is asked.

    Attributes:
        removed: Groups that are gone.
        k: How many are wanted.
        rank: Group -> what its cost is compared as.
        saved: Group -> MACs that its removal saves.
        hints: Group -> its place in the caller's expectation, 0 = lowest.
        largest: What one image costs at most.
        typical: What one error costs about.
        risk: Probability with which a candidate that should win may be dropped; None: never.
    """

    removed: frozenset[int]
    k: int
    rank: dict[int, Rank]
    saved: Mapping[int, int]
    hints: dict[int, int]
    largest: int
    typical: float
    risk: float | None = None


def lowest(
    asked: Contest, sites: Sequence[Sequence[int]], open_site: Callable[[int, Sequence[State]], State], budget: int
) -> list[Runner]:
    """The k candidates of smallest key, smallest first.

    Args:
        asked: What is asked.
        sites: Candidates, site by site.
        open_site: State of a site by its number; the states given with it must stay in memory.
        budget: Bytes that states may take together. Sites that do not fit race one after the other, against the best
            so far.
    """
    board = Board(asked.k)
    lined_up: list[tuple[State, list[Runner]]] = []
    for number, groups in enumerate(sites):
        state = open_site(number, [held for held, _ in lined_up])
        tables = min(budget // TABLES, RACING_BYTES * state.n * len(groups))
        size = max(4, (budget - tables) // max(1, state.each_bytes))
        if lined_up and sum(held.n_bytes for held, _ in lined_up) + state.n_bytes > budget - tables:
            _race(asked, board, lined_up, budget)
            lined_up = []
        for some in few_at_a_time(asked, groups, state.n, budget):
            if size < state.n:
                _by_blocks(asked, board, state, some, size, budget)
                continue
            if len(some) < len(groups) and lined_up:
                _race(asked, board, lined_up, budget)
                lined_up = []
            state.enter(asked.removed, np.arange(state.n, dtype=np.int64))
            state.expect(some)
            lined_up.append((state, [start(asked, state, group) for group in some]))
    _race(asked, board, lined_up, budget)
    return [runner for _, runner in board.best]


def few_at_a_time(asked: Contest, groups: Sequence[int], n: int, budget: int) -> list[list[int]]:
    """Candidates in parts whose tables of n images fit into their part of the budget, the expected best first."""
    few = max(2 * asked.k, budget // TABLES // (RACING_BYTES * n))
    if len(groups) > few:
        groups = sorted(groups, key=lambda group: asked.hints.get(group, len(asked.hints)))
    return [list(groups[at : at + few]) for at in range(0, len(groups), few)]


def _race(asked: Contest, board: Board, lined_up: Sequence[tuple[State, list[Runner]]], budget: int) -> None:
    entered = [(state, runner) for state, some in lined_up for runner in some]
    if not entered:
        return
    compete(asked, board, entered, lined_up[0][0].pool)
    for state, some in lined_up:
        remember(state, some, budget)


def compete(asked: Contest, board: Board, entered: Sequence[tuple[State, Runner]], pool: Pool) -> None:
    """Race candidates whose images are all in memory.

    Where an error is allowed, the expected winners are run to the end first; what they cost is what the others bet
    against.
    """
    if asked.risk is not None and len(entered) > asked.k:
        entered = sorted(entered, key=lambda at: nearness(at[1]))
        race([runner for _, runner in entered[: asked.k]], board, board.bound or 0.0, asked.largest, pool)
        entered = entered[asked.k :]
        if board.bound is not None:
            for state, runner in entered:
                _offer_bet(asked, state, runner, board.bound)
    runners = [runner for _, runner in entered]
    if runners:
        race(runners, board, guess(asked, runners), asked.largest, pool)


def _offer_bet(asked: Contest, state: State, runner: Runner, bound: float) -> None:
    """Give a candidate a bet if that will likely decide sooner than counting its likeliest errors."""
    assert asked.risk is not None
    limit, n = runner.rank.most(bound), len(runner.order)
    if limit is None or n < FEW:
        return
    before = state.costs[runner.order].astype(np.float64)
    counting = min(n, int(np.searchsorted(runner.risk, limit + 1 - runner.cost)))
    gap = runner.hope - limit
    if runner.group not in state.shifts:  # nothing is known of it yet but the size of its channels
        gap = max(gap, UNKNOWN * n * asked.typical)
    betting = forecast(before, gap, asked.risk)
    if betting > BARGAIN * counting:
        return
    chances, losses = np.diff(runner.risk), np.diff(runner.toll)
    # An order of its own for each candidate and step, from nothing but who they are: images first as they are stored.
    seed = [runner.group, len(asked.removed), sum(asked.removed)]
    stored = np.argsort(runner.order, kind="stable")
    each = weights(before, chances / asked.typical)[stored]
    drawn = draw(each, np.random.default_rng(seed))
    order = stored[drawn]
    runner.line_up(runner.order[order], chances[order], losses[order])
    runner.bet = Bet(state.costs[runner.order], each[drawn], runner.cost, limit, asked.risk, betting)


def guess(asked: Contest, runners: Sequence[Runner]) -> float:
    """About the rank of the k-th best."""
    ranks = sorted(runner.rank.of(int(runner.hope)) for runner in runners)
    return ranks[min(asked.k, len(ranks)) - 1]


def nearness(runner: Runner) -> tuple[float, float]:
    """Rises with the distance from winning, as expected."""
    return runner.rank.of(int(runner.hope)), runner.hope


def remember(state: State, runners: Collection[Runner], budget: int) -> None:
    """Keep what was run: results for as long as they hold, margins as the next step's expectation.

    Where all candidates' would not fit into their part of the budget, those that came nearest to winning are kept.
    """
    most = budget // TABLES // (KEPT_BYTES * state.n)
    for gone in (state.removed or frozenset()) & state.shifts.keys():
        del state.shifts[gone]
    for runner in sorted(runners, key=nearness):
        group = runner.group
        if group not in state.shifts and len(state.shifts) >= most:
            continue
        shift = state.shifts.setdefault(group, np.full(state.n, np.nan, np.float32))
        known = ~np.isnan(runner.log.margin)
        shift[known] = (runner.log.margin - state.margins)[known]
        if group in state.logs or len(state.logs) < most:
            state.logs[group] = runner.log


def start(asked: Contest, state: State, group: int) -> Runner:
    """A candidate at the start: what is known is counted, the rest in the order of its risk."""
    log = state.known(group)
    runner = Runner(group, state, np.zeros(0, np.int64), asked.saved[group], asked.rank[group], log)
    runner.cost, runner.loss = int(log.cost.sum()), int(log.loss.sum())
    order_images(asked, state, runner)
    return runner


def order_images(
    asked: Contest,
    state: State,
    runner: Runner,
    images: npt.NDArray[np.int64] | None = None,
    norms: npt.NDArray[np.float32] | None = None,
) -> None:
    """Line up the runner's open images of the block in memory, or of `images`, with the channels' sizes on them."""
    if images is None:
        assert state.block is not None
        images, norms = state.block.indices, state.norms.get(runner.group)
    todo = np.isnan(runner.log.margin[images])
    sizes = None if norms is None else norms[todo]
    shift, open_ = state.shifts.get(runner.group), images[todo]
    order, chances, losses = risk_order(state.margins[open_], None if shift is None else shift[open_], sizes)
    losses *= LOSS_ONE
    runner.line_up(open_[order], losses if state.judge.metric.name == "loss" else chances * asked.typical, losses)


def _by_blocks(asked: Contest, board: Board, state: State, groups: Sequence[int], size: int, budget: int) -> None:
    """One site whose images do not fit in memory: the expected best first, then the others block by block.

    No candidate is complete before the last block, so somebody must be run to the end before anybody can be out.
    """
    blocks = [np.arange(i, min(i + size, state.n), dtype=np.int64) for i in range(0, state.n, size)]
    state.enter(asked.removed, blocks[0])
    state.expect(groups)
    runners = [start(asked, state, group) for group in groups]
    runners.sort(key=lambda runner: (asked.hints.get(runner.group, len(asked.hints)), runner.hope))
    for runner in runners:  # a fresh start: what the first block gave is counted when its turn comes
        runner.log, runner.cost, runner.loss = Log.empty(state.n), 0, 0
    # The second pass goes backwards: its first block is still in memory.
    for some, order in ((runners[: asked.k], blocks), (runners[asked.k :], blocks[::-1])):
        for number, block in enumerate(order):
            active = [runner for runner in some if not runner.out]
            if not active:
                break
            state.enter(asked.removed, block)
            state.expect([runner.group for runner in active])
            for runner in active:
                known = state.known(runner.group)
                before = int(runner.log.cost.sum()), int(runner.log.loss.sum())
                runner.log.copy_from(known, ~np.isnan(known.margin))
                runner.cost += int(runner.log.cost.sum()) - before[0]
                runner.loss += int(runner.log.loss.sum()) - before[1]
                order_images(asked, state, runner)
                runner.more = number + 1 < len(order)
            race(active, board, guess(asked, active), asked.largest, state.pool)
    remember(state, runners, budget)
