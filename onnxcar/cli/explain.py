"""``onnxcar explain``: what each filter does, as one HTML page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from onnxcar.cli.border import InterruptedRunError
from onnxcar.cli.command import Command
from onnxcar.cli.options import (
    data_options,
    general_options,
    json_option,
    layer_options,
    metric_option,
    model_argument,
    option,
    runtime_options,
)
from onnxcar.cli.types import TIME
from onnxcar.cli.work import (
    check_model,
    check_outputs,
    header,
    json_target,
    need_data,
    open_data,
    open_provider,
    terminal,
    write_json,
)
from onnxcar.progress import duration

_WHAT = "What to explain"


@click.command("explain", cls=Command, short_help="What each filter does; HTML.")
@model_argument
@layer_options(_WHAT)
@option(
    "--plan",
    section=_WHAT,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plan, a record or a pruned model: show what it removed, and widths before and after.",
)
@option(
    "--scores",
    section=_WHAT,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON of an earlier `score --by-class`: saves scoring again.",
)
@option("--no-car", section=_WHAT, is_flag=True, help="Leave CAR and class-CAR out: minutes become seconds.")
@option(
    "--maximise",
    section=_WHAT,
    type=TIME,
    metavar="T",
    help="Make an image that excites each filter, too, in that time (10m) at most; needs onnxcar[torch].",
)
@option(
    "--similarity",
    section=_WHAT,
    type=click.Choice(["responses", "maximised"]),
    default="responses",
    help="Clusters and twins by responses to the images, or to those of --maximise.  [default: responses]",
)
@option(
    "-o",
    "--output",
    section="Output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of index.html.  [default: MODEL's stem + .explained]",
)
@option("--force", section="Output", is_flag=True, help="Overwrite DIR/index.html.")
@data_options
@metric_option
@json_option
@runtime_options
@general_options
def command(**params: Any) -> None:
    """What the filters of MODEL do: patches they respond to, classes they serve, colour, kernels, twins; one HTML page.

    The page is complete in itself: pictures of the data are in it, so share it as you would the data.

    \b
    onnxcar explain model.onnx --data images --preprocess imagenet -o explained
    """  # noqa: D301 - click reads \b
    from onnxcar.explanation import explain, read_removed, read_scores
    from onnxcar.model import load
    from onnxcar.progress import open_meter

    check_model(params["model"])
    need_data(params, "explain")
    model_path: Path = params["model"]
    folder: Path = params["output"] or model_path.with_name(f"{model_path.stem}.explained")
    page = folder / "index.html"
    check_outputs(
        [folder if not folder.is_dir() else page], force=params["force"] or (folder.is_dir() and not page.exists())
    )
    json_target(params["json"], [model_path])
    model = load(model_path)
    removed = None if params["plan"] is None else read_removed(params["plan"], model)
    scores = None if params["scores"] is None else read_scores(params["scores"], model)
    provider = open_provider(params)
    data = open_data(params, model)
    here = terminal()
    started = time.monotonic()
    try:
        with open_meter(here.err, "explaining", "groups, then images", quiet=here.quiet) as meter:
            found = explain(
                model,
                data,
                scores=scores,
                car=not params["no_car"],
                metric=params["metric"],
                removed=removed,
                maximise=params["maximise"],
                similarity=params["similarity"],
                layers=params["layers"],
                exclude=params["exclude"],
                seed=params["seed"],
                provider=provider.name,
                threads=params["threads"],
                batch_size=params["batch_size"],
                memory_bytes=params["memory"],
                progress=meter,
            )
    except KeyboardInterrupt as exc:
        raise InterruptedRunError("Interrupted; nothing was written. Start the same command again.") from exc
    folder.mkdir(exist_ok=True)
    found.to_html(page)
    result = {**header("explain"), "provider": provider.name, **found.to_dict(), "page": str(page)}
    write_json(result, params["json"])
    facts = found.to_dict()
    dead = sum(layer["dead"] for layer in facts["layers"])
    for entry in (facts["maximised"] or {"left": []})["left"]:
        here.note(f"Not all images made for {entry['layer']}: {entry['reason']}.")
    if params["json"] != "-":
        here.data(f"{page}  {len(facts['filters'])} filters of {len(facts['layers'])} layers, {dead} never respond.")
    here.note(f"{duration(time.monotonic() - started)} on {provider.name}; {page.stat().st_size / 1e6:.1f} MB.")
