"""Prune a model: choose filters, remove them, verify the result, and say what was done.

The search is the paper's (Abbasi-Asl and Yu 2021, 10.3389/fdata.2021.704182): in a layer, remove the filter of lowest
CAR, score all others again on the network as it is then, and so on. Layers are worked on in graph order, each on the
network as pruned so far; at global scope all groups compete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcar import guarantee as promises
from onnxcar import record as records
from onnxcar.channels import ChannelSpace
from onnxcar.criteria import Criterion, CriterionFunction
from onnxcar.data import Dataset
from onnxcar.errors import PlanError
from onnxcar.finish import Finished
from onnxcar.greedy import prefixes, retreat, shorten
from onnxcar.model import Model, check_output, save
from onnxcar.progress import Report
from onnxcar.pruning import Pruning
from onnxcar.scoring import Score
from onnxcar.steps import TINY, Step, Stop
from onnxcar.steps import Path as GreedyPath
from onnxcar.surgery import Plan

__all__ = ["Run", "Step", "Stop", "prune", "read_plan", "write"]

TESTED, RECOVERED = 16, 12  # models that a promise is tested on at most, without recovery and with it


@dataclass(frozen=True, eq=False)
class Run:
    """What `prune` did.

    Attributes:
        space: Structure of the original.
        model: The compact model, verified, not yet written.
        plan: The groups that are gone.
        record: The JSON record; `write` completes path, hash and size of the result.
        path: How the search went, None where a plan was given.
        journal: File with the answers of the search, None if none was kept.
    """

    space: ChannelSpace
    model: Model
    plan: Plan
    record: dict[str, Any]
    path: GreedyPath | None
    journal: Path | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The removals in order; none where a plan was given."""
        return () if self.path is None else self.path.steps

    @property
    def stopped(self) -> str:
        """The rule that ended the search, see `greedy.Path`; "plan" where a plan was given."""
        return "plan" if self.path is None else self.path.stopped


