"""All sites at once: a search in which groups of many layers compete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar._judge import Judge
from onnxcar.executors import Pool
from onnxcar.scoring._evaluate import ON_DEVICE
from onnxcar.scoring._lowest import (
    RACING_BYTES,
    TABLES,
    Contest,
    compete,
    few_at_a_time,
    guess,
    nearness,
    order_images,
    remember,
    start,
)
from onnxcar.scoring._race import Board, Log, Runner, race
from onnxcar.scoring._state import State, Work
from onnxcar.scoring._trunk import Trunk

__all__ = ["Wide"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
RUN_BYTES = 64 << 20  # of values that one run of the trunk gives


class Wide:
    """The states of all sites, fed by one `Trunk`."""

    def __init__(
        self,
        trunk: Trunk,
        judge: Judge,
        inputs: Callable[[Indices], dict[str, Array]],
        step: int,
        pool: Pool,
        work: Work,
        budget: int,
        rows: Callable[[int], int],
    ) -> None:
        """Hold what is needed.

        Args:
            trunk: What all sites share.
            judge: The metric.
            inputs: Network inputs of the images at some positions.
            step: Images of one run of the trunk.
            pool: Runs batches side by side.
            work: What is done is counted there.
            budget: Bytes that values in memory may take.
            rows: Rows of a run of the suffix from the bytes that each takes.
        """
        self.trunk, self.judge, self.work = trunk, judge, work
        # All values of a run are there twice before they are stored; on a GPU they are written where they stay.
        most = RUN_BYTES * (1 if trunk.provider.name == "cpu" else ON_DEVICE)
        self._inputs, self._step, self._pool = inputs, int(np.clip(most // trunk.each_bytes, 1, step)), pool
        self.n = len(judge.targets)
        self._budget = budget
        tables = min(budget // TABLES, RACING_BYTES * self.n * len(trunk.space.groups))
        self.fits = max(4, (budget - tables) // trunk.each_bytes)
        self.shifts: dict[int, npt.NDArray[np.float32]] = {}
        self.states: dict[tuple[int, ...], State] = {}
        for key, site in trunk.sites.items():
            names = [*site.cut, *(reader.output for reader in (site.shortcut.readers if site.shortcut else ()))]
            each = trunk.bytes_of(names)
            state = State(site, frozenset(), judge, inputs, step, rows(each), pool, work, each_bytes=each)
            state.shifts = self.shifts
            self.states[key] = state
        self.removed: frozenset[int] | None = None
        self.base = Log.empty(self.n)
        self._block: Indices | None = None

    # --- values in memory -----------------------------------------------------------------------------------------

    def enter(self, removed: frozenset[int]) -> None:
        """Know what the network says without `removed`; have its values in memory if those of all images fit."""
        if self.removed == removed:
            return
        self.base = Log.empty(self.n)
        self.removed, self._block = removed, None
        for state in self.states.values():
            state.reset(removed, self.base)
        if self.fits >= self.n:
            self.load(np.arange(self.n, dtype=np.int64))
            return

        def run(start: int) -> tuple[Indices, Array]:
            at = np.arange(start, min(start + self._step, self.n), dtype=np.int64)
            return at, self.trunk.run(self._inputs(at), removed, values=False)[""]

        for at, out in self._pool.map(run, range(0, self.n, self._step)):
            self._heard(at, out)

    def load(self, images: Indices) -> None:
        """Have the values of these images, which rise, in memory."""
        if self._block is not None and np.array_equal(self._block, images):
            return
        assert self.removed is not None
        block = self.trunk.load(self._inputs, images, self.removed, self._step, self._pool, self._heard)
        self._block = images
        self.work.add(prefixes=len(images))
        for state in self.states.values():
            state.adopt(block)

    def _heard(self, at: Indices, out: Array) -> None:
        if np.isnan(self.base.margin[at]).any():
            self.base.put(at, self.judge.rows(out, at))

    def results(self, removed: frozenset[int]) -> Log:
        """What the network says of all images without `removed`."""
        self.enter(removed)
        return self.base

    # --- questions ------------------------------------------------------------------------------------------------

    def lowest(self, asked: Contest, sites: Mapping[tuple[int, ...], Sequence[int]]) -> list[Runner]:
        """The k candidates of smallest key, smallest first.

        Args:
            asked: What is asked.
            sites: Candidates by the reads where they are masked; those that nothing reads under ().
        """
        self.enter(asked.removed)
        board = Board(asked.k)
        idle = next(iter(self.states.values()))
        for group in sites.get((), ()):  # nothing reads it: the network says what it said
            log = self.base.only(np.ones(self.n, bool))
            runner = Runner(group, idle, np.zeros(0, np.int64), asked.saved[group], asked.rank[group], log)
            runner.cost, runner.loss = int(log.cost.sum()), int(log.loss.sum())
            board.enter(runner)
        where = {group: self.states[key] for key, groups in sites.items() if key for group in groups}
        for some in few_at_a_time(asked, list(where), self.n, self._budget):
            lined_up = [(where[group], group) for group in some]
            if self.fits >= self.n:
                entered = [(state, start(asked, state, group)) for state, group in lined_up]
                compete(asked, board, entered, self._pool)
                for state, runner in sorted(entered, key=lambda at: nearness(at[1])):
                    remember(state, [runner], self._budget)
            else:
                self._by_blocks(asked, board, lined_up)
        return [runner for _, runner in board.best]

    def _by_blocks(self, asked: Contest, board: Board, lined_up: Collection[tuple[State, int]]) -> None:
        """Values of all images do not fit: those at risk come first, and most candidates never see the others."""
        order = np.argsort(self.base.margin, kind="stable")
        blocks = [np.sort(order[i : i + self.fits]) for i in range(0, self.n, self.fits)]
        none, every = np.zeros(0, np.int64), np.arange(self.n, dtype=np.int64)
        entered = []
        for state, group in lined_up:
            runner = Runner(group, state, none, asked.saved[group], asked.rank[group], Log.empty(self.n))
            order_images(asked, state, runner, every, None)
            entered.append((state, runner))
        entered.sort(key=lambda at: (at[1].rank.of(int(at[1].hope)), at[1].hope))
        # Somebody must be complete before anybody can be out. The second pass begins with the block still in memory.
        for some, way in ((entered[: asked.k], blocks[::-1]), (entered[asked.k :], blocks)):
            for number, block in enumerate(way):
                active = [(state, runner) for state, runner in some if not runner.out]
                if not active:
                    break
                self.load(block)
                for state, runner in active:
                    before = int(runner.log.cost.sum()), int(runner.log.loss.sum())
                    known = state.known(runner.group)
                    runner.log.copy_from(known, ~np.isnan(known.margin))
                    runner.cost += int(runner.log.cost.sum()) - before[0]
                    runner.loss += int(runner.log.loss.sum()) - before[1]
                    order_images(asked, state, runner)
                    runner.more = number + 1 < len(way)
                racing = [runner for _, runner in active]
                race(racing, board, guess(asked, racing), asked.largest, self._pool)
        for state, runner in sorted(entered, key=lambda at: nearness(at[1])):
            remember(state, [runner], self._budget)
