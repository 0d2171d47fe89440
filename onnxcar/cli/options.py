"""The flags that several commands share, as decorators; INTERFACE words, defaults and sections."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from onnxcar.cli.command import Opt
from onnxcar.cli.later import refuse_later_values
from onnxcar.cli.terminal import Terminal
from onnxcar.cli.types import MEMORY, NUMBERS, SIZE, Count, Fraction

__all__ = [
    "CRITERIA",
    "PRESETS",
    "Decorator",
    "classes_option",
    "data_options",
    "general_options",
    "json_option",
    "layer_options",
    "metric_option",
    "model_argument",
    "norms_option",
    "option",
    "precision_option",
    "runtime_options",
    "test_data_option",
]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Written out so that --help imports neither numpy nor the tables; a test compares them with the tables.
CRITERIA = ("car", "class-car", "l1", "l2", "outgoing", "variance", "apoz", "function", "reconstruction", "random")
LATER_CRITERIA: tuple[str, ...] = ()
PRESETS = ("imagenet", "cifar10", "mnist", "tf", "unit", "raw")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")
PRECISIONS = ("fp32", "tf32", "fp16")


def option(*names: str, section: str, **kwargs: Any) -> Decorator:
    """An option under a heading of the help."""
    return click.option(*names, cls=Opt, section=section, **kwargs)


def _together(*decorators: Decorator) -> Decorator:
    return lambda function: reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


def _set(attribute: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Terminal), attribute, True)

    return callback


def model_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """The positional MODEL."""
    return click.argument("model", type=click.Path(path_type=Path))(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json FILE|-``."""
    return option("--json", section="Output", metavar="FILE|-", help="Write the result as JSON; - is stdout, alone.")(
        function
    )


def layer_options(section: str) -> Decorator:
    """``--layers`` and ``--exclude``."""
    return _together(
        option(
            "--layers",
            section=section,
            multiple=True,
            metavar="GLOB",
            help="Only these, by node or weight name; repeatable.",
        ),
        option("--exclude", section=section, multiple=True, metavar="GLOB", help="Not these; repeatable."),
    )


def norms_option(section: str) -> Decorator:
    """``--norms protect|rewrite``."""
    return option(
        "--norms",
        section=section,
        type=click.Choice(("protect", "rewrite")),
        default="protect",
        callback=refuse_later_values,
        help="Channels under LayerNorm, one-group GroupNorm, channel means.  [default: protect]",
    )


general_options: Decorator = _together(
    option(
        "--config",
        section="General",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Defaults of all flags; else onnxcar.toml beside MODEL, then in this folder.",
    ),
    option(
        "-q",
        "--quiet",
        section="General",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set("quiet"),
        help="No progress, no advice; results, warnings and errors only.",
    ),
    option(
        "--traceback",
        section="General",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set("traceback"),
        help="Show where an error came from.",
    ),
)

_DATA, _PRE, _RUN = "Data", "Preprocessing", "Running"

_source_options: Decorator = _together(
    option(
        "--data",
        section=_DATA,
        metavar="PATH",
        help="Images and labels: a folder with one sub-folder a class, .npz, .csv/.txt of path,label, or "
        "module:callable (file.py:callable).",
    ),
    option(
        "--label-offset",
        section=_DATA,
        type=int,
        default=0,
        metavar="N",
        help="Label L is output L + N (1,001-class networks: 1).  [default: 0]",
    ),
    option(
        "--limit",
        section=_DATA,
        type=Count(),
        metavar="N",
        help="A class-balanced sample of N.  [default: all]",
    ),
    option(
        "--seed",
        section=_DATA,
        type=Count(0),
        default=0,
        metavar="S",
        help="Of all sampling.  [default: 0]",
    ),
)

_preprocess_options: Decorator = _together(
    option(
        "--preprocess",
        section=_PRE,
        metavar="NAME|FILE",
        help=f"{', '.join(PRESETS)}, or a timm / Hugging Face JSON file.  [default: unit]",
    ),
    option("--size", section=_PRE, type=SIZE, metavar="N|HxW", help="Input size in pixels.  [default: the network's]"),
    option(
        "--crop-pct",
        section=_PRE,
        type=Fraction(high_in=True),
        metavar="F",
        help="Part of the resized image that the centre crop keeps.",
    ),
    option(
        "--interpolation",
        section=_PRE,
        type=click.Choice(INTERPOLATIONS),
        metavar="NAME",
        help="bilinear, bicubic, ...",
    ),
    option(
        "--mean",
        section=_PRE,
        type=NUMBERS,
        metavar="M,M,M",
        help="Subtracted, in 0..1 or 0..255, the network's order.",
    ),
    option("--std", section=_PRE, type=NUMBERS, metavar="S,S,S", help="Divides, on the scale of the mean."),
    option("--channels", section=_PRE, type=click.Choice(("rgb", "bgr", "gray")), help="Order the network wants."),
    option("--layout", section=_PRE, type=click.Choice(("nchw", "nhwc")), help="Axes the network wants."),
)

metric_option: Decorator = option(
    "--metric",
    section=_DATA,
    default="top1",
    metavar="NAME",
    help="top1, top5, balanced, loss, r2, mse, mae, pearson, or module:function.  [default: top1]",
)

runtime_options: Decorator = _together(
    option(
        "--provider",
        section=_RUN,
        type=click.Choice(PROVIDERS),
        default="auto",
        metavar="NAME",
        help="auto (CUDA if it really loads, else CPU), cpu, cuda, tensorrt.  [default: auto]",
    ),
    option("--threads", section=_RUN, type=Count(), metavar="N", help="[default: all cores]"),
    option("--batch-size", section=_RUN, type=Count(), metavar="N", help="[default: from the memory bound]"),
    option(
        "--memory", section=_RUN, type=MEMORY, metavar="SIZE", help="As 4GiB.  [default: a quarter of what is free]"
    ),
    option(
        "--executor",
        section=_RUN,
        default="local",
        callback=refuse_later_values,
        metavar="NAME",
        help="Where candidates are scored.  [default: local]",
    ),
)

precision_option: Decorator = option(
    "--precision",
    section=_RUN,
    type=click.Choice(PRECISIONS),
    default="fp32",
    metavar="NAME",
    help="What candidates are scored in: fp32, tf32 (GPU), fp16; the last two are tried against fp32 first.  "
    "[default: fp32]",
)

data_options: Decorator = _together(_source_options, _preprocess_options)

classes_option: Decorator = option(
    "--classes",
    section=_DATA,
    metavar="LIST",
    help="Only these classes count, among themselves: names or labels, separated by commas; @FILE: one a line.",
)

test_data_option: Decorator = option(
    "--test-data",
    section=_DATA,
    metavar="PATH",
    help="What final numbers are reported on; filters are never chosen on it.",
)
