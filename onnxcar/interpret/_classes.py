"""Class-CAR with its uncertainty: which classes a filter helps, and whether that is more than chance.

For every group and every class: the fall of the class's accuracy (class-CAR), its paired interval, and the mean change
of the loss, which is usable with far fewer images. Before a class is named, a permutation test asks whether the loss
changes differently over the classes at all.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar.errors import DataError

__all__ = ["ClassEffects", "ClassSets", "benjamini_hochberg", "class_sets", "effects", "joined", "paired_bounds"]

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
LEVEL = 0.05  # of the tests: false discovery rate over filters, family-wise error over the classes of a filter
ENOUGH = 20  # exceedances after which a filter is tested no further (Besag and Clifford 1991)
MOST, LEAST = 9999, 999  # permutations of a filter that goes on
_PER_GROUP = ("car", "low", "high", "loss", "loss_low", "loss_high", "p", "above", "below")
BATCH = 199  # permutations between two looks at who goes on
WORK = 4e9  # values to sum in one layer's test, which bounds the permutations


@dataclass(frozen=True, eq=False)
class ClassSets:
    """Classes, or the user's groups of classes, and the samples of each; groups may overlap.

    Attributes:
        names: Of each set.
        labels: Output indices that each set holds.
        samples: Number of samples in each, (n_sets,).
        members: Sparse 0/1 matrix, (n_sets, n).
        grouped: Whether they are the user's groups.
    """

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    samples: npt.NDArray[np.int64]
    members: Any
    grouped: bool = False


@dataclass(frozen=True, eq=False)
class ClassEffects:
    """What the removal of each group does to each class (or group of classes).

    Attributes:
        sets: The classes.
        car: Fall of the class's accuracy, (n_groups, n_sets), positive = the class needs the group.
        low: Lower end of its 95 % interval.
        high: Upper end.
        loss: Mean change of the cross-entropy, nats, positive = the class needs the group.
        loss_low: Lower end of its 95 % interval (Student's t), NaN for a class of one sample.
        loss_high: Upper end.
        p: Of the permutation test that the loss changes alike in all classes, (n_groups,).
        above: Whether a class's loss rises more than chance would make any class's, (n_groups, n_sets).
        below: Whether it falls more.
    """

    sets: ClassSets
    car: Floats
    low: Floats
    high: Floats
    loss: Floats
    loss_low: Floats
    loss_high: Floats
    p: Floats
    above: npt.NDArray[np.bool_]
    below: npt.NDArray[np.bool_]

    @property
    def q(self) -> Floats:
        """The p-values adjusted for the number of filters."""
        return benjamini_hochberg(self.p)

    def speaks(self) -> npt.NDArray[np.bool_]:
        """Filters whose classes may be named: q of at most 0.05, (n_groups,)."""
        return np.asarray(self.q <= LEVEL)

    def take(self, rows: Sequence[int]) -> ClassEffects:
        """The effects of some groups, in that order."""
        return ClassEffects(self.sets, **{name: getattr(self, name)[list(rows)] for name in _PER_GROUP})

    def to_dict(self, row: int, q: float, top: int) -> dict[str, Any]:
        """One group's effects as JSON types; arrays are in the order of the classes.

        Args:
            row: Which group.
            q: Its adjusted p-value.
            top: How many classes that it helps most, and least, to list.
        """
        order = np.argsort(-self.loss[row], kind="stable")
        known = [int(i) for i in order if self.sets.samples[i]]
        return {
            "p": _round(self.p[row]),
            "q": _round(q),
            "speaks": bool(q <= LEVEL),
            "most": [self._entry(row, i, self.above) for i in known[:top]],
            "least": [self._entry(row, i, self.below) for i in known[::-1][:top]],
            "car": [_round(x) for x in self.car[row]],
            "interval": [[_round(a), _round(b)] for a, b in zip(self.low[row], self.high[row], strict=True)],
            "loss": [_round(x) for x in self.loss[row]],
        }

    def _entry(self, row: int, i: int, named: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """One class of one group; `named`: it stands out of what chance gives any class of this filter."""
        return {
            "class": self.sets.names[i],
            "samples": int(self.sets.samples[i]),
            "car": _round(self.car[row, i]),
            "interval": [_round(self.low[row, i]), _round(self.high[row, i])],
            "loss": _round(self.loss[row, i]),
            "loss_interval": [_round(self.loss_low[row, i]), _round(self.loss_high[row, i])],
            "named": bool(named[row, i]),
        }


def _round(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)


# --- classes ---------------------------------------------------------------------------------------------------------


def class_sets(
    labels: npt.NDArray[np.int64],
    names: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str | int]] | None = None,
) -> ClassSets:
    """The classes that occur, or the groups of classes that the user gives.

    Args:
        labels: Output index of each sample, (n,).
        names: Of the output indices; None: their numbers.
        groups: Name -> class names or output indices.

    Raises:
        DataError: A group names a class that the data does not know, or none of its classes has a sample.
    """
    from scipy import sparse

    occurring = [int(x) for x in np.unique(labels)]
    if groups is None:
        known = [_name(i, names) for i in occurring]
        held: list[tuple[int, ...]] = [(i,) for i in occurring]
    else:
        known = list(groups)
        held = [_resolve(name, groups[name], occurring, names) for name in known]
    rows = [np.flatnonzero(np.isin(labels, ids)) for ids in held]
    index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    pointer = np.cumsum([0, *(len(row) for row in rows)])
    members = sparse.csr_matrix((np.ones(len(index)), index, pointer), shape=(len(rows), len(labels)))
    samples = np.asarray([len(row) for row in rows], np.int64)
    return ClassSets(tuple(known), tuple(held), samples, members, groups is not None)


def _name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names is not None and label < len(names) else str(label)


def _resolve(
    group: str, wanted: Sequence[str | int], occurring: Sequence[int], names: Sequence[str] | None
) -> tuple[int, ...]:
    """Output indices of one group's classes."""
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not wanted:
        raise DataError(
            f"Group of classes {group!r} holds {wanted!r}. Give a list of class names or output indices, like "
            '{"fruit": ["lemon", "orange", 954]}.'
        )
    by_name = {name: i for i, name in enumerate(names or ())} | {str(i): i for i in occurring}
    by_name |= {_name(i, names): i for i in occurring}
    found = []
    for entry in wanted:
        index = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
        if not index and str(entry) not in by_name:
            near = difflib.get_close_matches(str(entry), by_name, 3) or list(by_name)[:3]
            raise DataError(
                f"Group of classes {group!r} names {entry!r}, which the data does not know. "
                f"Near: {', '.join(map(repr, near))}. Correct the name or the output index, or leave it out."
            )
        found.append(int(entry) if index else by_name[str(entry)])
    found = [label for label in found if label in occurring]  # a sample of the data need not hold every class
    if not found:
        raise DataError(f"No sample of the data is in the group of classes {group!r}. Leave it out, or give more data.")
    return tuple(dict.fromkeys(found))


# --- effects ---------------------------------------------------------------------------------------------------------


def effects(
    sets: ClassSets,
    base_correct: npt.NDArray[np.bool_],
    flips: npt.NDArray[np.bool_],
    losses: npt.NDArray[np.floating[Any]],
    *,
    seed: int = 0,
) -> ClassEffects:
    """Class-CAR, loss change, intervals and tests of some groups.

    The interval of a class-CAR is the adjusted Wald interval of two paired proportions (Bonett and Price 2012: one
    added to both discordant counts, two to the samples), as everywhere in this tool.

    Args:
        sets: The classes.
        base_correct: Samples that the network gets right, (n,).
        flips: For each group the samples that change from right to wrong or back, (n_groups, n).
        losses: For each group what each sample's cross-entropy gains without it, nats, (n_groups, n).
        seed: Of the permutations.
    """
    members, n = sets.members, np.maximum(sets.samples, 1).astype(np.float64)
    lost = np.asarray((members @ (flips & base_correct).T.astype(np.float64)).T)
    won = np.asarray((members @ (flips & ~base_correct).T.astype(np.float64)).T)
    values = losses.astype(np.float64)
    mean = np.asarray((members @ values.T).T) / n
    second = np.asarray((members @ np.square(values).T).T) / n
    low, high = paired_bounds(lost, won, n)
    half = _half_width(np.maximum(second - mean**2, 0), sets.samples)
    p, above, below = heterogeneity(sets, values, seed=seed)
    # One class far above the mean leaves the others below it: what is named must differ from no change, too.
    above &= np.where(np.isnan(half), mean, mean - half) > 0
    below &= np.where(np.isnan(half), mean, mean + half) < 0
    return ClassEffects(sets, (lost - won) / n, low, high, mean, mean - half, mean + half, p, above, below)


def joined(parts: Sequence[ClassEffects]) -> ClassEffects:
    """The effects of several layers' groups, one after the other."""
    found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_GROUP}
    return ClassEffects(parts[0].sets, **found)


