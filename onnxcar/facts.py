"""What is known of every value of a graph without running it: shapes, types, small values, constness.

The walk goes node by node with concrete input sizes, so that shape arithmetic (Shape, Gather, Concat, Reshape)
folds to numbers. It is made twice, with two batch sizes; what differs between the two depends on the batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxcar.model import Model

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

SMALL = 65_536  # elements: shape vectors, indices and masks are folded; weights are not
BATCHES = (2, 3)  # two sizes of the batch axis; both above 1 so that no axis broadcasts by accident
SIZES = (224, 256, 128, 64, 32, 28, 299, 512)  # tried in turn where height and width are dynamic
# defined by function bodies that onnx does not look into for shapes: first output like the first input
_LIKE_INPUT = {"GroupNormalization", "MeanVarianceNormalization", "RMSNormalization", "LpNormalization"}
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}


@dataclass
class Trace:
    """Types and known values of one walk at one batch size."""

    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def shape(self, name: str) -> Shape | None:
        """Concrete shape of a value, None where it is not known."""
        kind = self.types.get(name)
        if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
            return None
        dims = kind.tensor_type.shape.dim
        if not all(d.HasField("dim_value") for d in dims):
            return None
        return tuple(int(d.dim_value) for d in dims)


@dataclass(frozen=True, eq=False)
class Facts:
    """Shapes and small values at two batch sizes, and which values are constant.

    Attributes:
        traces: One walk for each of `BATCHES`.
        initializers: Tensors of the main graph by name.
        producers: Index of the node that makes a value.
        constants: Values that depend on weights only.
        opset: Version of the default operator set.
    """

    model: Model
    traces: tuple[Trace, Trace]
    initializers: dict[str, onnx.TensorProto]
    producers: dict[str, int]
    constants: frozenset[str]
    opset: int

    def shape(self, name: str) -> Shape | None:
        """Shape of a value at the first batch size, None where unknown."""
        return self.traces[0].shape(name)

    def dims_fixed(self, name: str) -> tuple[bool, ...]:
        """For each axis, whether its size is the same at both batch sizes."""
        a, b = self.traces[0].shape(name), self.traces[1].shape(name)
        if a is None:
            return ()
        if b is None or len(a) != len(b):
            return (False,) * len(a)
        return tuple(i == j for i, j in zip(a, b, strict=True))

    def dtype(self, name: str) -> int:
        """ONNX element type of a value, 0 where unknown."""
        kind = self.traces[0].types.get(name)
        return int(kind.tensor_type.elem_type) if kind is not None and kind.HasField("tensor_type") else 0

    def value(self, name: str) -> Array | None:
        """Small value that is known without input data, at the first batch size; else None."""
        if name in self.traces[0].values:
            return self.traces[0].values[name]
        tensor = self.initializers.get(name)
        if tensor is not None and math.prod(tensor.dims) <= SMALL:
            return self.model.array(tensor)
        return None

    def steady(self, name: str) -> Array | None:
        """`value` where it is the same at both batch sizes, else None."""
        a, b = self.value(name), self.traces[1].values.get(name)
        if name in self.traces[0].values and (b is None or not np.array_equal(self.traces[0].values[name], b)):
            return None
        return a

    def constant(self, name: str) -> bool:
        """Whether the value depends on weights only."""
        return name in self.constants

    def array(self, name: str) -> Array:
        """Values of a constant of any size, evaluated through the nodes that make it.

        Raises:
            KeyError: The value is not constant.
        """
        if name in self.initializers:
            return self.model.array(self.initializers[name])
        if name in self.traces[0].values:
            return self.traces[0].values[name]
        if name not in self.constants:
            raise KeyError(name)
        node = self.model.proto.graph.node[self.producers[name]]
        arrays = [self.array(x) if x else None for x in node.input]
        return fold(node, arrays, self.opset)[list(node.output).index(name)]


def trace(model: Model) -> Facts:
    """Shapes and small values of every value of the main graph.

    Dynamic axes get concrete sizes: the first axis of an input the batch size, a channel axis what the first
    Conv reads, others the first of `SIZES` for which the whole graph is consistent.
    """
    graph = model.proto.graph
    initializers = {t.name: t for t in graph.initializer}
    producers = {o: i for i, n in enumerate(graph.node) for o in n.output if o}
    constants = _constants(graph, initializers)
    opset = default_opset(model.proto)
    dynamic = any(
        not d.HasField("dim_value") or d.dim_value <= 0
        for i in graph.input
        if i.name not in initializers
        for d in list(i.type.tensor_type.shape.dim)[1:]
    )
    best: Trace | None = None
    size = SIZES[0]
    for s in SIZES if dynamic else SIZES[:1]:
        found = _walk(model, initializers, BATCHES[0], s, opset)
        if best is None or len(found.failed) < len(best.failed):
            best, size = found, s
        if not found.failed:
            break
    assert best is not None
    second = _walk(model, initializers, BATCHES[1], size, opset)
    return Facts(model, (best, second), initializers, producers, constants, opset)


def default_opset(proto: onnx.ModelProto) -> int:
    """Version of the default operator set that the model imports."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)


