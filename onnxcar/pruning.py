"""One pruning task: everything that follows from the arguments before a filter is chosen, and what is said afterwards.

`search.prune` ships one model of the path, `sweep.sweep` several, both from the same task.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxcar
from onnxcar import guarantee as promises
from onnxcar import record as records
from onnxcar.channels import ChannelSpace, Cost
from onnxcar.choosers import chooser
from onnxcar.classes import Kept
from onnxcar.criteria import CRITERIA, Context, Criterion, CriterionFunction, find, refuse_unscored
from onnxcar.data import Dataset, overlap
from onnxcar.errors import DataError, PlanError
from onnxcar.finish import Finished, Finisher, RunOn
from onnxcar.greedy import walk
from onnxcar.guarantee import Held
from onnxcar.journal import Journal
from onnxcar.latency_table import Pace, Table, measure_table
from onnxcar.model import Model
from onnxcar.progress import Report
from onnxcar.recovery import METHODS
from onnxcar.rules import analyze
from onnxcar.runtime import resolve_provider
from onnxcar.scope import Keep, fields, select_layers, vector_width, whole_layers
from onnxcar.scoring import Agreement, Score, Scorer, check_precision
from onnxcar.shrinking import Shrinking, every_groups
from onnxcar.steps import Path as GreedyPath
from onnxcar.steps import Stop

__all__ = ["DEFAULT_STOP", "SCOPES", "Pruning"]

SCOPES = ("layer", "global")
DEFAULT_STOP = Stop(max_drop=0.01)


@dataclass(frozen=True, eq=False)
class Pruning:
    """A task, checked; see `search.prune` for what the arguments mean.

    Attributes:
        space: Structure of the original.
        data: What filters are chosen on; with a guarantee the part of the data that is for that. None where there is
            none, or none with labels and nobody asks for a score: criteria then look at `seen`.
        seen: What criteria look at, labelled or not: `data`, else the samples that recovery fits on.
        test_data: What is reported on.
        criterion: Who ranks.
        metric: What is measured.
        scope: What competes with what.
        stop: When to end.
        keep: What layers keep.
        per_step: Groups a step.
        layers: Patterns.
        exclude: Patterns.
        dense: Whether dense layers are pruned.
        finisher: Makes models.
        held: The parts of the data where a promise is asked for.
        seed: Of everything random.
        arguments: As in the record.
        started: `time.monotonic()` when the task began.
        measured: The table of latencies, once there is one.
        agreed: How near scores in another precision are to FP32; None where they are in FP32.
    """

    space: ChannelSpace
    data: Dataset | None
    seen: Dataset | None
    test_data: Dataset | None
    criterion: Criterion
    metric: str
    scope: str
    stop: Stop
    keep: Keep
    per_step: int
    layers: tuple[str, ...]
    exclude: tuple[str, ...]
    dense: bool
    finisher: Finisher
    held: Held | None
    seed: int
    arguments: dict[str, Any]
    scorer: Scorer | None
    started: float = field(default_factory=time.monotonic)
    measured: list[dict[str, Any]] = field(default_factory=list)
    agreed: Agreement | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        data: Dataset | None,
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
        planned: bool = False,
        test_data: Dataset | None = None,
        verify: bool = True,
        provider: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        batch_size: int | None = None,
        memory_bytes: int | None = None,
    ) -> Pruning:
        """The task of these arguments.

        Raises:
            DataError: Something needs data and there is none, or too little.
            PlanError: An argument is out of its range.
        """
        started = time.monotonic()
        rule = stop if stop is not None and stop.any else DEFAULT_STOP
        row = find(usual_criterion(scope, recover, approximate) if criterion is None else criterion)
        _check_numbers(scope, per_step, min_filters, multiple_of)
        _check_risk(approximate, row)
        _check_data(row, rule, data, calibration_data, planned)
        _check_recovery(recover, recover_every, data, calibration_data)
        if drop_outputs and (data is None or data.outputs is None):
            raise DataError("Output rows can go where data of some classes only are given: --classes, Dataset.only.")
        held = None
        if guarantee is not None:
            promises.check(metric, rule.max_drop, guarantee)
            assert rule.max_drop is not None
            if data is None or planned:
                raise DataError("A guarantee tests the models of a search on data. Give --data, and no --plan.")
            held = promises.split(data, rule.max_drop, guarantee, seed)
            _check_untouched(held, calibration_data)
            data = held.choosing
        on = RunOn(resolve_provider(provider).name, threads, batch_size, memory_bytes)
        wanted = multiple_of if multiple_of is not None else "auto" if rule.budget else 1
        multiple = vector_width(on.provider) if wanted == "auto" else int(wanted)
        space = analyze(model, norms=norms)
        calibration = calibration_data if calibration_data is not None else data
        seen = data if data is not None else calibration_data
        if data is not None and not data.has_labels and not (row.needs_labels or rule.max_drop is not None):
            data = None  # nobody asks how well a network does
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
            "recover": recover,
            "recover_every": recover_every,
            "guarantee": guarantee,
            "approximate": approximate,
            "classes": None if data is None or data.outputs is None else data.outputs.tolist(),
            "drop_outputs": drop_outputs,
            "precision": precision,
            "seed": seed,
        }
        refuse_unscored(precision, row, data)
        agreed = None
        if data is not None:
            agreed = check_precision(model, data, precision, provider=on.provider, threads=threads)
        finisher = Finisher(space, on, data, metric, verify, recover, calibration, seed, drop_outputs)
        keep = Keep(space, min_filters, multiple, wanted == "auto")
        if not planned and (rule.target_macs, rule.target_params) != (None, None):
            competing = fields(space, select_layers(space, layers, exclude, dense=dense), exclude, scope)
            may_go = [group for field in competing for group in field.groups]
            keep = keep.reaching(may_go, rule.target_macs, rule.target_params)
        scorer = None
        if data is not None:
            models: dict[str, Any] = {}
            if recover_every:
                models = {"rebuild": finisher.rebuilt, "due": every_groups(recover_every)}
            how: dict[str, Any] = {"metric": metric, "approximate": approximate, "precision": precision}
            scorer = Shrinking(space, data, **how, **models, **asdict(on))
        return cls(
            space=space,
            data=data,
            seen=seen,
            test_data=test_data,
            criterion=row,
            metric=metric,
            scope=scope,
            stop=rule,
            keep=keep,
            per_step=per_step,
            layers=tuple(layers),
            exclude=tuple(exclude),
            dense=dense,
            finisher=finisher,
            held=held,
            seed=seed,
            arguments=arguments,
            scorer=scorer,
            started=started,
            agreed=agreed,
        )

    @property
    def on(self) -> RunOn:
        """How networks are run."""
        return self.finisher.on

    def search(self, journal: str | Path | None, progress: Report | None) -> GreedyPath:
        """The greedy path."""
        selected = select_layers(self.space, self.layers, self.exclude, dense=self.dense)
        context = Context(
            self.seen,
            self.scorer,
            seed=self.seed,
            provider=self.on.provider,
            threads=self.on.threads,
            memory_bytes=self.on.memory_bytes,
            progress=progress,
        )
        with Journal(journal, self.header()) as log:
            clock = self.clock(log)
            return walk(
                self.space,
                fields(self.space, selected, self.exclude, self.scope),
                chooser(self.space, self.criterion, context, self.scope, None if clock is None else clock.saved),
                stop=self.stop,
                keep=self.keep,
                whole=whole_layers(self.space, selected, self.exclude) if self.scope == "layer" else (),
                per_step=self.per_step,
                journal=log,
                progress=progress,
                started=self.started,
                clock=clock,
                renew=self.scorer.renew if isinstance(self.scorer, Shrinking) else None,
            )

    def clock(self, journal: Journal) -> Pace | None:
        """Who tells latencies, if a rule asks for them; what was measured once is in the journal."""
        if self.stop.target_latency is None:
            return None
        table = journal.ask(
            {"latency_table": self.on.provider, "threads": self.on.threads},
            lambda: measure_table(
                self.space,
                self.seen,
                self.keep,
                layers=self.layers,
                exclude=self.exclude,
                dense=self.dense,
                provider=self.on.provider,
                threads=self.on.threads,
            ).to_json(),
        )
        self.measured.append(table)
        return Pace(self.space, Table.from_json(table), self.seen, self.on.provider, self.on.threads)

    def latency(self, finished: Finished, path: GreedyPath | None) -> dict[str, Any] | None:
        """What the record says of a target latency: predictions, measurements, the final model measured."""
        if self.stop.target_latency is None or path is None or not self.measured:
            return None
        table = self.measured[-1]
        pace = Pace(self.space, Table.from_json(table), self.seen, self.on.provider, self.on.threads)
        ratio, interval = pace.compare(finished.model)
        return {
            "target": self.stop.target_latency,
            "predicted": pace.predict(finished.plan.groups),
            "measured": ratio,
            "interval": list(interval),
            "met": ratio <= self.stop.target_latency,
            "checks": [vars(check) for check in path.checks],
            "table": table,
        }

    def header(self) -> dict[str, Any]:
        """What must match for a journal to answer this run. The time limit may differ: a stopped run can go on."""
        calibration = self.finisher.calibration
        fitted = calibration if self.finisher.recover != "none" else None
        return {
            "onnxcar": onnxcar.__version__,
            "model": self.space.model.sha256,
            "data": None if self.seen is None else self.seen.sha256,
            "samples": None if self.seen is None else len(self.seen),
            "criterion": self.criterion.name,
            "metric": self.metric,
            "provider": self.on.provider,
            "arguments": {name: value for name, value in self.arguments.items() if name != "time_limit"}
            | {"width": self.keep.multiple_of},
            "calibration_data": None if fitted is None else fitted.sha256,
        }

    @cached_property
    def base(self) -> Score | None:
        """Score of the original on `data`, in single precision as all scores of whole models."""
        if self.agreed is not None:
            return self.on.evaluate(self.space.model, self.data, self.metric)
        return None if self.scorer is None else self.scorer.base(frozenset())

    @property
    def kept(self) -> Kept | None:
        """The classes that count; None where all do."""
        return None if self.data is None else Kept.of(self.data, dropped=self.finisher.drop)

    def cost(self, finished: Finished) -> Cost:
        """Params and MACs of a finished model."""
        if self.finisher.drop:
            return analyze(finished.model).cost(())  # its output rows are no groups of the space
        return self.space.cost(finished.plan.groups)

    @cached_property
    def test_base(self) -> Score | None:
        """Score of the original on `test_data`."""
        return self.on.evaluate(self.space.model, self.test_data, self.metric)

    def record(self, finished: Finished, path: GreedyPath | None, **more: Any) -> dict[str, Any]:
        """The record of one finished model; `write` completes path, hash and size of the result.

        Args:
            finished: The model.
            path: How the search went up to it, None where a plan was given.
            more: Further keys, in the place of the standard ones where they have the same name.
        """
        model, space, metric = self.space.model, self.space, self.metric
        calibrated = self.finisher.calibration if finished.recovered is not None else None
        found: dict[str, Any] = {
            "onnxcar": onnxcar.__version__,
            "schema": records.SCHEMA,
            "command": "prune",
            "model": records.model_entry(model.path, model.sha256, space.cost(()), model.n_bytes),
            "result": records.model_entry(None, None, self.cost(finished), None),
            "data": records.data_entry(self.seen),
            "test_data": records.data_entry(self.test_data),
            "calibration_data": records.data_entry(calibrated),
            "optimistic": self.test_data is None,
            "metric": metric,
            "provider": self.on.provider,
            "precision": self.arguments["precision"],
            "precision_check": None if self.agreed is None else self.agreed.to_json(),
            "seconds": 0.0,
            "base": records.score_entry(self.base),
            "final": records.score_entry(finished.score),
            "test_base": records.score_entry(self.test_base),
            "test_final": records.score_entry(self.finisher.evaluate(finished.model, self.test_data)),
            "criterion": "plan" if path is None else self.criterion.name,
            "recover": self.finisher.recover,
            "recovery": None if finished.recovered is None else finished.recovered.to_json(),
            "classes": None if self.kept is None else self.kept.to_json(),
            "guarantee": None,
            "latency": self.latency(finished, path),
            "arguments": self.arguments,
            "width": self.keep.multiple_of if self.keep.by_width else None,
            **records.path_entries(space, path),
            "removed": finished.plan.removed(space),
            "protected": records.protected_entries(space),
            "verify": records.verify_entry(finished.verified),
        }
        return found | more | {"seconds": round(time.monotonic() - self.started, 3)}


# --- checks ---------------------------------------------------------------------------------------------------------


def usual_criterion(scope: str, recover: str, approximate: float | None = None) -> str:
    """The criterion of a search that names none: "car", and "reconstruction" where its like repairs afterwards.

    CAR counts what a removal costs that nobody repairs. Where all groups compete for a budget and least squares repairs
    what is left, what counts is what the refit cannot make up for: ResNet-20 at 0.56 of its MACs keeps 87.7 % so, and
    70.3 % by CAR (docs/accuracy.md).
    """
    repaired = scope == "global" and recover == "least-squares" and approximate is None
    return "reconstruction" if repaired else "car"


def _check_numbers(scope: str, per_step: int, min_filters: int, multiple_of: int | str | None) -> None:
    if scope not in SCOPES:
        raise PlanError(f"There is no scope {scope!r}. Take one of {', '.join(SCOPES)}.", scope=scope)
    for name, value in (("per_step", per_step), ("min_filters", min_filters), ("multiple_of", multiple_of)):
        if value is not None and value != "auto" and (not isinstance(value, int) or value < 1):
            raise PlanError(f"{name} is {value!r}, and must be a whole number of at least 1.", field=name)


def _check_risk(approximate: float | None, row: Criterion) -> None:
    if approximate is None:
        return
    if not 0 < approximate < 1:
        raise PlanError(
            f"approximate is {approximate}, and must be a probability of an error, between 0 and 1: 0.05.",
            field="approximate",
        )
    if row.name != "car":
        raise PlanError(f"approximate is about CAR, and the criterion is {row.name}. Leave one of them out.")


def _check_data(row: Criterion, stop: Stop, data: Dataset | None, calibration: Dataset | None, planned: bool) -> None:
    if planned or data is not None:
        return
    free = ", ".join(name for name, other in CRITERIA.items() if not other.needs_data)
    if row.needs_labels or (row.needs_data and calibration is None):
        raise DataError(
            f"Criterion {row.name!r} scores filters on images, and there is no data. Give --data, or take a criterion "
            f"that looks at weights alone: {free}."
        )
    if stop.max_drop is not None:
        raise DataError(
            f"max_drop={stop.max_drop:g} is a drop on validation data, and there is no data. Give --data, or say how "
            "much to remove: --ratio, --steps, --target-macs or --target-params."
        )


def _check_recovery(method: str, every: int, data: Dataset | None, calibration: Dataset | None) -> None:
    if method != "none" and method not in METHODS:
        raise PlanError(f"There is no recovery {method!r}. Take one of none, {', '.join(METHODS)}.", recover=method)
    if not isinstance(every, int) or every < 0:
        raise PlanError(f"recover_every is {every!r}, and must be a whole number of at least 0.", field="recover_every")
    if method == "none" and every:
        raise PlanError("recover_every says how often to recover, and recover is none. Give --recover least-squares.")
    if method != "none" and data is None and calibration is None:
        raise DataError(
            f"Recovery ({method}) fits the network on images, and there are none. Give --calibration-data or --data."
        )


def _check_untouched(held: Held, calibration: Dataset | None) -> None:
    shared = 0 if calibration is None else overlap(calibration, held.held)
    if shared:
        raise DataError(
            f"{shared} of the {len(held.held)} images that the promise is tested on are among the calibration data, so "
            "recovery would have seen them. Give other images with --calibration-data, or none: recovery then fits on "
            "the part of --data that filters are chosen on."
        )
