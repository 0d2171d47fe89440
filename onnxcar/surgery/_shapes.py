"""Shape arithmetic after a cut: sizes that the graph computes from its values are made right, or refused.

The new graph is walked at both batch sizes. Where a computed size reaches a node that uses it as a shape or as a
number, it must be what the surviving channels give. If not, the wrong entries are replaced: as a constant where the
right value does not depend on the batch, else entry by entry with `Where(mask, sizes, computed)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxcar.channels import ChannelSpace, Edit
from onnxcar.errors import InternalError, UnsupportedError
from onnxcar.facts import SMALL, Trace, default_opset, step
from onnxcar.surgery._edits import Bench, resized

Array = npt.NDArray[Any]


class _View:
    """One walk of the new graph at one batch size."""

    def __init__(self, old: Trace, tensors: dict[str, onnx.TensorProto], inputs: list[str], model: Any) -> None:
        self.old = old
        self.trace = Trace()
        self.tensors = tensors
        self.model = model
        self._cache: dict[str, Array] = {}
        for name in inputs:
            if name in old.types and name not in tensors:
                self.trace.types[name] = old.types[name]

    def known(self, name: str) -> Array | None:
        if name in self.trace.values:
            return self.trace.values[name]
        if name in self._cache:
            return self._cache[name]
        t = self.tensors.get(name)
        if t is not None:
            self.type(name)
            if int(np.prod(t.dims)) <= SMALL:
                self._cache[name] = self.model.array(t)
                return self._cache[name]
        return None

    def type(self, name: str) -> None:
        t = self.tensors.get(name)
        if t is not None and name not in self.trace.types:
            self.trace.types[name] = helper.make_tensor_type_proto(t.data_type, list(t.dims))


def patch_shapes(space: ChannelSpace, bench: Bench) -> None:
    """Make every computed size fit the surviving channels, and check every shape of the new graph.

    Raises:
        UnsupportedError: A size depends on the batch and on a removed channel at once.
        InternalError: A shape of the new graph is not what the labels say: a bug of ours, nothing is written.
    """
    facts, proto = space.facts, space.model.proto
    targets: dict[tuple[int, int], Edit] = {
        (e.node, int(e.args["input"])): e for e in space.edits if e.kind == "target"
    }
    versions = {o.domain: o.version for o in proto.opset_import}
    opset = default_opset(proto)
    tensors = dict(facts.initializers)
    tensors.update(bench.tensors.replaced)
    views = [_View(t, tensors, [i.name for i in proto.graph.input], space.model) for t in facts.traces]
    for index, group in enumerate(bench.nodes):
        placed: list[onnx.NodeProto] = []
        for node in group:
            tensors.update({t.name: t for t in bench.tensors.added})
            if index in _borders(space):
                placed += _patched(space, bench, views, node, index, targets)
            placed.append(node)
            for v in views:
                for x in node.input:
                    v.type(x)
                step(node, v.trace, v.known, versions, opset, space.model)
                _assumed(space, bench, v, node)
        bench.nodes[index] = placed
    for v in views:
        _check(space, bench, v)


def _assumed(space: ChannelSpace, bench: Bench, view: _View, node: onnx.NodeProto) -> None:
    """What inference cannot tell of an op has the shape it had, with its channels at their new counts."""
    for name in node.output:
        old = view.old.shape(name) if name else None
        if old is None or view.trace.shape(name) is not None:
            continue
        dims = _cut_sizes(space, bench, name, old)
        kind = view.old.types[name].tensor_type.elem_type
        view.trace.types[name] = helper.make_tensor_type_proto(kind, dims)


def _cut_sizes(space: ChannelSpace, bench: Bench, name: str, old: Sequence[int]) -> list[int]:
    """Sizes of a value after the cut."""
    sizes = list(old)
    for labels in (space.labels.get(name), space.crossing.get(name)):
        if labels is not None:
            sizes = [int(bench.along(labels, a).sum()) if labels.shape[a] > 1 else n for a, n in enumerate(sizes)]
    return sizes


_FILLS = ("ConstantOfShape", "Expand", "Tile")  # make data, however small, of a computed shape


def _borders(space: ChannelSpace) -> frozenset[int]:
    """Nodes that use a computed small value without being shape arithmetic themselves."""
    found = getattr(space, "_border_nodes", None)
    if found is None:
        facts = space.facts
        values = facts.traces[0].values
        derived = {n for n in values if not facts.constant(n)}
        found = frozenset(
            i
            for i, n in enumerate(space.model.proto.graph.node)
            if any(x in derived for x in n.input)
            and (n.op_type in _FILLS or not all(o in values for o in n.output if o))
        )
        space.__dict__["_border_nodes"] = found  # frozen for callers; this is a cache
    return found


def _patched(
    space: ChannelSpace,
    bench: Bench,
    views: list[_View],
    node: onnx.NodeProto,
    index: int,
    targets: dict[tuple[int, int], Edit],
) -> list[onnx.NodeProto]:
    """Nodes to place before `node` so that the sizes it uses are right; its inputs are rewired."""
    original = space.model.proto.graph.node[index]
    extra: list[onnx.NodeProto] = []
    for k, name in enumerate(original.input):
        if k >= len(node.input) or node.input[k] != name or space.facts.constant(name):
            continue
        if name in space.labels:  # data with channels, not a size
            continue
        old = [v.old.values.get(name) for v in views]
        new = [v.known(name) for v in views]
        if any(o is None for o in old):
            continue
        want = [np.array(o) for o in old]
        edit = targets.get((index, k))
        if edit is not None:
            want = [resized(bench, edit, o) for o in want]
        if all(n is not None and np.array_equal(n, o) for n, o in zip(new, want, strict=True)):
            continue
        if any(n is None or n.shape != o.shape for n, o in zip(new, want, strict=True)):
            raise InternalError(f"The size '{name}' of node '{node.name}' cannot be followed through the cut graph.")
        extra += _replace(bench, views, node, k, want)
    return extra


def _replace(bench: Bench, views: list[_View], node: onnx.NodeProto, k: int, want: list[Array]) -> list[onnx.NodeProto]:
    name = node.input[k]
    if np.array_equal(want[0], want[1]):
        node.input[k] = bench.tensors.constant(want[0], name)
        _announce(bench, views)
        return []
    steady = want[0] == want[1]
    new = [v.known(name) for v in views]
    if any(n is None or not np.array_equal(n[~steady], w[~steady]) for n, w in zip(new, want, strict=True)):
        return _scaled(bench, views, node, k, want)
    mask = bench.tensors.constant(steady, f"{name}_fixed")
    sizes = bench.tensors.constant(np.where(steady, want[0], 0).astype(want[0].dtype), f"{name}_sizes")
    out = bench.fresh(name)
    made = helper.make_node("Where", [mask, sizes, name], [out], out)
    node.input[k] = out
    _announce(bench, views)
    for v, w in zip(views, want, strict=True):
        v.trace.values[out] = w
        v.trace.types[out] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(w.dtype), list(w.shape))
    return [made]


def _scaled(bench: Bench, views: list[_View], node: onnx.NodeProto, k: int, want: list[Array]) -> list[onnx.NodeProto]:
    """A number of elements, of batch and channels at once: the original's times a ratio of counts.

    Raises:
        UnsupportedError: It is none, as where a number of channels is added to one of samples.
    """
    name = node.input[k]
    a, b = (v.known(name) for v in views)
    if a is None or b is None or not _proportional(want, [a, b]):
        raise UnsupportedError(
            f"Node '{node.name}' computes a size from the batch and from channels that are to go. "
            "Export the model with a fixed batch, or keep these channels with --exclude.",
            node=node.name,
            op_type=node.op_type,
        )
    out = bench.fresh(name)
    if np.issubdtype(a.dtype, np.integer):
        common = np.gcd(want[0], a)
        times = bench.tensors.constant(np.asarray(want[0] // common, a.dtype), f"{name}_times")
        over = bench.tensors.constant(np.asarray(a // common, a.dtype), f"{name}_over")
        product = bench.fresh(f"{name}_product")
        made = [
            helper.make_node("Mul", [name, times], [product], product),
            helper.make_node("Div", [product, over], [out], out),
        ]
    else:
        times = bench.tensors.constant(np.asarray(want[0] / a, a.dtype), f"{name}_times")
        made = [helper.make_node("Mul", [name, times], [out], out)]
    node.input[k] = out
    _announce(bench, views)
    for v, w in zip(views, want, strict=True):
        v.trace.values[out] = w
        v.trace.types[out] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(w.dtype), list(w.shape))
    return made


def _proportional(want: list[Array], new: list[Array]) -> bool:
    """Whether one ratio for each entry leads from `new` to `want` at both batch sizes."""
    if any((n == 0).any() for n in new):
        return False
    left, right = np.asarray(want[0], np.float64) * new[1], np.asarray(want[1], np.float64) * new[0]
    if np.issubdtype(new[0].dtype, np.integer):
        return np.array_equal(left, right)
    return np.issubdtype(new[0].dtype, np.floating) and np.allclose(left, right, rtol=1e-5, atol=0)


def _announce(bench: Bench, views: list[_View]) -> None:
    for v in views:
        v.tensors.update({t.name: t for t in bench.tensors.added})


def _check(space: ChannelSpace, bench: Bench, view: _View) -> None:
    """Every shape of the new graph is the original's with the cut axes at their new counts."""
    skip = _skipped(space, bench)
    for name in {o for n in space.model.proto.graph.node for o in n.output if o}:
        old, new = view.old.shape(name), view.trace.shape(name)
        if old is None or new is None or space.facts.constant(name) or name in skip:
            continue
        want = _cut_sizes(space, bench, name, old)
        if list(new) != want:
            raise InternalError(
                f"After the cut '{name}' would have shape {new}, its channels say {tuple(want)}. "
                "This is a bug of onnxcar: please report the model."
            )


def _skipped(space: ChannelSpace, bench: Bench) -> set[str]:
    """Values inside shuffles that became a Gather: they are swept."""
    made = {o for group in bench.nodes for n in group for o in n.output}
    used = {x for group in bench.nodes for n in group for x in n.input} | {
        o.name for o in space.model.proto.graph.output
    }
    dead = {o for o in made if o not in used}
    changed = True
    nodes = [n for group in bench.nodes for n in group]
    while changed:
        changed = False
        used = {x for n in nodes if any(o not in dead for o in n.output) for x in n.input}
        used |= {o.name for o in space.model.proto.graph.output}
        more = {o for n in nodes for o in n.output if o not in used and o not in dead}
        if more:
            dead |= more
            changed = True
    return dead