def input_types(model: Model, batch: int, size: int) -> dict[str, onnx.TypeProto]:
    """Concrete types of the graph inputs that are not weights."""
    graph = model.proto.graph
    weights = {t.name: t for t in graph.initializer}
    types = {}
    for i in graph.input:
        if i.name in weights:
            continue
        kind = onnx.TypeProto()
        kind.CopyFrom(i.type)
        if kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"):
            for axis, d in enumerate(kind.tensor_type.shape.dim):
                if d.HasField("dim_value") and d.dim_value > 0:
                    continue
                d.dim_value = batch if axis == 0 else (_channels(graph, weights, i.name) or size) if axis == 1 else size
        types[i.name] = kind
    return types


def _channels(graph: onnx.GraphProto, weights: dict[str, onnx.TensorProto], name: str) -> int | None:
    for node in graph.node:
        if node.op_type == "Conv" and node.input[0] == name and node.input[1] in weights:
            groups = attribute(node, "group", 1)
            return int(weights[node.input[1]].dims[1]) * int(groups)
    return None


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Python value of a node's attribute."""
    for a in node.attribute:
        if a.name == name:
            value = helper.get_attribute_value(a)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _constants(graph: onnx.GraphProto, initializers: dict[str, onnx.TensorProto]) -> frozenset[str]:
    names = set(initializers)
    for t in graph.sparse_initializer:
        names.add(t.values.name)
    for node in graph.node:
        if node.op_type in _RANDOM or any(a.HasField("g") or a.graphs for a in node.attribute):
            continue
        if all(not x or x in names for x in node.input):
            names.update(o for o in node.output if o)
    return frozenset(names)


def _walk(model: Model, initializers: dict[str, onnx.TensorProto], batch: int, size: int, opset: int) -> Trace:
    out = Trace(input_types(model, batch, size))
    for name, t in initializers.items():
        out.types[name] = helper.make_tensor_type_proto(t.data_type, list(t.dims))
    versions = {o.domain: o.version for o in model.proto.opset_import}
    small: dict[str, Array] = {}

    def known(name: str) -> Array | None:
        if name in out.values:
            return out.values[name]
        if name in small:
            return small[name]
        t = initializers.get(name)
        if t is not None and math.prod(t.dims) <= SMALL:
            small[name] = model.array(t)
            return small[name]
        return None

    declared = _declared(model.proto.graph, out.types)
    for node in model.proto.graph.node:
        step(node, out, known, versions, opset, model)
        for name in node.output:
            if name in declared and out.shape(name) is None:
                out.types[name] = declared[name]
    return out


def _declared(graph: onnx.GraphProto, inputs: dict[str, onnx.TypeProto]) -> dict[str, onnx.TypeProto]:
    """Types that the file itself notes, where every size is a number or a symbol of an input.

    What inference cannot do (functions, branches, other domains) is often written down by the exporter.
    """
    symbols: dict[str, int] = {}
    for i in graph.input:
        if i.name in inputs and i.type.HasField("tensor_type"):
            for old, new in zip(i.type.tensor_type.shape.dim, inputs[i.name].tensor_type.shape.dim, strict=True):
                if old.dim_param:
                    symbols.setdefault(old.dim_param, new.dim_value)
    out = {}
    for info in (*graph.value_info, *graph.output):
        kind = info.type.tensor_type
        if not info.type.HasField("tensor_type") or not kind.HasField("shape"):
            continue
        dims = [d.dim_value if d.HasField("dim_value") else symbols.get(d.dim_param, -1) for d in kind.shape.dim]
        if all(n >= 0 for n in dims):
            out[info.name] = helper.make_tensor_type_proto(kind.elem_type, dims)
    return out