def paired_bounds(lost: Floats, won: Floats, n: Floats) -> tuple[Floats, Floats]:
    """`stats.paired_interval` of (lost - won) / n for whole arrays."""
    from scipy.stats import norm

    p1, p2 = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(np.maximum(p1 + p2 - (p1 - p2) ** 2, 0) / (n + 2))
    return np.maximum(p1 - p2 - half, -1.0), np.minimum(p1 - p2 + half, 1.0)


def _half_width(variance: Floats, samples: npt.NDArray[np.int64]) -> Floats:
    """Half the 95 % interval of a mean by Student's t, NaN below two samples."""
    from scipy.stats import t

    free = np.maximum(samples - 1, 1)
    width = t.ppf(0.5 + CONFIDENCE / 2, free) * np.sqrt(variance / free)
    return np.where(samples > 1, width, np.nan)


def benjamini_hochberg(p: Floats) -> Floats:
    """Adjusted p-values: at most q of those with a value up to q are false (Benjamini and Hochberg 1995).

    >>> benjamini_hochberg(np.asarray([0.01, 0.04, 0.03, 0.5])).round(4).tolist()
    [0.04, 0.0533, 0.0533, 0.5]
    """
    n = len(p)
    order = np.argsort(p)
    ranked = p[order] * n / np.arange(1, n + 1)
    out = np.empty(n)
    out[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return out


def heterogeneity(
    sets: ClassSets, losses: Floats, *, seed: int = 0
) -> tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Does the loss change differently over the classes? By permuting the labels of the samples.

    The statistic is the sum of squares between classes (the F test's, but no distribution is assumed). A filter that
    is clearly silent is left early and keeps an exact p-value (Besag and Clifford 1991, sequential Monte Carlo
    p-values). A class stands out if its standardised mean is beyond the 95 % quantile of the largest one of any class
    under permutation (Westfall and Young's max-T). With one sample in every class nothing can speak: group them.

    Returns:
        p (n_groups,); whether each class's loss rises, and falls, more than chance allows, (n_groups, n_sets) each.
    """
    n = losses.shape[1]
    centred = (losses - losses.mean(1, keepdims=True)).T
    spread = np.sqrt(np.mean(np.square(centred), axis=0))
    live = np.flatnonzero(spread > 1e-9)
    members, samples = sets.members, np.maximum(sets.samples, 1).astype(np.float64)
    rest = max(1.0, float(n - (members.sum(0) > 0).sum()))
    scaled = centred[:, live] / spread[live]
    shape = (len(losses), len(sets.names))
    p, above, below = np.ones(len(losses)), np.zeros(shape, bool), np.zeros(shape, bool)
    covered = np.asarray(members.sum(0)).ravel() > 0

    def standardised(order: npt.NDArray[np.int64], columns: Floats) -> tuple[Floats, Floats]:
        moved = type(members)((members.data, order[members.indices], members.indptr), shape=members.shape)
        z = np.asarray(moved @ columns) / np.sqrt(samples)[:, None]
        between = np.square(z).sum(0)
        if not covered.all():
            between = between + np.square(columns[order[~covered]].sum(0)) / rest
        return z, between

    if not len(live) or not len(sets.names):
        return p, above, below
    observed, statistic = standardised(np.arange(n), scaled)
    tops: list[list[float]] = [[] for _ in live]
    bottoms: list[list[float]] = [[] for _ in live]
    hits = np.zeros(len(live), np.int64)
    still = np.arange(len(live))
    rng = np.random.default_rng(seed)
    done, limit = 0, MOST
    while len(still) and done < limit:
        columns = scaled[:, still]
        for _ in range(min(BATCH, limit - done)):
            done += 1
            z, between = standardised(rng.permutation(n), columns)
            highest, lowest = z.max(0), z.min(0)
            beyond = between >= statistic[still] * (1 - 1e-9)
            for k, i in enumerate(still.tolist()):
                if hits[i] < ENOUGH:
                    tops[i].append(highest[k])
                    bottoms[i].append(lowest[k])
                    hits[i] += beyond[k]
                    if hits[i] == ENOUGH:
                        p[live[i]] = ENOUGH / done
        still = still[hits[still] < ENOUGH]
        limit = min(MOST, max(LEAST, int(WORK / max(1, n * len(still)))))
    p[live[still]] = (hits[still] + 1) / (done + 1)
    for i in range(len(tops)):
        above[live[i]] = observed[:, i] > max(0.0, float(np.quantile(tops[i], 1 - LEVEL)))
        below[live[i]] = observed[:, i] < min(0.0, float(np.quantile(bottoms[i], LEVEL)))
    return p, above, below
