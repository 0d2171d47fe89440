"""Choosing what a refit can make up for: what is lost of each reader's output once its other weights are refitted.

Optimal brain surgery on the normal equations of every linear reader, without gradients: removing the inputs B of a
layer with weights W and second moments X'X = 1 / H, and refitting the rest, costs W_B' (H_BB)^-1 W_B in squared output
error; H and W then follow in closed form (Hassibi and Stork 1993, Second order derivatives for network pruning; for
layers Dong et al. 2017, arXiv:1705.07565). How much an error in one layer's output costs at the end is measured: the
layer alone loses half of its groups, and the network's outputs are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
from threadpoolctl import threadpool_limits

from onnxcar.channels import ChannelSpace
from onnxcar.errors import PlanError
from onnxcar.recovery._layers import Graph, Linear, linear_layers
from onnxcar.recovery._measures import Distance
from onnxcar.recovery._patches import Array, sampled, windows
from onnxcar.recovery._samples import draw
from onnxcar.recovery._solve import Normal
from onnxcar.recovery._stream import Stream, fetch
from onnxcar.recovery._write import Names, apply, refit
from onnxcar.runtime import open_network
from onnxcar.surgery import Plan

if TYPE_CHECKING:
    from onnxcar.data import Dataset

RIDGE = 1e-3  # on the diagonal of the second moments, as a share of their mean
POSITIONS = 16  # looked at in each sample
PROBED = 128  # samples on which the weight of a layer's error is measured
CHUNK = 64
_DIGITS = 7  # importances are rounded to these: sums in another order must not turn a choice


class Reconstruction:
    """What each group's removal would cost the network's outputs if its readers were refitted.

    Attributes:
        weights: Name of a reader -> rise of the outputs' relative squared distance for each unit of its output's.
    """

    def __init__(
        self,
        space: ChannelSpace,
        data: Dataset,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        memory_bytes: int = 1 << 30,
        seed: int = 0,
    ) -> None:
        """Run the original network on the samples.

        Raises:
            PlanError: No prunable group is read by layers that could be refitted alone.
        """
        self._space = space
        everything = Plan(g.id for g in space.groups)
        self._graph = Graph(space, everything, space.model)
        layers, skipped = linear_layers(self._graph)
        by_output = {layer.output: layer for layer in layers}
        self._readers: list[Linear] = []
        self._inputs: dict[int, Array] = {}  # reader -> group of each of its inputs, (blocks, d)
        self._lost: set[int] = set()  # groups that something reads that cannot be refitted
        for read in space.reads:
            for i, k in read.consumers:
                layer = by_output.get(space.model.proto.graph.node[i].output[0])
                ids = None if layer is None or k != 0 else _inputs(layer, read.groups)
                if layer is None or ids is None or 24 * ids.size * ids.shape[1] > memory_bytes:
                    self._lost.update(int(g) for g in np.unique(read.groups) if g >= 0)
                elif layer.index not in self._inputs:
                    self._readers.append(layer)
                    self._inputs[layer.index] = ids
        self._readers.sort(key=lambda layer: layer.index)
        if not {g.id for g in space.groups} - self._lost:
            why = f" ('{skipped[0].node}': {skipped[0].reason})" if skipped else ""
            raise PlanError(
                f"No group of this model is read by layers with weights of their own alone{why}, so none can be judged "
                "by what a refit makes up. Take --criterion car."
            )
        few = data.inputs(np.arange(min(3, len(data))))
        self._network = open_network(
            space.model, provider=provider, threads=threads, sample=few if len(data) > 1 else None
        )
        self._provider, self._memory = provider, memory_bytes
        size = self._network.fixed or CHUNK
        n = len(data) // size * size if self._network.fixed else len(data)
        self._data, self._starts, self._size = data, range(0, n, size), size
        self._normal = {layer.index: Normal(*self._sizes(layer)) for layer in self._readers}
        with threadpool_limits(limits=threads, user_api="blas"):
            self._sum_up(seed)
            self._all = {layer.index: self._surgeons(layer) for layer in self._readers}
            self.weights = self._weigh()
        self._gone: frozenset[int] = frozenset()
        self._costs: dict[int, dict[int, float]] = {}

    def importances(self, removed: frozenset[int]) -> npt.NDArray[np.float64]:
        """Rise of the outputs' squared distance, over their variance, that removing each group next would bring.

        An estimate to first order: layers add up. Infinite for groups that something else reads, too; NaN for those
        that are gone; (n_groups,).
        """
        if not self._gone <= removed:
            self._all = {layer.index: self._surgeons(layer) for layer in self._readers}
            self._gone, self._costs = frozenset(), {}
        for group in sorted(removed - self._gone):
            for index, blocks in self._all.items():
                for surgeon in blocks:
                    if surgeon.drop(group):
                        self._costs.pop(index, None)
        self._gone = removed
        out = np.zeros(len(self._space.groups))
        for layer in self._readers:
            if layer.index not in self._costs:
                total: dict[int, float] = {}
                for surgeon in self._all[layer.index]:
                    for group, cost in surgeon.costs().items():
                        total[group] = total.get(group, 0.0) + cost
                self._costs[layer.index] = total
            for group, cost in self._costs[layer.index].items():
                out[group] += cost * self.weights[layer.output]
        out = np.asarray([float(f"{x:.{_DIGITS}g}") for x in out])
        out[list(self._lost)] = np.inf
        out[list(removed)] = np.nan
        return out

    def _sizes(self, layer: Linear) -> tuple[int, int, int]:
        return layer.blocks, layer.inputs, layer.filters // layer.blocks

    def _feeds(self, start: int) -> dict[str, Array]:
        where = np.arange(start, min(start + self._size, len(self._data)))
        return self._network.session.bind(self._data.inputs(where))

    def _sum_up(self, seed: int) -> None:
        names = [x for layer in self._readers for x in (layer.input, layer.output)]
        values_of = fetch(self._network, self._space.model, names, self._provider)
        for start in self._starts:
            values = values_of(self._feeds(start))
            for i, layer in enumerate(self._readers):
                x, y = values[layer.input], values[layer.output]
                at = draw(seed, i, start, layer.positions(y.shape), POSITIONS)
                if layer.window is None:
                    rows = sampled(x, -1, at)[None]
                else:
                    rows = windows(x, layer.window, y.shape[2:], at, layer.blocks)
                aim = sampled(y, layer.axis, at)
                aim = aim.reshape(len(aim), layer.blocks, -1).swapaxes(0, 1)
                self._normal[layer.index].add(rows, aim)

    def _matrix(self, layer: Linear) -> Array:
        held = self._graph.floats(layer.weight)
        assert held is not None
        return layer.matrix(held)

    def _surgeons(self, layer: Linear) -> list[_Surgeon]:
        weights, normal, ids = self._matrix(layer), self._normal[layer.index], self._inputs[layer.index]
        moments = normal.centred() / max(normal.n, 1)
        return [_Surgeon(weights[b], moments[b], ids[b]) for b in range(layer.blocks)]

    def _weigh(self) -> dict[str, float]:
        """Weight of each reader's output error, by taking half of its groups from it alone."""
        model, out = self._space.model, [o.name for o in self._network.proto.graph.output]
        starts = [s for s in self._starts if s < PROBED] or list(self._starts[:1])
        stream = Stream(
            self._network, model, lambda c: self._feeds(starts[c]), len(starts), self._memory, self._provider
        )
        want = list(stream.outputs(self._network.proto, out))
        found: dict[str, float] = {}
        for layer in self._readers:
            for _ in stream.run([], layer.output):
                pass
            surgeons, lost = self._surgeons(layer), 0.0
            for surgeon in surgeons:
                lost += surgeon.halve()
            weights = np.stack([s.weights for s in surgeons])
            bias = self._normal[layer.index].bias(weights).ravel()
            if not layer.bias.inside:
                bias = bias + layer.bias.values
            proto = onnx.ModelProto()
            proto.CopyFrom(self._network.proto)
            apply(proto, refit(layer, self._graph, Names(proto), weights, bias))
            distance = Distance()
            for a, b in zip(want, stream.outputs(proto, out), strict=True):
                distance.add(a, b)
            found[layer.output] = distance.value / lost if lost > 0 else 0.0
        return found


