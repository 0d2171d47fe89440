"""Running large networks without holding their weights more than once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxcar._tensors import all_tensors, copy_without_weights, embed, is_external, n_bytes, raw_bytes, subgraphs
from onnxcar.errors import ModelError
from onnxcar.model import LAZY_BYTES, Model

_LENT_BYTES = 65536  # larger weights are lent to ONNX Runtime, not copied into the protobuf that it parses
_REFERENCE_BYTES = 2**25  # networks up to here also run in onnx's reference evaluator, which is slow


def outputs(
    structure: onnx.ModelProto, weights: Model, feeds: Mapping[str, Any], names: list[str], what: str
) -> list[npt.NDArray[Any]]:
    """Values `names` of a network on `feeds`.

    Args:
        structure: The graph; initializers it holds itself stay.
        weights: The model whose initializers complete it, and whose folder holds external data.
        feeds: Inputs.
        names: Which values, outputs or not.
        what: What to call the network in an error.

    Raises:
        ModelError: Neither ONNX Runtime nor, for a small network, onnx's reference evaluator can run it.
    """
    proto = copy_without_weights(structure)
    proto.ir_version = max(proto.ir_version, 4)
    graph = proto.graph
    graph.initializer.extend(structure.graph.initializer)
    there = {o.name for o in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in there)
    held = {t.name for t in weights.proto.graph.initializer} | {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in held]  # weights among the inputs are no inputs here
    del graph.input[:]
    graph.input.extend(inputs)
    try:
        return _in_runtime(proto, weights, feeds, names)
    except Exception as exc:
        line = str(exc).strip().splitlines()[0][:300]
        refused = "NOT_IMPLEMENTED" in line or "INVALID_GRAPH" in line
        if refused and weights.n_bytes <= LAZY_BYTES and (single := _in_single(proto, weights)) is not None:
            given = {name: _single(value) for name, value in feeds.items()}
            with contextlib.suppress(Exception):  # it was a try: the other ways, and the first reason, remain
                return _in_runtime(copy_without_weights(single), Model(single, ""), given, names)
        if "NOT_IMPLEMENTED" in line and weights.n_bytes <= _REFERENCE_BYTES:
            return _in_reference(proto, weights, feeds, names, what)
        raise ModelError(f"ONNX Runtime cannot run {what}: {line}. Check that the original runs there.") from exc


def _in_runtime(
    proto: onnx.ModelProto, weights: Model, feeds: Mapping[str, Any], names: list[str]
) -> list[npt.NDArray[Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights would be a second copy
    if weights.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.folder))
    lent: list[tuple[str, Any, npt.NDArray[Any]]] = []
    for t in weights.proto.graph.initializer:
        inside = is_external(t) and not weights.external  # of an .onnx file, at any offset: read, so that it is aligned
        if (
            (is_external(t) and not inside)
            or t.data_type == onnx.TensorProto.STRING
            or n_bytes(t) < _LENT_BYTES
            or not (inside or t.HasField("raw_data"))
        ):
            proto.graph.initializer.add().CopyFrom(t)
            continue
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(t.data_type))
        except (KeyError, TypeError):
            dtype = np.dtype(np.void)
        if dtype.kind not in "fiu" or dtype.itemsize * int(np.prod(t.dims)) != n_bytes(t):
            kept = proto.graph.initializer.add()
            kept.CopyFrom(t)
            if inside:
                embed(kept, raw_bytes(t, weights.folder))
            continue
        made = proto.graph.initializer.add(name=t.name, data_type=t.data_type, dims=t.dims)
        made.data_location = onnx.TensorProto.EXTERNAL
        made.external_data.add(key="location", value=f"lent_{len(lent)}")
        values = np.frombuffer(raw_bytes(t, weights.folder), dtype).reshape(tuple(t.dims))
        lent.append((t.name, ort.OrtValue.ortvalue_from_numpy(values), values))
    if lent:
        options.add_external_initializers([x[0] for x in lent], [x[1] for x in lent])
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, dict(feeds)))


_WIDE = (onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)


def _in_single(proto: onnx.ModelProto, weights: Model) -> onnx.ModelProto | None:
    """The network in single precision; None if nothing in it is of another.

    ONNX Runtime's CPU kernels know few operators in double precision or bfloat16. Which channels a file has does not
    depend on the precision, so that both sides of a comparison may run in another.
    """
    made = _whole(proto, weights)
    changed = [_to_single(t) for t in all_tensors(made)]
    for graph in _graphs_of(made.graph):
        changed += [_value_to_single(v) for v in (*graph.input, *graph.output)]
        del graph.value_info[:]
        for node in graph.node:
            for a in node.attribute:
                if a.name in ("to", "dtype", "output_dtype") and a.i in _WIDE:
                    a.i = onnx.TensorProto.FLOAT
                    changed.append(True)
    return made if any(changed) and not made.functions else None


def _to_single(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in _WIDE or is_external(tensor):
        return False
    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return True


def _value_to_single(value: onnx.ValueInfoProto) -> bool:
    if value.type.tensor_type.elem_type not in _WIDE:
        return False
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return True


def _single(value: Any) -> Any:
    return value.astype(np.float32) if value.dtype.name in ("float64", "float16", "bfloat16") else value


def _graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for a in node.attribute:
            for inner in subgraphs(a):
                yield from _graphs_of(inner)


def _whole(proto: onnx.ModelProto, weights: Model) -> onnx.ModelProto:
    """The structure with the model's own weights in it, what `proto` holds itself first."""
    full = onnx.ModelProto()
    full.CopyFrom(proto)
    lent = {t.name: t for t in weights.held().proto.graph.initializer}
    held = {t.name for t in full.graph.initializer}
    full.graph.initializer.extend(t for name, t in lent.items() if name not in held)
    for t in full.graph.initializer:
        if is_external(t):
            t.CopyFrom(lent[t.name])
    return full


def _in_reference(
    proto: onnx.ModelProto, weights: Model, feeds: Mapping[str, Any], names: list[str], what: str
) -> list[npt.NDArray[Any]]:
    from onnx.reference import ReferenceEvaluator

    full = _whole(proto, weights)
    try:
        return [np.asarray(x) for x in ReferenceEvaluator(full).run(names, dict(feeds))]
    except Exception as exc:
        line = (str(exc).strip() or type(exc).__name__).splitlines()[0][:300]
        raise ModelError(
            f"Neither ONNX Runtime nor onnx's reference evaluator can run {what}: {line}. Convert the model to a "
            "newer opset (onnx.version_converter), or skip the check with --no-verify."
        ) from exc
