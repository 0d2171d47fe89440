"""CAR of channel groups: every candidate in full, or the lowest ones by exact elimination."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar._judge import Judge
from onnxcar.channels import ChannelSpace
from onnxcar.errors import InternalError
from onnxcar.executors import Pool
from onnxcar.metrics import Metric, Rows, Score, Tally, metric
from onnxcar.runtime import n_cores, open_network
from onnxcar.scoring._evaluate import SHARE, feeds, free_bytes, judge_for, samples_per_run
from onnxcar.scoring._order import risk_order
from onnxcar.scoring._race import Key, Log, Runner, race
from onnxcar.scoring._site import BASE, Block, Site, open_site, reads_of, whole_site

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["Pick", "Scorer", "Work"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
ROW_BYTES = 24 << 20  # of cut values gathered for one run
LARGEST_BATCH = 64  # more would run rows of candidates that are nearly out


@dataclass(frozen=True)
class Pick:
    """A candidate and the score of the network without it."""

    group: int
    score: Score


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


@dataclass(eq=False)
class _State:
    """A site at work: its sessions, its images, and what is known of candidates on them."""

    site: Site
    foreign: frozenset[int]
    judge: Judge
    batch: int
    work: Work
    block: Block | None = None
    removed: frozenset[int] | None = None
    base: Log | None = None
    norms: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    shifts: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    last: dict[int, Log] = field(default_factory=dict)

    def rows(self, candidates: Indices, rows: Indices) -> Rows:
        """Results of (candidate, position in the block) pairs."""
        assert self.block is not None
        with self.work.lock:
            self.work.rows += len(rows)
        out = self.site.run(self.block, candidates, rows, exact=False)
        images = self.block.indices[rows]
        if self.site.shortcut is not None and self.judge.labelled:
            # What the shortcut's rounding might decide is decided by a run of all nodes.
            again = np.flatnonzero(self.judge.doubtful(out, images, self.site.shortcut.doubt))
            if len(again):
                with self.work.lock:
                    self.work.again += len(again)
                out[again] = self.site.run(self.block, candidates[again], rows[again])
        return self.judge.rows(out, images)


class Scorer:
    """Scores networks without some groups, on one data set by one metric.

    Sessions and activations are kept from call to call: while a search stays at one layer, the part of the network in
    front of it runs once. No answer depends on what was asked before.
    """

    def __init__(
        self,
        space: ChannelSpace,
        data: Dataset,
        *,
        metric: str | Metric = "top1",
        provider: str = "auto",
        threads: int | None = None,
        memory_bytes: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Load the network and look at a few samples.

        Args:
            space: Structure of the model.
            data: Labelled samples.
            metric: Name, or a `Metric`.
            provider: Where it runs.
            threads: Of a run; None = all cores.
            memory_bytes: Bound on activations and inputs in memory; None = a quarter of what is free.
            batch_size: Rows of a run; None = chosen from the bound.

        Raises:
            DataError: No samples, no labels, a wrong shape, a label outside the classes.
            MetricError: The metric does not fit labels or outputs.
            ModelError: ONNX Runtime cannot run the model.
        """
        self.space = space
        self.data = data
        self.metric = _metric(metric)
        self._memory = memory_bytes or free_bytes() // SHARE
        self._batch = batch_size
        few = np.arange(min(4, len(data)), dtype=np.int64)
        sample = data.inputs(few) if len(few) else {}
        tried = sample if all(len(value) > 1 for value in sample.values()) and sample else None
        self._pool = Pool(n_cores() if threads is None else threads)
        # Batches run side by side, each on one thread: nobody waits for anybody inside a run.
        self._network = open_network(space.model, provider=provider, threads=1, sample=tried)
        self._judge = judge_for(self._network, data, self.metric)
        self._sample = feeds(self._network, data, few)
        self._step = samples_per_run(self._network, self._sample, self._memory, batch_size)
        self._reads = reads_of(space)
        self._states: dict[tuple[int, ...], _State] = {}
        self._scores: dict[frozenset[int], Score] = {}
        self.work = Work()
        self.flips: dict[int, npt.NDArray[np.bool_]] = {}
        self.base_correct: npt.NDArray[np.bool_] = np.zeros(0, bool)

    # --- whole networks -------------------------------------------------------------------------------------------

    def base(self, removed: Collection[int] = ()) -> Score:
        """Score of the network with the groups `removed` masked where they are read."""
        gone = frozenset(removed)
        if gone not in self._scores:
            self._scores[gone] = self._whole(gone)
        return self._scores[gone]

    def _whole(self, removed: frozenset[int]) -> Score:
        # No read of its own: removed groups are constants of the graph.
        site = whole_site(self.space, self._network, (), removed) if removed else None

        def run(start: int) -> tuple[Tally, Array]:
            at = np.arange(start, min(start + self._step, len(self.data)), dtype=np.int64)
            inputs = feeds(self._network, self.data, at)
            if site is None:
                out = self._network.run(inputs)[0]
            else:
                out = site.run(Block(at, inputs), np.full(len(at), BASE), np.arange(len(at)))
            rows = self._judge.rows(out, at)
            return self._judge.tally(rows, at), rows.outputs

        tally, outputs = Tally(), []
        for part, out in self._pool.map(run, range(0, len(self.data), self._step)):
            tally.add(part)
            if not self.metric.additive:
                outputs.append(out)
        return self._judge.score(tally, np.concatenate(outputs) if outputs else None)

    # --- candidates in full ---------------------------------------------------------------------------------------

    def score(self, removed: Collection[int], candidates: Sequence[int]) -> list[Score]:
        """Score of the network without `removed` and each candidate in turn, in their order, on all samples.

        Which samples changed is kept in `flips` for `reliability`.
        """
        gone = frozenset(removed)
        self.flips = {}
        found: dict[int, Score] = {}
        for key, groups in self._by_site(candidates).items():
            if not key:
                found.update({group: self.base(gone) for group in groups})
                continue
            found.update(self._score_site(self._state(key, gone), gone, groups))
        return [found[group] for group in candidates]

    def _score_site(self, state: _State, removed: frozenset[int], groups: Sequence[int]) -> dict[int, Score]:
        tallies = {group: Tally() for group in groups}
        outputs: dict[int, list[Array]] = {group: [] for group in groups}
        right: dict[int, list[Array]] = {group: [] for group in [*groups, BASE]}
        for at in self._blocks(state):
            self._enter(state, removed, at)
            assert state.block is not None
            n = len(at)
            base = self._log(state, BASE, np.arange(n), outputs if not self.metric.additive else None)
            right[BASE].append(base.top1)
            same = outputs.pop(BASE, [np.zeros(0)])[-1]
            self.work.pairs += n * len(groups)
            for group in groups:
                todo = self._changed(state, group)
                log = Log.empty(n)
                if len(todo) < n:
                    log.copy_from(base, np.setdiff1d(np.arange(n), todo))
                given = None if self.metric.additive else same.copy()
                self._log(state, group, todo, None, log, given)
                rows = Rows(log.cost, log.loss, log.top1, log.top5, log.margin, log.margin)
                tallies[group].add(self._judge.tally(rows, at))
                right[group].append(log.top1)
                if given is not None:
                    outputs[group].append(given)
        if self._judge.labelled:
            self.base_correct = np.concatenate(right.pop(BASE))
            for group in groups:
                self.flips[group] = np.concatenate(right[group]) != self.base_correct
        return {
            group: self._judge.score(tallies[group], np.concatenate(outputs[group]) if outputs[group] else None)
            for group in groups
        }

    def _log(
        self,
        state: _State,
        group: int,
        todo: Indices,
        outputs: dict[int, list[Array]] | None,
        log: Log | None = None,
        given: Array | None = None,
    ) -> Log:
        """Run one candidate on the images at `todo`."""
        assert state.block is not None
        log = Log.empty(len(state.block.indices)) if log is None else log
        parts = []

        def run(start: int) -> tuple[Indices, Rows]:
            at = todo[start : start + state.batch]
            return at, state.rows(np.full(len(at), group, np.int64), at)

        for at, rows in self._pool.map(run, range(0, len(todo), state.batch)):
            log.put(at, rows)
            if outputs is not None:
                parts.append(rows.outputs)
            if given is not None:
                given[at] = rows.outputs
        if outputs is not None:
            outputs[group] = [np.concatenate(parts)]
        return log

    # --- the lowest -----------------------------------------------------------------------------------------------

    def lowest(
        self,
        removed: Collection[int],
        candidates: Sequence[int],
        order_hint: Sequence[int] | None = None,
        k: int = 1,
        *,
        per_mac: bool = False,
    ) -> list[Pick]:
        """The k candidates of lowest importance, lowest first: what scoring all of them in full would give.

        Of equal costs the smaller mean loss goes first, then the one that saves more MACs, then the lower id.

        Args:
            removed: Groups that are gone.
            candidates: Groups on trial.
            order_hint: Groups expected to be lowest, best first; saves work, changes nothing.
            k: How many.
            per_mac: Whether importances are taken per MAC saved.
        """
        gone = frozenset(removed)
        k = min(k, len(candidates))
        if k == 0:
            return []
        rank = self._ranks(gone, candidates, per_mac)
        saved = {group: self.space.saved_macs(group, gone) for group in candidates}
        if not self.metric.additive:
            return self._lowest_in_full(gone, candidates, k, rank, saved)
        n = len(self.data)
        runners: list[Runner] = []
        hints = {group: i for i, group in enumerate(order_hint or ())}
        for key, groups in self._by_site(candidates).items():
            state = self._state(key, gone)
            if key and len(self._blocks(state)) > 1:
                return self._lowest_in_full(gone, candidates, k, rank, saved)
            runners += self._start(state, gone, groups, rank, saved, hints)
        self.work.pairs += n * len(runners)
        guess = int(np.partition([runner.hope for runner in runners], k - 1)[k - 1])
        won = race(runners, k, guess, self._judge.largest_cost, self._pool)
        for runner in runners:
            assert isinstance(runner.lane, _State)
            known = ~np.isnan(runner.log.margin)
            assert runner.lane.base is not None
            shift = runner.lane.shifts.setdefault(runner.group, np.full(n, np.nan, np.float32))
            shift[known] = (runner.log.margin - runner.lane.base.margin)[known]
        return [self._picked(runner, gone) for runner in won]

    def _picked(self, runner: Runner, removed: frozenset[int]) -> Pick:
        state, log = runner.lane, runner.log
        assert isinstance(state, _State)
        rows = Rows(log.cost, log.loss, log.top1, log.top5, log.margin, log.margin)
        score = self._judge.score(self._judge.tally(rows, np.arange(len(self.data))))
        self._scores[removed | {runner.group}] = score
        state.last[runner.group] = log
        return Pick(runner.group, score)

    def _start(
        self,
        state: _State,
        removed: frozenset[int],
        groups: Sequence[int],
        rank: dict[int, Callable[[int], float]],
        saved: dict[int, int],
        hints: dict[int, int],
    ) -> list[Runner]:
        """Candidates of one site at the start: unchanged images counted, the others in the order of their risk."""
        n = len(self.data)
        self._enter(state, removed, np.arange(n))
        assert state.base is not None
        state.last = {}
        runners = []
        for group in groups:
            log = Log.empty(n)
            todo = self._changed(state, group)
            if len(todo) < n:
                log.copy_from(state.base, np.setdiff1d(np.arange(n), todo))
            order, hope = risk_order(
                state.base, todo, state.shifts.get(group), state.norms.get(group), self.metric.name
            )
            runner = Runner(group, state, order, saved[group], rank[group], log)
            runner.cost, runner.loss = int(log.cost.sum()), int(log.loss.sum())
            runner.hope = (
                runner.cost + hope - (len(hints) - hints[group]) * 1e-3 if group in hints else runner.cost + hope
            )
            runners.append(runner)
        return runners

    def _lowest_in_full(
        self,
        removed: frozenset[int],
        candidates: Sequence[int],
        k: int,
        rank: dict[int, Callable[[int], float]],
        saved: dict[int, int],
    ) -> list[Pick]:
        scores = self.score(removed, candidates)
        keys: dict[int, Key] = {}
        found = dict(zip(candidates, scores, strict=True))
        for group, score in found.items():
            if score.cost is not None:
                lost = rank[group](score.cost)
            else:
                lost = self.base(removed).reduction(score)
                lost = lost / saved[group] if rank[group] is not _itself and saved[group] else lost
            keys[group] = (lost, score.loss_units, -saved[group], group)
        picks = [Pick(group, found[group]) for group in sorted(keys, key=keys.__getitem__)[:k]]
        for pick in picks:
            self._scores[removed | {pick.group}] = pick.score
        return picks

    def _ranks(
        self, removed: frozenset[int], candidates: Sequence[int], per_mac: bool
    ) -> dict[int, Callable[[int], float]]:
        """What costs are compared as: themselves, or what is lost for each MAC saved."""
        if not per_mac:
            return dict.fromkeys(candidates, _itself)
        base = self.base(removed).cost or 0
        return {g: _per_mac(base, self.space.saved_macs(g, removed)) for g in candidates}

    # --- sites ----------------------------------------------------------------------------------------------------

    def _by_site(self, candidates: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        """Candidates by the reads where they are masked; those that nothing reads under ()."""
        out: dict[tuple[int, ...], list[int]] = {}
        for group in candidates:
            if not 0 <= group < len(self.space.groups):
                raise InternalError(f"Group {group} is not among the {len(self.space.groups)} of the space.")
            out.setdefault(self._reads.get(group, ()), []).append(group)
        return out

    def _state(self, key: tuple[int, ...], removed: frozenset[int]) -> _State:
        """The site of these reads; made anew where groups read elsewhere have gone since."""
        own = set(key)
        foreign = frozenset(g for g in removed if not set(self._reads.get(g, ())) <= own)
        state = self._states.get(key)
        if state is None or state.foreign != foreign:
            held = [k for k in self._states if k != key]
            for k in held:  # activations of one site at a time: a search stays at a layer
                del self._states[k]
            site = open_site(self.space, self._network, key, foreign, sample=self._sample)
            state = _State(site, foreign, self._judge, 1, self.work)
            self._states[key] = state
        return state

    def _blocks(self, state: _State) -> list[Indices]:
        """Images in pieces whose cut values fit in half of the memory bound."""
        if state.block is None or len(state.block.indices) < min(4, len(self.data)):
            self._load(state, np.arange(min(4, len(self.data)), dtype=np.int64))
        assert state.block is not None
        each = max(1, state.block.n_bytes // len(state.block.indices))
        state.batch = self._batch or int(np.clip(ROW_BYTES // each, 4, LARGEST_BATCH))
        fits = max(4, self._memory // 2 // each)
        n = len(self.data)
        return [np.arange(i, min(i + fits, n), dtype=np.int64) for i in range(0, n, fits)]

    def _load(self, state: _State, at: Indices) -> None:
        state.block = state.site.load(lambda part: feeds(self._network, self.data, part), at, self._step, self._pool)
        state.base, state.removed = None, None
        state.norms = _norms(state.site, state.block)
        self.work.prefixes += len(at)

    def _enter(self, state: _State, removed: frozenset[int], at: Indices) -> None:
        """Load the images at `at`, mask `removed`, and know what the network says without any candidate."""
        self._blocks(state) if state.block is None else None
        if state.block is None or not np.array_equal(state.block.indices, at):
            self._load(state, at)
        if state.removed == removed and state.base is not None:
            return
        new = None if state.removed is None else removed - state.removed
        state.site.set_removed(removed)
        assert state.block is not None
        state.site.refresh(state.block, self._step, self._pool)
        last = state.last.get(next(iter(new))) if new is not None and len(new) == 1 else None
        if last is not None and state.removed is not None and state.removed < removed:
            state.base = last
        else:
            state.base = self._log(state, BASE, np.arange(len(at)), None)
        state.removed = removed

    def _changed(self, state: _State, group: int) -> Indices:
        """Positions of the images on which the group's channels are not all zero where they are read."""
        assert state.block is not None
        norms = state.norms.get(group)
        if norms is None:
            return np.arange(len(state.block.indices), dtype=np.int64)
        return np.flatnonzero(norms != 0)


_metric = metric


def _itself(cost: int) -> float:
    return cost


def _per_mac(base: int, saved: int) -> Callable[[int], float]:
    def rank(cost: int) -> float:
        lost = cost - base
        if saved > 0:
            return lost / saved
        return 0.0 if lost == 0 else float(np.sign(lost)) * float("inf")

    return rank


def _norms(site: Site, block: Block) -> dict[int, npt.NDArray[np.float32]]:
    """Group -> size of its channels on each image where they are read; only groups read at cut values alone.

    Zero exactly where all of them are zero.
    """
    if not site.by_row or set(site.entries) != set(site.reads):
        return {}
    out: dict[int, npt.NDArray[np.float32]] = {}
    for k in site.entries:
        read = site.space.reads[k]
        values = block.values[read.value]
        rest = tuple(axis for axis, size in enumerate(read.groups.shape) if axis > 0 and size == 1)
        sizes = np.empty((len(values), int(np.prod(read.groups.shape))), np.float32)
        for start in range(0, len(values), 64):
            part = values[start : start + 64].astype(np.float32, copy=False)
            norm = np.sqrt(np.square(part).sum(rest))
            # Squares underflow: what is not zero must not look like it.
            tiny = (norm == 0) & (part != 0).any(rest)
            norm = np.where(tiny, np.finfo(np.float32).tiny, norm)
            sizes[start : start + 64] = norm.reshape(len(part), -1)
        ids = read.groups.ravel()
        for group in np.unique(ids[ids >= 0]).tolist():
            mine = np.square(sizes[:, ids == group]).sum(1)
            held = out.get(group)
            out[group] = mine if held is None else held + mine
    # The root of a sum of squares of tiny numbers may vanish again.
    return {g: np.sqrt(np.maximum(v, np.where(v > 0, np.float32(1e-30), np.float32(0)))) for g, v in out.items()}
