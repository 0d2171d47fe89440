"""Physical removal: the original protobuf, patched."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper

from onnxcar.channels import ChannelSpace
from onnxcar.errors import InternalError
from onnxcar.facts import captured
from onnxcar.model import Model
from onnxcar.surgery._edits import EDITS, Bench
from onnxcar.surgery._plan import Plan, checked
from onnxcar.surgery._shapes import patch_shapes
from onnxcar.surgery._spill import Spill, spill_for
from onnxcar.surgery._tensors import Cut, Tensors, cut_of


def remove(space: ChannelSpace, plan: Plan) -> Model:
    """The network without the plan's channels: tensors sliced, counts and sizes adjusted, all else untouched.

    Names of inputs, outputs, nodes and weights that survive stay; surviving weight values stay bit for bit. Cost:
    one copy of the protobuf; tensors are read one at a time.

    Raises:
        PlanError: The plan does not fit the model or empties a value.
        UnsupportedError: A size in the graph depends on both the batch and a removed channel.
    """
    table = space.alive(checked(space, plan))
    if table.all():
        return space.model
    names = _names(space.model.proto)

    def fresh(like: str) -> str:
        name, k = f"{like}_onnxcar", 0
        while name in names:
            k += 1
            name = f"{like}_onnxcar{k}"
        names.add(name)
        return name

    nodes = [[_copied(n)] for n in space.model.proto.graph.node]
    spill = spill_for(space.model)
    tensors = Tensors(space.facts, nodes, fresh, spill)
    cuts: dict[tuple[int, int], Cut] = {}
    for site in space.sites:
        cut = cut_of(site, table)
        if cut is not None:
            held = cuts.setdefault((site.node, site.input), cut)
            if held != cut:
                raise InternalError(f"Two sites cut input {site.input} of node {site.node} differently.")
    tensors.cut(cuts)
    bench = Bench(space.facts, nodes, tensors, table, fresh)
    for edit in space.edits:
        EDITS[edit.kind](bench, edit)
    patch_shapes(space, bench)
    proto = _assemble(space, bench, spill)
    return space.model.with_proto(proto) if spill is None else spill.model(proto)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    out = onnx.NodeProto()
    out.CopyFrom(node)
    return out


def _names(proto: onnx.ModelProto) -> set[str]:
    graph = proto.graph
    names = {x for n in graph.node for x in (*n.input, *n.output)}
    names.update(t.name for t in graph.initializer)
    names.update(i.name for i in graph.input)
    for n in graph.node:
        names |= captured(n)
        for g in (a.g for a in n.attribute if a.HasField("g")):
            names.update(x for m in g.node for x in (*m.input, *m.output))
    return names


def _assemble(space: ChannelSpace, bench: Bench, spill: Spill | None) -> onnx.ModelProto:
    old = space.model.proto
    proto = onnx.ModelProto()
    for field, value in old.ListFields():
        if field.name != "graph":
            _put(proto, field.name, value)
    graph = proto.graph
    for field, value in old.graph.ListFields():
        if field.name not in ("node", "initializer", "value_info", "input"):
            _put(graph, field.name, value)
    live = _live([n for group in bench.nodes for n in group], old.graph, bench)
    graph.node.extend(live)
    used = {x for n in live for x in n.input} | {x for n in live for x in captured(n)}
    used |= {o.name for o in graph.output}
    was_used = {x for n in old.graph.node for x in n.input} | {x for n in old.graph.node for x in captured(n)}
    dropped = set()
    for t in old.graph.initializer:
        if t.name in was_used and t.name not in used:
            dropped.add(t.name)
            continue
        cut = bench.tensors.replaced.get(t.name)
        graph.initializer.add().CopyFrom(cut if cut is not None else t if spill is None else spill.put(t))
        if cut is not None:
            # its shape is still asked for; its values are in place, and this copy of them is freed
            bench.tensors.replaced[t.name] = onnx.TensorProto(name=t.name, dims=cut.dims, data_type=cut.data_type)
            del cut
    added = [t for t in bench.tensors.added if t.name in used]
    for t in added:
        graph.initializer.add().CopyFrom(t)
    _inputs(graph, old, bench, dropped, added)
    _value_info(graph, old.graph, space, bench)
    return proto


def _put(message: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if isinstance(value, str | bytes | int | float):
        setattr(message, name, value)
    elif isinstance(value, Iterable):
        getattr(message, name).extend(value)
    else:
        getattr(message, name).CopyFrom(value)


def _live(nodes: list[onnx.NodeProto], old: onnx.GraphProto, bench: Bench) -> list[onnx.NodeProto]:
    """Nodes without those that surgery left without users; what was dead before stays as it was."""
    wanted = {o.name for o in old.output}
    used_before = {x for n in old.node for x in n.input} | {x for n in old.node for x in captured(n)} | wanted
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        outs = [o for o in node.output if o]
        was_dead = not any(o in used_before for o in outs)
        if was_dead or any(o in wanted for o in outs):
            kept.append(node)
            wanted.update(node.input)
            wanted |= captured(node)
    return kept[::-1]


def _inputs(
    graph: onnx.GraphProto,
    old: onnx.ModelProto,
    bench: Bench,
    dropped: set[str],
    added: list[onnx.TensorProto],
) -> None:
    """Graph inputs; weights listed among them (IR < 4) follow their tensors."""
    weights = {t.name for t in old.graph.initializer}
    for i in old.graph.input:
        if i.name in dropped:
            continue
        info = graph.input.add()
        info.CopyFrom(i)
        if i.name in bench.tensors.replaced and i.name in weights:
            dims = bench.tensors.replaced[i.name].dims
            for d, n in zip(info.type.tensor_type.shape.dim, dims, strict=True):
                d.dim_value = n
    if old.ir_version < 4:
        for t in added:
            graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))


def _value_info(graph: onnx.GraphProto, old: onnx.GraphProto, space: ChannelSpace, bench: Bench) -> None:
    """Shapes of values: the sizes of cut axes follow, values that are gone leave."""
    there = {o for n in graph.node for o in n.output}
    cut_consts = {t.name for t in graph.initializer}
    for info in old.value_info:
        if info.name not in there or info.name in cut_consts:
            continue
        if space.facts.constant(info.name):
            continue  # a cut constant has another shape; inference finds it
        made = graph.value_info.add()
        made.CopyFrom(info)
        dims = made.type.tensor_type.shape.dim
        for labels in (space.labels.get(info.name), space.crossing.get(info.name)):
            if labels is None or bench.table[labels].all():
                continue
            for axis in range(min(labels.ndim, len(dims))):
                if labels.shape[axis] > 1:
                    dims[axis].dim_value = int(np.sum(bench.along(labels, axis)))
