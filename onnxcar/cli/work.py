"""Steps that several commands share: output paths, opening the model and the data, writing JSON."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnxcar.cli.terminal import Terminal
from onnxcar.errors import ModelError, OutputError

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.model import Model
    from onnxcar.runtime import Provider

__all__ = [
    "check_model",
    "check_outputs",
    "header",
    "json_target",
    "need_data",
    "open_data",
    "open_provider",
    "open_reported",
    "open_unscored",
    "read_class_groups",
    "terminal",
    "this_command",
    "write_json",
    "write_text",
]

_PARTS = ("size", "crop_pct", "interpolation", "mean", "std", "channels", "layout")


def terminal() -> Terminal:
    """The terminal of the running command."""
    return click.get_current_context().ensure_object(Terminal)


# --- outputs --------------------------------------------------------------------------------------------------------


def check_outputs(paths: Iterable[Path], *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse paths that could not be written later, before any work is done.

    Raises:
        OutputError: A path exists and ``force`` is off, is a folder, is one of ``inputs``, or its folder is missing
            or cannot be written.
    """
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path} is a folder. Name a file in it.", path=path)
        if any(_same(path, given) for given in inputs):
            raise OutputError(f"{path} is what is read. Name another file, it would be overwritten.", path=path)
        if path.exists() and not force:
            raise OutputError(f"{path} exists. Name another file, or give --force to replace it.", path=path)
        folder = path.parent
        if not folder.is_dir():
            raise OutputError(
                f"The folder {folder} of {path.name} does not exist. Make it first, or name another.", path=path
            )
        if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise OutputError(
                f"{path} cannot be written (no permission in {folder}). Name a file elsewhere.", path=path
            )


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return a.absolute() == b.absolute()


def json_target(json_to: str | None, inputs: Sequence[Path] = ()) -> Path | None:
    """The file of ``--json``, checked; None for stdout and for none. A report of an earlier run is replaced."""
    if json_to is None or json_to == "-":
        return None
    path = Path(json_to)
    check_outputs([path], force=True, inputs=inputs)
    return path


def write_json(result: Mapping[str, Any], json_to: str | None) -> None:
    """Write the result where ``--json`` says."""
    if json_to is None:
        return
    from onnxcar import record

    if json_to == "-":
        sys.stdout.write(record.dumps(result))
        sys.stdout.flush()
    else:
        record.write(result, Path(json_to), force=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as exc:
        raise OutputError(f"Cannot write {path}: {exc.strerror or exc}. Name a file elsewhere.", path=path) from exc
    finally:
        draft.unlink(missing_ok=True)


def header(command: str) -> dict[str, Any]:
    """The first keys of every JSON result."""
    from onnxcar import __version__, record

    return {"onnxcar": __version__, "schema": record.SCHEMA, "command": command}


def this_command() -> str:
    """The command line that runs, to be copied."""
    return shlex.join(["onnxcar", *sys.argv[1:]])


# --- inputs ---------------------------------------------------------------------------------------------------------


def check_model(path: Path) -> None:
    """Refuse a path that cannot be a model's before anything else is asked for; `load` does the rest.

    Raises:
        ModelError: There is no such file.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"Model {path} {what}. Give the path of an .onnx file.", path=path)


def open_provider(params: Mapping[str, Any]) -> Provider:
    """The provider of ``--provider``; one line says what ``auto`` found."""
    from onnxcar.runtime import resolve_provider

    found = resolve_provider(params["provider"])
    if params.get("precision") == "tf32" and found.name != "cuda":
        raise click.UsageError(
            f"--precision tf32 is a mode of the provider cuda, and models run on {found.name} here. Leave it out, or "
            "give --provider cuda on a machine with an NVIDIA GPU."
        )
    if found.note:
        terminal().note(found.note)
    return found


def open_data(params: Mapping[str, Any], model: Model, path: str | None = None, *, labelled: bool = True) -> Dataset:
    """The data set of ``--data`` as the flags describe it, fitted to the model's input.

    Args:
        params: Values of the data and preprocessing flags.
        model: Whose input the images become.
        path: Another data set (test data): ``--limit`` is not about it.
        labelled: False where labels are not needed.
    """
    from onnxcar.data import Preprocess, open_dataset
    from onnxcar.runtime import batch_inputs

    inputs = batch_inputs(model)
    classes = params.get("classes")
    limit = params["limit"] if path is None else None
    data = open_dataset(
        path if path is not None else params["data"],
        preprocess=Preprocess.resolve(params["preprocess"], **{part: params[part] for part in _PARTS}),
        label_offset=params["label_offset"],
        limit=limit if classes is None else None,
        seed=params["seed"],
        labelled=labelled,
        input_names=[i.name for i in inputs],
    )
    if classes is not None and labelled:
        from onnxcar.classes import resolve

        data = data.only(resolve(classes, data, params["label_offset"])).limit(limit, params["seed"])
    return data.for_input(inputs[0].shape if len(inputs) == 1 else None)


def open_unscored(params: Mapping[str, Any], model: Model) -> Dataset:
    """The data set of ``--data`` where nobody has to be scored on it: with its labels where there are any."""
    from onnxcar.errors import DataError

    try:
        return open_data(params, model)
    except DataError as exc:
        try:
            found = open_data(params, model, labelled=False)
        except DataError:
            raise exc from None  # no labels is not all that is wrong
    terminal().note(f"No labels in {params['data']}: how accurate networks are on these images is not told.")
    return found


def open_reported(params: Mapping[str, Any], model: Model) -> Dataset | None:
    """What numbers are reported on: ``--test-data`` where there is any, else ``--data``, else None."""
    path = params["test_data"] or params["data"]
    if path is None:
        return None
    # A limit in a config is about choosing filters; one that is typed here is meant for these data.
    typed = click.get_current_context().get_parameter_source("limit") is ParameterSource.COMMANDLINE
    limit = params["limit"] if typed or params["test_data"] is None else None
    return open_data({**params, "data": path, "limit": limit}, model)


def read_class_groups(path: Path) -> dict[str, list[str | int]]:
    """Groups of classes from a JSON file, name -> class names or output indices.

    Raises:
        DataError: The file is missing or is no such JSON.
    """
    import json

    from onnxcar.errors import DataError

    remedy = 'It must hold JSON like {"fruit": ["lemon", "orange"], "cats": [281, 282]}.'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as exc:
        raise DataError(f"Groups of classes cannot be read from {path}: {exc}. {remedy}", path=path) from exc
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds a {type(found).__name__}, no groups of classes. {remedy}", path=path)
    return found


def need_data(params: Mapping[str, Any], why: str) -> None:
    """Refuse, as a usage error, to go on without ``--data``."""
    if params.get("data") is None and params.get("test_data") is None:
        raise click.UsageError(
            f"{why} needs data: give --data PATH and --preprocess, or put both into an onnxcar.toml beside the model.",
            click.get_current_context(),
        )
