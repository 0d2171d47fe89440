"""Running large networks without holding their weights more than once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxcar._tensors import copy_without_weights, embed, is_external, n_bytes, raw_bytes
from onnxcar.errors import ModelError
from onnxcar.model import Model

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


def _in_reference(
    proto: onnx.ModelProto, weights: Model, feeds: Mapping[str, Any], names: list[str], what: str
) -> list[npt.NDArray[Any]]:
    from onnx.reference import ReferenceEvaluator

    full = onnx.ModelProto()
    full.CopyFrom(proto)
    held = {t.name for t in full.graph.initializer}
    whole = weights.held().proto
    full.graph.initializer.extend(t for t in whole.graph.initializer if t.name not in held)
    lent = {t.name: t for t in whole.graph.initializer}
    for t in full.graph.initializer:
        if is_external(t):
            t.CopyFrom(lent[t.name])
    try:
        return [np.asarray(x) for x in ReferenceEvaluator(full).run(names, dict(feeds))]
    except Exception as exc:
        line = (str(exc).strip() or type(exc).__name__).splitlines()[0][:300]
        raise ModelError(
            f"Neither ONNX Runtime nor onnx's reference evaluator can run {what}: {line}. Convert the model to a "
            "newer opset (onnx.version_converter), or skip the check with --no-verify."
        ) from exc
