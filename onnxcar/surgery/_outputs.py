"""A classifier with some of its output rows only: the last layer shrinks, the rows that stay are the original's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcar.channels import ChannelSpace
from onnxcar.errors import InternalError, ModelError
from onnxcar.model import Model
from onnxcar.rules import analyze
from onnxcar.surgery._plan import Plan
from onnxcar.surgery._remove import remove
from onnxcar.surgery._verify import verify

NODE = "onnxcar_kept_outputs"
# What may stand between the Softmax and the output without touching a value or its place.
_BEHIND = ("Identity", "Flatten", "Squeeze")
_NORMALIZED = ("Softmax", "LogSoftmax")


def keep_outputs(model: Model, kept: Sequence[int], *, norms: str = "protect") -> Model:
    """The model with only these rows of its first output, in ascending order; what else it computes stays.

    A Gather of the rows is put behind the last layer and the channels it leaves out are removed as any others are:
    what made them goes, too, and the result is checked against the masked model. Where the network ends in a Softmax,
    that is in front of it: the rows in front are the original's, the probabilities are among the rows that are kept.

    Args:
        model: A classifier whose first output is (n, classes, ...).
        kept: Rows, each once, at least two.
        norms: As `analyze`.

    Raises:
        ModelError: A row that is not there, or rows that cannot go: another output or layer needs them.
    """
    rows = sorted(set(kept))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    value, reader = _in_front_of_softmax(graph)
    gathered = value if reader is None else f"{value}_kept"
    source = f"{value}_all" if reader is None else value
    index = numpy_helper.from_array(np.asarray(rows, np.int64), f"{NODE}_rows")
    graph.initializer.append(index)
    if proto.ir_version < 4:  # weights were listed as inputs
        graph.input.append(helper.make_tensor_value_info(index.name, onnx.TensorProto.INT64, [len(rows)]))
    at = next(i for i, node in enumerate(graph.node) if value in node.output)
    for node in graph.node:
        if source != value and value in node.output:
            node.output[list(node.output).index(value)] = source
        for i, name in enumerate(node.input):  # who else reads the rows reads all of them
            if name == value:
                node.input[i] = gathered if node is reader else source
    gather = helper.make_node("Gather", [source, index.name], [gathered], NODE, axis=1)
    graph.node.insert(at + 1, gather)
    dims = graph.output[0].type.tensor_type.shape.dim
    if len(dims) > 1:
        if dims[1].dim_value and dims[1].dim_value <= rows[-1]:
            raise ModelError(
                f"Output '{graph.output[0].name}' has {dims[1].dim_value} rows, and row {rows[-1]} was to be kept. "
                "Correct --classes."
            )
        dims[1].dim_value = len(rows)
    del graph.value_info[:]
    space = analyze(model.with_proto(proto), norms=norms)
    gone = _unread(space, source, rows)
    plan = Plan(gone)
    made = remove(space, plan)
    verify(space, plan, made)
    return made.with_proto(_without_gather(made.proto, len(rows)))


def _in_front_of_softmax(graph: onnx.GraphProto) -> tuple[str, onnx.NodeProto | None]:
    """The value whose rows are taken, and who reads them: the output, or what enters the Softmax that makes it."""
    producer = {name: node for node in graph.node for name in node.output}
    name = graph.output[0].name
    node = producer.get(name)
    while node is not None and node.op_type in _BEHIND:
        node = producer.get(node.input[0])
    if node is not None and node.op_type in _NORMALIZED:
        return str(node.input[0]), node
    return name, None


def _unread(space: ChannelSpace, source: str, rows: Sequence[int]) -> set[int]:
    """Groups of the rows that nobody reads."""
    ids = space.labels.get(source)
    if ids is None or ids.ndim < 2 or ids.size != ids.shape[1]:
        raise ModelError(
            f"The rows of '{source}' are no channels of a layer that could lose them (an unknown operator in "
            "between?). Leave --drop-outputs out: --classes alone keeps all outputs."
        )
    flat = ids.reshape(-1)
    keep = np.zeros(len(flat), bool)
    keep[list(rows)] = True
    stay = {int(i) for i in flat[keep]}
    gone = {int(i) for i in flat[~keep]}
    if gone & stay or -1 in gone:
        reasons = sorted({p.reason for p in space.protected if p.node == NODE or p.layer == space.layers[-1].node})
        why = f" ({'; '.join(reasons[:2])})" if reasons else ""
        raise ModelError(
            f"Some rows of the output cannot go, something else needs them{why}. Leave --drop-outputs out: --classes "
            "alone keeps all outputs."
        )
    return gone


def _without_gather(proto: onnx.ModelProto, n_rows: int) -> onnx.ModelProto:
    """The graph without the Gather, which by now takes every row in order."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    graph = out.graph
    found = next((node for node in graph.node if node.name == NODE), None)
    if found is None:
        return out
    index = next(t for t in graph.initializer if t.name == found.input[1])
    if not np.array_equal(numpy_helper.to_array(index).ravel(), np.arange(n_rows)):
        raise InternalError("The rows that were kept are not those that are left. Please report the model.")
    source, target = found.input[0], found.output[0]
    graph.node.remove(found)
    graph.initializer.remove(index)
    for value in list(graph.input):
        if value.name == index.name:
            graph.input.remove(value)
    is_output = any(o.name == target for o in graph.output)
    old, new = (source, target) if is_output else (target, source)
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    for value in list(graph.value_info):
        if value.name in (old, new):
            graph.value_info.remove(value)
    return out