class _Surgeon:
    """One block of a reader, while its inputs leave and the rest is refitted."""

    def __init__(self, weights: Array, moments: Array, groups: Array) -> None:
        scale = float(np.trace(moments)) / len(moments) or 1.0
        self._inverse = np.linalg.inv(moments + RIDGE * scale * np.eye(len(moments)))
        self.weights = weights.copy()
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
            solved = np.linalg.solve(self._inverse[at[:, :, None], at[:, None, :]], w)
            out.update(zip(groups, (w * solved).sum((1, 2)).tolist(), strict=True))
        return out

    def drop(self, group: int) -> bool:
        """The group leaves, if it is here; whether it was."""
        at = self._where.pop(group, None)
        if at is None:
            return False
        across = self._inverse[:, at]
        inner = across[at].copy()
        self.weights -= across @ np.linalg.solve(inner, self.weights[at])
        self._inverse -= across @ np.linalg.solve(inner, across.T)
        self.weights[at] = 0
        self._inverse[at] = 0
        self._inverse[:, at] = 0
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


def _inputs(layer: Linear, groups: Array) -> Array | None:
    """Group of each input of a layer, (blocks, d); None where channels do not lie on the axis it reads."""
    axis = groups.ndim - 1 if layer.window is None else 1
    if groups.ndim <= axis or groups.shape[axis] != groups.size:
        return None
    ids = groups.reshape(layer.blocks, -1)
    if layer.inputs % ids.shape[1]:
        return None
    return np.repeat(ids, layer.inputs // ids.shape[1], axis=1)
