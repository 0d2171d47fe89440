"""``onnxcar score``: importance of every group, and how far to trust the ranking."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from onnxcar.cli.border import InterruptedRunError
from onnxcar.cli.command import Command
from onnxcar.cli.later import refuse_later_values
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
)
from onnxcar.cli.prune import DATA_FREE, LABELLED
from onnxcar.cli.types import Count
from onnxcar.cli.work import (
    check_model,
    header,
    json_target,
    need_data,
    open_data,
    open_provider,
    open_unscored,
    read_class_groups,
    terminal,
    write_json,
    write_text,
)
from onnxcar.progress import duration

_WHAT = "What to score"
_SHOWN = 40
_FEW = 10  # samples of a class below which its mean loss change says little


@click.command("score", cls=Command, short_help="Importance of every group; removes nothing.")
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
@layer_options(_WHAT)
@norms_option(_WHAT)
@option(
    "--by-class",
    section=_WHAT,
    is_flag=True,
    help="What each group does to each class: class-CAR and loss with intervals, and whether it is more than chance.",
)
@option(
    "--class-groups",
    section=_WHAT,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON of name: [class names or output indices]; --by-class then speaks of these groups of classes.",
)
@option(
    "--top-classes", section=_WHAT, type=Count(), default=3, metavar="K", help="Classes to name a group.  [default: 3]"
)
@option(
    "--by-layer",
    section=_WHAT,
    is_flag=True,
    help="The score against the part of each layer that is removed, 0.1 to 0.9, lowest importance first.",
)
@option(
    "--plot", section="Output", type=click.Path(path_type=Path), metavar="FILE", help="With --by-layer: PNG or SVG."
)
@data_options
@classes_option
@metric_option
@json_option
@runtime_options
@precision_option
@general_options
def command(
    by_class: bool,
    class_groups: Path | None,
    top_classes: int,
    by_layer: bool,
    plot: Path | None,
    **params: Any,
) -> None:
    """Importance of every group of MODEL by a criterion, least important first; removes nothing.

    --json FILE.csv writes one line a group.

    \b
    onnxcar score model.onnx --data images --preprocess imagenet --by-class --json scores.json
    """  # noqa: D301 - click reads \b
    from onnxcar import record, report
    from onnxcar.importances import importance
    from onnxcar.model import load
    from onnxcar.progress import open_meter

    check_model(params["model"])
    if plot is not None and not by_layer:
        raise click.UsageError("--plot draws what --by-layer measures. Give both.")
    if by_layer:
        if by_class or class_groups is not None:
            raise click.UsageError("--by-layer and --by-class are two questions. Ask one at a time.")
        if params["precision"] != "fp32":
            raise click.UsageError("--by-layer scores pruned models as a whole, in fp32. Leave out --precision.")
        from onnxcar.cli.score_layers import by_layer as measure_layers

        measure_layers(params, plot)
        return
    groups = None if class_groups is None else read_class_groups(class_groups)
    by_class = by_class or groups is not None
    if by_class and params["criterion"] not in ("car", "class-car"):
        raise click.UsageError(f"--by-class is about CAR: the criterion {params['criterion']} scores no classes.")
    if params["criterion"] not in DATA_FREE:
        need_data(params, f"The criterion {params['criterion']}")
    json_to = params["json"]
    target = json_target(json_to, [params["model"]])
    model = load(params["model"])
    needed = params["criterion"] not in DATA_FREE
    provider = open_provider(params) if needed else None
    data = (open_data if params["criterion"] in LABELLED else open_unscored)(params, model) if needed else None
    here = terminal()
    started = time.monotonic()
    same = ("criterion", "metric", "layers", "exclude", "norms", "precision", "seed", "threads", "batch_size")
    try:
        with open_meter(here.err, "scoring", "groups", quiet=here.quiet) as meter:
            found = importance(
                model,
                data,
                provider="cpu" if provider is None else provider.name,
                memory_bytes=params["memory"],
                progress=meter,
                by_class=by_class,
                class_groups=groups,
                **{name: params[name] for name in same},
            )
    except KeyboardInterrupt as exc:
        raise InterruptedRunError("Interrupted; nothing was written. Start the same command again.") from exc
    seconds = time.monotonic() - started
    cost = found.space.cost()
    result = {
        **header("score"),
        "model": record.model_entry(model.path, model.sha256, cost, model.n_bytes),
        "data": record.data_entry(data),
        "metric": params["metric"],
        "provider": None if provider is None else provider.name,
        "seconds": round(seconds, 3),
        **found.to_dict(by_class=by_class, top=top_classes),
    }
    if target is not None and target.suffix.lower() == ".csv":
        write_text(found.to_csv(by_class=by_class), target)
    else:
        write_json(result, json_to)
    if json_to != "-":
        # A pipe gets every line, a person the ends of a long table.
        here.data(report.score_table(result, limit=_SHOWN if here.out.is_terminal else None))
    here.note(f"{len(found.groups)} groups in {duration(seconds)}.")
    if found.agreed is not None:
        here.note(str(found.agreed))
    _trust(result, found.near_noise)
    if result["classes"] is not None:
        _on_classes(result)


def _on_classes(result: dict[str, Any]) -> None:
    """How many groups treat classes differently, and what that rests on."""
    speaking = sum(group["by_class"]["speaks"] for group in result["groups"])
    fewest = min(entry["samples"] for entry in result["classes"])
    text = (
        f"Classes: {speaking} of {len(result['groups'])} groups change the loss of some classes more than of others "
        "(permutation test, q <= 0.05 over the groups); only their classes are named, those beyond what chance gives "
        "any class. Intervals are paired (Bonett and Price 2012)."
    )
    if fewest < _FEW:
        text += f" A class has {fewest} samples: accuracy by class needs some 50, the loss 10, groups of classes fewer."
    terminal().note(text)


def _trust(result: dict[str, Any], near_noise: bool) -> None:
    """What chance alone does to these numbers, in words."""
    here, known = terminal(), result["reliability"]
    if known is None:
        if result["base"] is not None:
            here.note(f"No reliability is known for the metric {result['metric']}; --metric top1 has one.")
        return
    n = result["base"]["samples"]
    stderr, split = known["stderr"], known["split_half"]
    half = "undefined (a half ranks all alike)" if split != split else f"{split:.2f}"
    text = (
        f"Reliability: the standard error of an importance is {stderr:.4f} ({stderr * n:.1f} of {n} samples); the rank "
        f"correlation between two halves of the data is {half}."
    )
    if not near_noise:
        here.note(text)
        return
    here.warn(
        f"{text} This ranking is near noise: other samples would rank the groups quite differently. Score on more of "
        "them, or let `onnxcar prune` choose step by step; --metric loss has no ties."
    )
