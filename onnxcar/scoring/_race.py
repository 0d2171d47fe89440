"""Exact elimination: the k best of many candidates without scoring all of them to the end.

A candidate's cost only grows while its samples are counted. So one whose cost so far is beyond the final cost of the
k-th best is out, whatever its other samples say. Who has the lowest cost so far goes on first; ties are never
eliminated, they are run to the end and told apart by the rule.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxcar.metrics import Rows

__all__ = ["Key", "Lane", "Log", "Runner", "race"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
FIRST = 8  # rows a candidate takes at least when its turn comes
GROWTH = 1.5  # of that number from turn to turn

Key = tuple[float, int, int, int]  # cost (or what is lost for each MAC saved), loss, -MACs saved, group id


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
        rank: Maps a cost to what is compared first.
        log: Where its results go.
        hope: What its final cost is expected to be; the order among equals, nothing else.
        cost: So far.
        loss: So far.
        at: How many of `order` are done.
    """

    group: int
    lane: Lane
    order: Indices
    saved: int
    rank: Callable[[int], float]
    log: Log
    hope: float = 0.0
    cost: int = 0
    loss: int = 0
    at: int = 0
    turn: float = FIRST
    expected: npt.NDArray[np.float64] | None = None
    out: bool = False

    @property
    def key(self) -> Key:
        """What candidates are compared by: smaller goes first; a lower bound of it until all images are done."""
        return (self.rank(self.cost), self.loss, -self.saved, self.group)

    @property
    def done(self) -> bool:
        """All images are counted."""
        return self.at >= len(self.order)


@dataclass(eq=False)
class _Board:
    """The best complete keys so far."""

    k: int
    best: list[tuple[Key, Runner]] = field(default_factory=list)

    def enter(self, runner: Runner) -> None:
        self.best.append((runner.key, runner))
        self.best.sort(key=lambda entry: entry[0])
        del self.best[self.k :]

    def out(self, runner: Runner) -> bool:
        """Whether the candidate cannot be among the k best. Only what can still grow is compared, so no tie is lost."""
        if len(self.best) < self.k:
            return False
        last = self.best[-1][0]
        return (runner.rank(runner.cost), runner.loss) > last[:2]

    @property
    def cost(self) -> int | None:
        """Cost of the k-th best, None while there are fewer."""
        return self.best[-1][1].cost if len(self.best) == self.k else None


def race(runners: Sequence[Runner], k: int, guess: int, largest: int = 1) -> list[Runner]:
    """The k candidates of smallest key, smallest first; the same as if all had run to the end.

    Args:
        runners: All candidates.
        k: How many are wanted.
        guess: About what the k-th best will cost: no result depends on it, only work.
        largest: What one image costs at most.
    """
    board = _Board(k)
    heaps: dict[int, list[tuple[tuple[float, ...], int]]] = {}
    for i, runner in enumerate(runners):
        if runner.done:
            board.enter(runner)
        else:
            heapq.heappush(heaps.setdefault(id(runner.lane), []), (_urgency(runner), i))
    while any(heaps.values()):
        heap = min((h for h in heaps.values() if h), key=lambda h: h[0])
        batch = _fill(heap, runners, board, guess, largest)
        if not batch:
            continue
        for i in _run(runners, batch):
            runner = runners[i]
            if runner.done:
                board.enter(runner)
            elif board.out(runner):
                runner.out = True
            else:
                heapq.heappush(heap, (_urgency(runner), i))
    return [runner for _, runner in board.best]


def _urgency(runner: Runner) -> tuple[float, ...]:
    return (runner.rank(runner.cost), runner.hope)


def _fill(
    heap: list[tuple[tuple[float, ...], int]], runners: Sequence[Runner], board: _Board, guess: int, largest: int
) -> list[tuple[int, int]]:
    """The next batch: (runner, number of rows), the lowest first."""
    batch: list[tuple[int, int]] = []
    room = runners[heap[0][1]].lane.batch if heap else 0
    while heap and room > 0:
        _, i = heapq.heappop(heap)
        runner = runners[i]
        if board.out(runner):
            runner.out = True
            continue
        bound = board.cost if board.cost is not None else guess
        # At least so many rows are needed before the candidate can be out.
        gap = (bound - runner.cost) // largest + 1
        take = min(max(int(runner.turn), gap), len(runner.order) - runner.at, room)
        runner.turn = max(runner.turn, min(take, 64)) * GROWTH if gap <= runner.turn else runner.turn
        batch.append((i, take))
        room -= take
    return batch


def _run(runners: Sequence[Runner], batch: Sequence[tuple[int, int]]) -> list[int]:
    lane = runners[batch[0][0]].lane
    candidates = np.concatenate([np.full(n, runners[i].group, np.int64) for i, n in batch])
    images = np.concatenate([runners[i].order[runners[i].at : runners[i].at + n] for i, n in batch])
    rows = lane.rows(candidates, images)
    start = 0
    for i, n in batch:
        runner, where = runners[i], slice(start, start + n)
        runner.log.put(images[where], rows, where)
        runner.cost += int(rows.cost[where].sum())
        runner.loss += int(rows.loss[where].sum())
        runner.at += n
        start += n
    return [i for i, _ in batch]
