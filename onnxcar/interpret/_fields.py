"""Receptive fields: which pixels of the input a position of a value can see, from the attributes of the graph.

Source of the recursion: Araujo, Norris and Sim 2019, Computing receptive fields of convolutional neural networks,
10.23915/distill.00021. Where paths of different strides meet, or something else than windows moves positions about, the
field is the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from onnxcar.channels import ChannelSpace
from onnxcar.facts import attribute

__all__ = ["Field", "receptive_fields"]

Pair = tuple[float, float]


@dataclass(frozen=True)
class Field:
    """Pixels that position (i, j) sees: from ``start + i * jump`` on, ``size`` of them, along both axes.

    Attributes:
        start: First pixel of position 0; negative where padding is seen.
        jump: Pixels between neighbouring positions.
        size: Pixels seen.
        axes: The axes of the value that the positions run along.
    """

    start: Pair = (0.0, 0.0)
    jump: Pair = (1.0, 1.0)
    size: Pair = (1.0, 1.0)
    axes: tuple[int, int] = (2, 3)

    def box(self, row: int, column: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right (beyond the last) of a position's field inside an image of that size."""
        ends = []
        for i, at, most in ((0, row, height), (1, column, width)):
            first = self.start[i] + at * self.jump[i]
            low = min(max(0, int(first // 1)), most - 1)
            ends.append((low, max(low + 1, min(most, round(first + self.size[i])))))
        (top, bottom), (left, right) = ends
        return top, left, bottom, right

    def moved(self, start: Pair, jump: Pair, size: Pair) -> Field:
        """The field of a window: `start`, `jump` and `size - 1` are counted in this field's positions."""
        return Field(
            (self.start[0] + start[0] * self.jump[0], self.start[1] + start[1] * self.jump[1]),
            (self.jump[0] * jump[0], self.jump[1] * jump[1]),
            (self.size[0] + (size[0] - 1) * self.jump[0], self.size[1] + (size[1] - 1) * self.jump[1]),
            self.axes,
        )


def receptive_fields(space: ChannelSpace, *, nhwc: bool = False) -> dict[str, Field | None]:
    """Field of every value that depends on the images, None = the whole image.

    Args:
        space: Structure of the model.
        nhwc: Whether images enter with their channels last.
    """
    facts, graph = space.facts, space.model.proto.graph
    found: dict[str, Field | None] = {}
    for info in graph.input:
        shape = facts.shape(info.name)
        if info.name not in facts.initializers and shape is not None:
            found[info.name] = Field(axes=(1, 2) if nhwc else (2, 3)) if len(shape) == 4 else None
    for node in graph.node:
        inputs = [name for name in node.input if name in found]
        if not inputs:
            continue
        rule = _RULES.get(node.op_type, _same)
        for name in node.output:
            if name:
                found[name] = rule(space, node, inputs, found, name)
    return found


Known = dict[str, Field | None]


def _spatial(space: ChannelSpace, name: str, field: Field | None) -> tuple[int, int] | None:
    shape = space.facts.shape(name)
    if shape is None or len(shape) != 4 or field is None:
        return None
    return shape[field.axes[0]], shape[field.axes[1]]


def _same(space: ChannelSpace, node: onnx.NodeProto, inputs: Sequence[str], known: Known, out: str) -> Field | None:
    """What keeps the positions: the union of what the inputs see, those of a single position left to themselves."""
    fields = []
    after = space.facts.shape(out)
    for name in inputs:
        field = known[name]
        before = space.facts.shape(name)
        single = before is not None and len(before) == 4 and before[2:] == (1, 1)
        if single and len(inputs) > 1 and after is not None and len(after) == 4 and after[2:] != (1, 1):
            continue  # one number for a whole channel, as of a squeeze-and-excite gate: it moves nothing
        sizes = _spatial(space, name, field)
        if field is None or sizes is None or sizes != _spatial(space, out, field):
            return None
        fields.append(field)
    return _union(fields) if fields else None


def _union(fields: Sequence[Field]) -> Field | None:
    first = fields[0]
    if any(field.jump != first.jump or field.axes != first.axes for field in fields):
        return None
    start = (min(f.start[0] for f in fields), min(f.start[1] for f in fields))
    end = (max(f.start[0] + f.size[0] for f in fields), max(f.start[1] + f.size[1] for f in fields))
    return Field(start, first.jump, (end[0] - start[0], end[1] - start[1]), first.axes)


def _window(space: ChannelSpace, node: onnx.NodeProto, inputs: Sequence[str], known: Known, out: str) -> Field | None:
    """Convolutions and pools."""
    field = known[inputs[0]]
    sizes = _spatial(space, inputs[0], field)
    parts = _kernel(space, node)
    if field is None or sizes is None or parts is None or len(inputs) > 1:
        return None
    kernel, stride, dilation = parts
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    begins = _begins(node, sizes, reach, stride)
    return field.moved((-begins[0], -begins[1]), (stride[0], stride[1]), (reach[0], reach[1]))


def _transposed(
    space: ChannelSpace, node: onnx.NodeProto, inputs: Sequence[str], known: Known, out: str
) -> Field | None:
    """Transposed convolutions: position i sees positions (i + pad - reach + 1) / stride to (i + pad) / stride."""
    field = known[inputs[0]]
    parts = _kernel(space, node)
    if field is None or parts is None or len(inputs) > 1 or _spatial(space, inputs[0], field) is None:
        return None
    kernel, stride, dilation = parts
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = attribute(node, "pads", [0, 0, 0, 0])
    start = [(pads[i] - reach[i] + 1) / stride[i] for i in (0, 1)]
    size = [1 + (reach[i] - 1) / stride[i] for i in (0, 1)]
    return field.moved((start[0], start[1]), (1 / stride[0], 1 / stride[1]), (size[0], size[1]))


def _resized(space: ChannelSpace, node: onnx.NodeProto, inputs: Sequence[str], known: Known, out: str) -> Field | None:
    """Interpolation: a position sees its neighbours in the smaller or larger grid."""
    field = known[inputs[0]]
    before, after = _spatial(space, inputs[0], field), _spatial(space, out, field)
    if field is None or before is None or after is None or 0 in after:
        return None
    ratio = (before[0] / after[0], before[1] / after[1])
    return field.moved((-0.5, -0.5), ratio, (2.0, 2.0))


def _padded(space: ChannelSpace, node: onnx.NodeProto, inputs: Sequence[str], known: Known, out: str) -> Field | None:
    """Padding shifts the positions."""
    field = known[inputs[0]]
    if field is None or _spatial(space, inputs[0], field) is None:
        return None
    given = attribute(node, "pads")
    if given is None and len(node.input) > 1:
        value = space.facts.value(node.input[1])
        given = None if value is None else value.tolist()
    if given is None or len(given) != 8:
        return None
    a, b = field.axes
    return field.moved((-given[a], -given[b]), (1.0, 1.0), (1.0, 1.0))


def _turned(space: ChannelSpace, node: onnx.NodeProto, inputs: Sequence[str], known: Known, out: str) -> Field | None:
    """Transposing moves the axes of the positions."""
    field = known[inputs[0]]
    perm = attribute(node, "perm")
    if field is None or perm is None or len(perm) != 4:
        return None
    axes = (perm.index(field.axes[0]), perm.index(field.axes[1]))
    return Field(field.start, field.jump, field.size, axes) if axes[0] < axes[1] else None


def _kernel(space: ChannelSpace, node: onnx.NodeProto) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, strides and dilations of a window over two axes."""
    kernel = attribute(node, "kernel_shape")
    if kernel is None and len(node.input) > 1:
        shape = space.facts.shape(node.input[1])
        kernel = None if shape is None else list(shape[2:])
    if kernel is None or len(kernel) != 2:
        return None
    return list(kernel), attribute(node, "strides", [1, 1]), attribute(node, "dilations", [1, 1])


def _begins(node: onnx.NodeProto, sizes: Sequence[int], reach: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Padding before the first row and column."""
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return list(attribute(node, "pads", [0, 0, 0, 0])[:2]) if auto == "NOTSET" else [0, 0]
    total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, stride, reach, strict=True)]
    return [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]


_RULES: dict[str, Callable[[ChannelSpace, onnx.NodeProto, Sequence[str], Known, str], Field | None]] = {
    "Conv": _window,
    "MaxPool": _window,
    "AveragePool": _window,
    "LpPool": _window,
    "ConvTranspose": _transposed,
    "Resize": _resized,
    "Upsample": _resized,
    "Pad": _padded,
    "Transpose": _turned,
}
