"""``onnxcar recover``: repair a pruned model from unlabelled images, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcar.cli.command import Command
from onnxcar.cli.options import (
    data_options,
    general_options,
    json_option,
    metric_option,
    model_argument,
    option,
    runtime_options,
    test_data_option,
)
from onnxcar.cli.work import (
    check_model,
    check_outputs,
    header,
    json_target,
    need_data,
    open_data,
    open_provider,
    open_unscored,
    terminal,
    write_json,
)
from onnxcar.progress import duration, open_meter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxcar.channels import ChannelSpace
    from onnxcar.data import Dataset
    from onnxcar.model import Model
    from onnxcar.recovery import Recovered
    from onnxcar.scoring import Score
    from onnxcar.surgery import Plan

_WHAT = "What to repair"


@click.command("recover", cls=Command, short_help="Repair a pruned model without training.")
@model_argument
@option(
    "--like",
    section=_WHAT,
    required=True,
    metavar="ORIGINAL",
    type=click.Path(path_type=Path),
    help="The model that MODEL was pruned from.",
)
@option(
    "--method",
    section=_WHAT,
    type=click.Choice(("bias", "bn", "least-squares")),
    default="least-squares",
    metavar="NAME",
    help="bias, bn, least-squares.  [default: least-squares]",
)
@option(
    "--plan",
    section=_WHAT,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What was removed, a plan or a record.  [default: the record beside MODEL, else what MODEL says of itself, "
    "else found by comparing weights]",
)
@data_options
@test_data_option
@metric_option
@option(
    "-o",
    "--output",
    section="Output",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="[default: MODEL with .recovered.onnx]",
)
@option("--force", section="Output", is_flag=True, help="Overwrite OUT and its record.")
@json_option
@runtime_options
@general_options
def command(**params: Any) -> None:
    """Refit the weights of MODEL, a pruned network, to what ORIGINAL computes on the images of --data.

    No gradient and no label is needed: layer by layer, surviving weights and biases are solved for. Labels, where there
    are any, only tell the accuracy.

    \b
    onnxcar recover small.onnx --like model.onnx --data images --preprocess imagenet -o repaired.onnx
    """  # noqa: D301 - click reads \b
    from onnxcar import record
    from onnxcar.model import load, save
    from onnxcar.recovery import recover

    pruned_path, like = params["model"], params["like"]
    out: Path = params["output"] or pruned_path.with_name(f"{pruned_path.stem}.recovered.onnx")
    beside = out.with_suffix(".json")
    for path in (pruned_path, like):
        check_model(path)
    if beside == out:
        raise click.UsageError(f"{out} is also the name of the record. Give OUT the suffix .onnx.")
    check_outputs([out, beside], force=params["force"], inputs=[pruned_path, like])
    json_target(params["json"], [pruned_path, like, out])
    need_data(params, "recover")
    original, pruned = load(like), load(pruned_path)
    space, plan, origin = _gone(original, pruned, _plan(params, original))
    here = terminal()
    if not plan.groups:
        here.warn(f"{pruned_path} has all channels of {like}: there is nothing to make up for.")
    provider = open_provider(params)
    if params["data"] is None:
        raise click.UsageError("recover needs images to fit on: give --data PATH; --test-data only reports.")
    data = open_unscored(params, original)
    test = None if params["test_data"] is None else open_data(params, original, params["test_data"])
    running = {name: params[name] for name in ("threads", "batch_size")} | {"memory_bytes": params["memory"]}
    started = time.monotonic()
    with open_meter(here.err, "recovering", "layers", quiet=here.quiet) as meter:
        found = recover(
            space,
            plan,
            pruned,
            data,
            method=params["method"],
            provider=provider.name,
            seed=params["seed"],
            progress=meter,
            **running,
        )
    scores = _scores(
        {"base": original, "pruned": pruned, "final": found.model}, data, test, params["metric"], provider.name, running
    )
    result: dict[str, Any] = {
        **header("recover"),
        "model_sha256": original.sha256,
        "original": record.model_entry(like, original.sha256, space.cost(), original.n_bytes),
        "model": record.model_entry(pruned_path, pruned.sha256, space.cost(plan.groups), pruned.n_bytes),
        "data": record.data_entry(data),
        "test_data": record.data_entry(test),
        "optimistic": test is None,
        "metric": params["metric"],
        "provider": provider.name,
        "seconds": round(time.monotonic() - started, 3),
        **{name: record.score_entry(score) for name, score in scores.items()},
        "plan_from": origin,
        "removed": plan.removed(space),
        "recover": params["method"],
        "recovery": found.to_json(),
    }
    saved = save(found.model, out, force=params["force"], metadata=_metadata(result, found))
    result["result"] = record.model_entry(out, saved.sha256, space.cost(plan.groups), saved.n_bytes)
    record.write(result, beside, force=params["force"])
    write_json(result, params["json"])
    if params["json"] != "-":
        _show(result, found, scores)
    here.note(f"Model   {out}\nRecord  {beside}")


def _gone(original: Model, pruned: Model, asked: Mapping[str, Any] | None) -> tuple[ChannelSpace, Plan, str]:
    """Structure of the original, what is gone, and where that is known from; norms may have been rewritten."""
    from onnxcar.classes import kept_by
    from onnxcar.errors import PlanError
    from onnxcar.recovery import plan_of
    from onnxcar.rules import analyze

    kept = kept_by(pruned)
    if kept is not None and kept.dropped:
        raise PlanError(
            f"{pruned.path} has output rows for {len(kept.outputs)} classes only, so its outputs are not those of the "
            "original. Recover before rows are dropped: prune --drop-outputs --recover least-squares.",
            path=pruned.path,
        )
    space = analyze(original)
    try:
        return space, *plan_of(space, pruned, asked)
    except PlanError:
        free = analyze(original, norms="rewrite")
        if len(free.groups) == len(space.groups):
            raise
        return free, *plan_of(free, pruned, asked)


def _plan(params: Mapping[str, Any], original: Model) -> Mapping[str, Any] | None:
    """The plan of ``--plan``, or the record beside the pruned model if it is of this original."""
    from onnxcar.search import read_plan

    if params["plan"] is not None:
        return _as_plan(read_plan(params["plan"]))
    beside = params["model"].with_suffix(".json")
    if not beside.is_file():
        return None
    from onnxcar.errors import PlanError

    try:
        found = _as_plan(read_plan(beside))
    except PlanError:
        return None  # some other JSON of that name
    return found if found.get("model_sha256") == original.sha256 else None


def _as_plan(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan, or what a record says was removed."""
    if "model_sha256" in found or not isinstance(found.get("model"), dict):
        return found
    return {**found, "model_sha256": found["model"].get("sha256")}


