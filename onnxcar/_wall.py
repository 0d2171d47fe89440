"""The wall against damaged and hostile models: what must hold before any other code looks at a protobuf."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
from google.protobuf.message import Message
from onnx import TensorProto

from onnxcar import _tensors
from onnxcar._tensors import quoted
from onnxcar.errors import ModelError

# Weights above this many elements are declared instead of copied for the checker; integers stay, shapes are made
# of them.
_WEIGHT_ELEMENTS = 256
_SHAPE_ELEMENTS = 65536
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
# A feed of more elements than this is no image and would not fit a machine.
_MAX_INPUT_ELEMENTS = 2**31
_AGAIN = "The file is damaged: export or download it again."


def check_structure(proto: onnx.ModelProto) -> None:
    """Refuse a model that any later code could stumble over, onnx's own checker included.

    External data files are not touched.

    Cost: linear in nodes and names, no pass over weights.

    Raises:
        ModelError: With one line that says what, where, and what to do.
    """
    try:
        _check_text(proto)
        _check_versions(proto)
        for tensor in _tensors.all_tensors(proto):
            _tensors.check_tensor(tensor)
        _check_graph(proto.graph, (), "the graph")
        _check_functions(proto.functions)
    except UnicodeDecodeError as exc:
        raise ModelError(f"The model has a name that is no UTF-8 text ({exc.reason}). {_AGAIN}") from exc


def check_onnx(proto: onnx.ModelProto, *, full: bool) -> None:
    """Run onnx's own checker on a copy whose weights are declared but absent, so that size does not matter.

    Args:
        proto: The model.
        full: With strict shape inference.

    Raises:
        ModelError: The checker's reason in one line.
    """
    try:
        onnx.checker.check_model(weightless(proto), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as exc:
        raise refusal(exc, full=full) from exc


def refusal(exc: Exception, *, full: bool) -> ModelError:
    """The checker's exception as one of ours, in one line."""
    reason, _, node = " ".join(str(exc).split()).partition(" ==> Context: Bad node spec for node. ")
    shown = f"{reason} ({node})" if node else reason
    shown = _tensors.one_line(shown, 300)
    test = "strict shape inference" if full else "the ONNX checker"
    return ModelError(f"The model fails {test}: {shown.rstrip('.')}. Repair the model or export it again.")


