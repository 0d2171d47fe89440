"""Data from the user's own code: import it, run it once, keep what it yields."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcar.errors import DataError

__all__ = ["collect", "load_callable"]


def load_callable(spec: str) -> Callable[[], Iterable[Any]]:
    """The function that `module:callable` or `file.py:callable` names; importing it runs the module's code.

    Modules are also looked for in the working folder.

    Raises:
        DataError: No such module, file or name, the import fails, or the name is not callable.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise DataError(f"'{spec}' names no function. Write module:callable or file.py:callable.", path=spec)
    try:
        found: Any = _module(place)
    except DataError:
        raise
    except Exception as e:  # the user's code may raise anything
        raise DataError(f"Importing '{place}' for '{spec}' failed: {type(e).__name__}: {e}.", path=spec) from e
    for part in name.split("."):
        if not hasattr(found, part):
            raise DataError(f"'{place}' has no '{name}'. Define it, or correct '{spec}'.", path=spec)
        found = getattr(found, part)
    if not callable(found):
        raise DataError(
            f"'{spec}' is a {type(found).__name__}, not a function. It must return batches when called.", path=spec
        )
    return found  # type: ignore[no-any-return]


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        folder = str(Path.cwd())
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as e:
            if e.name is None or not place.startswith(e.name):
                raise
            raise DataError(
                f"There is no module '{place}'. Run where it can be imported, or give its file: file.py:callable.",
                path=place,
            ) from e
        finally:
            sys.path.remove(folder)
    path = Path(place)
    if not path.is_file():
        raise DataError(f"There is no file '{path}' (looked in '{Path.cwd()}'). Correct the path.", path=place)
    module_spec = importlib.util.spec_from_file_location(f"_onnxcar_data_{path.stem}", path)
    assert module_spec is not None  # a .py file always has a loader
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look the module up
    module_spec.loader.exec_module(module)
    return module


def collect(
    function: Callable[[], Iterable[Any]],
    path: str,
    *,
    input_names: Sequence[str] = (),
    labelled: bool = True,
    bounds: tuple[int, int],
) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """All batches of a function, joined: inputs by name ("" for the only one) and labels.

    Args:
        function: Called once; its result is run through once.
        path: Its name for messages.
        input_names: Of the network, for inputs given as a tuple.
        labelled: False accepts batches without labels.
        bounds: Bytes of each input kept in memory, and bytes on disk beyond which collecting stops.

    Raises:
        DataError: The code raises, yields nothing or something else than batches, or more than the bounds allow.
    """
    joined: dict[str, _Joined] = {}
    labels: list[NDArray[Any]] = []
    try:
        for number, batch in enumerate(function()):
            inputs, values = _parts(batch, number, path, input_names, labelled)
            sizes = {key: len(value) for key, value in inputs.items()}
            n = next(iter(sizes.values()))
            if len(set(sizes.values())) > 1 or (values is not None and (values.ndim == 0 or len(values) != n)):
                shown = None if values is None else values.shape
                raise DataError(
                    f"Batch {number} of '{path}' has inputs of {sizes} samples and labels of shape {shown}. "
                    "They must agree.",
                    sample=number,
                )
            if joined and joined.keys() != inputs.keys():
                raise DataError(
                    f"Batch {number} of '{path}' has inputs {sorted(inputs)}, the first has {sorted(joined)}.",
                    sample=number,
                )
            for key, value in inputs.items():
                joined.setdefault(key, _Joined(f"'{path}'", bounds)).add(value, number)
            if values is not None:
                labels.append(values)
    except BaseException as e:  # the user's code may raise anything, and may be interrupted
        for store in joined.values():
            store.close()
        if isinstance(e, DataError) or not isinstance(e, Exception):
            raise
        raise DataError(
            f"'{path}' failed: {type(e).__name__}: {e}. It must yield (inputs, labels) batches.", path=path
        ) from e
    if not joined:
        raise DataError(f"'{path}' yields no batches. It must yield (inputs, labels).", path=path)
    if labelled:
        kinds = {v.dtype.kind for v in labels}
        if len({v.shape[1:] for v in labels}) > 1 or ("f" in kinds and kinds != {"f"}):
            raise DataError(
                f"Batches of '{path}' have labels of different shapes or dtypes. Yield the same kind in every batch.",
                path=path,
            )
    return {key: value.array() for key, value in joined.items()}, np.concatenate(labels) if labelled else None


