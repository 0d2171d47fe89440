"""Cutting constants, per use: in place where all uses agree, else a copy for each way of cutting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnxcar.channels import Site
from onnxcar.facts import Facts, attribute, uses
from onnxcar.surgery._spill import Spill

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut: axis -> indices kept (ascending); with `blocks`, axis 1 is indexed block by block."""

    axes: tuple[tuple[int, tuple[int, ...]], ...]
    blocks: int = 1

    def apply(self, array: Array) -> Array:
        """The part of `array` that survives, in its own memory."""
        if self.blocks > 1 and len(self.axes) == 2:
            rows, cols = (np.asarray(i, np.int64) for _, i in self.axes)
            n_rows, n_cols = array.shape[0] // self.blocks, array.shape[1]
            parts = []
            for b in range(self.blocks):
                r = rows[(rows >= b * n_rows) & (rows < (b + 1) * n_rows)]
                c = cols[(cols >= b * n_cols) & (cols < (b + 1) * n_cols)] - b * n_cols
                if len(r) and len(c):
                    parts.append(array[r][:, c])
            return np.ascontiguousarray(np.concatenate(parts))
        for axis, index in self.axes:
            array = np.take(array, np.asarray(index, np.int64), axis=axis)
        return np.ascontiguousarray(array)


def cut_of(site: Site, table: npt.NDArray[np.bool_]) -> Cut | None:
    """The cut that a site needs, None where nothing of it goes."""
    axes = sorted(site.axes.items())
    alive = [(a, table[ids]) for a, ids in axes]
    if all(x.all() for _, x in alive):
        return None
    keep = [(a, tuple(np.flatnonzero(x).tolist())) for a, x in alive if not x.all() or site.blocks > 1]
    return Cut(tuple(keep), site.blocks)


class Tensors:
    """The constants of the graph under surgery."""

    def __init__(
        self,
        facts: Facts,
        nodes: list[list[onnx.NodeProto]],
        fresh: Callable[[str], str],
        spill: Spill | None = None,
    ) -> None:
        self._facts = facts
        self._graph = facts.model.proto.graph
        self._nodes = nodes  # new nodes by original index; the original one is still the first of its list
        self._fresh = fresh
        self._spill = spill
        self.replaced: dict[str, onnx.TensorProto] = {}
        self.added: list[onnx.TensorProto] = []

    def cut(self, cuts: dict[tuple[int, int], Cut]) -> None:
        """Cut every (node, input) as told; values that only pass constants on are followed to their tensors."""
        cuts = dict(cuts)
        users = uses(self._graph)
        outputs = {o.name for o in self._graph.output}
        pending = defaultdict(list)
        for (i, k), _ in cuts.items():
            pending[self._graph.node[i].input[k]].append((i, k))
        # later producers first, so that a value's uses are known before it is followed; tensors last
        order = sorted(pending, key=lambda n: -self._facts.producers.get(n, -1))
        while order:
            name = order.pop(0)
            everywhere = [(i, k) for i, k in users.get(name, [])]
            wanted = {u: cuts.get(u) for u in everywhere}
            distinct = {c for c in wanted.values() if c is not None}
            whole = len(distinct) == 1 and all(c is not None for c in wanted.values()) and name not in outputs
            if whole:
                moved = self._in_place(name, next(iter(distinct)))
                for use, cut in moved.items():
                    cuts[use] = cut
                    below = self._graph.node[use[0]].input[use[1]]
                    if below not in order:
                        order.append(below)
                order.sort(key=lambda n: -self._facts.producers.get(n, -1))
                continue
            for cut in sorted(distinct, key=repr):
                copy = self._new(cut.apply(self._array(name)), self._fresh(name))
                for (i, k), c in wanted.items():
                    if c == cut:
                        self._nodes[i][0].input[k] = copy

    def _array(self, name: str) -> Array:
        return self._facts.array(name)

    def _new(self, values: Array, name: str) -> str:
        self.added.append(self._stored(numpy_helper.from_array(np.asarray(values), name)))
        return name

    def _stored(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        return tensor if self._spill is None else self._spill.put(tensor)

    def constant(self, values: Array, like: str) -> str:
        """A new initializer with a name made from `like`."""
        return self._new(values, self._fresh(like))

    def _in_place(self, name: str, cut: Cut) -> dict[tuple[int, int], Cut]:
        """Cut a value for all its uses; returns cuts to be made at the inputs of the node that makes it."""
        if name in self._facts.initializers:
            tensor = self._facts.initializers[name]
            self.replaced[name] = self._sliced(tensor, cut, name)
            return {}
        index = self._facts.producers[name]
        node = self._nodes[index][0]
        if node.op_type in ("Identity", "Cast"):
            return {(index, 0): cut}
        if node.op_type == "Transpose" and cut.blocks == 1:
            rank = len(self._facts.shape(name) or ())
            perm = attribute(node, "perm", None) or list(range(rank))[::-1]
            return {(index, 0): Cut(tuple(sorted((int(perm[a]), i) for a, i in cut.axes)))}
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            return self._quantized(index, node, cut)
        if node.op_type == "ConstantOfShape" and cut.blocks == 1:
            sizes = np.array(self._facts.shape(name), np.int64)
            for axis, kept in cut.axes:
                sizes[axis] = len(kept)
            node.input[0] = self._new(sizes, self._fresh(node.input[0]))
            return {}
        values = cut.apply(self._array(name))
        if node.op_type == "Constant":
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("value", numpy_helper.from_array(values)))
            return {}
        copy = self._new(values, self._fresh(name))
        for i, k in uses(self._graph).get(name, []):
            self._nodes[i][0].input[k] = copy
        return {}

    def _quantized(self, index: int, node: onnx.NodeProto, cut: Cut) -> dict[tuple[int, int], Cut]:
        out = {(index, 0): cut}
        scale = self._facts.shape(node.input[1]) or ()
        rank = len(self._facts.shape(node.input[0]) or ())
        axis = int(attribute(node, "axis", 1))
        axis += rank if axis < 0 else 0
        kept = dict(cut.axes).get(axis)
        if len(scale) == 1 and scale[0] > 1 and kept is not None:
            for k in (1, 2):
                if len(node.input) > k and node.input[k]:
                    out[(index, k)] = Cut(((0, kept),))
        return out

    def _sliced(self, tensor: onnx.TensorProto, cut: Cut, name: str) -> onnx.TensorProto:
        made = numpy_helper.from_array(cut.apply(self._facts.model.array(tensor)), name)
        made.doc_string = tensor.doc_string
        if made.data_type != tensor.data_type:
            made.data_type = tensor.data_type
        return self._stored(made)
