"""A site at work: its sessions, the images in memory, and what is known of candidates on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar._judge import Judge
from onnxcar.executors import Pool
from onnxcar.metrics import Rows
from onnxcar.scoring._race import Log
from onnxcar.scoring._site import BASE, Block, Site
from onnxcar.scoring._verdict import Verdicts

__all__ = ["State", "Work"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
RUN_S = 0.012  # seconds that a run of rows should take
FEWEST = 32  # rows of a run: fewer gain nothing, more are run for candidates that are nearly out


@dataclass
class Work:
    """What was done, for those who measure.

    Attributes:
        rows: (candidate, image) pairs that were run.
        pairs: Pairs that scoring everything in full would have run.
        prefixes: Images whose prefix was run.
        again: Pairs run again because rounding might have decided them.
    """

    rows: int = 0
    pairs: int = 0
    prefixes: int = 0
    again: int = 0
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        """Count on, from any thread."""
        with self.lock:
            for name, n in counts.items():
                setattr(self, name, getattr(self, name) + n)


@dataclass(eq=False)
class State:
    """One site with some images.

    Attributes:
        site: Its graphs.
        foreign: Removed groups that are written into them.
        judge: The metric.
        inputs: Network inputs of the images at some positions.
        step: Images of one run of the prefix.
        batch: Rows of one run of the suffix.
        pool: Runs batches side by side.
        work: What is done is counted there.
        each_bytes: Memory that one image's cut values take.
        session_bytes: About what the sessions take.
        verdicts: Judges rows on the device, where there is one and the metric allows it.
        tune: Rows of a run at most, once the batch has been chosen by a probe; 0: it stays as it is.
        block: Cut values of the images in memory.
        removed: Groups that are masked at present.
        winner: What a network said of all images when it was a candidate, perhaps at another site, and what is removed
            from it: an expectation of the base.
        base: What the network says without any candidate, as far as it was run.
        margins: About the margins of all images without any candidate, (n,): an expectation, no result.
        costs: About their costs, (n,), likewise.
        norms: Group -> size of its channels on each image of the block where they are read; only where all reads are
            cut values.
        shifts: Group -> what its removal did to each image's margin when it was last run, (n,), NaN = never run.
        logs: Group -> its results in the network without `removed`, as far as they were run.
    """

    site: Site
    foreign: frozenset[int]
    judge: Judge
    inputs: Callable[[Indices], dict[str, Array]]
    step: int
    batch: int
    pool: Pool
    work: Work
    each_bytes: int = 0
    session_bytes: int = 0
    verdicts: Verdicts | None = None
    tune: int = 0
    block: Block | None = None
    removed: frozenset[int] | None = None
    winner: tuple[frozenset[int], Log] | None = None
    base: Log = field(init=False)
    margins: npt.NDArray[np.float32] = field(init=False)
    costs: npt.NDArray[np.int64] = field(init=False)
    norms: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    shifts: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    logs: dict[int, Log] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = Log.empty(self.n)
        self.margins, self.costs = self.base.margin, self.base.cost

    @property
    def n_bytes(self) -> int:
        """Memory taken with all images loaded."""
        return self.session_bytes + self.each_bytes * self.n

    @property
    def n(self) -> int:
        """Number of all images."""
        return len(self.judge.targets)

    def _probe(self, images: Indices) -> None:
        """Choose how many rows a run takes: enough to hide what a run costs besides, few enough to stop in time."""
        assert self.block is not None
        at = self.block.where(images[:FEWEST])
        none = np.full(len(at), BASE, np.int64)
        took = []
        # A busy machine must not make batches small; what a GPU takes no clock of the CPU knows.
        clock = time.perf_counter if self.verdicts is not None else time.thread_time
        for _ in range(3):
            start = clock()
            self.site.run(self.block, none, at, exact=False)
            took.append(clock() - start)
        each = max(1e-7, min(took) / len(at))
        self.batch = int(np.clip(RUN_S / each, min(FEWEST, self.tune), self.tune))
        self.tune = 0

    def rows(self, candidates: Indices, images: Indices) -> Rows:
        """Results of (candidate, image) pairs; the images are in the block."""
        assert self.block is not None
        self.work.add(rows=len(images))
        at = self.block.where(images)
        if self.verdicts is not None and self.site.by_row:
            return self._judged(self.verdicts, candidates, images, at)
        out = self.site.run(self.block, candidates, at, exact=False)
        if self.site.shortcut is not None and self.judge.labelled:
            # What the shortcut's rounding might decide is decided by a run of all nodes.
            again = np.flatnonzero(self.judge.doubtful(out, images, self.site.shortcut.doubt))
            if len(again):
                self.work.add(again=len(again))
                out[again] = self.site.run(self.block, candidates[again], at[again])
        return self.judge.rows(out, images)

    def _judged(self, verdicts: Verdicts, candidates: Indices, images: Indices, at: Indices) -> Rows:
        """As `rows`, with the outputs judged on the device."""
        assert self.block is not None
        doubt = -1.0 if self.site.shortcut is None else self.site.shortcut.doubt
        rows, near = verdicts.rows(self.site.run_held(self.block, candidates, at, exact=False), images, doubt)
        again = np.flatnonzero(near)
        if len(again):
            self.work.add(again=len(again))
            exact, _ = verdicts.rows(self.site.run_held(self.block, candidates[again], at[again]), images[again])
            for name in ("cost", "loss", "top1", "top5", "margin"):
                getattr(rows, name)[again] = getattr(exact, name)
        return rows

    def enter(self, removed: frozenset[int], images: Indices) -> None:
        """Have these images (consecutive ones) in memory and `removed` masked; what still holds is kept."""
        if self.block is None or not np.array_equal(self.block.indices, images):
            self.block = self.site.load(self.inputs, images, self.step, self.pool)
            self.norms = _norms(self.site, self.block)
            self.work.add(prefixes=len(images))
            stale = True
        else:
            stale = self.removed != removed
        if self.removed != removed:
            self._carry(removed)
            self.site.set_removed(removed)
            self.removed = removed
        if stale:
            self.site.refresh(self.block, self.step, self.pool)
        if self.tune:
            self._probe(images)

    def reset(self, removed: frozenset[int], base: Log) -> None:
        """Mask `removed`, of which `base` says what the network says; a `Trunk` fills it and makes the blocks."""
        self.removed, self.base, self.block, self.logs = removed, base, None, {}
        self.margins, self.costs = base.margin, base.cost
        self.site.set_removed(removed)

    def adopt(self, block: Block) -> None:
        """Have this block in memory: a trunk made it for all sites."""
        self.block = block
        self.norms = _norms(self.site, block)
        if self.tune:
            self._probe(block.indices)

    def _carry(self, removed: frozenset[int]) -> None:
        """Keep the results of images that the newly removed groups do not touch; of the others only expectations.

        The winner's results would do for the network without it, but for the last bits: they come from another sum.
        """
        assert self.block is not None
        new = removed - (self.removed or frozenset())
        grown = self.removed is not None and self.removed <= removed and len(self.block.indices) == self.n
        same = np.zeros(self.n, bool)
        if grown and all(group in self.norms for group in new):
            same = np.logical_and.reduce([self.norms[group] == 0 for group in new]) if new else ~same
        self.base = self.base.only(same)
        self.margins, self.costs = self.base.margin, self.base.cost
        if self.winner is not None and self.winner[0] == removed:
            self.margins, self.costs = self.winner[1].margin, self.winner[1].cost
        self.logs = (
            {group: log.only(same) for group, log in self.logs.items() if group not in removed} if same.any() else {}
        )

    def run_base(self, images: Indices) -> None:
        """Know what the network says of these images without any candidate."""
        self.fill(self.base, BASE, images[np.isnan(self.base.margin[images])])

    def expect(self, groups: Collection[int]) -> None:
        """Know the base where candidates need it: on all images if nothing is expected yet.

        Else on those that some candidates leave alone, if they are expected to cost something: no other would rule
        anybody out.
        """
        assert self.block is not None
        images = self.block.indices
        if np.isnan(self.margins[images]).any():
            self.run_base(images)
            self.margins, self.costs = self.base.margin, self.base.cost
        still = [self.norms[group] == 0 for group in groups if group in self.norms]
        if still:
            self.run_base(images[np.logical_or.reduce(still) & (self.costs[images] > 0)])

    def fill(self, log: Log, group: int, todo: Indices, outputs: Array | None = None) -> None:
        """Run one candidate on the images `todo`; `outputs`, if given, takes the network's outputs, (n, ...)."""

        def run(start: int) -> tuple[Indices, Rows]:
            at = todo[start : start + self.batch]
            return at, self.rows(np.full(len(at), group, np.int64), at)

        for at, rows in self.pool.map(run, range(0, len(todo), self.batch)):
            log.put(at, rows)
            if outputs is not None:
                outputs[at] = rows.outputs

    def known(self, group: int) -> Log:
        """A candidate's results that need no run: what was kept, and images on which its channels are all zero.

        `expect` comes first.
        """
        assert self.block is not None
        log = self.logs.get(group)
        log = Log.empty(self.n) if log is None else log
        norms = self.norms.get(group)
        if norms is not None:
            alone = self.block.indices[norms == 0]
            log.copy_from(self.base, alone[~np.isnan(self.base.margin[alone])])
        return log


def _norms(site: Site, block: Block) -> dict[int, npt.NDArray[np.float32]]:
    """Group -> size of its channels on each image where they are read; only groups read at cut values alone.

    Zero exactly where all of them are zero.
    """
    if not site.by_row or not site.reads or set(site.entries) != set(site.reads):
        return {}
    total: dict[int, npt.NDArray[np.float32]] = {}
    for k in site.entries:
        read = site.space.reads[k]
        sizes = site.sizes(k, block)
        ids = read.groups.ravel()
        for group in _members(ids):
            mine = sizes[:, ids == group].sum(1)
            total[group] = total[group] + mine if group in total else mine
    return {group: np.sqrt(value) for group, value in total.items()}


def _members(ids: npt.NDArray[np.int32]) -> Collection[int]:
    return [int(group) for group in np.unique(ids) if group >= 0]
