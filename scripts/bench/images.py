"""The data options of the benches: the same as those of `onnxcar`, for folders, lists and arrays alike."""

from __future__ import annotations

import argparse

from onnxcar.data import INTERPOLATIONS, PRESETS, Dataset, Preprocess, open_dataset
from onnxcar.model import Model
from onnxcar.runtime import batch_inputs

__all__ = ["PARTS", "add_data", "flags", "open_data"]

PARTS = ("size", "crop_pct", "interpolation", "mean", "std", "channels", "layout")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the data and its options."""
    parser.add_argument("data", help="a folder, .npz, .csv or .txt")
    parser.add_argument("--preprocess", help=f"{', '.join(PRESETS)}, or a JSON file; default unit")
    for part in PARTS:
        choices = tuple(INTERPOLATIONS) if part == "interpolation" else None
        parser.add_argument(f"--{part.replace('_', '-')}", choices=choices)
    parser.add_argument("--label-offset", type=int, default=0)
    parser.add_argument("--limit", type=int, help="images, default all")


def open_data(asked: argparse.Namespace, model: Model, limit: int | None = None) -> Dataset:
    """The images as the model wants them."""
    pre = Preprocess.resolve(asked.preprocess, **{part: getattr(asked, part) for part in PARTS})
    data = open_dataset(asked.data, preprocess=pre, label_offset=asked.label_offset, limit=limit or asked.limit, seed=0)
    return data.for_input(batch_inputs(model)[0].shape)


def flags(asked: argparse.Namespace) -> list[str]:
    """The same options for another process, without the limit."""
    names = ("preprocess", *PARTS, "label_offset")
    return [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(asked, name)) is not None]
