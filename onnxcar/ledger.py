"""Size of a network while groups leave one by one: kept up to date, not computed anew at every step."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnxcar.channels import ChannelSpace

Counts = npt.NDArray[np.int64]


class Ledger:
    """Params, MACs and what may still go, of a network without the groups removed so far.

    Cost of a removal: the sites, terms and axes that the group touches, whatever the size of the network.
    """

    def __init__(self, space: ChannelSpace) -> None:
        self.removed: set[int] = set()
        n = len(space.groups)
        self._scales = [t.scale for t in space.terms]
        self._ins = [_per_block(t.reads, t.blocks) for t in space.terms]
        self._outs = [_per_block(t.writes, t.blocks) for t in space.terms]
        self._terms: list[dict[int, tuple[Counts, Counts]]] = [{} for _ in range(n)]
        for i, t in enumerate(space.terms):
            for g, (a, b) in _shares(t.reads, t.writes, t.blocks).items():
                self._terms[g][i] = (a, b)
        self._sites: list[dict[int, dict[int, Counts]]] = [{} for _ in range(n)]
        self._kept: list[dict[int, Counts]] = []
        self._rest: list[int] = []
        for i, (shape, site) in enumerate(space.tensors):
            blocks = site.blocks if len(site.axes) == 2 else 1
            self._kept.append({a: _per_block(v, blocks) for a, v in site.axes.items()})
            self._rest.append(int(np.prod([m for a, m in enumerate(shape) if a not in site.axes], dtype=np.int64)))
            for axis, v in site.axes.items():
                for g, count in _counts(v, blocks).items():
                    self._sites[g].setdefault(i, {})[axis] = count
        self.macs = sum(s * float((a * b).sum()) for s, a, b in zip(self._scales, self._ins, self._outs, strict=True))
        self.params = space.base_params
        self._axes: list[npt.NDArray[np.int64]] = [ids for _, ids in space.keep_one]
        self._left = [len(ids) for ids in self._axes]
        self._axes_of: list[list[int]] = [[] for _ in range(n)]
        for k, ids in enumerate(self._axes):
            for g in ids.tolist():
                self._axes_of[g].append(k)
        self.blocked: set[int] = {int(ids[0]) for ids in self._axes if len(ids) == 1}

    def by_term(self) -> npt.NDArray[np.float64]:
        """MACs of each term that are left, in the order of `ChannelSpace.terms`."""
        return np.asarray(
            [s * float((a * b).sum()) for s, a, b in zip(self._scales, self._ins, self._outs, strict=True)]
        )

    def copy(self) -> Ledger:
        """A ledger of its own with the same groups removed; arrays are shared, as no removal writes into them."""
        made = copy(self)
        made.removed, made.blocked = set(self.removed), set(self.blocked)
        made._ins, made._outs, made._left = list(self._ins), list(self._outs), list(self._left)
        made._kept = [dict(x) for x in self._kept]
        return made

    def remove(self, groups: Iterable[int]) -> None:
        """`groups` leave; those that have left already change nothing."""
        for g in groups:
            if g in self.removed:
                continue
            self.macs -= self.saved_macs(g)
            for i, (a, b) in self._terms[g].items():
                self._ins[i] = self._ins[i] - a
                self._outs[i] = self._outs[i] - b
            self.params -= self.saved_params(g)
            for i, axes in self._sites[g].items():
                self._kept[i].update(self._without(i, axes))
            self.removed.add(g)
            for i in self._axes_of[g]:
                self._left[i] -= 1
                if self._left[i] == 1:
                    self.blocked.add(next(x for x in self._axes[i].tolist() if x not in self.removed))

    def saved_macs(self, group: int) -> float:
        """MACs that go when `group` leaves now."""
        return sum(self.saved_by_term(group).values(), 0.0)

    def saved_by_term(self, group: int) -> dict[int, float]:
        """The same, by position among `ChannelSpace.terms`; terms that save nothing are left out."""
        if group in self.removed:
            return {}
        saved = {}
        for i, (a, b) in self._terms[group].items():
            ins, outs = self._ins[i], self._outs[i]
            saved[i] = self._scales[i] * float((ins * outs - (ins - a) * (outs - b)).sum())
        return saved

    def saved_params(self, group: int) -> int:
        """Weight elements that go when `group` leaves now."""
        if group in self.removed:
            return 0
        return sum(
            self._size(i, self._kept[i]) - self._size(i, {**self._kept[i], **self._without(i, axes)})
            for i, axes in self._sites[group].items()
        )

    def _without(self, i: int, axes: dict[int, Counts]) -> dict[int, Counts]:
        return {axis: self._kept[i][axis] - count for axis, count in axes.items()}

    def _size(self, i: int, kept: dict[int, Counts]) -> int:
        product: Any = 1
        for count in kept.values():
            product = product * count
        return int(np.sum(product)) * self._rest[i]


def _per_block(ids: npt.NDArray[Any], blocks: int) -> Counts:
    """Positions in each block."""
    return np.full(blocks, len(ids) // blocks, np.int64)


def _counts(ids: npt.NDArray[Any], blocks: int) -> dict[int, Counts]:
    """For each group its positions in each block."""
    out: dict[int, Counts] = {}
    width = len(ids) // blocks
    for position in np.flatnonzero(ids >= 0).tolist():
        g = int(ids[position])
        if g not in out:
            out[g] = np.zeros(blocks, np.int64)
        out[g][position // width] += 1
    return out


def _shares(reads: npt.NDArray[Any], writes: npt.NDArray[Any], blocks: int) -> dict[int, tuple[Counts, Counts]]:
    a, b = _counts(reads, blocks), _counts(writes, blocks)
    none = np.zeros(blocks, np.int64)
    return {g: (a.get(g, none), b.get(g, none)) for g in a.keys() | b.keys()}