def step(
    node: onnx.NodeProto,
    out: Trace,
    known: Callable[[str], Array | None],
    versions: dict[str, int],
    opset: int,
    model: Model | None = None,
) -> None:
    """Types and, where they fold, values of one node's outputs are added to `out`."""
    if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx"):
        shape = out.shape(node.input[0])
        if shape is not None:
            if node.op_type == "Size":
                result = np.asarray(math.prod(shape), np.int64)
            else:
                result = np.asarray(shape[slice(attribute(node, "start", 0), attribute(node, "end", None))], np.int64)
            _put(out, node.output[0], result)
            return
    if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
        value = _constant_node(node, model)
        if isinstance(value, onnx.TensorProto):
            out.types[node.output[0]] = helper.make_tensor_type_proto(value.data_type, list(value.dims))
        elif value is not None:
            _put(out, node.output[0], value)
        return
    # float arithmetic on small weights need not be folded, but shape arithmetic passes through float now and then
    if node.op_type not in _RANDOM and not any(a.HasField("g") or a.graphs for a in node.attribute) and node.input:
        arrays = [known(x) if x else None for x in node.input]
        if all(a is not None or not x for a, x in zip(arrays, node.input, strict=True)) and _output_small(node, arrays):
            try:
                for name, result in zip(node.output, fold(node, arrays, opset, versions), strict=False):
                    if name:
                        _put(out, name, result)
                return
            except Exception:  # an op that the reference evaluator cannot do: its type is still inferred below
                pass
    _infer(node, out, known, versions, model)


def _output_small(node: onnx.NodeProto, arrays: Sequence[Array | None]) -> bool:
    if node.op_type in ("ConstantOfShape", "Expand", "Tile"):
        shape = arrays[0] if node.op_type == "ConstantOfShape" else arrays[1]
        return shape is not None and math.prod(max(int(d), 1) for d in shape.ravel()) <= SMALL
    return True


def _put(out: Trace, name: str, value: Array) -> None:
    value = np.asarray(value)
    out.types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
    if value.size <= SMALL:
        out.values[name] = value


def _constant_node(node: onnx.NodeProto, model: Model | None) -> Array | onnx.TensorProto | None:
    for a in node.attribute:
        if a.name == "value":
            if math.prod(a.t.dims) > SMALL:
                tensor: onnx.TensorProto = a.t
                return tensor
            values: Array = model.array(a.t) if model is not None else numpy_helper.to_array(a.t)
            return values
        if a.name in ("value_float", "value_floats"):
            return np.asarray(helper.get_attribute_value(a), np.float32)
        if a.name in ("value_int", "value_ints"):
            return np.asarray(helper.get_attribute_value(a), np.int64)
    return None


def _infer(
    node: onnx.NodeProto,
    out: Trace,
    known: Callable[[str], Array | None],
    versions: dict[str, int],
    model: Model | None,
) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
        types = {x: out.types[x] for x in node.input if x and x in out.types}
        if any(x and x not in types for x in node.input):
            raise KeyError(node.op_type)
        data = {}
        for x in node.input:
            value = known(x) if x else None
            if value is not None and value.ndim <= 1 and value.size <= 1024:
                data[x] = numpy_helper.from_array(value, x)
        imports = [helper.make_opsetid(d, v) for d, v in versions.items()]
        ir = model.proto.ir_version if model is not None else 8
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports, ir_version=ir)
        out.types.update(found)
        if node.op_type in _LIKE_INPUT and node.domain in ("", "ai.onnx"):
            out.types[node.output[0]] = types[node.input[0]]
        if any(o and out.shape(o) is None for o in node.output[:1]):
            raise KeyError(node.output[0])
    except Exception:  # no schema, data-dependent, or inconsistent sizes: unknown, and the channels there are protected
        out.failed.append(node.name or node.op_type)


# --- folding -----------------------------------------------------------------------------------------------------


def _axes(node: onnx.NodeProto, arrays: Sequence[Array | None]) -> list[int]:
    if len(arrays) > 1 and arrays[1] is not None:
        return [int(x) for x in arrays[1].ravel()]
    return [int(x) for x in attribute(node, "axes", [])]


def _unsqueeze(node: onnx.NodeProto, arrays: Sequence[Array | None]) -> Array:
    x = arrays[0]
    assert x is not None
    return np.expand_dims(x, tuple(_axes(node, arrays)))


def _cast(node: onnx.NodeProto, arrays: Sequence[Array | None]) -> Array:
    x = arrays[0]
    assert x is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return x.astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to")))


