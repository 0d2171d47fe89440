"""Arrays in a device's memory: what one network leaves there the next one reads, and the host never sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar._providers import onnx_runtime

__all__ = ["ALIGN", "Buffer", "aligned", "bind_inputs", "bind_outputs"]

Array = npt.NDArray[Any]
ALIGN = 256  # bytes: what CUDA's own allocations are aligned to, and some kernels rely on


@dataclass(frozen=True, eq=False)
class Buffer:
    """Rows in a device's memory; a slice or another shape of it is the same memory.

    ONNX Runtime's values cannot be sliced from Python, but a binding takes any address. So one buffer holds the rows of
    all images: each batch is written to its place, and no batches have to be put together afterwards.

    Attributes:
        owner: The value of ONNX Runtime that owns the memory.
        device: "cuda" or "cpu".
        dtype: Of its elements.
        shape: Rows come first.
        start: Bytes between the owner's first element and this one's.
    """

    owner: Any
    device: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def empty(cls, device: str, shape: Iterable[int], dtype: npt.DTypeLike) -> Buffer:
        """Room for an array, its values arbitrary."""
        sizes, kind = tuple(shape), np.dtype(dtype)
        made = onnx_runtime().OrtValue.ortvalue_from_shape_and_type(list(sizes), kind.type, device, 0)
        return cls(made, device, kind, sizes)

    @classmethod
    def of(cls, device: str, values: Array) -> Buffer:
        """A copy of an array of the host."""
        whole = np.ascontiguousarray(values)
        return cls(onnx_runtime().OrtValue.ortvalue_from_numpy(whole, device, 0), device, whole.dtype, whole.shape)

    @classmethod
    def taken(cls, device: str, value: Any, dtype: npt.DTypeLike) -> Buffer:
        """The memory of a value that ONNX Runtime has made on the device."""
        return cls(value, device, np.dtype(dtype), tuple(value.shape()))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Buffer:
        """Consecutive rows."""
        first, last, step = rows.indices(len(self))
        assert step == 1
        skipped = self.start + first * self.row_bytes
        return Buffer(self.owner, self.device, self.dtype, (max(0, last - first), *self.shape[1:]), skipped)

    def reshape(self, *shape: int) -> Buffer:
        """The same memory in another shape; one size may be -1."""
        known = math.prod(size for size in shape if size != -1)
        sizes = tuple(math.prod(self.shape) // max(1, known) if size == -1 else size for size in shape)
        return Buffer(self.owner, self.device, self.dtype, sizes, self.start)

    @property
    def row_bytes(self) -> int:
        """Memory of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return len(self) * self.row_bytes

    @property
    def address(self) -> int:
        """Of the first element, on the device."""
        return int(self.owner.data_ptr()) + self.start

    def numpy(self) -> Array:
        """A copy on the host, of the owner's whole memory first: for what is small, and for tests."""
        whole = self.owner.numpy().reshape(-1)
        first = self.start // self.dtype.itemsize
        return np.asarray(whole[first : first + math.prod(self.shape)]).reshape(self.shape).copy()


def aligned(batch: int, row_bytes: Iterable[int]) -> int:
    """Rows of a batch near `batch` such that each batch begins at an address that is aligned as the buffer is."""
    unit = math.lcm(1, *(ALIGN // math.gcd(ALIGN, size) for size in row_bytes if size))
    return max(unit, batch // unit * unit)


def bind_inputs(binding: Any, feeds: Mapping[str, Any]) -> list[Array]:
    """Tell a binding what to read: buffers where they lie, arrays of the host through a copy.

    Returns:
        Arrays that must live until the run is over.
    """
    lent = []
    for name, value in feeds.items():
        if isinstance(value, Buffer):
            binding.bind_input(name, value.device, 0, value.dtype.type, list(value.shape), value.address)
        else:
            lent.append(np.ascontiguousarray(value))
            binding.bind_cpu_input(name, lent[-1])
    binding.synchronize_inputs()  # copies to the device are only queued until then
    return lent


def bind_outputs(binding: Any, into: Mapping[str, Buffer], kept: Iterable[str], given: Iterable[str], on: str) -> None:
    """Tell a binding where to write.

    Args:
        binding: Of ONNX Runtime.
        into: Outputs that go to buffers of the right shape.
        kept: Outputs that stay on the device `on`, in memory that ONNX Runtime takes.
        given: Outputs that come back to the host.
        on: "cuda" or "cpu".
    """
    for name, buffer in into.items():
        binding.bind_output(name, buffer.device, 0, buffer.dtype.type, list(buffer.shape), buffer.address)
    for name in kept:
        binding.bind_output(name, on, 0)
    for name in given:
        binding.bind_output(name)
