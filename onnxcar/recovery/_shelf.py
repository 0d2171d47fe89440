"""Arrays put away until wanted again: in memory up to a bound, the least recently used in a temporary folder."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from onnxcar.errors import OutputError
from onnxcar.recovery._patches import Array

Arrays = dict[str, Array]


class Shelf:
    """Named arrays by key.

    Args:
        most_bytes: Bound on what is held in memory.

    Attributes:
        written: Bytes that went to files so far.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self.written = most_bytes, 0
        self._here: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._files: dict[Hashable, Path] = {}  # of all that ever had to leave
        self._stale: set[Hashable] = set()  # keys whose file is older than what is held
        self._folder: Path | None = None

    def put(self, key: Hashable, arrays: Mapping[str, Array]) -> None:
        """Keep the arrays of a key; those it had are forgotten.

        Raises:
            OutputError: What does not fit into memory cannot be written.
        """
        self._here[key] = dict(arrays)
        self._here.move_to_end(key)
        self._stale.add(key)
        self._make_room()

    def get(self, key: Hashable) -> Arrays:
        """The arrays of a key; who changes them puts them back.

        Raises:
            KeyError: There are none.
        """
        if key in self._here:
            self._here.move_to_end(key)
            return self._here[key]
        with np.load(self._files[key]) as held:
            found = {name: held[name] for name in held.files}
        self._here[key] = found
        self._make_room()
        return found

    def __contains__(self, key: Hashable) -> bool:
        """Whether there are arrays of a key."""
        return key in self._here or key in self._files

    def drop(self, key: Hashable) -> None:
        """Forget a key."""
        self._here.pop(key, None)
        self._stale.discard(key)
        if key in self._files:
            self._files.pop(key).unlink(missing_ok=True)

    def _make_room(self) -> None:
        while self._here and sum(_size(arrays) for arrays in self._here.values()) > self._most:
            key, arrays = self._here.popitem(last=False)
            if key in self._stale:
                self._write(key, arrays)

    def _write(self, key: Hashable, arrays: Arrays) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="onnxcar-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        file = self._files.setdefault(key, self._folder / f"{len(self._files)}.npz")
        try:
            np.savez(file, **cast("dict[str, Any]", arrays))
        except OSError as exc:
            raise OutputError(
                f"{_size(arrays) / 2**20:.0f} MiB that do not fit into the memory bound cannot be written to "
                f"{self._folder}: {exc.strerror or exc}. Give more --memory, or a TMPDIR with room.",
                path=self._folder,
            ) from exc
        self.written += _size(arrays)
        self._stale.discard(key)


def _size(arrays: Arrays) -> int:
    return sum(value.nbytes for value in arrays.values())