def weightless(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large weights are graph inputs of the same shape: equal to the checker and to shape inference.

    Raises:
        ModelError: An attribute holds external data.
    """
    for tensor in _tensors.nested_tensors(proto):
        if _tensors.is_external(tensor):
            raise ModelError(
                f"Tensor {quoted(tensor.name)} inside a node has external data. Only weights of the graph itself may: "
                "load the model with onnxcar.load, or export it without external data.",
                tensor=tensor.name,
            )
    out = _tensors.copy_without_weights(proto)
    inputs = {value.name for value in out.graph.input}
    for tensor in proto.graph.initializer:
        if not _is_weight(tensor):
            out.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            out.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return out


def _is_weight(tensor: TensorProto) -> bool:
    if _tensors.is_external(tensor):
        return True
    limit = _SHAPE_ELEMENTS if tensor.data_type in _INTEGERS else _WEIGHT_ELEMENTS
    return tensor.data_type != TensorProto.STRING and _tensors.n_elements(tensor) > limit


def _check_text(message: Any) -> None:
    """Look at every text of the protobuf: proto2 does not check UTF-8 while parsing."""
    if isinstance(message, TensorProto):  # its bytes are not text, and many
        texts = [message.name, message.doc_string]
        texts += [text for entry in message.external_data for text in (entry.key, entry.value)]
        _refuse_bytes(texts)
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            _refuse_bytes([value] if isinstance(value, str | bytes) else value)
        elif field.type == field.TYPE_MESSAGE:
            for item in [value] if isinstance(value, Message) else value:
                _check_text(item)


def _refuse_bytes(texts: Iterable[str | bytes]) -> None:
    """Some protobuf backends give bytes for a text that is no UTF-8, others raise UnicodeDecodeError."""
    for text in texts:
        if isinstance(text, bytes):
            text.decode()


def _check_versions(proto: onnx.ModelProto) -> None:
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError("The model has no nodes, so there is nothing to prune. Give a complete ONNX model.")
    if proto.ir_version < 3:
        raise ModelError(f"The model has IR version {proto.ir_version}; ONNX starts at 3. {_AGAIN}")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"The model has IR version {proto.ir_version} and onnx {onnx.__version__} knows up to "
            f"{onnx.IR_VERSION}. Upgrade onnx, or export with an older IR version.",
            ir_version=proto.ir_version,
        )
    opsets = [(entry.domain or "ai.onnx", entry.version) for entry in proto.opset_import]
    twice = [domain for domain, count in Counter(domain for domain, _ in opsets).items() if count > 1]
    if twice:
        raise ModelError(f"The model imports the opset of {quoted(twice[0])} twice. Export the model again.")
    opset = dict(opsets).get("ai.onnx")
    if opset is None:
        raise ModelError("The model imports no opset of ai.onnx, so its operators mean nothing. Export it again.")
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ModelError(
            f"The model uses opset {opset} and onnx {onnx.__version__} knows 1 to {newest}. "
            "Upgrade onnx, or export with an older opset.",
            opset=opset,
        )


def _check_graph(graph: onnx.GraphProto, outer: tuple[set[str], ...], where: str) -> None:
    """Every name is made once, before it is read."""
    for value in [*graph.input, *graph.output, *graph.value_info]:
        _check_dims(value)
    inputs = [value.name for value in graph.input]
    weights = [tensor.name for tensor in graph.initializer]
    if graph.sparse_initializer:
        raise ModelError(f"Weights of {where} are stored sparse, which is not supported. Store them dense.")
    for kind, names in (("inputs", inputs), ("initializers", weights)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ModelError(f"Two {kind} of {where} are named {quoted(twice[0])}. Export the model again.")
    known = set(inputs) | set(weights)
    _check_order(graph.node, known, outer, where)
    for value in graph.output:
        if value.name not in known and not any(value.name in scope for scope in outer):
            raise ModelError(f"Output {quoted(value.name)} of {where} is made by no node. {_AGAIN}")


def _check_order(nodes: Sequence[onnx.NodeProto], known: set[str], outer: tuple[set[str], ...], where: str) -> None:
    """Walk the nodes in file order; ``known`` grows by what they make."""
    made_later: set[str] | None = None
    for index, node in enumerate(nodes):
        shown = f"Node {quoted(node.name or str(index))} ({quoted(node.op_type)})"
        for name in node.input:
            if not name or name in known or any(name in scope for scope in outer):
                continue
            if made_later is None:
                made_later = {output for later in nodes[index:] for output in later.output}
            if name in made_later:
                raise ModelError(
                    f"{shown} of {where} reads {quoted(name)} before any node makes it: the nodes form a cycle or "
                    "are out of order. Export the model again, or sort it (onnx-graphsurgeon toposort).",
                    node=node.name,
                )
            raise ModelError(f"{shown} of {where} reads {quoted(name)}, which nothing makes. {_AGAIN}", node=node.name)
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ModelError(f"{shown} of {where} holds a sparse tensor, which is not supported. Store it dense.")
            for graph in _tensors.subgraphs(attribute):
                _check_graph(graph, (*outer, known), f"a branch of {shown}")
        for name in node.output:
            if name and name in known:
                raise ModelError(
                    f"{shown} of {where} makes {quoted(name)}, which is made already. Export the model again.",
                    node=node.name,
                )
            if name:
                known.add(name)


def _check_dims(value: onnx.ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return
    dims = [d.dim_value for d in getattr(value.type, kind).shape.dim if d.HasField("dim_value")]
    if any(d < 0 for d in dims) or math.prod(max(d, 1) for d in dims) > _MAX_INPUT_ELEMENTS:
        raise ModelError(f"Value {quoted(value.name)} has impossible dims {dims[:8]}. {_AGAIN}", value=value.name)


def _check_functions(functions: Iterable[onnx.FunctionProto]) -> None:
    """Bodies in order, and none that calls itself: inlining would never end."""
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for function in functions:
        where = f"function {quoted(function.name)}"
        _check_order(function.node, set(function.input), (), where)
        calls[(function.domain, function.name)] = {(node.domain, node.op_type) for node in function.node}
    while calls:
        leaves = [key for key, called in calls.items() if not called & calls.keys()]
        if not leaves:
            name = next(iter(calls))[1]
            raise ModelError(f"Function {quoted(name)} of the model calls itself. Export the model without functions.")
        for key in leaves:
            del calls[key]
