"""Fill the tensors of exported graphs that were stored without values, so that the graphs can be run.

A folder of weight-less graphs holds whole architectures in a few kilobytes each: their large tensors have a type and
dims and no values. `filled` puts seeded random values in, and scales every layer so that its outputs have a standard
deviation of one: signals neither explode nor die, and a comparison of outputs says something.

    python scripts/fill_weights.py resnet50.skel.onnx resnet50.onnx
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Inputs of normalisations by position: what they multiply with, add, subtract, divide by.
NORMS = {
    "BatchNormalization": ("", "factor", "offset", "offset", "factor"),
    "InstanceNormalization": ("", "factor", "offset"),
    "GroupNormalization": ("", "factor", "offset"),
    "LayerNormalization": ("", "factor", "offset"),
    "PRelu": ("", "slope"),
}
BATCH = 2


def is_empty(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's dims ask for values and it holds none."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or not all(tensor.dims):
        return False
    held = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    return not any(len(getattr(tensor, name)) for name in held)


def tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """(name of the value, tensor) of all that a graph and its bodies store."""
    yield from ((t.name, t) for t in graph.initializer)
    for node in graph.node:
        for a in node.attribute:
            if node.op_type == "Constant" and a.name == "value":
                yield node.output[0], a.t
            if a.HasField("g"):
                yield from tensors(a.g)


def filled(model: onnx.ModelProto, feeds_of: Any, seed: int = 0) -> onnx.ModelProto:
    """`model` itself with values in every empty tensor: the same seed, the same values.

    Args:
        model: Changed in place.
        feeds_of: Called with the filled model, gives arrays for its inputs, batch included.
        seed: Of the values.
    """
    roles: dict[str, str] = {}
    for node in model.graph.node:
        for name, role in zip(node.input, NORMS.get(node.op_type, ()), strict=False):
            roles[name] = role
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _number(node, "transB")):
            roles[node.input[1]] = "matrix"
        if node.op_type == "ConvTranspose":
            roles[node.input[1]] = "transposed"
    empty = [(name, t) for name, t in tensors(model.graph) if is_empty(t)]
    for name, tensor in empty:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = _values(rng, tuple(tensor.dims), roles.get(name, ""))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        kept = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), kept))
    if empty:
        _settle(model, feeds_of(model))
    return model


def _values(rng: np.random.Generator, dims: tuple[int, ...], role: str) -> Array:
    if role == "factor":
        return rng.uniform(0.6, 1.4, dims)
    if role == "slope":
        return rng.uniform(0.05, 0.45, dims)
    if role == "offset" or len(dims) < 2:
        return rng.uniform(-0.2, 0.2, dims)
    terms = {"matrix": dims[-2], "transposed": dims[0] * int(np.prod(dims[2:]))}.get(role, int(np.prod(dims[1:])))
    return np.asarray(rng.standard_normal(dims, np.float32) * np.float32(terms**-0.5))


def _settle(model: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    """Divide weight and bias of every layer, in graph order, by the standard deviation of its outputs.

    A layer is linear in both, so its outputs are divided likewise and nothing is run twice.
    """
    held = dict(tensors(model.graph))
    values = dict(feeds)
    nodes = list(model.graph.node)
    last = {x: k for k, n in enumerate(nodes) for x in n.input} | {o.name: len(nodes) for o in model.graph.output}
    scaled: set[str] = set()
    start = 0
    for end, node in enumerate(nodes):
        mine = [x for x in node.input[1:] if x in held]
        if node.op_type not in LAYERS or not mine:
            continue
        later = {o for n in nodes[start : end + 1] for o in n.output if last.get(o, -1) > end}
        values.update(_run(model, nodes[start : end + 1], values, sorted(later | {node.output[0]})))
        start = end + 1
        values = {k: v for k, v in values.items() if last.get(k, -1) > end}
        out = values.get(node.output[0])
        deviation = 0.0 if out is None else float(out.std())
        if deviation > 0 and np.isfinite(deviation) and not scaled & set(mine):
            for name in mine:
                array = numpy_helper.to_array(held[name])
                stored = held[name].name
                held[name].CopyFrom(numpy_helper.from_array((array / deviation).astype(array.dtype), stored))
            scaled.update(mine)
            values[node.output[0]] = (out / deviation).astype(out.dtype)


def _run(model: onnx.ModelProto, nodes: list[onnx.NodeProto], values: dict[str, Array], names: list[str]) -> Any:
    made = {o for n in nodes for o in n.output}
    used = {x for n in nodes for x in n.input if x} - made
    feeds = {x: values[x] for x in sorted(used) if x in values}
    inputs = [
        helper.make_tensor_value_info(x, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for x, v in feeds.items()
    ]
    weights = [t for t in model.graph.initializer if t.name in used and t.name not in feeds]
    constants = [
        n for n in model.graph.node if n.op_type == "Constant" and n.output[0] in used and n.output[0] not in feeds
    ]
    graph = helper.make_graph(
        [*constants, *nodes], "part", inputs, [onnx.ValueInfoProto(name=n) for n in names], weights
    )
    part = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=max(4, model.ir_version))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return zip(names, session.run(names, feeds), strict=True)


def _number(node: onnx.NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import oracle

    source, target = sys.argv[1:]
    onnx.save(filled(onnx.load(source), lambda m: oracle.first_run(m, 0)[0]), target)
