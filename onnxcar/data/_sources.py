"""Where samples come from: image files, arrays of pixels, arrays that are inputs already.

A source reads samples by position and knows nothing of labels; `onnxcar.data.Dataset` puts labels, subsets and the
cache on top.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxcar.data._images import Pixels, decode, fit, to_channels
from onnxcar.data._preprocess import Preprocess
from onnxcar.errors import DataError

__all__ = ["ArraySource", "FileSource", "PixelArray", "Source", "array_source"]

Indices = NDArray[np.int64]
DIGEST_BYTES = 32


def parallel(function: Callable[[int], Any], indices: Indices, threads: int) -> list[Any]:
    """`[function(i) for i in indices]` by several threads, in order; the first error in order is raised."""
    if threads <= 1 or len(indices) <= 1:
        return [function(int(i)) for i in indices]
    with ThreadPoolExecutor(min(threads, len(indices)), thread_name_prefix="onnxcar-data") as pool:
        return list(pool.map(function, [int(i) for i in indices], chunksize=1))


class FileSource:
    """Image files, decoded when they are read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Take the files in this order; none is opened yet."""
        self._paths = [os.fspath(p) for p in paths]  # half a million Path objects are several times larger
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return self._paths[index]

    def pixels(self, indices: Indices, pre: Preprocess, threads: int) -> list[Pixels]:
        """Decoded, resized and cropped, uint8 (h, w, c) each.

        Raises:
            DataError: A file is missing or is no image; fact `sample` is its path.
        """

        def one(index: int) -> Pixels:
            path = self._paths[index]
            data = self._read(path)
            self._digests.setdefault(index, hashlib.sha256(data).digest())
            return fit(decode(data, path), pre, path)

        return parallel(one, indices, threads)

    def digests(self, indices: Indices) -> NDArray[np.uint8]:
        """SHA-256 of each file's bytes, (k, 32)."""

        def one(index: int) -> bytes:
            digest = self._digests.get(index)
            if digest is None:
                digest = self._digests[index] = hashlib.sha256(self._read(self._paths[index])).digest()
            return digest

        joined = b"".join(parallel(one, indices, min(8, os.cpu_count() or 1)))
        return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)

    @staticmethod
    def _read(path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as e:
            raise DataError(
                f"Image '{path}' cannot be opened ({e.strerror or e}). Correct the path or take it out of the set.",
                sample=path,
            ) from e


class PixelArray:
    """Images in one uint8 array, (n, h, w, c)."""

    def __init__(self, array: NDArray[np.uint8], origin: str) -> None:
        """Take (n, h, w, 1, 3 or 4) pixels; `origin` names them in messages."""
        self._array, self._origin = array, origin

    @property
    def native_hw(self) -> tuple[int, int]:
        """Height and width of every image."""
        return (int(self._array.shape[1]), int(self._array.shape[2]))

    def __len__(self) -> int:
        return len(self._array)

    def name(self, index: int) -> str:
        """Origin and position."""
        return f"{self._origin}[{index}]"

    def stored(self, pre: Preprocess) -> bool:
        """Whether the pixels lie here as `pre` wants them, so that keeping them elsewhere gains nothing."""
        return pre.hw in (None, self.native_hw)

    def stored_pixels(self, indices: Indices, pre: Preprocess) -> Pixels:
        """Pixels that need no resizing, uint8 (k, h, w, c)."""
        return to_channels(self._array[indices], pre)

    def pixels(self, indices: Indices, pre: Preprocess, threads: int) -> list[Pixels]:
        """Resized and cropped, uint8 (h, w, c) each."""

        def one(index: int) -> Pixels:
            pixels = np.asarray(self._array[index])[..., :3]  # alpha is dropped, as in files
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
            return fit(image, pre, self.name(index))

        return parallel(one, indices, threads)

    def digests(self, indices: Indices) -> NDArray[np.uint8]:
        """SHA-256 of each image's shape and pixels, (k, 32)."""
        return _row_digests([self._array], indices)


class ArraySource:
    """Inputs that need no preprocessing, one array for each graph input."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], origin: str) -> None:
        """Take arrays (n, ...) of equal n, key "" for the only input of a network."""
        self.arrays, self._origin = dict(arrays), origin

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def name(self, index: int) -> str:
        """Origin and position."""
        return f"{self._origin}[{index}]"

    def rows(self, indices: Indices) -> dict[str, NDArray[Any]]:
        """The samples' inputs, floats as float32, other dtypes as they are stored.

        Raises:
            DataError: A value is NaN or infinite; fact `sample`.
        """
        out: dict[str, NDArray[Any]] = {}
        for key, array in self.arrays.items():
            rows = np.asarray(array[indices])
            if rows.dtype.kind == "f":
                with np.errstate(over="ignore"):  # a float64 beyond float32 is reported just below
                    rows = rows.astype(np.float32, copy=False)
                good = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
                if not good.all():
                    bad = int(indices[int(np.argmin(good))])
                    raise DataError(
                        f"Sample {self.name(bad)} holds NaN or infinite values{f' in input {key}' if key else ''}. "
                        "Repair it or take it out of the set.",
                        sample=self.name(bad),
                    )
            out[key] = rows
        return out

    def digests(self, indices: Indices) -> NDArray[np.uint8]:
        """SHA-256 of each sample's shapes and values, (k, 32)."""
        return _row_digests([self.arrays[key] for key in sorted(self.arrays)], indices)


Source = FileSource | PixelArray | ArraySource


def _row_digests(arrays: Sequence[NDArray[Any]], indices: Indices) -> NDArray[np.uint8]:
    heads = [f"{a.dtype.str}{a.shape[1:]}".encode() for a in arrays]
    out = np.empty((len(indices), DIGEST_BYTES), np.uint8)
    for k, i in enumerate(indices):
        digest = hashlib.sha256()
        for head, array in zip(heads, arrays, strict=True):
            digest.update(head)
            digest.update(np.ascontiguousarray(array[i]).data)
        out[k] = np.frombuffer(digest.digest(), np.uint8)
    return out


def array_source(array: NDArray[Any], origin: str) -> PixelArray | ArraySource:
    """A source over an array, pixels or inputs as its dtype says.

    uint8 arrays are pixels: (n, h, w), (n, h, w, 1|3|4) or (n, 1|3, h, w); they are preprocessed. Floats, int8, and
    integers of rank 1 or 2 are inputs already: their values are not touched.

    Raises:
        DataError: Objects, other dtypes, or a shape that is not one of these or could be read in two ways.
    """
    shape = tuple(int(n) for n in array.shape)
    if array.ndim == 0 or shape[0] == 0:
        raise DataError(f"{origin} has shape {shape}: there are no samples in it.", sample=origin)
    if 0 in shape:
        raise DataError(f"{origin} has shape {shape}: its samples are empty. Store (n, h, w, c) images.", sample=origin)
    kind = array.dtype.kind
    if kind == "f" or array.dtype == np.int8 or (kind in "iu" and array.ndim <= 2 and array.dtype != np.uint8):
        return ArraySource({"": array}, origin)
    if array.dtype != np.uint8:
        raise DataError(
            f"{origin} has dtype {array.dtype} and shape {shape}. Store pixels as uint8 (0..255), "
            "or preprocessed inputs as float32.",
            sample=origin,
        )
    wanted = "(n, h, w), (n, h, w, 3) or (n, 3, h, w)"
    if array.ndim == 3:
        return PixelArray(array[..., None], origin)
    if array.ndim != 4 or not (shape[1] in (1, 3) or shape[3] in (1, 3, 4)):
        raise DataError(
            f"{origin} has shape {shape}; uint8 arrays are images of shape {wanted}. "
            "Reshape it, or store preprocessed inputs as float32.",
            sample=origin,
        )
    if shape[1] in (1, 3) and shape[3] in (1, 3, 4):
        raise DataError(
            f"{origin} has shape {shape}, which may be {wanted}. Store preprocessed float32 inputs instead.",
            sample=origin,
        )
    return PixelArray(array if shape[3] in (1, 3, 4) else array.transpose(0, 2, 3, 1), origin)
