"""Choosing what a refit can make up for: what is lost of each reader's output once its other weights are refitted.

Optimal brain surgery (see `_surgeon`) on the normal equations of every linear reader, without gradients. How much an
error in one layer's output costs at the end is measured: the layer alone loses half of its groups, and the network's
outputs are compared. Second moments are summed up in as many passes over the samples as memory asks for.
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
from onnxcar.recovery._release import release
from onnxcar.recovery._samples import draw
from onnxcar.recovery._shelf import Arrays, Shelf
from onnxcar.recovery._solve import Normal
from onnxcar.recovery._stream import Stream, fetch
from onnxcar.recovery._surgeon import Surgeon, inverse
from onnxcar.recovery._write import Names, apply, refit
from onnxcar.runtime import open_network
from onnxcar.surgery import Plan

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

MEMORY_BYTES = 1 << 30  # where none is said; readers that take more are looked at only if more is said
POSITIONS = 16  # looked at in each sample
PROBED = 128  # samples on which the weight of a layer's error is measured
CHUNK = 64  # samples that share their positions, and of a run, if memory allows
_DIGITS = 7  # importances are rounded to these: sums in another order must not turn a choice


class Reconstruction:
    """What each group's removal would cost the network's outputs if its readers were refitted.

    Attributes:
        weights: Name of a reader -> rise of the outputs' relative squared distance for each unit of its output's.
        passes: Runs over the samples that second moments took.
    """

    def __init__(
        self,
        space: ChannelSpace,
        data: Dataset,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        memory_bytes: int | None = None,
        seed: int = 0,
        progress: Report | None = None,
    ) -> None:
        """Run the original network on the samples.

        Args:
            space: Structure of the network.
            data: Samples; labels are not looked at.
            provider: Execution provider.
            threads: Of a session and of the algebra, default all cores.
            memory_bytes: Bound on second moments and activations held at once, default 1 GiB; with less than all of
                them take, the samples are run several times and what does not fit lies in a temporary folder.
            seed: Of the positions that are looked at.
            progress: Told how far it is.

        Raises:
            PlanError: No prunable group is read by layers that could be refitted alone, or a layer alone takes more
                than `memory_bytes`.
        """
        self._space, self._progress = space, progress
        everything = Plan(g.id for g in space.groups)
        self._graph = Graph(space, everything, space.model)
        self._memory = memory_bytes or MEMORY_BYTES
        self._readers: list[Linear] = []
        self._inputs: dict[int, Array] = {}  # reader -> group of each of its inputs, (blocks, d)
        self._lost: set[int] = set()  # groups that something reads that cannot be refitted
        self._find_readers()
        few = data.inputs(np.arange(min(3, len(data))))
        self._network = open_network(
            space.model, provider=provider, threads=threads, sample=few if len(data) > 1 else None
        )
        self._provider = provider
        fixed = self._network.fixed
        self._block = fixed or CHUNK
        n = len(data) // fixed * fixed if fixed else len(data)
        self._data, self._n = data, n
        self._each = self._bytes(few)
        # What a run holds besides: activations of a convolutional network take some ten times its input.
        self._alone = max(1, 10 * sum(v[:1].nbytes for v in few.values()))
        self._means: dict[int, tuple[Array, Array]] = {}  # reader -> means of inputs (blocks, d), outputs (blocks, m)
        self._shelf = Shelf(self._memory // 2)
        self._left: dict[int, set[int]] = {layer.index: set() for layer in self._readers}
        self._costs: dict[int, dict[int, float]] = {}
        self._gone: frozenset[int] = frozenset()
        with threadpool_limits(limits=threads, user_api="blas"):
            parts = self._parts()
            self.passes = len(parts)
            for number, part in enumerate(parts):
                self._sum_up(part, number, seed)
            self.weights = self._weigh()
        release()

    def importances(self, removed: frozenset[int]) -> npt.NDArray[np.float64]:
        """Rise of the outputs' squared distance, over their variance, that removing each group next would bring.

        An estimate to first order: layers add up. Infinite for groups that something else reads, too; NaN for those
        that are gone; (n_groups,).
        """
        if not self._gone <= removed:
            for layer in self._readers:
                self._shelf.drop(("now", layer.index))
                self._left[layer.index] = set()
            self._costs = {}
        self._gone = removed
        out = np.zeros(len(self._space.groups))
        for layer in self._readers:
            for group, cost in self._of(layer, removed).items():
                out[group] += cost * self.weights[layer.output]
        out = np.asarray([float(f"{x:.{_DIGITS}g}") for x in out])
        out[list(self._lost)] = np.inf
        out[list(removed)] = np.nan
        return out

    # --- one reader -------------------------------------------------------------------------------------------------

    def _of(self, layer: Linear, removed: frozenset[int]) -> dict[int, float]:
        """Cost of each group that this reader still has, in its own output."""
        at = layer.index
        leaving = sorted(removed.intersection(self._inputs[at].ravel().tolist()) - self._left[at])
        if at in self._costs and not leaving:
            return self._costs[at]
        held, surgeons = self._surgeons(layer)
        for group in leaving:
            for surgeon in surgeons:
                surgeon.drop(group)
        if leaving:
            self._left[at].update(leaving)
            self._shelf.put(("now", at), held)
        total: dict[int, float] = {}
        for surgeon in surgeons:
            for group, cost in surgeon.costs().items():
                total[group] = total.get(group, 0.0) + cost
        self._costs[at] = total
        return total

    def _surgeons(self, layer: Linear) -> tuple[Arrays, list[Surgeon]]:
        """What is put away of a reader, and who change it: its blocks, without the groups that left."""
        at = layer.index
        if ("now", at) not in self._shelf:
            moments = self._shelf.get(("moments", at))["moments"]
            inverses = np.stack([inverse(block) for block in moments])
            self._shelf.put(("now", at), {"weights": self._matrix(layer).copy(), "inverse": inverses})
        held = self._shelf.get(("now", at))
        surgeons = [
            Surgeon(w, h, ids) for w, h, ids in zip(held["weights"], held["inverse"], self._inputs[at], strict=True)
        ]
        for group in self._left[at]:
            for surgeon in surgeons:
                surgeon.gone(group)
        return held, surgeons

    def _matrix(self, layer: Linear) -> Array:
        held = self._graph.floats(layer.weight)
        assert held is not None
        return layer.matrix(held)

    # --- set up -----------------------------------------------------------------------------------------------------

    def _find_readers(self) -> None:
        space = self._space
        layers, skipped = linear_layers(self._graph)
        by_output = {layer.output: layer for layer in layers}
        for read in space.reads:
            for i, k in read.consumers:
                layer = by_output.get(space.model.proto.graph.node[i].output[0])
                ids = None if layer is None or k != 0 else _inputs(layer, read.groups)
                if layer is None or ids is None or _need(ids) > max(self._memory, MEMORY_BYTES):
                    self._lost.update(int(g) for g in np.unique(read.groups) if g >= 0)
                elif _need(ids) > self._memory:
                    raise PlanError(
                        f"Layer '{layer.node}' has {ids.shape[1]:,} inputs, whose second moments take "
                        f"{_need(ids) / 2**20:.1f} MiB, and the bound is {self._memory / 2**20:.2g} MiB. Give --memory "
                        f"{_need(ids) // 2**20 + 1}MiB or more, or take another criterion.",
                        layer=layer.node,
                    )
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

    def _bytes(self, few: dict[str, Array]) -> dict[int, int]:
        """Reader -> bytes of its input and output, of one sample."""
        names = [x for layer in self._readers for x in (layer.input, layer.output)]
        feeds = self._network.session.bind({k: v[: self._network.fixed or 1] for k, v in few.items()})
        values = fetch(self._network, self._space.model, names, self._provider)(feeds)
        n = self._network.fixed or 1
        return {x.index: (values[x.input].nbytes + values[x.output].nbytes) // n for x in self._readers}

    def _parts(self) -> list[list[int]]:
        """Readers, by their place, whose second moments are summed up in one pass over the samples."""
        parts: list[list[int]] = [[]]
        held = 0
        for i, layer in enumerate(self._readers):
            need = 8 * (self._inputs[layer.index].size * layer.inputs + layer.inputs * layer.filters)
            if parts[-1] and held + need > self._memory // 4:
                parts.append([])
                held = 0
            parts[-1].append(i)
            held += need
        return parts

    def _run_size(self, part: list[int]) -> int:
        """Samples of a run: the largest power of two, or the network's own, whose activations fit."""
        if self._network.fixed:
            return self._network.fixed
        each = max(self._alone, sum(self._each[self._readers[i].index] for i in part))
        size = CHUNK
        while size > 1 and size * each > self._memory // 4:
            size //= 2
        return size

    def _feeds(self, start: int, size: int) -> dict[str, Array]:
        where = np.arange(start, min(start + size, self._n))
        return self._network.session.bind(self._data.inputs(where))

    def _sum_up(self, part: list[int], number: int, seed: int) -> None:
        layers = [(i, self._readers[i]) for i in part]
        names = [x for _, layer in layers for x in (layer.input, layer.output)]
        values_of = fetch(self._network, self._space.model, names, self._provider)
        normals = {layer.index: Normal(*self._sizes(layer)) for _, layer in layers}
        size = self._run_size(part)
        for start in range(0, self._n, size):
            if self._progress is not None:
                text = "inputs of all layers" if self.passes == 1 else f"inputs of layers, pass {number + 1}"
                self._progress.update(number * self._n + start, self.passes * self._n, text, "samples")
            values = values_of(self._feeds(start, size))
            for i, layer in layers:
                x, y = values[layer.input], values[layer.output]
                # samples of a block share their positions, however many are run at once
                first = start // self._block * self._block
                at = draw(seed, i, first, layer.positions(y.shape), POSITIONS)
                if layer.window is None:
                    rows = sampled(x, -1, at)[None]
                else:
                    rows = windows(x, layer.window, y.shape[2:], at, layer.blocks)
                aim = sampled(y, layer.axis, at)
                aim = aim.reshape(len(aim), layer.blocks, -1).swapaxes(0, 1)
                normals[layer.index].add(rows, aim)
        for _, layer in layers:
            normal = normals.pop(layer.index)
            n = max(normal.n, 1)
            self._means[layer.index] = (normal.x / n, normal.t / n)
            moments = normal.centred()
            moments /= n
            self._shelf.put(("moments", layer.index), {"moments": moments})

    def _sizes(self, layer: Linear) -> tuple[int, int, int]:
        return layer.blocks, layer.inputs, layer.filters // layer.blocks

    def _weigh(self) -> dict[str, float]:
        """Weight of each reader's output error, by taking half of its groups from it alone."""
        model, out = self._space.model, [o.name for o in self._network.proto.graph.output]
        size = self._run_size(list(range(len(self._readers))))
        starts = range(0, max(size, min(self._n, PROBED // self._block * self._block or self._block)), size)
        stream = Stream(
            self._network,
            model,
            lambda c: self._feeds(starts[c], size),
            len(starts),
            self._memory // 4,
            self._provider,
        )
        want = list(stream.outputs(self._network.proto, out))
        found: dict[str, float] = {}
        for i, layer in enumerate(self._readers):
            if self._progress is not None:
                self._progress.update(i, len(self._readers), f"what errors in {layer.node} cost", "layers")
            for _ in stream.run([], layer.output):
                pass
            lost, halved = 0.0, []
            for surgeon, ids in zip(self._surgeons(layer)[1], self._inputs[layer.index], strict=True):
                trial = Surgeon(surgeon.weights.copy(), surgeon.inverse.copy(), ids)
                lost += trial.halve()
                halved.append(trial.weights)
            weights = np.stack(halved)
            inputs, outputs = self._means[layer.index]
            bias = (outputs - (inputs[:, None, :] @ weights)[:, 0]).ravel()
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


def _need(ids: Array) -> int:
    """Bytes of a reader's second moments, their inverse, and one more of them to work on."""
    return 24 * int(ids.size) * int(ids.shape[1])


def _inputs(layer: Linear, groups: Array) -> Array | None:
    """Group of each input of a layer, (blocks, d); None where channels do not lie on the axis it reads."""
    axis = groups.ndim - 1 if layer.window is None else 1
    if groups.ndim <= axis or groups.shape[axis] != groups.size:
        return None
    ids = groups.reshape(layer.blocks, -1)
    if layer.inputs % ids.shape[1]:
        return None
    return np.repeat(ids, layer.inputs // ids.shape[1], axis=1)