def prune(
    model: Model,
    data: Dataset | None = None,
    *,
    criterion: str | Criterion | CriterionFunction | None = None,
    metric: str = "top1",
    scope: str = "layer",
    stop: Stop | None = None,
    per_step: int = 1,
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dense: bool = False,
    min_filters: int = 1,
    multiple_of: int | str | None = None,
    norms: str = "protect",
    recover: str = "none",
    recover_every: int = 0,
    calibration_data: Dataset | None = None,
    guarantee: float | None = None,
    approximate: float | None = None,
    drop_outputs: bool = False,
    seed: int = 0,
    plan: Mapping[str, Any] | str | Path | None = None,
    test_data: Dataset | None = None,
    verify: bool = True,
    provider: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    journal: str | Path | None = None,
    progress: Report | None = None,
) -> Run:
    """A compact model, the plan that made it, and the record of how.

    Args:
        model: The network; it is not changed.
        data: Validation samples that filters are chosen on. Criteria that look at weights alone need none.
        criterion: A name of `criteria.CRITERIA`, or a function. None: "car", but "reconstruction" at global scope with
            `recover="least-squares"`, see `pruning.usual_criterion`.
        metric: What CAR and the drop are measured in.
        scope: "layer": every selected layer in graph order, each on the network as pruned so far; a group that spans
            several layers counts for the first selected one. "global": all groups compete, CAR by score lost per MAC
            saved, other criteria by importance over the norm of their layer's (`criteria.per_layer_unit`). Cost targets
            want "global": at layer scope they are met by the first layers alone.
        stop: When to end; None, or no rule in it, is `Stop(max_drop=0.01)`.
        per_step: Groups removed before all others are scored again.
        layers: Patterns of node or weight names to prune; default all convolutions.
        exclude: Patterns of layers that keep every filter.
        dense: Prune dense layers, too, where `layers` names none.
        min_filters: What every layer keeps at least.
        multiple_of: Kept counts are a multiple of it, by giving back the last removals of a layer. "auto": what runs
            fast on the provider. None: "auto" where `stop` is a budget (max_drop, target_*), 1 where it says how much
            to remove (ratio, steps).
        norms: As `analyze`.
        recover: "none", or a method of `recovery.recover`: corrects the network without training. The compact model is
            verified before that, and scored after.
        recover_every: Recover after so many removed groups, too, so that the search sees the repaired network; 0: once,
            at the end.
        calibration_data: What recovery fits on, labels not needed; default `data`.
        guarantee: Confidence with which the drop on unseen data is below `stop.max_drop`; a part of `data` is kept
            untouched for the test, see `onnxcar.guarantee`.
        approximate: Probability that any pick of the search is not that of the full count; buys time where there are
            many images or many errors. None: exact.
        drop_outputs: Where `data` are of some classes only (`Dataset.only`): remove the output rows of the others.
        seed: Of everything random.
        plan: Remove exactly this instead of searching: a plan, a record, or a file of either.
        test_data: Samples the final numbers are reported on; never used to choose.
        verify: Check that the compact model equals the masked original.
        provider: Execution provider.
        precision: What candidates are scored in: "fp32", "tf32" or "fp16". The last two are held against FP32 on a
            sample first (`scoring.check_precision`). Whole models are scored in FP32; what is written never changes.
        threads: Threads of a session, default all cores.
        batch_size: Samples of an inference call, default from `memory_bytes`.
        memory_bytes: Bound on the activations held at once, default a quarter of what is free.
        journal: File for the answers of the search; what it holds is not computed again.
        progress: Told how far the search is.

    Raises:
        DataError: The criterion or a stop rule needs data and there is none.
        JournalError: The journal is of another run, or corrupt.
        ModelError: The compact model differs from the masked original.
        PlanError: An argument is out of its range, a pattern matches nothing, nothing can be removed, or the plan is of
            another model.
    """
    task = Pruning.of(
        model,
        data,
        criterion=criterion,
        metric=metric,
        scope=scope,
        stop=stop,
        per_step=per_step,
        layers=layers,
        exclude=exclude,
        dense=dense,
        min_filters=min_filters,
        multiple_of=multiple_of,
        norms=norms,
        recover=recover,
        recover_every=recover_every,
        calibration_data=calibration_data,
        guarantee=guarantee,
        approximate=approximate,
        drop_outputs=drop_outputs,
        seed=seed,
        planned=plan is not None,
        test_data=test_data,
        verify=verify,
        provider=provider,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        memory_bytes=memory_bytes,
    )
    space, more = task.space, dict[str, Any]()
    path: GreedyPath | None = None
    if plan is not None:
        named = {"plan": str(plan) if isinstance(plan, str | Path) else "given"}
        more["arguments"] = named | {name: task.arguments[name] for name in ("norms", "recover")}
        finished = task.finisher.make(Plan.from_json(space, read_plan(plan)).groups, progress=progress)
    else:
        path = task.search(journal, progress)
        if task.held is not None and guarantee is not None:
            path, more["guarantee"] = _promised(task, path, guarantee, progress)
        finished = task.finisher.make(path.groups, progress=progress)
        if task.held is None:
            path, finished = _within(task, path, finished)
    return Run(space, finished.model, finished.plan, task.record(finished, path, **more), path, _path(journal))


def _within(task: Pruning, path: GreedyPath, finished: Finished) -> tuple[GreedyPath, Finished]:
    """The path cut back until what is shipped is within the drop on the data that filters were chosen on.

    Removing and masking round differently, so a sample on the edge may fall.
    """
    most = task.stop.max_drop
    while most is not None and path.steps and _fell(task.base, finished.score) > most + TINY:
        path = retreat(task.space, path, task.keep)
        finished = task.finisher.make(path.groups)
    return path, finished


