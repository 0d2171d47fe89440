"""Prune a model: choose filters, remove them, verify the result, and say what was done.

The search is the paper's (Abbasi-Asl and Yu 2021, 10.3389/fdata.2021.704182): in a layer, remove the filter of lowest
CAR, score all others again on the network as it is then, and so on. Layers are worked on in graph order, each on the
network as pruned so far; at global scope all groups compete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxcar
from onnxcar import record as records
from onnxcar import surgery
from onnxcar.channels import ChannelSpace
from onnxcar.choosers import chooser
from onnxcar.criteria import CRITERIA, Context, Criterion, CriterionFunction, find
from onnxcar.data import Dataset
from onnxcar.errors import DataError, PlanError
from onnxcar.greedy import retreat, walk
from onnxcar.journal import Journal
from onnxcar.model import Model, check_output, save
from onnxcar.progress import Report
from onnxcar.rules import analyze
from onnxcar.runtime import resolve_provider
from onnxcar.scope import Keep, fields, select_layers, vector_width, whole_layers
from onnxcar.scoring import Score, Scorer, evaluate
from onnxcar.steps import TINY, Step, Stop
from onnxcar.steps import Path as GreedyPath
from onnxcar.surgery import Plan

__all__ = ["Run", "Step", "Stop", "prune", "read_plan", "write"]

SCOPES = ("layer", "global")
DEFAULT_STOP = Stop(max_drop=0.01)


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
    criterion: str | Criterion | CriterionFunction = "car",
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
    seed: int = 0,
    plan: Mapping[str, Any] | str | Path | None = None,
    test_data: Dataset | None = None,
    verify: bool = True,
    provider: str = "auto",
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
        criterion: A name of `criteria.CRITERIA`, or a function.
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
        seed: Of everything random.
        plan: Remove exactly this instead of searching: a plan, a record, or a file of either.
        test_data: Samples the final numbers are reported on; never used to choose.
        verify: Check that the compact model equals the masked original.
        provider: Execution provider.
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
    started = time.monotonic()
    rule = stop if stop is not None and stop.any else DEFAULT_STOP
    row = find(criterion)
    _check_numbers(scope, per_step, min_filters, multiple_of)
    _check_data(row, rule, data, plan is not None)
    run_on = _RunOn(resolve_provider(provider).name, threads, batch_size, memory_bytes)
    wanted = multiple_of if multiple_of is not None else "auto" if rule.budget else 1
    multiple = vector_width(run_on.provider) if wanted == "auto" else int(wanted)
    arguments: dict[str, Any] = {
        "scope": scope,
        **asdict(rule),
        "per_step": per_step,
        "layers": list(layers),
        "exclude": list(exclude),
        "dense": dense,
        "min_filters": min_filters,
        "multiple_of": wanted,
        "norms": norms,
        "seed": seed,
    }
    space = analyze(model, norms=norms)
    keep = Keep(space, min_filters, multiple, wanted == "auto")
    original_cost = space.cost(())
    scorer = None if data is None else run_on.scorer(space, data, metric)
    path: GreedyPath | None = None
    if plan is not None:
        arguments = {"plan": str(plan) if isinstance(plan, str | Path) else "given", "norms": norms}
        chosen = Plan.from_json(space, read_plan(plan))
    else:
        selected = select_layers(space, layers, exclude, dense=dense)
        searched = fields(space, selected, exclude, scope)
        context = Context(data, scorer, seed=seed, provider=run_on.provider, threads=threads)
        header = _header(model, data, row.name, metric, run_on.provider, arguments | {"width": multiple})
        with Journal(journal, header) as log:
            path = walk(
                space,
                searched,
                chooser(space, row, context, scope),
                stop=rule,
                keep=keep,
                whole=whole_layers(space, selected, exclude) if scope == "layer" else (),
                per_step=per_step,
                journal=log,
                progress=progress,
                started=started,
            )
        chosen = Plan(path.groups)
    base = None if scorer is None else scorer.base(frozenset())
    compact = surgery.remove(space, chosen)
    final = run_on.evaluate(compact, data, metric)
    while path is not None and path.steps and rule.max_drop is not None and _fell(base, final) > rule.max_drop + TINY:
        # Removing and masking round differently, and a sample on the edge fell: the promise is about what is shipped.
        path = retreat(space, path, keep)
        chosen = Plan(path.groups)
        compact = surgery.remove(space, chosen)
        final = run_on.evaluate(compact, data, metric)
    cost = space.cost(chosen.groups)
    verified = surgery.verify(space, chosen, compact) if verify else None
    found: dict[str, Any] = {
        "onnxcar": onnxcar.__version__,
        "schema": records.SCHEMA,
        "command": "prune",
        "model": records.model_entry(model.path, model.sha256, original_cost, model.n_bytes),
        "result": records.model_entry(None, None, cost, None),
        "data": records.data_entry(data),
        "test_data": records.data_entry(test_data),
        "optimistic": test_data is None,
        "metric": metric,
        "provider": run_on.provider,
        "seconds": 0.0,
        "base": records.score_entry(base),
        "final": records.score_entry(final),
        "test_base": records.score_entry(run_on.evaluate(model, test_data, metric)),
        "test_final": records.score_entry(run_on.evaluate(compact, test_data, metric)),
        "criterion": "plan" if path is None else row.name,
        "recover": "none",
        "arguments": arguments,
        **records.path_entries(space, path),
        "removed": chosen.removed(space),
        "protected": records.protected_entries(space),
        "verify": records.verify_entry(verified),
    }
    found["seconds"] = round(time.monotonic() - started, 3)
    return Run(space, compact, chosen, found, path, None if journal is None else Path(journal))


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


@dataclass(frozen=True)
class _RunOn:
    """How networks are run. Nothing here is meant to change a result."""

    provider: str
    threads: int | None
    batch_size: int | None
    memory_bytes: int | None

    def scorer(self, space: ChannelSpace, data: Dataset, metric: str) -> Scorer:
        return Scorer(space, data, metric=metric, **asdict(self))

    def evaluate(self, model: Model, data: Dataset | None, metric: str) -> Score | None:
        return None if data is None else evaluate(model, data, metric=metric, **asdict(self))


def _fell(base: Score | None, final: Score | None) -> float:
    return 0.0 if base is None or final is None else base.reduction(final)


def _header(
    model: Model, data: Dataset | None, criterion: str, metric: str, provider: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What must match for a journal to answer this run. The time limit may differ: a stopped run can go on."""
    return {
        "onnxcar": onnxcar.__version__,
        "model": model.sha256,
        "data": None if data is None else data.sha256,
        "samples": None if data is None else len(data),
        "criterion": criterion,
        "metric": metric,
        "provider": provider,
        "arguments": {name: value for name, value in arguments.items() if name != "time_limit"},
    }


def _check_numbers(scope: str, per_step: int, min_filters: int, multiple_of: int | str | None) -> None:
    if scope not in SCOPES:
        raise PlanError(f"There is no scope {scope!r}. Take one of {', '.join(SCOPES)}.", scope=scope)
    for name, value in (("per_step", per_step), ("min_filters", min_filters), ("multiple_of", multiple_of)):
        if value is not None and value != "auto" and (not isinstance(value, int) or value < 1):
            raise PlanError(f"{name} is {value!r}, and must be a whole number of at least 1.", field=name)


def _check_data(row: Criterion, stop: Stop, data: Dataset | None, planned: bool) -> None:
    if planned or data is not None:
        return
    free = ", ".join(name for name, other in CRITERIA.items() if not other.needs_data)
    if row.needs_data:
        raise DataError(
            f"Criterion {row.name!r} scores filters on images, and there is no data. Give --data, or take a criterion "
            f"that looks at weights alone: {free}."
        )
    if stop.max_drop is not None:
        raise DataError(
            f"max_drop={stop.max_drop:g} is a drop on validation data, and there is no data. Give --data, or say how "
            "much to remove: --ratio, --steps, --target-macs or --target-params."
        )
