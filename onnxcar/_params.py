"""What counts as a parameter of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from onnxcar import _tensors

if TYPE_CHECKING:
    from onnxcar.model import Model

# Integer weights: op type -> the inputs that are weights rather than scales, zero points or data.
_QUANTIZED = {
    "DequantizeLinear": (0,),
    "QLinearConv": (3, 8),
    "QLinearMatMul": (3,),
    "ConvInteger": (1,),
    "MatMulInteger": (1,),
}
# Floating-point inputs that are settings: op type -> input indices.
_SETTINGS = {
    "DequantizeLinear": (1, 2),
    "QuantizeLinear": (1, 2),
    "DynamicQuantizeLinear": (),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "Resize": (1, 2),
    "Upsample": (1,),
}
_NOT_LEARNT = frozenset({TensorProto.BOOL, TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128})
_INTEGER_TYPES = frozenset(
    getattr(TensorProto, name)
    for name in ("INT2", "UINT2", *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (4, 8, 16, 32, 64)))
    if hasattr(TensorProto, name)
)


def parameters(model: Model) -> dict[str, int]:
    """Elements of every parameter tensor by the name of its value, in file order.

    A parameter is a constant (initializer, Constant node, or ConstantOfShape of a constant shape) that is part of
    what the network has learnt: floating-point tensors and the integer weights of quantized ops. Not counted:
    scalars, integer tensors used as shapes or indices, scales and zero points of quantization, and the sizes of
    Resize. Statistics of BatchNormalization count: they are stored. A tensor that several nodes share counts once.
    Tensors of subgraphs and functions count under their own names.
    """
    found: dict[str, int] = {}
    for scope in _scopes(model.proto):
        _count(model, scope, found)
    return found


def _scopes(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, its subgraphs, the functions."""
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while pending:
        scope = pending.pop(0)
        yield scope
        for node in scope.node:
            for attribute in node.attribute:
                pending.extend(_tensors.subgraphs(attribute))


def _count(model: Model, scope: onnx.GraphProto | onnx.FunctionProto, found: dict[str, int]) -> None:
    """Add the parameters of one graph or function body to ``found``."""
    weights: set[str] = set()
    settings: set[str] = set()
    for node in scope.node:
        for table, names in ((_QUANTIZED, weights), (_SETTINGS, settings)):
            names.update(node.input[i] for i in table.get(node.op_type, ()) if i < len(node.input))
    tensors = {t.name: t for t in scope.initializer} if isinstance(scope, onnx.GraphProto) else {}
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {n: (t.data_type, tuple(t.dims)) for n, t in tensors.items()}
    for node in scope.node:
        value = next((a for a in node.attribute if a.name.startswith("value")), None)
        if node.op_type == "Constant" and value is not None:
            if value.HasField("t"):
                tensors[node.output[0]] = value.t
                shapes[node.output[0]] = (value.t.data_type, tuple(value.t.dims))
            elif value.floats:
                shapes[node.output[0]] = (TensorProto.FLOAT, (len(value.floats),))
        elif node.op_type == "ConstantOfShape" and node.input[0] in tensors:
            dtype = TensorProto.FLOAT if value is None else value.t.data_type
            sizes = model.array(tensors[node.input[0]]).reshape(-1)
            shapes[node.output[0]] = (dtype, tuple(int(size) for size in sizes))
    for name, (dtype, dims) in shapes.items():
        integer = dtype in _INTEGER_TYPES
        if name in weights if integer else dims and name not in settings and dtype not in _NOT_LEARNT:
            found[name] = math.prod(dims)
