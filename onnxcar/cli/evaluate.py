"""``onnxcar evaluate``: the metrics of one model on a data set."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from onnxcar.cli.command import Command
from onnxcar.cli.options import (
    classes_option,
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
    header,
    json_target,
    need_data,
    open_provider,
    open_reported,
    terminal,
    write_json,
)
from onnxcar.progress import duration, open_meter

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.metrics import Score
    from onnxcar.model import Model


@click.command("evaluate", cls=Command, short_help="The metrics of one model on a data set.")
@model_argument
@data_options
@classes_option
@test_data_option
@metric_option
@option("--per-class", section="Output", is_flag=True, help="List every class.")
@json_option
@runtime_options
@general_options
def command(per_class: bool, **params: Any) -> None:
    """The metrics of MODEL on a data set, with 95 % intervals.

    \b
    onnxcar evaluate model.onnx --data images --preprocess imagenet
    """  # noqa: D301 - click reads \b
    from onnxcar import record, report
    from onnxcar.cli.watch import Watched
    from onnxcar.comparison import rows
    from onnxcar.model import load
    from onnxcar.rules import analyze
    from onnxcar.scoring import evaluate

    check_model(params["model"])
    json_to = params["json"]
    json_target(json_to, [params["model"]])
    need_data(params, "evaluate")
    model = load(params["model"])
    provider = open_provider(params)
    data = open_reported(params, model)
    assert data is not None
    here = terminal()
    data = _for_model(model, data)
    started = time.monotonic()
    with open_meter(here.err, "evaluating", "samples", quiet=here.quiet) as meter:
        score = evaluate(
            model,
            Watched(data, meter),
            metric=params["metric"],
            provider=provider.name,
            threads=params["threads"],
            batch_size=params["batch_size"],
            memory_bytes=params["memory"],
        )
    seconds = time.monotonic() - started
    result = {
        **header("evaluate"),
        "model": record.model_entry(model.path, model.sha256, analyze(model).cost(), model.n_bytes),
        "data": record.data_entry(data),
        "optimistic": params["test_data"] is None,
        "metric": score.metric,
        "provider": provider.name,
        "seconds": round(seconds, 3),
        "value": score.value,
        "correct": score.correct,
        "samples": score.samples,
        "scores": {name: row.to_dict(score.samples) for name, row in rows(score).items()},
        "per_class": _per_class(score, data),
    }
    write_json(result, json_to)
    if json_to == "-":
        return
    here.data(f"{params['model']} on {score.samples} samples of {data.path}", report.evaluation_table(result))
    if per_class and result["per_class"]:
        here.data(report.per_class_table(result))
    if method := result["scores"][score.metric].get("interval_method"):
        here.note(f"Intervals: {method}.")
    here.note(f"{duration(seconds)} on {provider.name}.")


def _for_model(model: Model, data: Dataset) -> Dataset:
    """The data as the model's outputs have them; one line says where these are not all of the original's."""
    from onnxcar.classes import fitted, kept_by

    kept = kept_by(model)
    if kept is not None and kept.dropped:
        terminal().note(f"The model has outputs for {len(kept.outputs)} classes only; samples of others are left out.")
    return fitted(model, data)


def _per_class(score: Score, data: Dataset) -> list[dict[str, Any]] | None:
    """Correct and all samples of each class that occurs; None without classes."""
    if score.per_class is None or score.class_samples is None:
        return None
    names = data.classes
    return [
        {
            "class": names[i] if names is not None and i < len(names) else str(i),
            "label": i,
            "correct": int(correct),
            "samples": int(n),
        }
        for i, (correct, n) in enumerate(zip(score.per_class, score.class_samples, strict=True))
        if n
    ]
