"""Preprocessed pixels, kept so that every image is decoded once: in memory up to a bound, and on disk.

The first images that come stay in memory until the bound is full. What does not fit, and all images of a set whose
decoding takes long enough to be worth it, go to a sparse file that is keyed by the content of the data set and the
preprocessing, so that other processes and later runs find them; beyond the bound on disk images are decoded again.
Whatever is kept where, the same pixels come back.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PixelCache", "cache_folder"]

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]
WORTH_BYTES = 64 << 20  # pixels of a whole set from which they are kept for later runs: seconds of decoding


def cache_folder() -> Path:
    """Where pixels that do not fit in memory go: `ONNXCAR_CACHE`, else `onnxcar` in the user's cache folder."""
    if own := os.environ.get("ONNXCAR_CACHE"):
        return Path(own)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home: a container with an unknown user
        base = Path(tempfile.gettempdir())
    return base / "onnxcar"


class PixelCache:
    """Pixels of one source under one preprocessing.

    Args:
        n_samples: Of the whole source.
        memory_bytes: What the pixels in memory may take.
        disk_bytes: What the file may take; half of the free disk at most.
        key: Gives the name of the file, asked for only when something goes to disk.
    """

    def __init__(self, n_samples: int, memory_bytes: int, disk_bytes: int, key: Callable[[], str]) -> None:
        """Start empty."""
        self._n, self._memory_left, self._disk_bytes, self._key = n_samples, memory_bytes, disk_bytes, key
        self._rows: dict[int, Pixels] = {}
        self._file: _File | None = None
        self._file_failed = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:  # a copy in another process starts empty and shares the file
        return {**self.__dict__, "_rows": {}, "_file": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def get(self, indices: Indices, read: Callable[[Indices], list[Pixels]], *, lasting: bool = False) -> list[Pixels]:
        """The pixels of `indices`; those not kept come from `read` and are kept where there is room.

        Args:
            indices: Positions in the source, (k,).
            read: Decodes.
            lasting: Most of the source will be asked for: a set that is large enough is kept on disk from the start.
        """
        found: dict[int, Pixels] = {}
        for i in {int(i) for i in indices}:
            row = self._rows.get(i)
            if row is None and self._file is not None:
                row = self._file.get(i)
                if row is not None:
                    self._hold(i, row)
            if row is not None:
                found[i] = row
        missing = np.array(sorted({int(i) for i in indices} - found.keys()), np.int64)
        if len(missing):
            for i, row in zip(missing.tolist(), read(missing), strict=True):
                found[i] = row
                self._keep(i, row, lasting and self._n * row.nbytes >= WORTH_BYTES)
        return [found[int(i)] for i in indices]

    def _hold(self, index: int, row: Pixels) -> bool:
        """Have a row in memory if there is room."""
        with self._lock:
            if index not in self._rows and row.nbytes <= self._memory_left:
                self._memory_left -= row.nbytes
                self._rows[index] = np.ascontiguousarray(row)
            return index in self._rows

    def _keep(self, index: int, row: Pixels, lasting: bool) -> None:
        if self._hold(index, row) and not lasting:
            return
        with self._lock:
            if self._file is None and not self._file_failed and self._disk_bytes > 0:
                self._open_file(row)
            if self._file is not None:
                try:
                    self._file.put(index, row)
                except OSError:  # the disk is full: decode again from here on
                    self._file, self._file_failed = None, True

    def _open_file(self, row: Pixels) -> None:
        try:
            self._file = _File(cache_folder() / self._key(), self._n, row.shape, self._disk_bytes)
        except OSError:  # a full or read-only disk costs time, not correctness: images are decoded again
            self._file_failed = True


class _File:
    """Rows in a sparse file and a checksum of each that is there; processes may share it, they write the same bytes.

    Written through the file and read through a map: a write to a map on a full disk kills the process.
    """

    def __init__(self, folder: Path, n: int, shape: tuple[int, ...], limit_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.utime(folder)  # the age that eviction goes by
        _evict(folder.parent, keep=folder, limit_bytes=limit_bytes)
        self._shape, self._row_bytes = shape, int(np.prod(shape))
        self._paths = (folder / "pixels", folder / "sums")
        self._rows = _mapped(self._paths[0], (n, *shape), np.uint8)
        self._sums = _mapped(self._paths[1], (n,), np.uint32)
        room = min(limit_bytes, shutil.disk_usage(folder).free // 2)
        self._left = room // self._row_bytes - int(np.count_nonzero(self._sums))

    def get(self, index: int) -> Pixels | None:
        wanted = int(self._sums[index])
        if wanted == 0:
            return None
        row = np.array(self._rows[index])
        return row if _checksum(row) == wanted else None  # after a power cut the sum may be there and the row not

    def put(self, index: int, row: Pixels) -> None:
        if self._left <= 0 or row.shape != self._shape or self._sums[index]:
            return
        self._left -= 1
        total = np.uint32(_checksum(row))
        writes = ((index * self._row_bytes, row.tobytes()), (index * total.nbytes, total.tobytes()))
        for path, (place, content) in zip(self._paths, writes, strict=True):
            with path.open("r+b") as file:
                file.seek(place)
                file.write(content)


def _checksum(row: Pixels) -> int:
    return zlib.crc32(np.ascontiguousarray(row).data) or 1  # 0 stands for a row that is not there


def _mapped(path: Path, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        if file.tell() < n_bytes:
            file.truncate(n_bytes)  # extends with zeros that take no disk
    return np.memmap(path, dtype, "r", shape=shape)


def _evict(folder: Path, keep: Path, limit_bytes: int) -> None:
    """Remove the longest unused files until the others take no more than the bound."""
    others = sorted((p for p in folder.iterdir() if p.is_dir() and p != keep), key=lambda p: p.stat().st_mtime)
    sizes = [sum(getattr(f.stat(), "st_blocks", 0) * 512 for f in p.iterdir()) for p in others]
    total = sum(sizes)
    for path, size in zip(others, sizes, strict=True):
        if total <= limit_bytes:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= size
