"""``onnxcar prune``: choose filters, remove them, verify, write the compact model and its record."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnxcar.cli.border import GateNotMetError, InterruptedRunError
from onnxcar.cli.command import Command
from onnxcar.cli.later import later_options, refuse_later_values
from onnxcar.cli.options import (
    CRITERIA,
    LATER_CRITERIA,
    data_options,
    general_options,
    json_option,
    metric_option,
    model_argument,
    option,
    runtime_options,
    test_data_option,
)
from onnxcar.cli.types import ALIGN, TIME, Count, Fraction
from onnxcar.cli.work import (
    check_model,
    check_outputs,
    json_target,
    need_data,
    open_data,
    open_provider,
    terminal,
    write_json,
)
from onnxcar.progress import duration

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.model import Model
    from onnxcar.search import Run

_WHAT, _STOP, _OUT = "What to remove", "When to stop (several: the first that bites; none: --max-drop 0.01)", "Output"
DATA_FREE = ("l1", "l2", "outgoing", "random")
_STOPS = ("ratio", "max_drop", "target_macs", "target_params", "steps", "time_limit")
# Flags that mean the same to the function.
_SAME: tuple[str, ...] = (
    "criterion",
    "metric",
    "scope",
    "per_step",
    "layers",
    "exclude",
    "dense",
    "min_filters",
    "multiple_of",
    "norms",
    "seed",
    "plan",
    "verify",
    "threads",
    "batch_size",
)
# Flags that the suggested `compare` repeats where they were typed; those of a config are found again.
_REPEAT = (
    "preprocess",
    "size",
    "crop_pct",
    "interpolation",
    "mean",
    "std",
    "channels",
    "layout",
    "label_offset",
    "metric",
)


@click.command("prune", cls=Command, short_help="Write a compact model.")
@model_argument
@option(
    "--criterion",
    section=_WHAT,
    type=click.Choice((*CRITERIA, *LATER_CRITERIA)),
    callback=refuse_later_values,
    default="car",
    metavar="NAME",
    help=f"{', '.join(CRITERIA)}; {', '.join(DATA_FREE)} need no data.  [default: car]",
)
@option(
    "--scope",
    section=_WHAT,
    type=click.Choice(("layer", "global")),
    default="layer",
    help="layer: one after the other, in graph order; global: all compete, by score lost per MAC.  [default: layer]",
)
@option(
    "--layers", section=_WHAT, multiple=True, metavar="GLOB", help="Only these, by node or weight name; repeatable."
)
@option("--exclude", section=_WHAT, multiple=True, metavar="GLOB", help="Not these; repeatable.")
@option("--dense", section=_WHAT, is_flag=True, help="Units of dense layers, too.")
@option(
    "--min-filters",
    section=_WHAT,
    type=Count(),
    default=1,
    metavar="N",
    help="A layer keeps at least N.  [default: 1]",
)
@option(
    "--multiple-of",
    section=_WHAT,
    type=ALIGN,
    metavar="N|auto",
    help="Kept counts are a multiple of N; auto: what runs fast.  [default: auto with --max-drop, --target-*; else 1]",
)
@option(
    "--norms",
    section=_WHAT,
    type=click.Choice(("protect", "rewrite")),
    default="protect",
    callback=refuse_later_values,
    help="Channels under LayerNorm, one-group GroupNorm, channel means.  [default: protect]",
)
@option(
    "--recover",
    section=_WHAT,
    type=click.Choice(("none", "bias", "bn", "least-squares")),
    metavar="NAME",
    default="none",
    callback=refuse_later_values,
    help="none, bias, bn, least-squares: correct the network without training.  [default: none]",
)
@option(
    "--plan",
    section=_WHAT,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Remove exactly what FILE (a plan or a record) says.",
)
@option(
    "--ratio",
    section=_STOP,
    type=Fraction(),
    metavar="R",
    help="Remove this fraction of each selected layer's filters.",
)
@option(
    "--max-drop",
    section=_STOP,
    type=Fraction(low_in=True, high_in=True),
    metavar="D",
    help="Before the metric on --data is more than D worse (0.01 = one point).",
)
@option("--target-macs", section=_STOP, type=Fraction(), metavar="F", help="At this fraction of the MACs.")
@option("--target-params", section=_STOP, type=Fraction(), metavar="F", help="At this fraction of the params.")
@option("--steps", section=_STOP, type=Count(), metavar="N", help="After N greedy steps.")
@option("--time-limit", section=_STOP, type=TIME, metavar="T", help="In time (30m, 8h), with the best so far.")
@option("--per-step", section=_STOP, type=Count(), default=1, metavar="K", help="Groups a step.  [default: 1]")
@data_options
@metric_option
@test_data_option
@option(
    "-o",
    "--output",
    section=_OUT,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="[default: MODEL's stem + .pruned.onnx]",
)
@option("--force", section=_OUT, is_flag=True, help="Overwrite OUT and its record.")
@option("--dry-run", section=_OUT, is_flag=True, help="Write the plan (OUT with .plan.json, or --json) and no model.")
@option(
    "--journal",
    section=_OUT,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="[default: OUT with .journal.jsonl]",
)
@option(
    "--verify/--no-verify",
    section=_OUT,
    default=True,
    help="Pruned output = masked original, else nothing is written.  [default: verify]",
)
@json_option
@runtime_options
@later_options("prune")
@general_options
def command(**params: Any) -> None:
    """Choose filters of MODEL, remove them, verify, write the compact model and its record.

    \b
    onnxcar prune model.onnx --data images --preprocess imagenet --max-drop 0.01
    onnxcar prune model.onnx --criterion l2 --ratio 0.3        (no data needed)
    """  # noqa: D301 - click reads \b
    check_model(params["model"])
    paths = _Paths.of(params)
    _check_usage(params)
    paths.check(params)
    model, run = _search(params, paths.journal)
    if params["dry_run"]:
        _write_plan(run, paths.plan, params)
        return
    written = _write(run, paths, params)
    if params["json"] != "-":
        _show(model, written)
    _advise(written, params, paths)


@dataclass(frozen=True)
class _Paths:
    """Where everything goes."""

    model: Path
    out: Path
    record: Path
    plan: Path
    journal: Path | None

    @classmethod
    def of(cls, params: dict[str, Any]) -> _Paths:
        model = params["model"]
        out = params["output"] or model.with_name(f"{model.stem}.pruned.onnx")
        plan = out if out.suffix == ".json" else out.with_suffix(".plan.json")
        journal = params["journal"]
        if journal is None and params["data"] is not None and params["plan"] is None:
            journal = out.with_suffix(".journal.jsonl")  # without data nothing takes long enough to be kept
        return cls(model, out, out.with_suffix(".json"), plan, journal)

    def check(self, params: dict[str, Any]) -> None:
        """Refuse what could not be written, before hours are spent on it."""
        read = [path for path in (self.model, params["plan"]) if path is not None]
        wanted = [self.plan] if params["dry_run"] else [self.out, self.record]
        if len({path.absolute() for path in wanted}) < len(wanted):
            raise click.UsageError(f"{self.out} is also the name of the record. Give OUT the suffix .onnx.")
        check_outputs(wanted, force=params["force"], inputs=read)
        if self.journal is not None:
            check_outputs([self.journal], force=True, inputs=[*read, *wanted])
        json_target(params["json"], [*read, *wanted[:1], *([self.journal] if self.journal else [])])


def _check_usage(params: dict[str, Any]) -> None:
    """Combinations that no single flag can refuse."""
    if params["data"] is not None:
        return
    stops = [name for name in _STOPS if params[name] is not None]
    if params["plan"] is not None:
        if params["max_drop"] is not None:
            need_data(params, "--max-drop")
    elif params["criterion"] not in DATA_FREE:
        need_data(params, f"The criterion {params['criterion']}")
    elif params["max_drop"] is not None:
        need_data(params, "--max-drop")
    elif not stops:
        raise click.UsageError(
            f"Without data, {params['criterion']} needs a stop rule that looks at no score: give --ratio 0.3, "
            "--target-macs 0.5, --target-params 0.5 or --steps N.",
            click.get_current_context(),
        )


def _search(params: dict[str, Any], journal: Path | None) -> tuple[Model, Run]:
    """The original and everything up to the verified compact model in memory."""
    from onnxcar.greedy import Stop
    from onnxcar.model import load
    from onnxcar.progress import open_meter
    from onnxcar.search import prune

    here = terminal()
    model = load(params["model"])
    provider = open_provider(params)
    data = None if params["data"] is None else open_data(params, model)
    test = None if params["test_data"] is None else open_data(params, model, params["test_data"])
    _warn_of_overlap(data, test)
    if journal is not None and journal.exists():
        here.note(f"Going on from {journal}.")
    meter = open_meter(here.err, "pruning", "evaluations", quiet=here.quiet)
    try:
        with meter:
            run = prune(
                model,
                data,
                stop=Stop(**{name: params[name] for name in _STOPS}),
                test_data=test,
                provider=provider.name,
                memory_bytes=params["memory"],
                journal=journal,
                progress=meter,
                **{name: params[name] for name in _SAME},
            )
    except KeyboardInterrupt as exc:
        raise InterruptedRunError(_how_to_go_on(meter.text, journal)) from exc
    return model, run


def _warn_of_overlap(data: Dataset | None, test: Dataset | None) -> None:
    if data is None or test is None:
        return
    from onnxcar.data import overlap

    shared = overlap(data, test)
    if shared:
        terminal().warn(
            f"{shared} of the {len(test)} samples of --test-data are among --data, too: filters are chosen on them, "
            "and the final numbers will be optimistic. Test on other samples."
        )


def _how_to_go_on(text: str, journal: Path | None) -> str:
    where = f" ({text})" if text else ""
    if journal is not None and journal.exists():
        return f"Interrupted{where}; no model was written. Start the same command again to go on from {journal}."
    return f"Interrupted{where}; no file was written. Start the same command again to begin anew."


# --- results --------------------------------------------------------------------------------------------------------


def _write_plan(run: Run, path: Path, params: dict[str, Any]) -> None:
    from onnxcar import record

    plan = {"schema": record.SCHEMA, "model_sha256": run.record["model"]["sha256"], "removed": run.record["removed"]}
    record.write(plan, path, force=params["force"])
    write_json(run.record, params["json"])
    n = sum(len(filters) for filters in plan["removed"].values())
    here = terminal()
    if params["json"] != "-":
        here.data(f"{path}  {n} filters to remove; no model was written.")
    here.note(f"Next: onnxcar prune {quoted(params['model'])} --plan {quoted(path)}", command=True)


def _write(run: Run, paths: _Paths, params: dict[str, Any]) -> dict[str, Any]:
    """Write model, record and JSON; the journal goes, unless the search can go on or it was asked for by name."""
    from onnxcar.search import write

    written = write(run, paths.out, record=paths.record, force=params["force"])
    if params["json"] is not None and not _names(params["json"], paths.record):
        write_json(written, params["json"])
    if paths.journal is not None and params["journal"] is None and run.stopped != "time_limit":
        paths.journal.unlink(missing_ok=True)
    return written


def _names(json_to: str, path: Path) -> bool:
    return json_to != "-" and Path(json_to).absolute() == path.absolute()


def _show(model: Model, record: dict[str, Any]) -> None:
    from onnxcar import report
    from onnxcar.rules import analyze

    removed = record["removed"]
    layers = [
        {
            "node": x.node,
            "kind": x.kind,
            "before": x.filters,
            "after": x.filters - len(removed.get(x.weight, ())),
        }
        for x in analyze(model, norms=record["arguments"].get("norms", "protect")).layers
    ]
    terminal().data(*report.prune_tables(record, layers))


_WHY_STOPPED = {
    "ratio": "the ratio is reached",
    "max_drop": "the next step would cost more than --max-drop",
    "target_macs": "--target-macs is reached",
    "target_params": "--target-params is reached",
    "steps": "--steps are done",
    "time_limit": "--time-limit is over",
    "nothing left": "nothing else may go",
    "plan": "as the plan says",
}


def _advise(record: dict[str, Any], params: dict[str, Any], paths: _Paths) -> None:
    """Where things are, what to doubt, what to do next."""
    here = terminal()
    n_steps = len({step["step"] for step in record["steps"]})
    why = _WHY_STOPPED.get(record["stopped"], record["stopped"])
    here.note(f"{n_steps} steps in {duration(record['seconds'])} on {record['provider']}; stopped: {why}.")
    verified = record["verify"]
    if verified is None:
        here.warn("Not verified (--no-verify): nothing says that the compact model equals the masked original.")
    else:
        error = verified["max_abs_error"]
        within = f", largest difference {error:.0e}" if error else ", to the last bit"
        here.note(f"Verified on {verified['samples']} samples: output = masked original{within}.")
    if not record["removed"]:
        here.warn(_nothing_removed(record))
    if record["base"] is not None and record["optimistic"]:
        here.note("The scores are optimistic: filters were chosen on the same data. Give --test-data for honest ones.")
    here.note(f"Model   {paths.out}\nRecord  {paths.record}", command=True)
    if record["stopped"] == "time_limit":
        here.note(f"Journal {paths.journal}\nThe same command with --force goes on from there.", command=True)
    here.note(f"Next: {_compare_command(params, paths)}", command=True)
    _hold_gate(record, params["max_drop"])


def _hold_gate(record: dict[str, Any], max_drop: float | None) -> None:
    """A search stops in time; a plan may not, and test data were never asked.

    Raises:
        GateNotMetError: The compact model is worse on ``--data`` than ``--max-drop`` allows.
    """
    if max_drop is None:
        return
    from onnxcar.metrics import metric

    sign = 1 if metric(record["metric"]).larger_is_better else -1
    for first, last, where in (("test_base", "test_final", "--test-data"), ("base", "final", "--data")):
        if record[first] is None or record[last] is None:
            continue
        drop = sign * (record[first]["value"] - record[last]["value"])
        if drop <= max_drop + 1e-9:
            continue
        text = f"{record['metric']} on {where} is {drop:.4f} worse than the original's, --max-drop allows {max_drop:g}"
        if where == "--data":
            raise GateNotMetError(f"Gate not met: {text}.")
        terminal().warn(f"{text}: the limit is held on --data only. Choose on more data, or allow less.")


def _nothing_removed(record: dict[str, Any]) -> str:
    if record["stopped"] == "max_drop":
        return (
            "Nothing was removed: the first step would cost more than --max-drop allows"
            + (" or was given back for --multiple-of" if record["given_back"] else "")
            + ". Allow a larger drop, or more filters to choose from with --scope global."
        )
    if given_back := len(record["given_back"]):
        return (
            f"Nothing was removed: {given_back} removals were given back for --multiple-of, as no layer had lost "
            "enough to reach the next multiple. Search longer, or take --multiple-of 1."
        )
    return "Nothing was removed: OUT equals the original. `onnxcar inspect` says what can go."


def _compare_command(params: dict[str, Any], paths: _Paths) -> str:
    words = ["onnxcar", "compare", str(paths.model), str(paths.out)]
    ctx = click.get_current_context()
    for key in ("test_data" if params["test_data"] else "data", *_REPEAT):
        value = params[key]
        if value is not None and ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE:
            text = ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", text]
    return shlex.join(words)


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
