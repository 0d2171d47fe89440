"""Sums over samples: how far values are from those aimed at, and the moments that a norm needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxcar.recovery._layers import Norm
from onnxcar.recovery._patches import Array


class Distance:
    """Squared distance between values and those aimed at, over the variance of the latter; outputs count alike."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}

    def add(self, want: Mapping[str, Array], got: Mapping[str, Array]) -> None:
        """Sum up some samples."""
        for name, value in want.items():
            if value.dtype.kind != "f":
                continue
            a, b = value.astype(np.float64), np.asarray(got[name], np.float64)
            if a.shape != b.shape or not a.size:
                continue
            new = np.array([np.square(a - b).sum(), np.square(a).sum(), a.sum(), a.size])
            self._sums[name] = self._sums.get(name, np.zeros(4)) + new

    @property
    def value(self) -> float:
        """Mean over the outputs."""
        found = [float(s[0] / max(s[1] - s[2] ** 2 / s[3], 1e-30)) for s in self._sums.values()]
        return float(np.mean(found)) if found else 0.0

    @property
    def spread(self) -> float:
        """Variance of what is aimed at, summed over the outputs."""
        return float(sum((s[1] - s[2] ** 2 / s[3]) / s[3] for s in self._sums.values()))


class Moments:
    """Sums over samples and positions of a norm's inputs and of the original's outputs."""

    def __init__(self, channels: int) -> None:
        self.n = 0
        self.x, self.xx, self.xy = np.zeros(channels), np.zeros(channels), np.zeros(channels)
        self.y, self.yy = np.zeros(channels), np.zeros(channels)

    def add(self, x: Array, y: Array) -> None:
        """Rows (n, channels)."""
        self.n += len(x)
        self.x += x.sum(0)
        self.xx += np.square(x).sum(0)
        self.xy += (x * y).sum(0)
        self.y += y.sum(0)
        self.yy += np.square(y).sum(0)

    def error(self, norm: Norm, mean: Array, variance: Array) -> float:
        """Mean squared distance of a x + b to y, summed over channels."""
        a = norm.scale / np.sqrt(variance + norm.epsilon)
        b = norm.shift - mean * a
        n = self.n
        total = a * a * self.xx + n * b * b + self.yy + 2 * a * b * self.x - 2 * a * self.xy - 2 * b * self.y
        return float(np.maximum(total, 0).sum()) / max(n, 1)
