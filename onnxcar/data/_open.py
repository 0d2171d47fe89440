"""Data sets: labelled samples from folders, arrays, lists and the user's own code, all as one :class:`Dataset`.

Sources (see :func:`open_dataset`):

- a folder with one sub-folder a class; sorted names are the class ids, `classes.txt` overrides;
- an `.npz` with `images` or `x` and `labels` or `y`; never unpickled;
- a `.csv` or `.txt` of `path,label` or `path label`, paths relative to the list;
- `module:callable` or `file.py:callable`, yielding `(inputs, labels)` batches.

Pixels (image files, uint8 arrays) are preprocessed. Float and int8 arrays are inputs already and keep their values;
only a missing channel axis or channels on the other side are put right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcar.data import _files
from onnxcar.data._calls import collect, load_callable
from onnxcar.data._dataset import DISK_BYTES, MEMORY_BYTES, Dataset, DataWarning
from onnxcar.data._preprocess import Preprocess
from onnxcar.data._sources import ArraySource, FileSource, array_source
from onnxcar.errors import DataError

__all__ = ["DataWarning", "Dataset", "FromCallable", "ImageFolder", "ListFile", "Npz", "open_dataset", "overlap"]


class ImageFolder(Dataset):
    """Images in one sub-folder a class.

    Args:
        path: The folder. Sorted sub-folder names are the class ids; a `classes.txt` in it, one name a line, overrides.
        preprocess: Default: `unit`.
        label_offset: Added to every label.
        labelled: False accepts images without class folders.
        options: `threads` and `memory_bytes` of :class:`Dataset`.

    Raises:
        DataError: No such folder, no images, an empty class folder, a folder that `classes.txt` does not name.
    """

    def __init__(
        self,
        path: str | Path,
        preprocess: Preprocess | None = None,
        *,
        label_offset: int = 0,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        """Scan the folder; no image is opened yet."""
        found = _files.scan_folder(Path(path), labelled=labelled)
        labels, classes = _shifted(found.labels, found.classes, label_offset)
        source = FileSource(found.paths)
        super().__init__(source, labels, path=str(path), preprocess=preprocess, classes=classes, **options)


class ListFile(Dataset):
    """Images named by a list of `path,label` or `path label` lines.

    Args:
        path: The list; image paths are relative to it. A header line is allowed. Labels are class ids, or names of
            a `classes.txt` beside the list, or floats, several to a line in a csv: targets of a regression.
        preprocess: Default: `unit`.
        label_offset: Added to every class label.
        labelled: False accepts lines without label.
        options: `threads` and `memory_bytes` of :class:`Dataset`.

    Raises:
        DataError: No such file, an empty list, a line without label, a label that is no number.
    """

    def __init__(
        self,
        path: str | Path,
        preprocess: Preprocess | None = None,
        *,
        label_offset: int = 0,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        """Read the list; no image is opened yet."""
        found = _files.read_list(Path(path), labelled=labelled)
        labels, classes = _shifted(found.labels, found.classes, label_offset)
        source = FileSource(found.paths)
        super().__init__(source, labels, path=str(path), preprocess=preprocess, classes=classes, **options)


class Npz(Dataset):
    """Arrays `images` (or `x`) and `labels` (or `y`) of an `.npz`.

    Args:
        path: The file. uint8 arrays are pixels, (n, h, w), (n, h, w, 3) or (n, 3, h, w); float and int8 arrays are
            inputs already. Names may stand in an array `classes`.
        preprocess: Default: `unit`. Not applied to prepared inputs.
        label_offset: Added to every class label.
        labelled: False accepts a file without labels.
        options: `threads` and `memory_bytes` of :class:`Dataset`.

    Raises:
        DataError: Not an npz, pickled objects, missing arrays, shapes or dtypes that are no images.
    """

    def __init__(
        self,
        path: str | Path,
        preprocess: Preprocess | None = None,
        *,
        label_offset: int = 0,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        """Read the labels, and the images unless they are so large that they are mapped."""
        images, values, names = _files.read_npz(Path(path), labelled=labelled)
        labels, classes = _shifted(values, names, label_offset)
        source = array_source(images, str(path))
        super().__init__(source, labels, path=str(path), preprocess=preprocess, classes=classes, **options)


class FromCallable(Dataset):
    """What the user's own code yields.

    Args:
        function: Called once without arguments; returns an iterable of `(inputs, labels)` batches. Inputs are an
            array (k, ...), or for several graph inputs a tuple or a dict by name. uint8 arrays of rank 3 or 4 are
            pixels and are preprocessed; all others are inputs already.
        preprocess: Default: `unit`.
        input_names: Graph inputs that the entries of a tuple belong to.
        label_offset: Added to every class label.
        labelled: False accepts batches with None for labels, or without them.
        options: `path`, `threads` and `memory_bytes` of :class:`Dataset`; beyond the latter batches go to disk.

    Raises:
        DataError: The code fails, or yields nothing, or batches that do not fit together.
    """

    def __init__(
        self,
        function: Callable[[], Iterable[Any]],
        preprocess: Preprocess | None = None,
        *,
        input_names: Sequence[str] = (),
        label_offset: int = 0,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        """Run the code to its end and keep what it yields."""
        path = (
            options.pop("path", None)
            or f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', '?')}"
        )
        limit = (options.get("memory_bytes", MEMORY_BYTES), DISK_BYTES)
        arrays, values = collect(function, path, input_names=input_names, labelled=labelled, bounds=limit)
        labels, _ = _shifted(values, None, label_offset)
        source = array_source(arrays[""], path) if tuple(arrays) == ("",) else ArraySource(arrays, path)
        super().__init__(source, labels, path=path, preprocess=preprocess, **options)


def open_dataset(
    source: str | Path | Callable[[], Iterable[Any]] | Dataset,
    *,
    preprocess: Preprocess | None = None,
    label_offset: int = 0,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = True,
    input_names: Sequence[str] = (),
    **options: Any,
) -> Dataset:
    """The data set that `--data` names.

    Args:
        source: A folder, `.npz`, `.csv` or `.txt`, `module:callable`, `file.py:callable`, a function, or a Dataset.
        preprocess: How pixels become inputs; default `unit`.
        label_offset: A label L in the data is output index L + label_offset.
        limit: A class-balanced sample of that many; None for all.
        seed: Of the sample.
        labelled: False where labels are not needed (calibration).
        input_names: Of the network, for callables that yield several inputs as a tuple.
        options: `threads` and `memory_bytes` of :class:`Dataset`.

    Raises:
        DataError: Missing, of no known kind, or not readable as what it is.
    """
    if isinstance(source, Dataset):
        return source.limit(limit, seed)
    shared: dict[str, Any] = {"label_offset": label_offset, "labelled": labelled, **options}
    if callable(source):
        return FromCallable(source, preprocess, input_names=input_names, **shared).limit(limit, seed)
    path = Path(source)
    if os.path.isdir(path):  # noqa: PTH112 -- pathlib raises for names that are too long, or folders that are closed
        data: Dataset = ImageFolder(path, preprocess, **shared)
    elif os.path.exists(path):  # noqa: PTH110
        kind = _KINDS.get(path.suffix.lower())
        if kind is None:
            raise DataError(
                f"'{path}' is no data set: files are {', '.join(_KINDS)}. Give one of these, a folder with one "
                "sub-folder a class, or module:callable.",
                path=str(path),
            )
        data = kind(path, preprocess, **shared)
    elif ":" in str(source):
        function = load_callable(str(source))
        data = FromCallable(function, preprocess, input_names=input_names, path=str(source), **shared)
    else:
        raise DataError(
            f"Data '{path}' does not exist (looked in '{Path.cwd()}'). Give a folder, an .npz, a .csv or .txt list, "
            "or module:callable.",
            path=str(path),
        )
    return data.limit(limit, seed)


_KINDS: Mapping[str, type[ImageFolder] | type[ListFile] | type[Npz]] = {".npz": Npz, ".csv": ListFile, ".txt": ListFile}


def overlap(a: Dataset, b: Dataset) -> int:
    """Number of samples of `b` whose stored content is also in `a`: 0 for clean test data.

    Files are compared by their bytes, arrays by shape and values; the same picture in two encodings is not seen.
    """
    known = {row.tobytes() for row in a._source.digests(a._index)}
    return sum(row.tobytes() in known for row in b._source.digests(b._index))


def _shifted(
    labels: NDArray[Any] | None, classes: Sequence[str] | None, offset: int
) -> tuple[NDArray[Any] | None, tuple[str, ...] | None]:
    """Labels and class names moved by the label offset; outputs without a class get a name in brackets."""
    names = None if classes is None else tuple(classes)
    if offset and names is not None:
        names = tuple(f"({k})" for k in range(offset)) + names if offset > 0 else names[-offset:]
    if offset and labels is not None and labels.dtype.kind in "iub":
        labels = labels.astype(np.int64) + offset
    return labels, names
