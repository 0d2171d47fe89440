"""Throw-away graphs: what a node uses, cutting between values, freeing a batch size. Never what is shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcar.errors import ModelError
from onnxcar.model import Model

__all__ = ["constants", "cut", "extract", "free_batch", "graph_inputs", "plain", "uses", "value_types"]

Array = npt.NDArray[Any]


def plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its weights no longer listed among the inputs; itself if none are.

    ONNX Runtime folds and packs only weights that cannot be overridden.
    """
    weights = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}
    if not any(i.name in weights for i in proto.graph.input):
        return proto
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made.ir_version = max(made.ir_version, 4)
    kept = [i for i in made.graph.input if i.name not in weights]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    return made


def uses(node: onnx.NodeProto) -> list[str]:
    """Names a node needs: its inputs, and what its subgraphs take from outside."""
    out = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs):
            out.extend(_captured(graph))
    return out


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    local = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        yield from (name for name in uses(node) if name not in local)
        local.update(node.output)
    yield from (o.name for o in graph.output if o.name not in local)


def constants(proto: onnx.ModelProto) -> set[str]:
    """Names of values that depend on weights only."""
    known = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}
    for node in proto.graph.node:
        if all(name in known for name in uses(node)) and not node.op_type.startswith("Random"):
            known.update(node.output)
    return known


def graph_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that must be fed: those that are no weights."""
    weights = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}
    return [i for i in proto.graph.input if i.name not in weights]


def cut(model: Model | onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part of a network between two sets of values, graph order kept, as a model whose batch is free.

    Raises:
        ModelError: An output does not follow from the inputs and constants alone, or a type is not known.
    """
    proto = plain(model.proto if isinstance(model, Model) else model)
    return extract(proto, inputs, outputs, value_types(proto))


def value_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that inference finds, by name."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # a model that inference cannot follow still has what it declares
        inferred = proto.graph
    found = {t.name: t.data_type for t in proto.graph.initializer}
    for info in [*inferred.value_info, *inferred.output, *inferred.input]:
        if info.type.HasField("tensor_type"):
            found[info.name] = info.type.tensor_type.elem_type
    return found


def extract(
    proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, int]
) -> onnx.ModelProto:
    """As `cut`, with the element types of the values given; inputs and outputs have no declared shape.

    Raises:
        ModelError: As `cut`.
    """
    given = set(inputs)
    declared = {i.name: i for i in graph_inputs(proto)}
    needed = [name for name in outputs if name not in given]
    keep: set[str] = set()
    producer = {name: node for node in proto.graph.node for name in node.output if name}
    chosen: set[int] = set()
    weights = {t.name: t for t in proto.graph.initializer}
    sparse = {t.values.name: t for t in proto.graph.sparse_initializer}
    while needed:
        name = needed.pop()
        if name in keep or name in given:
            continue
        keep.add(name)
        if name in producer:
            chosen.add(id(producer[name]))
            needed.extend(uses(producer[name]))
        elif name in declared:
            raise ModelError(f"Cutting at {sorted(given)} leaves input {name!r} on the way to {list(outputs)}.")
        elif name not in weights and name not in sparse:
            raise ModelError(f"Value {name!r} has no producer in the graph. Check the model with onnx.checker.")
    made = onnx.ModelProto()
    made.ir_version = max(proto.ir_version, 4)
    made.opset_import.extend(proto.opset_import)
    made.functions.extend(proto.functions)
    graph = made.graph
    graph.name = "cut"
    graph.node.extend(node for node in proto.graph.node if id(node) in chosen)
    graph.initializer.extend(t for name, t in weights.items() if name in keep)
    graph.sparse_initializer.extend(t for name, t in sparse.items() if name in keep)
    graph.input.extend(_info(name, types, declared) for name in dict.fromkeys(inputs))
    graph.output.extend(_info(name, types, {}) for name in dict.fromkeys(outputs))
    return made


def _info(name: str, types: Mapping[str, int], declared: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    kind = types.get(name) or (declared[name].type.tensor_type.elem_type if name in declared else 0)
    if not kind:
        raise ModelError(f"The type of value {name!r} is not known, so the graph cannot be cut there.")
    return helper.make_tensor_value_info(name, kind, None)


def free_batch(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A throw-away copy whose inputs and outputs have a dynamic first axis.

    Reshapes of activations to a constant shape that starts with the old batch size take theirs from the input. Only
    a run tells whether the copy is right: `open_network` does that.
    """
    made = onnx.ModelProto()
    made.CopyFrom(plain(proto))
    sizes = {i.type.tensor_type.shape.dim[0].dim_value for i in made.graph.input if i.type.tensor_type.shape.dim}
    del made.graph.value_info[:]
    for info in [*made.graph.input, *made.graph.output]:
        if info.type.tensor_type.shape.dim:
            info.type.tensor_type.shape.dim[0].Clear()
            info.type.tensor_type.shape.dim[0].dim_param = "batch"
    known = constants(made)
    values: dict[str, tuple[TensorProto, Array]] = {}
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) == 1 and tensor.dims[0] <= 16:
            values[tensor.name] = (tensor, numpy_helper.to_array(tensor))
    fresh = {}
    for node in made.graph.node:
        if node.op_type == "Reshape" and node.input[0] not in known and node.input[1] in values:
            shape = values[node.input[1]][1]
            if shape.size > 1 and int(shape[0]) in sizes:
                name = f"{node.input[1]}.free"
                fresh[name] = numpy_helper.from_array(np.concatenate([[0], shape[1:]]).astype(np.int64), name)
                node.input[1] = name
    made.graph.initializer.extend(fresh.values())
    return made
