"""Filters of one layer that do the same: correlation of their responses, clusters, twins, and an order of removal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["ALIKE", "clusters", "correlation", "redundancy", "twin_distance", "twins"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ALIKE = 0.7  # filters whose responses correlate by that much on average form a cluster


def correlation(products: Floats, sums: Floats, n: int) -> Floats:
    """Correlation of responses from their sums of products (c, c) and sums (c,) over n values; NaN if constant."""
    mean = sums / max(n, 1)
    covariance = products / max(n, 1) - np.outer(mean, mean)
    variance = np.diag(covariance).copy()
    # What is left of a constant after the subtraction is rounding: some 1e-16 of its square.
    variance[variance <= 1e-12 * np.square(mean) + 1e-30] = np.nan
    spread = np.sqrt(variance)
    found = np.clip(covariance / np.outer(spread, spread), -1, 1)
    np.fill_diagonal(found, np.where(np.isnan(spread), np.nan, 1.0))
    return np.asarray(found)


def _tree(correlations: Floats, live: Ints) -> Floats | None:
    """Average linkage over 1 - correlation of the live filters, as SciPy's (n - 1, 4); None of less than two."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if len(live) < 2:
        return None
    distance = 1 - correlations[np.ix_(live, live)]
    distance = np.maximum((distance + distance.T) / 2, 0)
    np.fill_diagonal(distance, 0)
    return np.asarray(linkage(squareform(distance, checks=False), "average"))


def _live(correlations: Floats) -> Ints:
    return np.flatnonzero(~np.isnan(np.diag(correlations)))


def clusters(correlations: Floats, alike: float = ALIKE) -> Ints:
    """Cluster of each filter, (c,), numbered by their first member; -1 for filters whose response never changes.

    Average linkage, cut where the mean correlation of two clusters falls below `alike`.
    """
    from scipy.cluster.hierarchy import fcluster

    out = np.full(len(correlations), -1, np.int64)
    live = _live(correlations)
    tree = _tree(correlations, live)
    if tree is None:
        out[live] = 0
        return out
    # Rounding must not part what is equal.
    found = fcluster(tree, 1 - alike + 1e-9, "distance")
    numbers: dict[int, int] = {}
    for i, c in zip(live.tolist(), found.tolist(), strict=True):
        out[i] = numbers.setdefault(c, len(numbers))
    return out


def twins(correlations: Floats, k: int = 3) -> list[list[tuple[int, float]]]:
    """For each filter the k others whose responses correlate most with its own: (index, correlation)."""
    known = np.where(np.isnan(correlations), -np.inf, correlations)
    np.fill_diagonal(known, -np.inf)
    order = np.argsort(-known, axis=1, kind="stable")[:, :k]
    return [[(int(j), float(known[i, j])) for j in row if np.isfinite(known[i, j])] for i, row in enumerate(order)]


def twin_distance(correlations: Floats) -> float:
    """Mean over the live filters of 1 - correlation with the nearest other one; NaN of less than two."""
    live = _live(correlations)
    if len(live) < 2:
        return float("nan")
    part = correlations[np.ix_(live, live)].copy()
    np.fill_diagonal(part, -np.inf)
    return float(np.mean(1 - part.max(1)))


def redundancy(correlations: Floats, contribution: Floats) -> Floats:
    """An importance by functional redundancy, (c,): what could stand in for a filter, and how well.

    The tree of clusters is walked from the most alike pair up; where two clusters meet, the one of the two
    representatives that contributes less has that distance as its importance and the other one stands for both. So
    after any number of removals every cluster of the tree cut at that height keeps exactly one filter, and none is
    emptied before the others. The last filter has the largest importance, 2 (no distance is larger); a filter that
    never responds has -1.
    """
    out = np.full(len(correlations), -1.0)
    live = _live(correlations)
    out[live] = 2.0
    tree = _tree(correlations, live)
    if tree is None:
        return out
    stands = {i: int(f) for i, f in enumerate(live)}
    for k, (a, b, distance, _) in enumerate(tree):
        first, second = stands[int(a)], stands[int(b)]
        if (contribution[second], -second) > (contribution[first], -first):
            first, second = second, first
        out[second] = distance
        stands[len(live) + k] = first
    return out
