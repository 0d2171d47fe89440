"""One data set: labels, subsets and samples on top of a source, every image preprocessed once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcar.data import _files
from onnxcar.data._images import normalize
from onnxcar.data._pixel_cache import PixelCache
from onnxcar.data._preprocess import Preprocess
from onnxcar.data._sources import ArraySource, PixelArray, Source
from onnxcar.errors import DataError, OnnxcarWarning

__all__ = ["DataWarning", "Dataset"]

#: Bounds on kept pixels where the caller gives none.
MEMORY_BYTES = 1 << 30
DISK_BYTES = 16 << 30

Shape = Sequence[int | str | None]


class DataWarning(OnnxcarWarning):
    """The data can be used but may not be what was meant; the text ends in advice."""


class Dataset:
    """Labelled samples in a fixed order.

    Attributes:
        labels: Output indices (n,) int64, or regression targets (n, k) float64. All -1 where there are none.
        classes: Name of each output index, None if unknown.
        path: Where the samples come from, as given.
        preprocess: How pixels become inputs.
        has_labels: Whether `labels` means something.
        outputs: Network outputs that count, ascending; `labels` are positions among them. None: all of them.
    """

    labels: NDArray[Any]
    classes: tuple[str, ...] | None
    path: str
    preprocess: Preprocess
    has_labels: bool
    outputs: NDArray[np.int64] | None

    def __init__(
        self,
        source: Source,
        labels: NDArray[Any] | None,
        *,
        path: str,
        preprocess: Preprocess | None = None,
        classes: Sequence[str] | None = None,
        threads: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Put labels on a source; the public constructors call this.

        Args:
            source: Samples by position.
            labels: Integers (n,), floats (n,) or (n, k), or None for none.
            path: Name for messages and records.
            preprocess: Default: `unit`.
            classes: Name of each label.
            threads: That decode images; default all cores.
            memory_bytes: Bound on the pixels kept in memory.

        Raises:
            DataError: Labels of another number, shape or type, or not finite.
        """
        self._source = source
        self._threads = threads or _files.n_cores()
        self._memory_bytes = memory_bytes
        self._sha256: str | None = None
        self.path = path
        self.classes = tuple(classes) if classes is not None else None
        self.has_labels = labels is not None
        self.outputs = None
        self.labels = np.full(len(source), -1, np.int64) if labels is None else _labels(labels, len(source), path)
        self._index: NDArray[np.int64] = np.arange(len(source), dtype=np.int64)
        self._axes: tuple[int | None, ...] | None = None  # of prepared inputs: where each axis comes from, None is new
        if isinstance(source, ArraySource):
            self._warn_if_unused(preprocess)
        self._set_preprocess(preprocess if preprocess is not None else Preprocess.preset("unit"))

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"<Dataset {self.path!r}, {len(self)} samples>"

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, hex: each sample's digest in order, then the labels. Reads every file once."""
        if self._sha256 is None:
            digest = hashlib.sha256(self._source.digests(self._index).tobytes())
            digest.update(str(self.labels.shape).encode())
            if self.outputs is not None:
                digest.update(self.outputs.astype("<i8").tobytes())
            digest.update(self.labels.astype("<f8" if self.labels.dtype.kind == "f" else "<i8").tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    @property
    def input_names(self) -> tuple[str, ...]:
        """Keys of :meth:`inputs`: graph inputs by name, or "" for the only one."""
        return tuple(self._source.arrays) if isinstance(self._source, ArraySource) else ("",)

    @property
    def holds_pixels(self) -> bool:
        """Whether samples are pixels that `preprocess` makes inputs of, rather than inputs already."""
        return not isinstance(self._source, ArraySource)

    def name(self, index: int) -> str:
        """A sample's name for messages: its path, or where in which array it is."""
        return self._source.name(int(self._index[index]))

    def inputs(self, indices: ArrayLike) -> dict[str, NDArray[Any]]:
        """Network inputs of some samples, in the order asked for.

        Images are decoded in parallel and once: their pixels are kept within bounds, in memory and on disk.

        Args:
            indices: Positions in this data set, (k,).

        Returns:
            One array (k, ...) for each graph input, key "" if there is only one. Pixels give float32 (k, c, h, w) or
            (k, h, w, c); casting to the input's dtype is the caller's.

        Raises:
            DataError: An image cannot be read, images differ in size and no size is set, or values are not finite.
        """
        at = self._index[np.asarray(indices, np.int64).reshape(-1)]
        if isinstance(self._source, ArraySource):
            return {key: self._laid_out(rows) for key, rows in self._source.rows(at).items()}
        source, pre = self._source, self.preprocess

        if isinstance(source, PixelArray) and source.stored(pre):
            return {"": normalize(source.stored_pixels(at, pre), pre)}

        def read(missing: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
            return source.pixels(missing, pre, self._threads)

        # The key of what is kept on disk takes a look at every file of the source: not for a small part of it.
        lasting = 2 * len(self) >= len(source)
        return {"": normalize(self._stacked(self._cache.get(at, read, lasting=lasting), at), pre)}

    def subset(self, indices: ArrayLike) -> Dataset:
        """The samples at these positions, in this order; decoded images are shared with this data set."""
        at = np.asarray(indices)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64).reshape(-1)
        out = self._copy()
        out._index, out.labels = self._index[at], self.labels[at]
        return out

    def only(self, outputs: Sequence[int]) -> Dataset:
        """The samples of some classes, judged among these alone: the other outputs do not count.

        Args:
            outputs: Output indices of the classes, any order; labels become positions among them, ascending.

        Raises:
            DataError: No class labels, fewer than two classes, one that no sample has, or a subset already.
        """
        kept = np.unique(np.asarray(outputs, np.int64))
        if not self.has_labels or self.labels.ndim > 1 or self.outputs is not None:
            raise DataError(f"Some classes of '{self.path}' were asked for; that takes class labels, of all classes.")
        missing = kept[~np.isin(kept, self.labels)]
        if len(kept) < 2 or len(missing):
            wrong = f"no sample of class {int(missing[0])}" if len(missing) else f"only {len(kept)} class asked for"
            raise DataError(f"'{self.path}': {wrong}. --classes takes at least two classes, each with samples.")
        out = self.subset(np.isin(self.labels, kept))
        out.labels = np.searchsorted(kept, out.labels)
        out.outputs = kept
        names = self.classes or ()
        out.classes = tuple(names[i] if i < len(names) else str(i) for i in kept.tolist())
        return out

    def among(self, outputs: Sequence[int] | None) -> Dataset:
        """The same samples and labels with other outputs that count: for a network whose rows were dropped, None."""
        out = self._copy()
        out.outputs = None if outputs is None else np.asarray(outputs, np.int64)
        return out

    def limit(self, n: int | None, seed: int = 0) -> Dataset:
        """A seeded sample of n, as even over the classes as they allow, in this data set's order.

        The sample of a smaller n lies within that of a larger one. Targets of regression are drawn evenly.

        Raises:
            DataError: n is below 1.
        """
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise DataError(f"A sample of {n} images was asked for from '{self.path}'. Use --limit 1 or more.")
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self))
        if self.labels.ndim > 1 or not self.has_labels:
            return self.subset(np.sort(order[:n]))
        _, ids = np.unique(self.labels, return_inverse=True)
        turn = rng.permutation(int(ids.max()) + 1)  # which classes come first in a round
        ids = turn[ids]
        by_class = order[np.argsort(ids[order], kind="stable")]
        starts = np.searchsorted(ids[by_class], ids[by_class])
        rounds = np.arange(len(by_class)) - starts  # 0 for the first image of each class, 1 for the second, ...
        drawn = by_class[np.lexsort((ids[by_class], rounds))[:n]]
        return self.subset(np.sort(drawn))

    def for_input(self, shape: Shape | None) -> Dataset:
        """The same samples, with what the preprocessing leaves open taken from a network's input shape.

        Args:
            shape: Batch first; None or a name for an unknown size.

        Raises:
            ConfigError: The preprocessing contradicts the network.
            DataError: Prepared inputs do not have the network's shape.
        """
        if isinstance(self._source, ArraySource):
            if self.input_names != ("",) or shape is None:
                return self
            out = self._copy()
            out._axes = _axes(self._source.arrays[""].shape[1:], tuple(shape), self.path)
            return out
        if shape is not None and len(shape) != 4:
            raise DataError(
                f"'{self.path}' holds images but the network's input has shape {tuple(shape)}, {len(shape)} axes "
                "instead of 4. Store inputs of that shape as float32 in an .npz."
            )
        return self._with_preprocess(self.preprocess.for_input(shape))

    def check_labels(self, n_classes: int | None = None) -> None:
        """Refuse labels that a classifier of `n_classes` outputs cannot be scored on.

        Raises:
            DataError: No labels, regression targets, a label outside [0, n_classes), or one class only.
        """
        if not self.has_labels:
            raise DataError(f"'{self.path}' has no labels. {_files.LABEL_REMEDY}", path=self.path)
        if self.labels.ndim > 1:
            raise DataError(
                f"'{self.path}' has float targets (regression). Use a regression metric (--metric r2), "
                "or store class labels as integers.",
                path=self.path,
            )
        if len(self) == 0:
            raise DataError(f"No samples of '{self.path}' are left. Choose more of them.", path=self.path)
        low, high = int(self.labels.min()), int(self.labels.max())
        if n_classes is not None and (low < 0 or high >= n_classes):
            bad = int(np.argmax((self.labels < 0) | (self.labels >= n_classes)))
            raise DataError(
                f"Label {int(self.labels[bad])} of sample {self.name(bad)} is outside the network's "
                f"{n_classes} classes (0..{n_classes - 1}); labels run from {low} to {high}. "
                "Correct the labels, or shift them with --label-offset.",
                sample=self.name(bad),
            )
        if low == high:
            raise DataError(
                f"All {len(self)} samples of '{self.path}' have label {low}: with one class, accuracy tells nothing of "
                "what filters do. Add samples of other classes.",
                path=self.path,
            )

    def _set_preprocess(self, pre: Preprocess) -> None:
        self.preprocess = pre
        self._cache = PixelCache(len(self._source), self._memory_bytes, DISK_BYTES, self._cache_key)

    def _cache_key(self) -> str:
        pre = self.preprocess
        content = self._source.digests(np.arange(len(self._source), dtype=np.int64)).tobytes()
        parts = (pre.hw, pre.crop_pct, pre.interpolation, pre.channels, pre.resize)
        return hashlib.sha256(content + repr(parts).encode()).hexdigest()[:40]

    def _laid_out(self, rows: NDArray[Any]) -> NDArray[Any]:
        if self._axes is None:
            return rows
        rows = rows.transpose(0, *(a + 1 for a in self._axes if a is not None))
        new = [k + 1 for k, a in enumerate(self._axes) if a is None]
        return np.ascontiguousarray(np.expand_dims(rows, tuple(new)))

    def _stacked(self, pixels: list[NDArray[np.uint8]], at: NDArray[np.int64]) -> NDArray[np.uint8]:
        if not pixels:
            return np.zeros((0, *self._source_shape()), np.uint8)
        for i, image in zip(at, pixels, strict=True):
            if image.shape != pixels[0].shape:
                one, other = ("x".join(map(str, s)) for s in (pixels[0].shape, image.shape))
                raise DataError(
                    f"Images differ: '{self._source.name(int(at[0]))}' is {one}, "
                    f"'{self._source.name(int(i))}' is {other}. Set --size (and --channels), or use a "
                    "network whose input has a fixed height and width.",
                    sample=self._source.name(int(i)),
                )
        return np.stack(pixels)

    def _source_shape(self) -> tuple[int, int, int]:
        h, w = self.preprocess.hw or getattr(self._source, "native_hw", None) or (1, 1)
        return (h, w, 1 if self.preprocess.channels == "gray" else 3)

    def _warn_if_unused(self, pre: Preprocess | None) -> None:
        if pre is not None and (any(pre.means) or set(pre.stds) != {1.0}):
            warnings.warn(
                f"'{self.path}' holds prepared inputs, not uint8 pixels: mean and std of the preprocessing are not "
                "applied. Store the pixels as uint8 to have them applied, or use --preprocess raw.",
                DataWarning,
                stacklevel=4,
            )

    def _copy(self) -> Dataset:
        out = object.__new__(Dataset)
        out.__dict__.update(self.__dict__)
        out._sha256 = None
        return out

    def _with_preprocess(self, pre: Preprocess) -> Dataset:
        if pre == self.preprocess:
            return self
        out = self._copy()
        out._set_preprocess(pre)
        return out


