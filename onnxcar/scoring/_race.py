"""Exact elimination: the k best of many candidates without scoring all of them to the end.

A candidate's cost only grows while its samples are counted. So one whose cost so far is beyond the final cost of the
k-th best is out, whatever its other samples say. Who has the lowest cost so far goes on first; ties are never
eliminated, they are run to the end and told apart by the rule.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxcar.executors import Pool
from onnxcar.metrics import Rows
from onnxcar.scoring._bet import Bet

__all__ = ["Board", "Key", "Lane", "Log", "Race", "Rank", "Runner", "race"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
FIRST = 4  # rows a candidate takes at least when its turn comes
EAGER = 0.5  # part of the rows that it is expected to need which are run at once

Key = tuple[float, int, int, int]  # cost (or what is lost for each MAC saved), loss, -MACs saved, group id


@dataclass(frozen=True)
class Rank:
    """What costs are compared as: themselves, or what is lost for each MAC saved.

    Attributes:
        base: Cost without any candidate; what is lost is counted from there.
        saved: MACs that the candidate's removal saves; None: costs are compared as they are.
    """

    base: int = 0
    saved: int | None = None

    def of(self, cost: int) -> float:
        """Rises with the cost."""
        if self.saved is None:
            return cost
        lost = cost - self.base
        if self.saved > 0:
            return lost / self.saved
        return 0.0 if lost == 0 else math.inf if lost > 0 else -math.inf

    def reaches(self, rank: float) -> int:
        """About the largest cost of that rank."""
        if self.saved is None:
            return int(rank)
        return self.base + (int(rank * self.saved) if math.isfinite(rank) else 0)

    def most(self, rank: float) -> int | None:
        """The largest cost whose rank is no higher; None if there is no largest."""
        if not math.isfinite(rank) or (self.saved is not None and self.saved <= 0):
            return None
        cost = self.reaches(rank) - 1
        while self.of(cost + 1) <= rank:
            cost += 1
        return cost


class Lane(Protocol):
    """Where rows are run: one site with the images of one block."""

    batch: int

    def rows(self, candidates: Indices, rows: Indices) -> Rows:
        """Results of (candidate, image position) pairs, (k,)."""
        ...


@dataclass(eq=False)
class Log:
    """What each image said without one group; filled as far as it was run.

    Attributes:
        cost: (n,) int64.
        loss: (n,) int64.
        top1: (n,) bool.
        top5: (n,) bool.
        margin: (n,) float32.
    """

    cost: npt.NDArray[np.int64]
    loss: npt.NDArray[np.int64]
    top1: npt.NDArray[np.bool_]
    top5: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, n: int) -> Log:
        """Room for n images; margins NaN until known."""
        no = np.zeros(n, bool)
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int64), no, no.copy(), np.full(n, np.nan, np.float32))

    def rows(self, images: Indices) -> Rows:
        """Results of these images."""
        margin = self.margin[images]
        return Rows(self.cost[images], self.loss[images], self.top1[images], self.top5[images], margin, margin)

    def only(self, where: Array) -> Log:
        """A copy that knows nothing but the images where `where`, (n,) bool, is set."""
        made = Log.empty(len(self.cost))
        made.copy_from(self, where)
        return made

    def put(self, at: Indices, rows: Rows, where: slice = slice(None)) -> None:
        """Results of the images at positions `at`."""
        self.cost[at], self.loss[at] = rows.cost[where], rows.loss[where]
        self.top1[at], self.top5[at] = rows.top1[where], rows.top5[where]
        self.margin[at] = rows.margin[where]

    def copy_from(self, other: Log, at: Array) -> None:
        """Take over the results of the images at `at`."""
        self.cost[at], self.loss[at] = other.cost[at], other.loss[at]
        self.top1[at], self.top5[at] = other.top1[at], other.top5[at]
        self.margin[at] = other.margin[at]


@dataclass(eq=False)
class Runner:
    """A candidate on its way.

    Attributes:
        group: Its id.
        lane: Where it runs.
        order: Image positions still to run, the likeliest errors first.
        saved: MACs its removal saves.
        rank: What its cost is compared as.
        log: Where its results go.
        risk: Errors expected before each position of `order`, (len + 1,); decides what runs next, and nothing else.
        toll: Loss expected before each position, likewise.
        cost: Counted so far.
        loss: Counted so far.
        at: How many of `order` are counted or under way.
        counted: How many are counted.
        version: Of its place in the queue.
        out: Whether it is known not to be among the best.
        more: Whether it has images besides those of `order`, in a later race.
        bet: Where an error is allowed: decides from images in random order, which `order` then is.
    """

    group: int
    lane: Lane
    order: Indices
    saved: int
    rank: Rank
    log: Log
    risk: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    toll: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    cost: int = 0
    loss: int = 0
    at: int = 0
    counted: int = 0
    version: int = 0
    out: bool = False
    more: bool = False
    bet: Bet | None = None
    staked: int = 0

    def settle(self) -> None:
        """Let the bet see all results that have come back without a gap."""
        if self.bet is not None and not self.bet.sure:
            missing = np.isnan(self.log.margin[self.order[self.staked :]])
            n = int(missing.argmax()) if missing.any() else len(missing)
            self.bet.see(self.log.cost[self.order[self.staked : self.staked + n]])
            self.staked += n

    def line_up(self, order: Indices, chances: npt.NDArray[np.float64], losses: npt.NDArray[np.float64]) -> None:
        """Take images to run, and what each is expected to cost and to lose."""
        self.order, self.at, self.counted = order, 0, 0
        self.risk = np.concatenate([[0.0], np.cumsum(chances)])
        self.toll = np.concatenate([[0.0], np.cumsum(losses)])

    def fold(self) -> None:
        """Give up the bet: what is left is run in the order of its risk."""
        self.bet = None
        chances, losses = np.diff(self.risk), np.diff(self.toll)
        later = self.at + np.argsort(-chances[self.at :], kind="stable")
        way = np.concatenate([np.arange(self.at), later])
        self.order = self.order[way]
        self.risk = np.concatenate([[0.0], np.cumsum(chances[way])])
        self.toll = np.concatenate([[0.0], np.cumsum(losses[way])])

    @property
    def dread(self) -> float:
        """What its loss is expected to be once all images of `order` are counted."""
        return self.loss + float(self.toll[-1] - self.toll[self.counted])

    @property
    def hope(self) -> float:
        """What its cost is expected to be once all images of `order` are counted."""
        return self.cost + float(self.risk[-1] - self.risk[self.counted])

    @property
    def expected(self) -> float:
        """What its cost is expected to be once all batches under way are counted."""
        return self.cost + float(self.risk[self.at] - self.risk[self.counted])

    def needs(self, cost: float, loss: float | None = None) -> int:
        """About how many more images it takes to cost more than `cost`, or to lose more than `loss`."""
        wanted = self.risk[self.at] + EAGER * max(cost + 1 - self.expected, 0.0)
        by_cost = int(np.searchsorted(self.risk, wanted)) - self.at
        if not loss or self.loss > loss:
            return by_cost  # who lost more and is not out will cost less
        lost = self.loss + float(self.toll[self.at] - self.toll[self.counted])
        by_loss = int(np.searchsorted(self.toll, self.toll[self.at] + max(loss - lost, 0.0))) - self.at
        # What is expected may be too much: who is not out goes on with a quarter more each time.
        return min(by_cost, max(by_loss, self.at // 4))

    @property
    def key(self) -> Key:
        """What candidates are compared by: smaller goes first; a lower bound of it until all images are done."""
        return (self.rank.of(self.cost), self.loss, -self.saved, self.group)

    @property
    def done(self) -> bool:
        """All images are counted."""
        return self.counted >= len(self.order)


@dataclass(eq=False)
class Board:
    """The best complete keys so far; may be carried from race to race.

    Attributes:
        k: How many are wanted.
        best: Key and candidate, the lowest first.
    """

    k: int
    best: list[tuple[Key, Runner]] = field(default_factory=list)

    def enter(self, runner: Runner) -> None:
        """A candidate is complete."""
        self.best.append((runner.key, runner))
        self.best.sort(key=lambda entry: entry[0])
        del self.best[self.k :]

    def out(self, runner: Runner) -> bool:
        """Whether the candidate cannot be among the k best. Only what can still grow is compared, so no tie is lost."""
        if len(self.best) < self.k:
            return False
        return (runner.rank.of(runner.cost), runner.loss) > self.best[-1][0][:2]

    @property
    def bound(self) -> float | None:
        """Rank of the k-th best, None while there are fewer."""
        return self.best[-1][0][0] if len(self.best) == self.k else None

    @property
    def loss(self) -> int | None:
        """Loss of the k-th best, None while there are fewer."""
        return self.best[-1][0][1] if len(self.best) == self.k else None


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of one run: for each runner how many of its next images."""

    lane: Lane
    parts: tuple[tuple[Runner, int, Indices], ...]

    def run(self) -> Rows:
        candidates = np.concatenate([np.full(n, runner.group, np.int64) for runner, n, _ in self.parts])
        return self.lane.rows(candidates, np.concatenate([images for _, _, images in self.parts]))


