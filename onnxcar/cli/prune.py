"""``onnxcar prune``: choose filters, remove them, verify, write the compact model and its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnxcar.cli.command import Command
from onnxcar.cli.later import later_options, refuse_later_values
from onnxcar.cli.options import (
    CRITERIA,
    LATER_CRITERIA,
    classes_option,
    data_options,
    general_options,
    json_option,
    layer_options,
    metric_option,
    model_argument,
    norms_option,
    option,
    precision_option,
    runtime_options,
    test_data_option,
)
from onnxcar.cli.prune_report import check_report, write_report
from onnxcar.cli.prune_result import Paths, advise, show, write_plan, write_run
from onnxcar.cli.prune_sweep import searched, sweep_models
from onnxcar.cli.types import ALIGN, NUMBERS, TIME, Count, Fraction
from onnxcar.cli.work import (
    check_model,
    need_data,
    open_data,
    open_provider,
    open_unscored,
    terminal,
)

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.model import Model
    from onnxcar.search import Run

_WHAT, _STOP, _OUT = "What to remove", "When to stop (several: the first that bites; none: --max-drop 0.01)", "Output"
DATA_FREE = ("l1", "l2", "outgoing", "random")
LABELLED = ("car", "class-car")  # criteria that score networks; the others that look at data need no labels
_STOPS = ("ratio", "max_drop", "target_macs", "target_params", "target_latency", "steps", "time_limit")
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
    "recover",
    "recover_every",
    "drop_outputs",
    "approximate",
    "precision",
    "seed",
    "verify",
    "threads",
    "batch_size",
)


# Flags that --sweep refuses, and what does it instead.
_NOT_SWEPT = {
    "plan": "a plan is one model; give --plan alone",
    "dry_run": "each model's record says what was removed",
    "guarantee": "a promise holds for the one model that is shipped; give --guarantee with --max-drop alone",
    "target_macs": "its fractions are the targets",
    "report": "onnxcar compare --html makes a page of the models",
}


def _fractions(ctx: click.Context, param: click.Parameter, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if value is not None and not all(0 < x < 1 for x in value):
        raise click.BadParameter("fractions of the MACs lie between 0 and 1: 0.9,0.7,0.5.", ctx, param)
    return value


@click.command("prune", cls=Command, short_help="Write a compact model.")
@model_argument
@option(
    "--criterion",
    section=_WHAT,
    type=click.Choice((*CRITERIA, *LATER_CRITERIA)),
    callback=refuse_later_values,
    metavar="NAME",
    help=f"{', '.join(CRITERIA)}; {', '.join(DATA_FREE)} need no data.  [default: car; reconstruction with --scope "
    "global --recover least-squares]",
)
@option(
    "--scope",
    section=_WHAT,
    type=click.Choice(("layer", "global")),
    default="layer",
    help="layer: one after the other, in graph order; global: all compete, by score lost per MAC (with "
    "--target-latency: per time saved).  [default: layer]",
)
@layer_options(_WHAT)
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
@norms_option(_WHAT)
@option(
    "--recover",
    section=_WHAT,
    type=click.Choice(("none", "bias", "bn", "least-squares")),
    metavar="NAME",
    default="none",
    help="none, bias, bn, least-squares: correct the network without training.  [default: none]",
)
@option(
    "--recover-every",
    section=_WHAT,
    type=Count(0),
    default=0,
    metavar="K",
    help="Recover after K removed groups, too, so that the search sees the repaired network.  [default: 0, at the end]",
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
@option("--target-latency", section=_STOP, type=Fraction(), metavar="F", help="At this fraction of the latency, here.")
@option(
    "--sweep",
    section=_STOP,
    type=NUMBERS,
    callback=_fractions,
    metavar="F,F,...",
    help="A model at each of these fractions of the MACs, from one search, with a table and a plot.",
)
@option("--steps", section=_STOP, type=Count(), metavar="N", help="After N greedy steps.")
@option(
    "--guarantee",
    section=_STOP,
    type=Fraction(),
    metavar="P",
    help="--max-drop holds on unseen data with confidence P: a part of --data is kept untouched for the test.",
)
@option(
    "--approximate",
    section=_WHAT,
    type=Fraction(),
    metavar="P",
    help="Faster on many images: with probability P at most any pick differs from the exact one.  [default: exact]",
)
@option("--time-limit", section=_STOP, type=TIME, metavar="T", help="In time (30m, 8h), with the best so far.")
@option("--per-step", section=_STOP, type=Count(), default=1, metavar="K", help="Groups a step.  [default: 1]")
@data_options
@classes_option
@option(
    "--drop-outputs",
    section=_WHAT,
    is_flag=True,
    help="With --classes: remove the output rows of all other classes; OUT with .classes.txt says which row is which.",
)
@metric_option
@test_data_option
@option(
    "--calibration-data",
    section="Data",
    metavar="PATH",
    help="What --recover fits on, labels not needed.  [default: --data]",
)
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
@option(
    "--report",
    section=_OUT,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write an HTML page of the search and of both models into DIR.",
)
@json_option
@runtime_options
@precision_option
@later_options("prune")
@general_options
def command(**params: Any) -> None:
    """Choose filters of MODEL, remove them, verify, write the compact model and its record.

    \b
    onnxcar prune model.onnx --data images --preprocess imagenet --max-drop 0.01
    onnxcar prune model.onnx --criterion l2 --ratio 0.3        (no data needed)
    """  # noqa: D301 - click reads \b
    check_model(params["model"])
    paths = Paths.of(params)
    _check_usage(params)
    if params["sweep"] is not None:
        sweep_models(params, paths, _arguments)
        return
    paths.check(params)
    check_report(params)
    run = _search(params, paths.journal)
    if params["dry_run"]:
        write_plan(run, paths.plan, params)
        return
    written = write_run(run, paths, params)
    if params["json"] != "-":
        show(run, written)
    if params["report"] is not None:
        write_report(run, written, params)
    advise(written, params, paths)


def _check_usage(params: dict[str, Any]) -> None:
    """Combinations that no single flag can refuse."""
    _check_promise(params)
    _check_sweep(params)
    if params["drop_outputs"] and params["classes"] is None:
        raise click.UsageError("--drop-outputs keeps the rows of some classes: say which with --classes.")
    if params["classes"] is not None:
        need_data(params, "--classes")
    if params["criterion"] is None:
        params["criterion"] = _usual(params)
    _check_recovery(params)
    if params["data"] is not None:
        return
    stops = [name for name in (*_STOPS, "sweep") if params[name] is not None]
    if params["plan"] is not None:
        if params["max_drop"] is not None:
            need_data(params, "--max-drop")
    elif params["criterion"] in LABELLED or (params["criterion"] not in DATA_FREE and not params["calibration_data"]):
        need_data(params, f"The criterion {params['criterion']}")
    elif params["max_drop"] is not None:
        need_data(params, "--max-drop")
    elif not stops:
        raise click.UsageError(
            f"Without data, {params['criterion']} needs a stop rule that looks at no score: give --ratio 0.3, "
            "--target-macs 0.5, --target-params 0.5 or --steps N.",
            click.get_current_context(),
        )


def _check_recovery(params: dict[str, Any]) -> None:
    """Flags about recovery without any; calibration data are for criteria that look at samples, too."""
    if params["recover"] != "none":
        if params["calibration_data"] is None:
            need_data(params, f"--recover {params['recover']}")
        unasked = params["max_drop"] is None and any(params[name] is not None for name in (*_STOPS, "sweep"))
        if params["recover_every"] and params["criterion"] not in LABELLED and unasked:
            terminal().warn(
                f"--recover-every changes nothing: {params['criterion']} ranks by the original network, and no "
                "--max-drop asks how the recovered one does."
            )
        return
    unused = {"recover_every": params["recover_every"]}
    if params["data"] is not None or params["criterion"] in (*LABELLED, *DATA_FREE) or params["plan"] is not None:
        unused["calibration_data"] = params["calibration_data"]
    typed = click.get_current_context().get_parameter_source
    for name, given in unused.items():
        if typed(name) is ParameterSource.COMMANDLINE and given:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is about recovery: give --recover least-squares, or leave it out.")
        params[name] = None if name == "calibration_data" else 0


def _usual(params: dict[str, Any]) -> str:
    """The criterion of a command that names none; said where it is not CAR."""
    from onnxcar.pruning import usual_criterion

    name = usual_criterion(params["scope"], params["recover"], params["approximate"])
    if name != "car" and params["plan"] is None:
        terminal().note(
            f"Criterion {name}: filters whose loss the repair can make up for leave first (--criterion car for CAR)."
        )
    return name


def _check_sweep(params: dict[str, Any]) -> None:
    if params["sweep"] is None:
        return
    for name, instead in _NOT_SWEPT.items():
        if params[name]:
            raise click.UsageError(
                f"--sweep writes models of one path and takes no --{name.replace('_', '-')}: {instead}."
            )


def _check_promise(params: dict[str, Any]) -> None:
    if params["guarantee"] is None:
        return
    from onnxcar.errors import PlanError
    from onnxcar.guarantee import check

    need_data(params, "--guarantee")
    if params["plan"] is not None:
        raise click.UsageError("--guarantee tests the models of a search, and --plan names one. Leave one of them out.")
    try:
        check(params["metric"], params["max_drop"], params["guarantee"])
    except PlanError as exc:
        raise click.UsageError(str(exc)) from exc


def _search(params: dict[str, Any], journal: Path | None) -> Run:
    """Everything up to the verified compact model in memory."""
    from onnxcar.search import prune

    return searched(prune, journal, **_arguments(params), plan=params["plan"], guarantee=params["guarantee"])


def _arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the functions behind the command, everything opened; what is odd about them is said."""
    from onnxcar.model import load
    from onnxcar.steps import Stop

    model = load(params["model"])
    provider = open_provider(params)
    data = None if params["data"] is None else (_open_scored if _scores(params) else open_unscored)(params, model)
    fitted = params["calibration_data"]
    calibration = None if fitted is None else open_data(params, model, fitted, labelled=False)
    test = None if params["test_data"] is None else open_data(params, model, params["test_data"])
    _warn_of_overlap(data, test)
    return {
        "model": model,
        "data": data,
        "stop": Stop(**{name: params[name] for name in _STOPS}),
        "test_data": test,
        "calibration_data": calibration,
        "provider": provider.name,
        "memory_bytes": params["memory"],
        **{name: params[name] for name in _SAME},
    }


def _open_scored(params: dict[str, Any], model: Model) -> Dataset:
    """The data set of ``--data`` with its labels; where there are none, what needs none is named."""
    from onnxcar.errors import DataError

    try:
        return open_data(params, model)
    except DataError as exc:
        if params["classes"] is not None or params["guarantee"] is not None or params["max_drop"] is not None:
            raise
        try:
            open_data(params, model, labelled=False)
        except DataError:
            raise exc from None
        raise DataError(
            f"{exc} Or choose without labels: --criterion reconstruction with --ratio, --steps or a target."
        ) from exc


def _scores(params: dict[str, Any]) -> bool:
    """Whether networks have to be scored on ``--data``, which takes labels."""
    if params["plan"] is not None:
        return params["max_drop"] is not None or params["classes"] is not None
    stops = any(params[name] is not None for name in (*_STOPS, "sweep"))
    asked = any(params[name] is not None for name in ("max_drop", "guarantee", "classes"))
    return params["criterion"] in LABELLED or asked or not stops


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
