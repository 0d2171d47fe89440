"""Ridge regression toward given weights, from normal equations summed up chunk by chunk in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[Any]

#: Ridge strengths tried, as a fraction of the mean variance of the inputs; infinite: only the bias is fitted.
RIDGES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, np.inf)
_LARGE = 48  # inputs from which on only one triangle of the products is summed up


class Normal:
    """Normal equations of several independent blocks of one layer.

    Attributes:
        n: Rows summed up so far.
        x, t: Sums of inputs (blocks, d) and targets (blocks, m).
        xt: Sums of products of inputs and targets, (blocks, d, m).
        tt: Sum of squared targets, (blocks, m).
    """

    def __init__(self, blocks: int, d: int, m: int) -> None:
        self.n = 0
        self.x, self.t = np.zeros((blocks, d)), np.zeros((blocks, m))
        self._half, self.xt = np.zeros((blocks, d, d)), np.zeros((blocks, d, m))  # one triangle where it is large
        self.tt = np.zeros((blocks, m))

    def add(self, x: Array, t: Array) -> None:
        """Rows of inputs (blocks, rows, d) and targets (blocks, rows, m)."""
        x, t = x.astype(np.float64), t.astype(np.float64)
        self.n += x.shape[1]
        self.x += x.sum(1)
        self.t += t.sum(1)
        across = x.swapaxes(1, 2)
        self.xt += across @ t
        self.tt += np.square(t).sum(1)
        if x.shape[2] < _LARGE:
            self._half += across @ x
            return
        for b in range(len(x)):  # half of the products, in place; BLAS counts rows and columns the other way round
            rows = np.ascontiguousarray(x[b]).T
            scipy.linalg.blas.dsyrk(1.0, rows, beta=1.0, c=self._half[b].T, overwrite_c=True)

    @property
    def xx(self) -> Array:
        """Sums of products of the inputs, (blocks, d, d)."""
        if self._half.shape[1] < _LARGE:
            return self._half.copy()
        out = self._half + self._half.swapaxes(1, 2)  # the other triangle of the sums is zero
        at = np.arange(out.shape[1])
        out[:, at, at] = self._half[:, at, at]
        return out

    def error(self, weights: Array, bias: Array) -> float:
        """Mean squared distance of outputs to targets, summed over filters.

        Args:
            weights: (blocks, d, m).
            bias: (blocks, m).
        """
        fit = (weights * self._times(weights)).sum(1) - 2 * (weights * self.xt).sum(1) + self.tt
        mean = (self.x[:, None, :] @ weights)[:, 0]
        fit += 2 * bias * (mean - self.t) + self.n * np.square(bias)
        return float(np.maximum(fit, 0).sum()) / max(self.n, 1)

    def _times(self, weights: Array) -> Array:
        """`xx` times weights, without another matrix of its size where one triangle is all there is."""
        if self._half.shape[1] < _LARGE:
            return np.asarray(self._half @ weights)
        product = scipy.linalg.blas.dsymm
        return np.stack([product(1.0, half.T, w) for half, w in zip(self._half, weights, strict=True)])

    def spread(self) -> float:
        """Variance of the targets, summed over filters: what an error is measured against."""
        return float(np.maximum(self.tt - np.square(self.t) / max(self.n, 1), 0).sum()) / max(self.n, 1)

    def centred(self) -> Array:
        """Sums of products of the inputs less their means, (blocks, d, d)."""
        out = self.xx
        out -= self.x[:, :, None] * self.x[:, None, :] / max(self.n, 1)
        return out

    def bias(self, weights: Array) -> Array:
        """The best bias for these weights, (blocks, m)."""
        return (self.t - (self.x[:, None, :] @ weights)[:, 0]) / max(self.n, 1)


class Ridge:
    """Ridge regression of one fit at any strength: what does not depend on the strength is computed once.

    W = W0 + (X'X + ridge v I)^-1 X'(T - X W0) with centred X and T, v the mean variance of an input; the bias is free.

    Args:
        fit: Rows to fit on.
        near: W0, (blocks, d, m).
    """

    def __init__(self, fit: Normal, near: Array) -> None:
        self._near, self._gram = near, fit.centred()
        self._right = fit.xt - fit.x[:, :, None] * fit.t[:, None, :] / max(fit.n, 1) - self._gram @ near
        self._scale = np.trace(self._gram, axis1=1, axis2=2) / self._gram.shape[1]

    def solve(self, ridge: float) -> Array:
        """Weights (blocks, d, m); infinite strength leaves W0.

        Raises:
            LinAlgError: The equations are singular at this strength.
        """
        out = self._near.copy()
        if np.isinf(ridge):
            return out
        for gram, right, scale, weights in zip(self._gram, self._right, self._scale.tolist(), out, strict=True):
            if scale > 0:
                held = gram.copy().T  # the same matrix, laid out as LAPACK wants it, which works in place
                held.flat[:: len(held) + 1] += ridge * scale
                weights += scipy.linalg.solve(held, right, assume_a="pos", check_finite=False, overwrite_a=True)
        return out


@dataclass(frozen=True, eq=False)
class Solution:
    """What a fit found.

    Attributes:
        weights: (blocks, d, m).
        bias: (blocks, m).
        ridge: The strength chosen, infinite where only the bias was fitted; None where nothing was better than before.
        before: Distance to the targets on held-back rows over their variance, with the weights as they were.
        after: The same with those found.
    """

    weights: Array
    bias: Array
    ridge: float | None
    before: float
    after: float


def best(
    fit: Normal, held: Normal, near: Array, bias: Array, dtype: npt.DTypeLike, ridges: tuple[float, ...] = RIDGES
) -> Solution:
    """The ridge that does best on the held-back rows; as before where none is better.

    Args:
        fit: Rows to fit on.
        held: Rows to choose on.
        near: Weights as they are (blocks, d, m).
        bias: As it is (blocks, m).
        dtype: What the weights are stored in: solutions are rounded before they are judged.
        ridges: Strengths to try.
    """
    spread = held.spread() or 1.0
    before = held.error(near, bias)
    found = Solution(near, bias, None, before / spread, before / spread)
    regression = Ridge(fit, near)
    for ridge in ridges:
        try:
            weights = regression.solve(ridge)
        except np.linalg.LinAlgError:
            continue  # singular at this strength; a stronger one is not
        if not np.isfinite(weights).all():
            continue
        weights = weights.astype(dtype).astype(np.float64)
        own = fit.bias(weights).astype(dtype).astype(np.float64)
        after = held.error(weights, own) / spread
        if np.isfinite(after) and after < found.after * (1 - 1e-9):
            found = Solution(weights, own, ridge, before / spread, after)
    return found
