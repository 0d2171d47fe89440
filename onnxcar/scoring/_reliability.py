"""How far an importance can be trusted that was counted on a few hundred samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Reliability", "reliability"]

SPLITS = 20


@dataclass(frozen=True, eq=False)
class Reliability:
    """What chance alone does to the importances.

    Attributes:
        stderr: Standard error of each group's CAR, (n_groups,), in the order given: from its flips, paired.
        split_half: Rank correlation of the importances of two halves of the samples, mean over random halvings; NaN
            where all importances of a half are equal. Near zero: the ranking is noise.
    """

    stderr: npt.NDArray[np.float64]
    split_half: float


def reliability(
    base_correct: npt.NDArray[np.bool_], flips: Mapping[int, npt.NDArray[np.bool_]], *, seed: int = 0
) -> Reliability:
    """Standard errors and split-half correlation of top-1 importances.

    Args:
        base_correct: Which samples the network gets right, (n,).
        flips: For each group which samples change from right to wrong or back without it, (n,).
        seed: Of the random halves.
    """
    n = len(base_correct)
    changed = np.stack(list(flips.values())) if flips else np.zeros((0, n), bool)
    # +1: right before and wrong without the group; -1: the other way round.
    loss = changed.astype(np.int8) * np.where(base_correct, 1, -1).astype(np.int8)
    mean = loss.mean(1, dtype=np.float64) if n else np.zeros(len(loss))
    second = changed.mean(1, dtype=np.float64) if n else np.zeros(len(loss))
    stderr = np.sqrt(np.maximum(second - mean**2, 0) / max(1, n - 1))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SPLITS if n > 1 and len(loss) > 1 else 0):
        order = rng.permutation(n)
        a, b = order[: n // 2], order[n // 2 :]
        found.append(_rank_correlation(loss[:, a].sum(1, dtype=np.int64), loss[:, b].sum(1, dtype=np.int64)))
    known = [value for value in found if not np.isnan(value)]
    return Reliability(stderr, float(np.mean(known)) if known else float("nan"))


def _rank_correlation(x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> float:
    """Spearman's, with the mean rank for ties; NaN where either does not vary."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / spread) if spread > 0 else float("nan")


def _ranks(x: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[inverse.ravel()], np.float64)
