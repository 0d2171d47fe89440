"""Which inputs each output of a linear layer is a sum over: windows as rows of a matrix, at some positions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Where the windows of a convolution lie.

    Attributes:
        kernel: Sizes.
        strides: Step of each axis.
        dilations: Distance of the taps on each axis.
        pads: All begins, then all ends, as the attribute; None where `auto_pad` or `output_shape` says it.
        lower: With no `pads`: an odd pad is larger at the beginning.
        transposed: Whether inputs are spread over the outputs (ConvTranspose).
        output_padding: Of a transposed convolution, each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    lower: bool = False
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, attributes: Mapping[str, Any], kernel: Sequence[int], *, transposed: bool) -> Window:
        """From the attributes of a node."""
        ones = (1,) * len(kernel)
        auto = attributes.get("auto_pad", b"NOTSET")
        auto = auto.decode() if isinstance(auto, bytes) else str(auto)
        pads: tuple[int, ...] | None = tuple(attributes.get("pads", (0,) * 2 * len(kernel)))
        if auto == "VALID":
            pads = (0,) * 2 * len(kernel)
        elif auto != "NOTSET" or (transposed and attributes.get("output_shape")):
            pads = None
        return cls(
            tuple(kernel),
            tuple(attributes.get("strides", ones)),
            tuple(attributes.get("dilations", ones)),
            pads,
            # a transposed convolution's padding is counted the other way round
            (auto == "SAME_LOWER") if not transposed else (auto != "SAME_UPPER"),
            transposed,
            tuple(attributes.get("output_padding", (0,) * len(kernel))),
        )

    def begins(self, inner: Sequence[int], outer: Sequence[int]) -> list[int]:
        """Padding before the first input of each axis, for input sizes `inner` and output sizes `outer`."""
        if self.pads is not None:
            return list(self.pads[: len(self.kernel)])
        found = []
        for a, k in enumerate(self.kernel):
            span = (k - 1) * self.dilations[a] + 1
            if self.transposed:
                total = self.strides[a] * (inner[a] - 1) + self.output_padding[a] + span - outer[a]
            else:
                total = (outer[a] - 1) * self.strides[a] + span - inner[a]
            total = max(total, 0)
            found.append(total - total // 2 if self.lower else total // 2)
        return found

    def taps(self, inner: Sequence[int], outer: Sequence[int], positions: Indices) -> Indices:
        """Flat input position of every tap of some outputs, (positions, taps); the number of inputs where outside."""
        begins = self.begins(inner, outer)
        flat = np.zeros((len(positions), 1), np.int64)
        inside = np.ones((len(positions), 1), bool)
        for a, at in enumerate(np.unravel_index(positions, tuple(outer))):
            tap = np.arange(self.kernel[a]) * self.dilations[a]
            if self.transposed:
                spread = at[:, None] + begins[a] - tap
                where, there = spread // self.strides[a], spread % self.strides[a] == 0
            else:
                where = at[:, None] * self.strides[a] - begins[a] + tap
                there = np.ones_like(where, bool)
            there = there & (where >= 0) & (where < inner[a])
            flat = (flat[:, :, None] * inner[a] + where[:, None, :]).reshape(len(positions), -1)
            inside = (inside[:, :, None] & there[:, None, :]).reshape(len(positions), -1)
        return np.where(inside, flat, int(np.prod(inner)))


def windows(values: Array, window: Window, outer: Sequence[int], positions: Indices, blocks: int) -> Array:
    """Inputs of some output positions, (blocks, n x positions, channels of a block x taps).

    Args:
        values: Activations (n, channels, ...).
        window: Where the windows lie.
        outer: Output sizes without batch and channels.
        positions: Flat output positions.
        blocks: `conv_groups`.
    """
    n, channels = values.shape[:2]
    taps = window.taps(values.shape[2:], outer, positions)
    flat = values.reshape(n, channels, -1)
    size = flat.shape[2]
    if (taps == size).any():
        flat = np.concatenate([flat, np.zeros((n, channels, 1), flat.dtype)], axis=2)
    taken = np.take(flat, taps.ravel(), axis=2).reshape(n, blocks, channels // blocks, len(positions), taps.shape[1])
    return taken.transpose(1, 0, 3, 2, 4).reshape(blocks, n * len(positions), -1)


def sampled(values: Array, axis: int, positions: Indices) -> Array:
    """Values at some positions, (n x positions, channels); channels lie on `axis`, 1 or the last."""
    n, channels = values.shape[0], values.shape[axis]
    if axis == 1:
        return values.reshape(n, channels, -1)[:, :, positions].transpose(0, 2, 1).reshape(-1, channels)
    return values.reshape(n, -1, channels)[:, positions].reshape(-1, channels)