def _promised(
    task: Pruning, path: GreedyPath, confidence: float, progress: Report | None
) -> tuple[GreedyPath, dict[str, Any]]:
    """The path up to the most pruned model whose drop on the held part is certainly below the limit, and the tests.

    What is tested is what would be shipped: counts made the multiples asked for, recovered where that is asked for.
    """
    assert task.held is not None
    assert task.stop.max_drop is not None
    held, limit, risk = task.held.held, task.stop.max_drop, 1 - confidence
    base = task.on.evaluate(task.space.model, held, task.metric)
    assert base is not None
    most = RECOVERED if task.finisher.recover != "none" else TESTED
    sets = _evenly(task, prefixes(path, task.keep), most)
    tests: list[promises.Certificate] = []
    last: frozenset[int] = frozenset()
    for groups in sets:
        if progress is not None:
            progress.update(len(tests), len(sets), f"testing the promise: {len(groups)} groups removed", "models")
        score = task.on.evaluate(task.finisher.rebuilt(groups), held, task.metric)
        assert score is not None
        lost, won = promises.flips(base, score)
        p = promises.p_value(lost, won, len(held), limit, risk)
        macs = task.space.cost(groups).macs
        tests.append(promises.Certificate(len(groups), macs, lost, won, len(held), p, p <= risk))
        if p > risk:
            break
        last = groups
    said = {
        "confidence": confidence,
        "max_drop": limit,
        "method": promises.METHOD,
        "split": {
            "seed": task.held.seed,
            "choosing": records.data_entry(task.held.choosing),
            "held": records.data_entry(held),
        },
        "models": len(sets),
        "tests": [test.to_dict() for test in tests],
    }
    stopped = "guarantee" if len(last) < len(path.groups) else path.stopped
    return replace(shorten(task.space, path, last), stopped=stopped), said


def _evenly(task: Pruning, sets: Sequence[frozenset[int]], most: int) -> list[frozenset[int]]:
    """At most so many of the sets, the last one included, about evenly spaced in MACs."""
    if len(sets) <= most:
        return list(sets)
    macs = np.asarray([task.space.cost(groups).macs for groups in sets], np.float64)
    goals = np.linspace(macs[0], macs[-1], most)
    return [sets[i] for i in sorted({int(np.abs(macs - goal).argmin()) for goal in goals} | {len(sets) - 1})]


def _path(journal: str | Path | None) -> Path | None:
    return None if journal is None else Path(journal)


def write(run: Run, out: str | Path, *, record: str | Path | None = None, force: bool = False) -> dict[str, Any]:
    """The completed record, after the model and then the record were written, each whole or not at all.

    The journal stays: who made the run says whether it is still wanted (`Run.journal`).

    Args:
        run: What `prune` gave back.
        out: Where the model goes.
        record: Where the record goes; default `out` with the suffix .json.
        force: Replace files that exist.

    Raises:
        OutputError: A file exists and `force` is not set, or cannot be written.
    """
    beside = Path(record) if record is not None else Path(out).with_suffix(".json")
    check_output(beside, force=force)
    saved = save(run.model, out, force=force, metadata=records.metadata(run.record))
    entry = run.record["result"] | {"path": str(out), "sha256": saved.sha256, "bytes": saved.n_bytes}
    done = run.record | {"result": entry}
    records.write(done, beside, force=force)
    return done


def read_plan(plan: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The JSON of a plan or a record, read where a file is named; `Plan.from_json` holds it against the model.

    Raises:
        PlanError: The file cannot be read, or is no JSON object.
    """
    if isinstance(plan, Mapping):
        return plan
    try:
        found = json.loads(Path(plan).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise PlanError(
            f"Cannot read the plan '{plan}': {exc}. Name the JSON that prune wrote, plan or record."
        ) from exc
    if not isinstance(found, Mapping):
        raise PlanError(f"Plan '{plan}' is no JSON object. Name the JSON that prune wrote, plan or record.")
    return found


def _fell(base: Score | None, final: Score | None) -> float:
    return 0.0 if base is None or final is None else base.reduction(final)