def _scores(
    models: Mapping[str, Model],
    data: Dataset,
    test: Dataset | None,
    metric: str,
    provider: str,
    running: Mapping[str, Any],
) -> dict[str, Score | None]:
    """Scores of the models on both data sets, null where there are no labels."""
    from onnxcar.scoring import evaluate

    out: dict[str, Score | None] = {}
    for prefix, part in (("", data), ("test_", test)):
        for name, model in models.items():
            scored = part is not None and part.has_labels
            out[prefix + name] = (
                evaluate(model, part, metric=metric, provider=provider, **running)
                if scored and part is not None
                else None
            )
    return out


def _metadata(result: Mapping[str, Any], found: Recovered) -> dict[str, str]:
    """What the model says of itself: what it was before, and what was done to it."""
    from onnxcar import record

    entries = record.metadata({**result, "model": {"sha256": result["model_sha256"]}})
    return entries | {"onnxcar.recover": "none" if found.kept else found.method}


def _show(result: Mapping[str, Any], found: Recovered, scores: Mapping[str, Score | None]) -> None:
    """Layers, then accuracies, on stdout."""
    from onnxcar import report

    here = terminal()
    here.data(*report.recovery_tables(result))
    changed = [f for f in found.layers if f.method != "kept"]
    if not found.layers:
        return
    if found.kept:
        here.warn(
            f"The repair, fitted on {found.samples} samples, brought the outputs no nearer to the original's on "
            f"{found.held} held-back ones ({found.before:.3g} of their variance away); all weights are as they were. "
            "More images may help."
        )
        return
    here.note(
        f"{len(changed)} of {len(found.layers)} layers changed, fitted on {found.samples} samples; squared distance "
        f"of the outputs to the original's on {found.held} held-back ones {found.before:.3g} -> {found.after:.3g} of "
        f"their variance. {duration(result['seconds'])} on {result['provider']}."
    )
