"""In which order a candidate's images are run: the likeliest errors first. No result depends on it, only work."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["risk_order"]

Indices = npt.NDArray[np.int64]
TIE = 1.5  # fewer errors than that above those without the candidate: nearly a tie
KNOWN = 0.3  # how far a shift measured in an earlier step is trusted: its error, relative to an unknown shift's size


def risk_order(
    margins: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32] | None,
    norm: npt.NDArray[np.float32] | None,
) -> tuple[Indices, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The order of some images by falling risk, and in that order the chance of each to be wrong, and about its loss.

    An image's margin without the candidate is today's margin plus a shift. Where an earlier step has measured the
    shift it is near that; elsewhere it is around zero, in proportion to the size of the candidate's channels.

    Args:
        margins: Without any candidate, (k,).
        shift: Margin shifts that were measured, (k,), NaN where none was; None: none at all.
        norm: Size of the candidate's channels on each image, (k,); None: not known.
    """
    n = len(margins)
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    margin = np.nan_to_num(margins.astype(np.float64), nan=0.0, posinf=1e3, neginf=-1e3)
    size = np.ones(n) if norm is None else norm.astype(np.float64)
    size = size / max(float(size.mean()), 1e-30)
    known = np.zeros(n, bool) if shift is None else ~np.isnan(shift)
    moved = np.zeros(n) if shift is None else np.nan_to_num(shift.astype(np.float64), nan=0.0)
    unit = 0.1 * max(float(np.abs(margin).mean()), 1e-6)
    if known.any():
        unit = max(float(np.sqrt(np.mean(np.square(moved[known] / np.maximum(size[known], 1e-3))))), 1e-6)
    sigma = np.maximum(unit * size * np.where(known, KNOWN, 1.0), 1e-6)
    z = (margin + moved) / sigma
    chances = _below_zero(z)
    # A candidate that will hardly make more errors than there are is out by its loss, if at all.
    order = np.argsort(margin + moved if chances.sum() < (margin < 0).sum() + TIE else z, kind="stable")
    return order, chances[order], np.logaddexp(0.0, -(margin + moved))[order]


def _below_zero(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """About the probability of a normal number of mean z to be negative (logistic approximation, good to 0.01)."""
    return 1.0 / (1.0 + np.exp(np.clip(1.702 * z, -60, 60)))
