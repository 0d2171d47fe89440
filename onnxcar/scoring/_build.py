"""Throw-away graphs of a site: masks as inputs, the values to cut at, rows gathered at the entry."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcar.channels import ChannelSpace, Read
from onnxcar.errors import ModelError
from onnxcar.runtime import Network, constants, uses, value_types

__all__ = [
    "CANDIDATE",
    "PREFIX",
    "batch_first",
    "cut_values",
    "expand_masks",
    "gather_rows",
    "keep_name",
    "mask_name",
    "masked",
    "outputs",
    "own_values",
    "value_kinds",
]

PREFIX = "onnxcar."
CANDIDATE = PREFIX + "candidate"


def masked(
    space: ChannelSpace,
    proto: onnx.ModelProto,
    site: Collection[int],
    removed: Collection[int],
    shared: Collection[int] = (),
) -> onnx.ModelProto:
    """A copy in which reads are multiplied by masks.

    Args:
        space: Structure of the model.
        proto: Its graph.
        site: Reads whose mask is an input, row by row.
        removed: Groups written into constants at all other reads they are read at.
        shared: Reads whose mask is an input that all rows share, so that no graph is made anew when groups leave.
    """
    if (space.facts.opset or 0) < 7:
        raise ModelError("Operator sets below 7 have no broadcasting; masks cannot be inputs.")
    alive = space.alive(removed)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    before: dict[int, list[onnx.NodeProto]] = {}
    for k, read in enumerate(space.reads):
        keep = alive[read.groups]
        given = k in site or k in shared
        if not given and keep.all():
            continue
        kind = space.facts.dtype(read.value) or onnx.TensorProto.FLOAT
        name = f"{PREFIX}masked.{k}"
        if given:
            made.graph.input.append(helper.make_tensor_value_info(mask_name(k), kind, None))
        else:
            values = keep.astype(helper.tensor_dtype_to_np_dtype(kind))
            made.graph.initializer.append(numpy_helper.from_array(values, mask_name(k)))
        node = helper.make_node("Mul", [read.value, mask_name(k)], [name], name=name)
        before.setdefault(min(i for i, _ in read.consumers), []).append(node)
        for i, j in read.consumers:
            made.graph.node[i].input[j] = name
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in made.graph.node]
    del made.graph.node[:]
    for i, node in enumerate(nodes):
        made.graph.node.extend(before.get(i, ()))
        made.graph.node.append(node)
    return made


def cut_values(space: ChannelSpace, proto: onnx.ModelProto, reads: Sequence[int]) -> list[str]:
    """Values that enter the suffix, one row for each image.

    The suffix is what lies behind the masked reads, and with it every value it needs that is no row of an image (a
    shape computed from the batch size, say): such values are computed anew from rows.
    """
    nodes = proto.graph.node
    fixed = constants(proto)
    needs = [[name for name in uses(node) if name not in fixed] for node in nodes]
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    wanted: set[int] = set()
    stack = [producer[name] for name in outputs(proto) if name in producer]
    while stack:
        i = stack.pop()
        if i not in wanted:
            wanted.add(i)
            stack.extend(producer[name] for name in needs[i] if name in producer)
    inside = {i for k in reads for i, _ in space.reads[k].consumers} & wanted
    tainted = {name for i in inside for name in nodes[i].output}
    for i in sorted(wanted):
        if i not in inside and any(name in tainted for name in needs[i]):
            inside.add(i)
            tainted.update(nodes[i].output)
    stack = sorted(inside)
    cut: dict[str, None] = {}
    while stack:
        for name in needs[stack.pop()]:
            if name in tainted:
                continue
            if name not in producer or _is_row(space, name):
                cut[name] = None
            elif producer[name] not in inside:
                inside.add(producer[name])
                tainted.update(nodes[producer[name]].output)
                stack.append(producer[name])
    order = {name: i for i, node in enumerate(nodes) for name in node.output}
    return sorted((name for name in cut if name not in tainted), key=lambda name: order.get(name, -1))


def gather_rows(proto: onnx.ModelProto, cut: Sequence[str]) -> None:
    """Each cut value becomes an input of all images, and a Gather takes the rows of a run from it."""
    graph = proto.graph
    gathers = []
    for info in graph.input:
        if info.name in cut:
            name = info.name
            info.name = f"{PREFIX}all.{name}"
            gathers.append(helper.make_node("Gather", [info.name, PREFIX + "rows"], [name], axis=0))
    graph.input.append(helper.make_tensor_value_info(PREFIX + "rows", onnx.TensorProto.INT64, None))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*gathers, *nodes])


def expand_masks(proto: onnx.ModelProto, space: ChannelSpace, reads: Collection[int]) -> None:
    """Masks are made in the graph: each row's candidate becomes an input, (k,), and so does what is kept anyway.

    ``keep.<read>`` is 0 where a channel is gone in every row; it has the shape of the read's groups.
    """
    graph = proto.graph
    nodes: list[onnx.NodeProto] = []
    for info in list(graph.input):
        k = next((k for k in reads if mask_name(k) == info.name), None)
        if k is None:
            continue
        groups = space.reads[k].groups
        at, kind = f"{PREFIX}expand.{k}.", info.type.tensor_type.elem_type
        info.name = keep_name(k)
        graph.initializer.append(numpy_helper.from_array(groups.astype(np.int64), at + "groups"))
        shape = np.asarray([-1, *(1,) * (groups.ndim - 1)], np.int64)
        graph.initializer.append(numpy_helper.from_array(shape, at + "shape"))
        nodes += [
            helper.make_node("Reshape", [CANDIDATE, at + "shape"], [at + "candidate"]),
            helper.make_node("Equal", [at + "groups", at + "candidate"], [at + "hit"]),
            helper.make_node("Not", [at + "hit"], [at + "spared"]),
            helper.make_node("Cast", [at + "spared"], [at + "factor"], to=kind),
            helper.make_node("Mul", [at + "factor", keep_name(k)], [mask_name(k)]),
        ]
    if nodes:
        graph.input.append(helper.make_tensor_value_info(CANDIDATE, onnx.TensorProto.INT64, None))
        old = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *old])


def batch_first(space: ChannelSpace, read: Read) -> bool:
    fixed = space.facts.dims_fixed(read.value)
    return read.groups.shape[0] == 1 and len(fixed) > 0 and not fixed[0]


def _is_row(space: ChannelSpace, name: str) -> bool:
    fixed = space.facts.dims_fixed(name)
    return len(fixed) > 0 and not fixed[0] and all(fixed[1:])


def mask_name(read: int) -> str:
    return f"{PREFIX}mask.{read}"


def keep_name(read: int) -> str:
    return f"{PREFIX}keep.{read}"


def outputs(proto: onnx.ModelProto) -> list[str]:
    return [proto.graph.output[0].name]


def own_values(network: Network) -> set[str]:
    """Inputs and outputs of the network, under their names in any graph of a site."""
    proto = network.proto
    own = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    return own | {f"{PREFIX}all.{name}" for name in own}


def value_kinds(space: ChannelSpace, proto: onnx.ModelProto) -> dict[str, int]:
    """Element types of all values of a masked graph."""
    found = {name: space.facts.dtype(name) for node in proto.graph.node for name in [*node.input, *node.output] if name}
    if any(not kind for name, kind in found.items() if not name.startswith(PREFIX)):
        found = value_types(proto) | {name: kind for name, kind in found.items() if kind}
    for info in proto.graph.input:
        found[info.name] = info.type.tensor_type.elem_type
    return found
