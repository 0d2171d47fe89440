"""CAR of channel groups: every candidate in full, or the lowest ones by exact elimination."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar.channels import ChannelSpace
from onnxcar.errors import InternalError
from onnxcar.executors import Pool
from onnxcar.facts import trace
from onnxcar.metrics import LOSS_ONE, Metric, Rows, Score, Tally, metric
from onnxcar.model import Model
from onnxcar.runtime import n_cores, open_network, resolve_provider
from onnxcar.scoring._bet import risk_of
from onnxcar.scoring._evaluate import ON_DEVICE, SHARE, feeds, free_bytes, judge_for, samples_per_run
from onnxcar.scoring._lowest import Contest, lowest
from onnxcar.scoring._open import open_site, whole_site
from onnxcar.scoring._race import Key, Log, Rank, Runner
from onnxcar.scoring._site import BASE, Block, reads_of
from onnxcar.scoring._state import State, Work
from onnxcar.scoring._trunk import open_trunk
from onnxcar.scoring._verdict import open_verdicts
from onnxcar.scoring._wide import Wide

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["Pick", "Scorer", "Work"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
ROW_BYTES = 16 << 20  # of cut values gathered for one run
COUNTS = ("top1", "top5", "balanced")  # metrics that are counts of samples
FIRST_ROWS = 64  # rows of a run until it is known how long they take
MOST_ROWS = 256


@dataclass(frozen=True)
class Pick:
    """A candidate and the score of the network without it."""

    group: int
    score: Score


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
        approximate: float | None = None,
        precision: str | None = None,
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
            approximate: Probability that any pick of a whole search (steps that remove more and more groups) is not
                that of the full count; None: exact.
            precision: What networks compute in, one of `PRECISIONS`; None: as the provider says.

        Raises:
            DataError: No samples, no labels, a wrong shape, a label outside the classes.
            MetricError: The metric does not fit labels or outputs.
            ModelError: ONNX Runtime cannot run the model.
        """
        self.space = space
        self.data = data
        self.metric = _metric(metric)
        self._batch = batch_size
        self._risk = approximate
        few = np.arange(min(4, len(data)), dtype=np.int64)
        sample = data.inputs(few) if len(few) else {}
        tried = sample if all(len(value) > 1 for value in sample.values()) and sample else None
        where = resolve_provider(provider, precision)
        self._memory = memory_bytes or free_bytes(where) // SHARE
        # A GPU is one worker, and another prepares the next batch meanwhile.
        self._pool = Pool((n_cores() if threads is None else threads) if where.name == "cpu" else 2)
        # Batches run side by side, each on one thread: nobody waits for anybody inside a run.
        self._network = open_network(space.model, provider=where, threads=1, sample=tried)
        # Which axes follow the batch is known of the copy whose batch is free, not of the file.
        freed = Model(self._network.proto, "", space.model.path)
        self._rows_space = replace(space, facts=trace(freed)) if self._network.freed else space
        self._judge = judge_for(self._network, data, self.metric)
        self._sample = feeds(self._network, data, few)
        self._step = samples_per_run(self._network, self._sample, self._memory, batch_size)
        outputs = self._network.run(self._sample)[0]
        self._output_shape = self._judge.rows(outputs, few).outputs.shape[1:]
        held = where.on_device and self._network.fixed is None
        self._verdicts = open_verdicts(self._judge, outputs, self._network.session) if held else None
        self._scale = 1 if where.name == "cpu" else ON_DEVICE
        self._budget = self._memory // 2  # the rest is for what a run needs
        self._reads = reads_of(space)
        self._states: dict[tuple[int, ...], State] = {}
        self._scores: dict[frozenset[int], Score] = {}
        self._wide: Wide | None = None
        self._winner: tuple[frozenset[int], Log] | None = None
        self._shifts: dict[int, npt.NDArray[np.float32]] = {}  # what candidates did to margins when last run
        self._no_wide = not self.metric.additive
        #: Set where groups of all layers compete: networks are then scored by what such steps need anyway.
        self.all_sites = False
        self._named = dict(self._sample)
        self.work = Work()
        self.flips: dict[int, npt.NDArray[np.bool_]] = {}
        self.base_correct: npt.NDArray[np.bool_] = np.zeros(0, bool)
        self.keep_losses = False  # four bytes for each candidate and image: only for who asks
        self.losses: dict[int, npt.NDArray[np.float32]] = {}

    def step(self, removed: frozenset[int]) -> None:
        """Told where a search stands; a scorer of one model has no use for it."""

    # --- whole networks -------------------------------------------------------------------------------------------

    def base(self, removed: Collection[int] = ()) -> Score:
        """Score of the network with the groups `removed` masked where they are read."""
        gone = frozenset(removed)
        if gone not in self._scores:
            wide = self._open_wide() if self.all_sites else None
            self._scores[gone] = self._whole(gone) if wide is None else self._of(wide.results(gone))
        return self._scores[gone]

    def _of(self, log: Log, outputs: Array | None = None) -> Score:
        images = np.arange(len(self.data), dtype=np.int64)
        return self._judge.score(self._judge.tally(log.rows(images), images), outputs)

    def _whole(self, removed: frozenset[int]) -> Score:
        # No read of its own: removed groups are constants of the graph.
        site = whole_site(self._rows_space, self._network, (), removed) if removed else None

        def run(start: int) -> tuple[Indices, Rows]:
            at = np.arange(start, min(start + self._step, len(self.data)), dtype=np.int64)
            inputs = feeds(self._network, self.data, at)
            if site is None:
                out = self._network.run(inputs)[0]
            else:
                out = site.run(Block(at, inputs), np.full(len(at), BASE), np.arange(len(at)))
            return at, self._judge.rows(out, at)

        log, outputs = Log.empty(len(self.data)), []
        for at, rows in self._pool.map(run, range(0, len(self.data), self._step)):
            log.put(at, rows)
            if not self.metric.additive:
                outputs.append(rows.outputs)
        self._winner = (removed, log)
        return self._of(log, np.concatenate(outputs) if outputs else None)

    # --- candidates in full ---------------------------------------------------------------------------------------

    def score(self, removed: Collection[int], candidates: Sequence[int]) -> list[Score]:
        """Score of the network without `removed` and each candidate in turn, in their order, on all samples.

        Which samples changed is kept in `flips` for `reliability`; with `keep_losses` what each sample's cross-entropy
        gained without the candidate, in nats, is kept in `losses`.
        """
        gone = frozenset(removed)
        self.flips, self.losses = {}, {}
        found: dict[int, Score] = {}
        for key, groups in self._by_site(candidates).items():
            if not key:
                found.update({group: self.base(gone) for group in groups})
                continue
            found.update(self._score_site(self._state(key, gone), gone, groups))
        return [found[group] for group in candidates]

    def _score_site(self, state: State, removed: frozenset[int], groups: Sequence[int]) -> dict[int, Score]:
        n = len(self.data)
        size = max(4, self._budget // max(1, state.each_bytes))
        tallies = {group: Tally() for group in groups}
        outputs = {group: self._room_for_outputs() for group in groups}
        flips = {group: np.zeros(n, bool) for group in groups}
        losses = {group: np.zeros(n, np.float32) for group in groups} if self.keep_losses else {}
        for images in (np.arange(i, min(i + size, n), dtype=np.int64) for i in range(0, n, size)):
            state.enter(removed, images)
            state.run_base(images)
            same = self._room_for_outputs()
            if same is not None:
                state.fill(Log.empty(n), BASE, images, same)
            for group in groups:
                log, given = state.known(group), outputs[group]
                todo = images[np.isnan(log.margin[images])] if given is None else images
                state.fill(log, group, todo, given)
                tallies[group].add(self._judge.tally(log.rows(images), images))
                flips[group][images] = log.top1[images] != state.base.top1[images]
                if losses:
                    losses[group][images] = (log.loss[images] - state.base.loss[images]) / LOSS_ONE
        if self._judge.labelled:
            self.base_correct = state.base.top1.copy()
            self.flips.update(flips)
            self.losses.update(losses)
        self.work.add(pairs=n * len(groups))
        return {group: self._judge.score(tallies[group], outputs[group]) for group in groups}

    def _room_for_outputs(self) -> Array | None:
        """Where all outputs of a candidate go, if the metric needs them."""
        return None if self.metric.additive else np.zeros((len(self.data), *self._output_shape), np.float64)

    # --- the lowest -----------------------------------------------------------------------------------------------

    def lowest(
        self,
        removed: Collection[int],
        candidates: Sequence[int],
        order_hint: Sequence[int] | None = None,
        k: int = 1,
        *,
        per_mac: bool = False,
        saved: Mapping[int, int] | None = None,
    ) -> list[Pick]:
        """The k candidates of lowest importance, lowest first: what scoring all of them in full would give.

        Of equal costs the smaller mean loss goes first, then the one that saves more MACs, then the lower id.

        Args:
            removed: Groups that are gone.
            candidates: Groups on trial.
            order_hint: Groups expected to be lowest, best first; saves work, changes nothing.
            k: How many.
            per_mac: Whether importances are taken per MAC saved.
            saved: Candidate -> MACs that its removal saves, where they are not to be taken from the space.
        """
        gone = frozenset(removed)
        k = min(k, len(candidates))
        if k == 0:
            return []
        if saved is None:
            saved = {group: self.space.saved_macs(group, gone) for group in candidates}
        rank = self._ranks(gone, saved, per_mac)
        if not self.metric.additive:
            return self._lowest_in_full(gone, candidates, k, rank, saved)
        by_site = self._by_site(candidates)
        self.work.add(pairs=len(self.data) * len(candidates))
        hints = {group: i for i, group in enumerate(order_hint or ())}
        risk = None if self._risk is None else risk_of(self._risk, len(gone), k)
        asked = Contest(gone, k, rank, saved, hints, self._judge.largest_cost, self._judge.typical_cost, risk)
        wide = self._open_wide() if self.all_sites else None
        if wide is not None:
            return [self._picked(runner, gone) for runner in wide.lowest(asked, by_site)]
        keys = list(by_site)
        won = lowest(asked, list(by_site.values()), lambda i, held: self._state(keys[i], gone, held), self._budget)
        if len(won) == 1:
            self._winner = (gone | {won[0].group}, won[0].log)
        return [self._picked(runner, gone) for runner in won]

    def _picked(self, runner: Runner, removed: frozenset[int]) -> Pick:
        return self._pick(runner.group, self._of(runner.log), removed)

    def _pick(self, group: int, score: Score, removed: frozenset[int]) -> Pick:
        """The candidate; its score is the next step's base where it is a count.

        Other numbers differ in their last bits from those of a run of the whole network, which is what a search that
        was interrupted here would ask for.
        """
        if self.metric.name in COUNTS and not self.all_sites:
            self._scores[removed | {group}] = score
        return Pick(group, score)

    def _lowest_in_full(
        self,
        removed: frozenset[int],
        candidates: Sequence[int],
        k: int,
        rank: dict[int, Rank],
        saved: Mapping[int, int],
    ) -> list[Pick]:
        scores = self.score(removed, candidates)
        keys: dict[int, Key] = {}
        found = dict(zip(candidates, scores, strict=True))
        for group, score in found.items():
            if score.cost is not None:
                lost = rank[group].of(score.cost)
            else:
                lost = self.base(removed).reduction(score)
                lost = lost / saved[group] if rank[group].saved else lost
            keys[group] = (lost, score.loss_units, -saved[group], group)
        return [self._pick(group, found[group], removed) for group in sorted(keys, key=keys.__getitem__)[:k]]

    def _ranks(self, removed: frozenset[int], saved: Mapping[int, int], per_mac: bool) -> dict[int, Rank]:
        if not per_mac:
            return dict.fromkeys(saved, Rank())
        base = self.base(removed).cost or 0
        return {group: Rank(base, macs) for group, macs in saved.items()}

    # --- sites ----------------------------------------------------------------------------------------------------

    def _by_site(self, candidates: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        """Candidates by the reads where they are masked; those that nothing reads under ()."""
        out: dict[tuple[int, ...], list[int]] = {}
        for group in candidates:
            if not 0 <= group < len(self.space.groups):
                raise InternalError(f"Group {group} is not among the {len(self.space.groups)} of the space.")
            out.setdefault(self._reads.get(group, ()), []).append(group)
        return out

    def _state(self, key: tuple[int, ...], removed: frozenset[int], held: Sequence[State] = ()) -> State:
        """The site of these reads; made anew where groups read elsewhere have gone since. `held` stay in memory."""
        own = set(key)
        foreign = frozenset(g for g in removed if not set(self._reads.get(g, ())) <= own)
        state = self._states.pop(key, None)
        if state is None or state.foreign != foreign:
            site = open_site(self._rows_space, self._network, key, foreign, sample=self._sample)
            state = State(site, foreign, self._judge, self._inputs, self._step, 1, self._pool, self.work)
            state.shifts, state.verdicts = self._shifts, self._verdicts
            few = np.arange(min(4, len(self.data)), dtype=np.int64)
            state.each_bytes = max(1, site.load(self._inputs, few, len(few)).n_bytes // len(few))
            if site.shortcut is not None:
                state.each_bytes += state.each_bytes // 2  # outputs of linear readers
            state.batch = self._rows_for(state.each_bytes)
            if self._batch is None and site.by_row and state.n >= 4 * FIRST_ROWS:
                state.tune = int(np.clip(self._scale * ROW_BYTES // state.each_bytes, 4, self._scale * MOST_ROWS))
            state.session_bytes = 2 * self.space.model.proto.ByteSize()
        state.winner = self._winner
        self._states[key] = state
        for other in list(self._states):
            if sum(s.n_bytes for s in self._states.values()) <= self._budget:
                break
            if other != key and self._states[other] not in held:
                del self._states[other]
        return state

    def _open_wide(self) -> Wide | None:
        """All sites at once, None where some cannot be scored by rows."""
        if self._wide is None and not self._no_wide:
            keys = sorted({key for key in self._reads.values() if key})
            trunk = open_trunk(self._rows_space, self._network, keys, self._named)
            if trunk is None:
                self._no_wide = True
                return None
            self._states.clear()
            self._wide = Wide(
                trunk, self._judge, self._inputs, self._step, self._pool, self.work, self._budget, self._rows_for
            )
            for state in self._wide.states.values():
                state.verdicts = self._verdicts
            self._wide.shifts.update(self._shifts)
            self._shifts = self._wide.shifts
        return self._wide

    def learn(self, other: Scorer, names: Mapping[int, int]) -> None:
        """Take over what another scorer expects of candidates: it saves work and changes no answer.

        Args:
            other: A scorer on the same data.
            names: Its groups -> these.
        """
        known = other._shifts
        self._shifts.update({names[group]: shift for group, shift in known.items() if group in names})

    def release(self) -> None:
        """Let go of sessions and activations; the next question opens what it needs."""
        self._states.clear()
        self._wide = None

    def _rows_for(self, each_bytes: int) -> int:
        """Rows of a run whose cut values take so many bytes each."""
        return self._batch or int(np.clip(self._scale * ROW_BYTES // each_bytes, 4, self._scale * FIRST_ROWS))

    def _inputs(self, images: Indices) -> dict[str, Array]:
        return feeds(self._network, self.data, images)


_metric = metric
