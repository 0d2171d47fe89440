"""What can be refitted in a compact model: linear layers behind removed channels, and where their biases lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxcar.channels import ChannelSpace
from onnxcar.facts import attribute, uses
from onnxcar.model import Model
from onnxcar.recovery._patches import Array, Window
from onnxcar.runtime import constants
from onnxcar.surgery import Plan

WEIGHT = 1  # input of every linear layer that holds its weights
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
_FLAT = 1e-3  # a norm's scale below this share of its largest: what lies behind says nothing of what lies before


@dataclass(frozen=True)
class Kind:
    """How an operator is linear: a window over positions or a matrix, and the input that holds its bias, if any."""

    dense: bool
    transposed: bool = False
    bias: int | None = 2


KINDS = {
    "Conv": Kind(dense=False),
    "ConvTranspose": Kind(dense=False, transposed=True),
    "Gemm": Kind(dense=True),
    "MatMul": Kind(dense=True, bias=None),
}
NORMS = {"BatchNormalization": ("scale", "bias", "mean", "variance")}
_SUMS = {"Add"}
_DEFAULT = ("", "ai.onnx")


@dataclass(frozen=True)
class Bias:
    """Where the bias of a layer lies, or will.

    Attributes:
        output: An output of the node that holds it as an input; of the layer itself where a node is to be added.
        input: Which input.
        name: The tensor, "" where there is none yet.
        sign: +1, or -1 for the mean of a norm, which is subtracted.
        factor: What the operator multiplies it by (beta of Gemm).
        shape: Of the tensor.
        values: As it is, (m,).
        dtype: Of the tensor.
        inside: Whether the layer's output holds it already.
        added: Whether it takes a node of its own.
    """

    output: str
    input: int
    name: str
    sign: float
    factor: float
    shape: tuple[int, ...]
    values: Array
    dtype: np.dtype[Any]
    inside: bool = True
    added: bool = False


@dataclass(frozen=True, eq=False)
class Linear:
    """A layer whose weights and bias can be refitted.

    Attributes:
        node: Its name.
        op_type: Its operator.
        index: Position of the node in the compact model.
        input: The value it reads.
        output: The value it writes.
        weight: Name of its weights.
        shape: Of the weights.
        dtype: Of the weights.
        blocks: `conv_groups`.
        window: Where its windows lie; None for a dense layer.
        flipped: Whether a dense layer's weights have the filters on axis 0.
        factor: What the operator multiplies the product by (alpha of Gemm).
        bias: Where its bias lies.
        direct: Whether it reads channels that are gone; else only its inputs changed.
        other: A value that its output is added to, already corrected; None if there is none.
        scale: What a norm in between multiplies the output by, (m,); 1 without one.
    """

    node: str
    op_type: str
    index: int
    input: str
    output: str
    weight: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: int
    window: Window | None
    flipped: bool
    factor: float
    bias: Bias
    direct: bool
    other: str | None = None
    scale: Array = field(default_factory=lambda: np.ones(1))

    @property
    def filters(self) -> int:
        """How many it has."""
        if self.window is None:
            return self.shape[0] if self.flipped else self.shape[1]
        return self.shape[1] * self.blocks if self.window.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        """Numbers that one output is a sum over."""
        return int(np.prod(self.shape)) // self.filters

    @property
    def axis(self) -> int:
        """Channel axis of the output: 1, or the last of a dense layer's."""
        return 1 if self.window is not None else -1

    def positions(self, shape: Sequence[int]) -> int:
        """Positions of an output of this shape in one sample."""
        return int(np.prod([n for a, n in enumerate(shape) if a not in (0, self.axis % len(shape))], dtype=np.int64))

    def matrix(self, weights: Array) -> Array:
        """Weights as (blocks, inputs, filters of a block), float64."""
        w = np.asarray(weights, np.float64)
        if self.window is None:
            return (w.T if self.flipped else w)[None] * self.factor
        if self.window.transposed:
            w = w.reshape(self.blocks, w.shape[0] // self.blocks, w.shape[1], -1)
            return w.transpose(0, 1, 3, 2).reshape(self.blocks, -1, w.shape[2])
        w = w.reshape(self.blocks, w.shape[0] // self.blocks, -1)
        return np.ascontiguousarray(w.swapaxes(1, 2))

    def tensor(self, matrix: Array) -> Array:
        """The inverse of `matrix`, in the weights' own shape and type."""
        if self.window is None:
            w = matrix[0] / self.factor
            return np.ascontiguousarray((w.T if self.flipped else w).astype(self.dtype))
        if self.window.transposed:
            taps = int(np.prod(self.shape[2:]))
            w = matrix.reshape(self.blocks, -1, taps, self.shape[1]).swapaxes(2, 3)
        else:
            w = matrix.swapaxes(1, 2)
        return np.ascontiguousarray(w.reshape(self.shape).astype(self.dtype))


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNormalization behind removed channels.

    Attributes:
        node: Its name.
        index: Position of the node in the compact model.
        input: The value it normalises.
        output: The value it writes.
        names: Tensors of mean and variance.
        scale, shift, mean, variance: As they are, (channels,).
        epsilon: Added to the variance.
        direct: Whether the layer in front of it reads channels that are gone.
    """

    node: str
    index: int
    input: str
    output: str
    names: tuple[str, str]
    scale: Array
    shift: Array
    mean: Array
    variance: Array
    epsilon: float
    direct: bool


@dataclass(frozen=True)
class Skipped:
    """A layer that keeps its weights, and why."""

    node: str
    weight: str
    reason: str


class Graph:
    """Look-ups in a compact model."""

    def __init__(self, space: ChannelSpace, plan: Plan, compact: Model) -> None:
        """Look at a compact model; with its own plan of groups that might go, at the original itself."""
        self.model = compact
        self.graph = compact.proto.graph
        self.users = uses(self.graph)
        self.outputs = {o.name for o in self.graph.output}
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in self.graph.initializer}
        self.constants = constants(compact.proto)
        self.producer = {o: i for i, n in enumerate(self.graph.node) for o in n.output if o}
        self.opset = space.facts.opset
        self.direct = _readers(space, plan)
        self.dirty = set(self.direct)
        for node in self.graph.node:
            if any(x in self.dirty for x in node.input):
                self.dirty.update(o for o in node.output if o)

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The constant tensor of that name: an initializer, or the value of a Constant node."""
        if name in self.initializers:
            return self.initializers[name]
        i = self.producer.get(name)
        if i is None:
            return None
        node = self.graph.node[i]
        held: list[onnx.TensorProto] = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
        return held[0] if held and not node.input else None

    def own(self, name: str) -> bool:
        """Whether a constant has one use only, so that it may change."""
        return len(self.users.get(name, ())) == 1 and name not in self.outputs

    def floats(self, name: str) -> Array | None:
        """A constant's values as float64, None if it is no constant tensor of floats."""
        t = self.tensor(name)
        if t is None or t.data_type not in FLOATS:
            return None
        values = self.model.array(t) if name in self.initializers else numpy_helper.to_array(t)
        return np.asarray(values, np.float64)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type of a constant."""
        t = self.tensor(name)
        return np.dtype(np.float32) if t is None else np.dtype(helper.tensor_dtype_to_np_dtype(t.data_type))

    def sole_user(self, value: str) -> tuple[int, int] | None:
        """The one (node, input) that uses a value, None if there are more, or it is an output."""
        found = self.users.get(value, [])
        return found[0] if len(found) == 1 and value not in self.outputs and found[0][1] >= 0 else None


def _readers(space: ChannelSpace, plan: Plan) -> set[str]:
    """Outputs of the nodes that read removed channels."""
    table = space.alive(plan.groups)
    out: set[str] = set()
    for read in space.reads:
        if not table[read.groups].all():
            for i, _ in read.consumers:
                out.update(o for o in space.model.proto.graph.node[i].output if o)
    return out


def linear_layers(graph: Graph) -> tuple[list[Linear], list[Skipped]]:
    """Every layer that reads something that changed, in graph order, and those that must keep their weights."""
    layers: list[Linear] = []
    skipped: list[Skipped] = []
    for i, node in enumerate(graph.graph.node):
        if node.op_type in KINDS and node.domain in _DEFAULT and node.output[0] in graph.dirty:
            made = _linear(graph, i, node)
            if isinstance(made, Linear):
                layers.append(made)
            else:
                skipped.append(Skipped(node.name or node.output[0], node.input[WEIGHT], made))
    return layers, skipped


def _linear(graph: Graph, i: int, node: onnx.NodeProto) -> Linear | str:
    kind, name = KINDS[node.op_type], node.input[WEIGHT]
    weight = graph.tensor(name)
    if weight is None:
        made = graph.producer.get(name)
        if made is None or name not in graph.constants:
            return "it multiplies two activations"
        return f"its weights come out of a {graph.graph.node[made].op_type}"
    if weight.data_type not in FLOATS:
        return f"its weights are {helper.tensor_dtype_to_string(weight.data_type)}"
    if not graph.own(name):
        return f"its weights are shared by {len(graph.users[name])} nodes"
    if attribute(node, "transA", 0):
        return "its input is transposed (transA)"
    if kind.dense and len(weight.dims) != 2:
        return f"its weights have {len(weight.dims)} axes"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    window = None
    if not kind.dense:
        window = Window.of(attributes, list(weight.dims)[2:], transposed=kind.transposed)
    shape = tuple(weight.dims)
    blocks, flipped = int(attribute(node, "group", 1)), bool(attribute(node, "transB", 0))
    if not kind.dense:
        filters = shape[1] * blocks if kind.transposed else shape[0]
    else:
        filters = shape[0] if flipped else shape[1]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(weight.data_type))
    bias = _bias(graph, node, kind, filters, dtype)
    if isinstance(bias, str):
        return bias
    other, scale = _added_to(graph, i, node.output[0], filters, channels_first=not kind.dense)
    return Linear(
        node=node.name or node.output[0],
        op_type=node.op_type,
        index=i,
        input=node.input[0],
        output=node.output[0],
        weight=name,
        shape=shape,
        dtype=dtype,
        blocks=blocks,
        window=window,
        flipped=flipped,
        factor=float(attribute(node, "alpha", 1.0)) if kind.dense else 1.0,
        bias=bias,
        direct=node.output[0] in graph.direct,
        other=other,
        scale=scale,
    )


def _bias(graph: Graph, node: onnx.NodeProto, kind: Kind, filters: int, dtype: np.dtype[Any]) -> Bias | str:
    """Where the bias lies: an input of the node, a constant added behind it, the mean of a norm behind it, or new."""
    output, none = node.output[0], np.zeros(filters)
    if kind.bias is not None and len(node.input) > kind.bias and node.input[kind.bias]:
        held = graph.floats(node.input[kind.bias])
        if held is None:
            return "its bias is computed"
        factor = float(attribute(node, "beta", 1.0))
        if factor == 0 or held.size not in (1, filters) or (held.ndim > 1 and held.shape[-1] != held.size):
            return "its bias is no bias per filter"
        values = np.broadcast_to(held.ravel() * factor, (filters,)).copy()
        shape = held.shape if held.size == filters else (filters,)
        return Bias(output, kind.bias, node.input[kind.bias], 1.0, factor, shape, values, dtype)
    user = graph.sole_user(output)
    if user is not None:
        behind = graph.graph.node[user[0]]
        if behind.op_type in NORMS and behind.domain in _DEFAULT and not attribute(behind, "training_mode", 0):
            mean = graph.floats(behind.input[3])
            if mean is not None and user[1] == 0:
                own = graph.dtype(behind.input[3])
                return Bias(
                    behind.output[0], 3, behind.input[3], -1.0, 1.0, mean.shape, -mean.ravel(), own, inside=False
                )
        if behind.op_type in _SUMS and behind.domain in _DEFAULT and graph.opset >= 7:
            constant = behind.input[1 - user[1]]
            held = graph.floats(constant)
            if held is not None and _per_channel(held.shape, filters, last=kind.dense):
                k, own = 1 - user[1], graph.dtype(constant)
                return Bias(behind.output[0], k, constant, 1.0, 1.0, held.shape, held.ravel(), own, inside=False)
    if kind.bias is None:
        return Bias(output, 1, "", 1.0, 1.0, (filters,), none, dtype, inside=False, added=True)
    factor = float(attribute(node, "beta", 1.0))
    if factor == 0:
        return "its bias is switched off (beta 0)"
    return Bias(output, kind.bias, "", 1.0, factor, (filters,), none, dtype)


def _per_channel(shape: tuple[int, ...], filters: int, *, last: bool) -> bool:
    """Whether a constant of this shape adds one number per channel: on the last axis, or one before the positions."""
    if int(np.prod(shape)) != filters:
        return False
    if last:
        return bool(shape) and shape[-1] == filters
    at = [a for a, n in enumerate(shape) if n == filters]
    return len(shape) >= 3 and bool(at) and at[0] <= 1 and filters > 1


def _added_to(graph: Graph, i: int, output: str, filters: int, *, channels_first: bool) -> tuple[str | None, Array]:
    """The value that a layer's output is summed with, if that is computed before, and the scale in between."""
    scale: Array = np.ones(1)
    value = output
    for _ in range(3):
        user = graph.sole_user(value)
        if user is None:
            return None, scale
        node = graph.graph.node[user[0]]
        if node.domain not in _DEFAULT:
            return None, scale
        if node.op_type in NORMS and user[1] == 0:
            terms = [graph.floats(x) for x in list(node.input)[1:5]]
            if any(t is None or t.size != filters for t in terms):
                return None, scale
            gain, _, _, variance = (np.asarray(t).ravel() for t in terms)
            scale = scale * gain / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
            value = node.output[0]
            continue
        if node.op_type not in _SUMS or len(node.input) != 2:
            return None, scale
        other = node.input[1 - user[1]]
        held = graph.floats(other)
        if held is not None:
            if not _per_channel(held.shape, filters, last=not channels_first):
                return None, scale
            value = node.output[0]
            continue
        if other == value or other not in graph.dirty or graph.producer.get(other, i) >= i:
            return None, scale
        return other, scale
    return None, scale


def inverse(scale: Array) -> npt.NDArray[np.float64]:
    """1 / scale, 0 where the scale is next to nothing."""
    flat = np.abs(scale) <= _FLAT * np.abs(scale).max(initial=0.0)
    return np.asarray(np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, scale)), np.float64)


def norms(graph: Graph) -> list[Norm]:
    """Every BatchNormalization that reads something that changed and holds its statistics itself, in graph order."""
    out = []
    for i, node in enumerate(graph.graph.node):
        if node.op_type not in NORMS or node.domain not in _DEFAULT or node.output[0] not in graph.dirty:
            continue
        terms = [graph.floats(x) for x in list(node.input)[1:5]]
        if any(t is None for t in terms) or not all(graph.own(x) for x in list(node.input)[3:5]):
            continue
        scale, shift, mean, variance = (np.asarray(t).ravel() for t in terms)
        made = graph.producer.get(node.input[0])
        out.append(
            Norm(
                node=node.name or node.output[0],
                index=i,
                input=node.input[0],
                output=node.output[0],
                names=(node.input[3], node.input[4]),
                scale=scale,
                shift=shift,
                mean=mean,
                variance=variance,
                epsilon=float(attribute(node, "epsilon", 1e-5)),
                direct=made is not None and node.input[0] in graph.direct,
            )
        )
    return out
