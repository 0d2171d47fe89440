"""The reference that pruning is held against: the original with zeros where readers read removed channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcar._tensors import copy_without_weights
from onnxcar.channels import ChannelSpace
from onnxcar.model import Model
from onnxcar.surgery._plan import Plan, checked


def mask(space: ChannelSpace, plan: Plan) -> Model:
    """The original network with the plan's channels multiplied by zero in front of every node that reads them.

    Not at the filters that make them: behind a BatchNormalization a zeroed filter still gives a constant. All
    shapes stay. The result is for running, not for shipping.

    Raises:
        PlanError: The plan does not fit the model or empties a value.
    """
    proto = masked_structure(space, plan)
    proto.graph.initializer.extend(space.model.proto.graph.initializer)
    return space.model.with_proto(proto)


def masked_structure(space: ChannelSpace, plan: Plan) -> onnx.ModelProto:
    """`mask` without the original's initializers, which are not touched: what it adds is little."""
    table = space.alive(checked(space, plan))
    proto = copy_without_weights(space.model.proto)
    graph = proto.graph
    proto.ir_version = max(proto.ir_version, 4)  # masks are initializers that are no inputs
    before: dict[int, list[onnx.NodeProto]] = {}
    for k, read in enumerate(space.reads):
        alive = table[read.groups]
        if alive.all():
            continue
        name = f"onnxcar_masked_{k}"
        dtype = helper.tensor_dtype_to_np_dtype(space.facts.dtype(read.value) or onnx.TensorProto.FLOAT)
        values = alive.astype(np.float32).astype(dtype)
        extra: dict[str, Any] = {}
        if space.facts.opset < 7:  # before, a second operand is placed by `axis`
            extra = {"broadcast": 1, "axis": int(np.argmax(values.shape))}
            values = values.reshape(-1)
        graph.initializer.append(numpy_helper.from_array(values, f"onnxcar_mask_{k}"))
        node = helper.make_node("Mul", [read.value, f"onnxcar_mask_{k}"], [name], name=name, **extra)
        before.setdefault(min(i for i, _ in read.consumers), []).append(node)
        for i, j in read.consumers:
            graph.node[i].input[j] = name
    nodes = []
    for i, node in enumerate(graph.node):
        nodes += before.get(i, [])
        nodes.append(node)
    copied = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copied)
    return proto