def _parts(
    batch: Any, number: int, path: str, names: Sequence[str], labelled: bool
) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
    elif labelled or isinstance(batch, (tuple, list)):
        raise DataError(
            f"Batch {number} of '{path}' is a {type(batch).__name__}, not a pair (inputs, labels).", sample=number
        )
    else:
        inputs, labels = batch, None
    if isinstance(inputs, Mapping):
        by_name = {str(key): np.asarray(value) for key, value in inputs.items()}
    elif isinstance(inputs, (tuple, list)):
        if len(inputs) > 1 and len(inputs) != len(names):
            raise DataError(
                f"Batch {number} of '{path}' has {len(inputs)} inputs, the network has {list(names)}. "
                "Yield a dict with the graph's input names.",
                sample=number,
            )
        by_name = (
            {"": np.asarray(inputs[0])}
            if len(inputs) == 1
            else {k: np.asarray(v) for k, v in zip(names, inputs, strict=True)}
        )
    else:
        by_name = {"": np.asarray(inputs)}
    for key, value in by_name.items():
        if value.dtype.hasobject or value.ndim == 0:
            raise DataError(
                f"Batch {number} of '{path}' has no array of numbers{f' for input {key}' if key else ''} but "
                f"{value.dtype} of shape {value.shape}. Yield arrays (k, ...).",
                sample=number,
            )
    if not by_name:
        raise DataError(f"Batch {number} of '{path}' has no inputs. Yield (inputs, labels).", sample=number)
    if labelled and labels is None:
        raise DataError(f"Batch {number} of '{path}' has no labels (None). Yield (inputs, labels).", sample=number)
    return by_name, None if labels is None else np.asarray(labels)


class _Joined:
    """Batches of one input end to end, in memory up to a bound, then in a temporary file."""

    def __init__(self, name: str, bounds: tuple[int, int]) -> None:
        self._name, (self._memory_bytes, self._disk_bytes) = name, bounds
        self._parts: list[NDArray[Any]] = []
        self._file: Any = None
        self._n = self._n_bytes = 0
        self._row: tuple[np.dtype[Any], tuple[int, ...]] | None = None

    def add(self, batch: NDArray[Any], number: int) -> None:
        """Append a copy: generators may use their buffers again."""
        row = (batch.dtype, batch.shape[1:])
        if self._row is None:
            self._row = row
        if row != self._row:
            raise DataError(
                f"Batch {number} of {self._name} has {row[0]} samples of shape {row[1]}, earlier ones are "
                f"{self._row[0]} of shape {self._row[1]}. Yield one kind.",
                sample=number,
            )
        self._n += len(batch)
        self._n_bytes += batch.nbytes
        if self._n_bytes > self._memory_bytes + self._disk_bytes:
            raise DataError(
                f"{self._name} yields more than {self._n_bytes >> 20} MiB and does not end. Yield fewer samples, or "
                "list image files instead."
            )
        if self._file is None and self._n_bytes > self._memory_bytes:
            self._file = tempfile.TemporaryFile(prefix="onnxcar-")  # noqa: SIM115 -- lives as long as the map
            for part in self._parts:
                self._file.write(part.tobytes())
            self._parts = []
        if self._file is None:
            self._parts.append(np.array(batch))
        else:
            self._file.write(np.ascontiguousarray(batch).tobytes())

    def close(self) -> None:
        """Give the temporary file up."""
        if self._file is not None:
            self._file.close()

    def array(self) -> NDArray[Any]:
        """All batches as one array (n, ...); mapped if they went to disk."""
        assert self._row is not None
        if self._file is None:
            return np.concatenate(self._parts)
        with self._file:  # the map holds the file open by itself
            self._file.flush()
            return np.memmap(self._file, self._row[0], "r", shape=(self._n, *self._row[1]))