class Race:
    """The queue of candidates that are neither out nor done."""

    def __init__(self, runners: Sequence[Runner], board: Board, guess: float, largest: int) -> None:
        """Line up the runners; see `race`."""
        self.board = board
        self._guess, self._largest = guess, largest
        self._heaps: dict[int, list[tuple[tuple[float, float, float], int, int, Runner]]] = {}
        self._serial = 0
        for runner in runners:
            if not runner.done:
                self._push(runner)
            elif not runner.more:
                board.enter(runner)

    def _push(self, runner: Runner) -> None:
        """Queue a candidate by what it will cost when all that is under way has come back."""
        self._serial += 1
        runner.version = self._serial
        urgency = (runner.rank.of(int(runner.expected)), runner.rank.of(int(runner.hope)), runner.dread)
        heapq.heappush(self._heaps.setdefault(id(runner.lane), []), (urgency, self._serial, runner.version, runner))

    def next(self) -> _Batch | None:
        """Rows to run now, those of the lowest candidates; None where all are out, done or under way."""
        while any(self._heaps.values()):
            heap = min((h for h in self._heaps.values() if h), key=lambda h: h[0][:2])
            found = self._fill(heap)
            if found:
                return _Batch(found[0][0].lane, tuple(self._take(runner, n) for runner, n in found))
        return None

    def _fill(self, heap: list[tuple[tuple[float, float, float], int, int, Runner]]) -> list[tuple[Runner, int]]:
        batch: list[tuple[Runner, int]] = []
        room = heap[0][3].lane.batch
        bound = self.board.bound if self.board.bound is not None else self._guess
        loss = self.board.loss
        while heap and room > 0:
            _, _, version, runner = heap[0]
            if version != runner.version or runner.at >= len(runner.order) or self._is_out(runner):
                heapq.heappop(heap)
                continue
            limit = runner.rank.reaches(bound)
            if runner.bet is not None and runner.bet.hopeless:
                runner.fold()
            if batch and runner.expected > limit and runner.bet is None:
                break  # it may well be out once the lower ones are done
            heapq.heappop(heap)
            runner.version = 0
            # It cannot be out before so many rows, and is likely to be after so many.
            surely = (limit - runner.cost) // self._largest + 1 - (runner.at - runner.counted)
            rows = max(surely, runner.needs(limit, loss), FIRST) if runner.bet is None else runner.bet.wanted()
            take = min(rows, len(runner.order) - runner.at, room)
            batch.append((runner, take))
            room -= take
        if batch and room > 0 and batch[0][0].bet is None:
            # Nobody else needs rows for sure: the lowest goes on.
            runner, n = batch[0]
            batch[0] = (runner, min(n + room, len(runner.order) - runner.at))
        return batch

    def _is_out(self, runner: Runner) -> bool:
        runner.out = runner.out or self.board.out(runner) or (runner.bet is not None and runner.bet.sure)
        return runner.out

    def _take(self, runner: Runner, n: int) -> tuple[Runner, int, Indices]:
        images = runner.order[runner.at : runner.at + n]
        runner.at += n
        if runner.at < len(runner.order):
            self._push(runner)
        return runner, n, images

    def done(self, batch: _Batch, rows: Rows) -> None:
        """Count the results of a batch; its runners go on, are done, or out."""
        start = 0
        for runner, n, images in batch.parts:
            where = slice(start, start + n)
            runner.log.put(images, rows, where)
            runner.cost += int(rows.cost[where].sum())
            runner.loss += int(rows.loss[where].sum())
            # Batches may come back in another order; how many are counted is all that matters here.
            runner.counted += n
            runner.settle()
            start += n
            if runner.done and not runner.more:
                self.board.enter(runner)
            elif runner.at < len(runner.order):
                self._push(runner)


def race(runners: Sequence[Runner], board: Board, guess: float, largest: int = 1, pool: Pool | None = None) -> None:
    """Run candidates until each is complete, out, or at the end of its images here; the complete ones enter the board.

    The board's best are then the same as if all had run to the end.

    Args:
        runners: Candidates.
        board: Takes the complete ones and says who is out.
        guess: About the rank of the k-th best: no result depends on it, only work.
        largest: What one image costs at most.
        pool: Runs several batches at a time; None: one after the other.
    """
    state = Race(runners, board, guess, largest)
    if pool is None or pool.workers == 1:
        while (batch := state.next()) is not None:
            state.done(batch, batch.run())
    else:
        under_way: dict[Future[Rows], _Batch] = {}
        try:
            while True:
                while len(under_way) < pool.workers and (batch := state.next()) is not None:
                    under_way[pool.submit(batch.run)] = batch
                if not under_way:
                    break
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    state.done(under_way.pop(future), future.result())
        finally:
            for future in under_way:
                future.cancel()
