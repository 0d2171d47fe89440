"""Optimal brain surgery on one layer: what it costs that inputs leave while the other weights are refitted.

With weights W and second moments 1 / H of the inputs, removing the inputs B and refitting the rest costs
W_B' (H_BB)^-1 W_B in squared output error; H and W then follow in closed form (Hassibi and Stork 1993, Second order
derivatives for network pruning; for layers Dong et al. 2017, arXiv:1705.07565).
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnxcar.recovery._patches import Array

RIDGE = 1e-3  # on the diagonal of the second moments, as a share of their mean


def inverse(moments: Array) -> Array:
    """Inverse of second moments (d, d), their diagonal raised by a share of its mean."""
    raised = np.array(moments, np.float64)
    raised.flat[:: len(raised) + 1] += RIDGE * (float(np.trace(moments)) / len(moments) or 1.0)
    # By Cholesky: half of the work of a general inverse. The transpose is the same matrix, laid out as LAPACK wants it.
    factor, failed = scipy.linalg.lapack.dpotrf(raised.T, overwrite_a=True, clean=True)
    if failed:
        return np.asarray(np.linalg.inv(raised))
    half, _ = scipy.linalg.lapack.dpotri(factor, overwrite_c=True)
    found = np.ascontiguousarray(half.T)
    for i in range(len(found)):
        found[i, i + 1 :] = found[i + 1 :, i]  # dpotri fills one triangle
    return found


class Surgeon:
    """One block of a layer while its inputs leave and the rest is refitted.

    Args:
        weights: (d, filters of the block); changed in place.
        inverse: See `inverse`, (d, d); changed in place.
        groups: Group of each input, negative for those that stay, (d,).

    Attributes:
        weights: As they are now; those of inputs that left are 0.
        inverse: Likewise.
    """

    def __init__(self, weights: Array, inverse: Array, groups: Array) -> None:
        self.weights, self.inverse = weights, inverse
        self._where = {int(g): np.flatnonzero(groups == g) for g in np.unique(groups) if g >= 0}

    def costs(self) -> dict[int, float]:
        """Squared output error that each group's leaving would bring, the rest refitted."""
        out: dict[int, float] = {}
        by_size: dict[int, list[int]] = {}
        for group, at in self._where.items():
            by_size.setdefault(len(at), []).append(group)
        for groups in by_size.values():
            at = np.stack([self._where[g] for g in groups])
            w = self.weights[at]
            solved = np.linalg.solve(self.inverse[at[:, :, None], at[:, None, :]], w)
            out.update(zip(groups, (w * solved).sum((1, 2)).tolist(), strict=True))
        return out

    def gone(self, group: int) -> None:
        """The group left earlier: weights and inverse are those without it."""
        self._where.pop(group, None)

    def drop(self, group: int) -> bool:
        """The group leaves, if it is here; whether it was."""
        at = self._where.pop(group, None)
        if at is None:
            return False
        across = self.inverse[:, at]
        inner = across[at].copy()
        self.weights -= across @ np.linalg.solve(inner, self.weights[at])
        # In place: another matrix of its size costs more than the product. BLAS counts rows and columns the other way.
        solved = np.linalg.solve(inner, across.T)
        scipy.linalg.blas.dgemm(-1.0, solved.T, across.T, beta=1.0, c=self.inverse.T, overwrite_c=True)
        self.weights[at] = 0
        self.inverse[at] = 0
        self.inverse[:, at] = 0
        return True

    def halve(self) -> float:
        """Half of the groups leave, the cheapest first; the squared output error in all."""
        total = 0.0
        for _ in range(max(1, len(self._where) // 2) if self._where else 0):
            costs = self.costs()
            cheapest = min(costs, key=lambda g: (costs[g], g))
            total += costs[cheapest]
            self.drop(cheapest)
        return total