def _div(node: onnx.NodeProto, arrays: Sequence[Array | None]) -> Array:
    a, b = arrays[0], arrays[1]
    assert a is not None
    assert b is not None
    if np.issubdtype(a.dtype, np.integer):
        if not np.all(b):
            raise ZeroDivisionError
        return np.asarray(np.trunc(a / b)).astype(a.dtype)  # ONNX truncates toward zero
    return np.asarray(a / b)


def _filled(node: onnx.NodeProto, arrays: Sequence[Array | None]) -> Array:
    shape = arrays[0]
    assert shape is not None
    t = attribute(node, "value")
    fill = np.zeros(1, np.float32) if t is None else numpy_helper.to_array(t)
    return np.full([int(d) for d in shape], fill.ravel()[0], fill.dtype)


# The arithmetic that exporters put around shapes; all else goes through onnx's reference evaluator (slower).
_FOLDS: dict[str, Callable[[onnx.NodeProto, Any], Array]] = {
    "Identity": lambda n, a: a[0],
    "Cast": _cast,
    "Gather": lambda n, a: np.take(a[0], a[1].astype(np.int64), axis=attribute(n, "axis", 0)),
    "Concat": lambda n, a: np.concatenate(a, axis=attribute(n, "axis", 1)),
    "Unsqueeze": _unsqueeze,
    "ConstantOfShape": _filled,
    "Transpose": lambda n, a: np.transpose(a[0], attribute(n, "perm")),
    "Add": lambda n, a: np.asarray(a[0] + a[1]),
    "Sub": lambda n, a: np.asarray(a[0] - a[1]),
    "Mul": lambda n, a: np.asarray(a[0] * a[1]),
    "Div": _div,
    "Floor": lambda n, a: np.floor(a[0]),
    "Sqrt": lambda n, a: np.sqrt(a[0]),
}


def fold(
    node: onnx.NodeProto, arrays: Sequence[Array | None], opset: int, versions: dict[str, int] | None = None
) -> list[Array]:
    """Outputs of one node on constant inputs (None = an input left out).

    Raises:
        Exception: The op has no implementation in onnx's reference evaluator, or it refuses the inputs.
    """
    if node.op_type == "Constant":
        value = _constant_node(node, None)
        assert value is not None
        return [numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value]
    quick = _FOLDS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if quick is not None and all(a is not None for a in arrays):
        return [np.asarray(quick(node, arrays))]
    from onnx.reference import ReferenceEvaluator  # slow to import, seldom needed

    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    clone = onnx.NodeProto()
    clone.CopyFrom(node)
    clone.input[:] = [f"x{i}" if a is not None else "" for i, a in enumerate(arrays)]
    clone.output[:] = [f"y{i}" if o else "" for i, o in enumerate(node.output)]
    ins = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()
    ]
    outs = [onnx.ValueInfoProto(name=o) for o in clone.output if o]
    versions = dict(versions or {"": opset})
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        versions[""] = max(versions.get("", 0), 19)  # the evaluator knows no older ones; what they mean stayed
    imports = [helper.make_opsetid(d, v) for d, v in versions.items()]
    tiny = helper.make_model(helper.make_graph([clone], "fold", ins, outs), opset_imports=imports)
    return [np.asarray(y) for y in ReferenceEvaluator(tiny).run(None, feeds)]


# --- multiply-accumulates ----------------------------------------------------------------------------------------


def uses(graph: onnx.GraphProto) -> dict[str, list[tuple[int, int]]]:
    """(node, input) pairs that use each value of the main graph; a value captured by a subgraph has input -1."""
    found: dict[str, list[tuple[int, int]]] = {}
    for i, node in enumerate(graph.node):
        for k, x in enumerate(node.input):
            if x:
                found.setdefault(x, []).append((i, k))
        for x in captured(node):
            found.setdefault(x, []).append((i, -1))
    return found


def captured(node: onnx.NodeProto) -> set[str]:
    """Names of outer values that the subgraphs of a node use."""
    names: set[str] = set()
    for graph in subgraphs(node):
        inner = {i.name for i in graph.input} | {t.name for t in graph.initializer}
        for n in graph.node:
            names.update(x for x in n.input if x and x not in inner)
            names.update(x for x in captured(n) if x not in inner)
            inner.update(n.output)
        names.update(o.name for o in graph.output if o.name not in inner)
    return names


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs in a node's attributes (If, Loop, Scan)."""
    for a in node.attribute:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs
