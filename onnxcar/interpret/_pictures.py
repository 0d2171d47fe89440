"""Network inputs as pictures again: pixels for people, and the gray versions that colour selectivity compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["Look", "look"]

Array = npt.NDArray[Any]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue


@dataclass(frozen=True)
class Look:
    """How inputs (k, c, h, w) or (k, h, w, c) were made of pixels.

    Attributes:
        axis: Of the channels.
        order: Index of red, green and blue among the channels; all 0 for gray images.
        mean: Subtracted, one a channel, on the scale of pixels.
        std: Divided by, one a channel, on the scale of pixels.
        known: Whether mean and std are those of the preprocessing; else inputs are stretched to be seen.
    """

    axis: int
    order: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    known: bool

    @property
    def colour(self) -> bool:
        """Whether there is any."""
        return len(self.mean) == 3

    def pixels(self, inputs: Array) -> npt.NDArray[np.uint8]:
        """Pixels (k, h, w, 3), red first."""
        x = np.moveaxis(np.asarray(inputs, np.float32), self.axis, -1)
        if self.known:
            x = x * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        else:
            low, high = x.min(axis=(1, 2, 3), keepdims=True), x.max(axis=(1, 2, 3), keepdims=True)
            x = (x - low) * (255 / np.maximum(high - low, 1e-9))
        return np.clip(np.rint(x), 0, 255).astype(np.uint8)[..., list(self.order)]

    def gray(self, inputs: Array) -> Array:
        """The inputs of the images without colour: each pixel's luma (BT.601) in all three channels."""
        x = np.moveaxis(np.asarray(inputs), self.axis, -1)
        mean, std = np.asarray(self.mean, x.dtype), np.asarray(self.std, x.dtype)
        weights = np.zeros(3, x.dtype)
        weights[list(self.order)] = LUMA
        luma = ((x * std + mean) @ weights)[..., None]
        return np.ascontiguousarray(np.moveaxis((luma - mean) / std, -1, self.axis)).astype(inputs.dtype)


def look(data: Dataset) -> Look | None:
    """How the data's inputs look, None where they are no images of one or three channels."""
    if len(data) == 0 or data.input_names != ("",):
        return None
    shape = data.inputs(np.zeros(1, np.int64))[""].shape
    if len(shape) != 4:
        return None
    pre = data.preprocess
    axis = 3 if pre.layout == "nhwc" or (shape[1] not in (1, 3) and shape[3] in (1, 3)) else 1
    n = shape[axis]
    if n not in (1, 3):
        return None
    order = (0, 0, 0) if n == 1 else (2, 1, 0) if pre.channels == "bgr" else (0, 1, 2)
    if not data.holds_pixels:
        return Look(axis, order, (0.0,) * n, (1.0,) * n, False)
    mean = tuple(pre.divisor * m for m in (pre.means if len(pre.means) == n else pre.means[:1] * n))
    std = tuple(pre.divisor * s for s in (pre.stds if len(pre.stds) == n else pre.stds[:1] * n))
    return Look(axis, order, mean, std, True)