def _labels(values: ArrayLike, n: int, path: str) -> NDArray[Any]:
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind in "iub":
        labels = labels[:, 0]
    if labels.ndim == 0 or len(labels) != n:
        raise DataError(
            f"'{path}' has {n} samples but labels of shape {labels.shape}. Give one label a sample.", path=path
        )
    if labels.dtype.kind == "f":
        targets = labels.reshape(n, -1).astype(np.float64)
        good = np.isfinite(targets).all(axis=1)
        if not good.all():
            bad = int(np.argmin(good))
            raise DataError(
                f"The target of sample {bad} of '{path}' is NaN or infinite. Repair or remove it.", sample=bad
            )
        return targets
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"Labels of '{path}' have dtype {labels.dtype}. Store class ids as integers, regression targets as floats.",
            path=path,
        )
    if labels.ndim > 1:
        raise DataError(
            f"Labels of '{path}' have shape {labels.shape}. Give class ids of shape ({n},): one-hot labels through "
            "argmax(axis=1).",
            path=path,
        )
    return labels.astype(np.int64)


def _axes(row: Sequence[int], wanted: Shape, path: str) -> tuple[int | None, ...] | None:
    """How prepared inputs become what the network takes: as they are, with a channel axis added or moved."""

    def fits(shape: Sequence[int]) -> bool:
        sizes = [n if isinstance(n, int) and n > 0 else None for n in wanted[1:]]
        return len(shape) == len(sizes) and all(n is None or n == m for n, m in zip(sizes, shape, strict=True))

    if fits(row):
        return None
    ways: list[tuple[int | None, ...]] = []
    if len(row) == 2 and len(wanted) == 4:
        ways = [(None, 0, 1), (0, 1, None)]
    elif len(row) == 3 and len(wanted) == 4:
        ways = [(2, 0, 1), (1, 2, 0)]
    for way in ways:
        if fits([1 if a is None else row[a] for a in way]):
            return way
    shown = tuple("?" if not isinstance(n, int) or n <= 0 else n for n in wanted)
    raise DataError(
        f"Samples of '{path}' have shape {tuple(row)} but the network's input has shape {shown}. Store them in that "
        "shape, or as uint8 images to have them resized.",
        path=path,
    )
