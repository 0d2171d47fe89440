"""Ops that treat every channel alike: labels pass, or tie position by position."""

from __future__ import annotations

import numpy as np

from onnxcar.channels import Labels
from onnxcar.rules._walk import Refused, Walk, aligned, axes_of


def same(w: Walk) -> None:
    """One value in, the same positions out; further outputs of the same shape too (Dropout's mask)."""
    w.emit(w.lab(0))
    for k in range(1, len(w.node.output)):
        if w.node.output[k] and w.facts.shape(w.node.output[k]) == w.out_shape():
            w.emit(w.lab(0), k)


def tie(w: Walk) -> None:
    """Broadcast arithmetic of any number of values: positions tie; constants along a labelled axis are cut."""
    out_shape = w.out_shape()
    rank = len(out_shape)
    live = [k for k in range(len(w.node.input)) if w.has(k) and not w.constant(k)]
    shapes = {k: (1,) * (rank - len(w.shape(k))) + w.shape(k) for k in range(len(w.node.input)) if w.has(k)}
    op = w.node.op_type
    total: Labels = np.zeros((1,) * rank, np.int64)
    carried: tuple[int, ...] = (1,) * rank  # sizes of what `total` was made from
    fills = [k for k in live if shapes[k] == out_shape and w.filled(k)]
    live = [k for k in live if k not in fills] or live[:1]
    for k in live:
        labels, shape = aligned(w.lab(k), rank), shapes[k]
        total, labels = _meet(w, total, carried, labels, shape, op)
        if axes_of(labels):
            if not axes_of(total):
                total = labels
            elif axes_of(labels) == axes_of(total):
                w.tie(total, labels, f"{op} ties it to another branch")
            else:
                w.tie(total, labels, f"{op} ties channels of different axes")
                total = np.ascontiguousarray(np.broadcast_arrays(total, labels)[0])
        carried = tuple(max(a, b) for a, b in zip(carried, shape, strict=True))
    for k in fills:
        if k not in live and axes_of(total):
            w.fill(k, total)
    for k, shape in shapes.items():
        if w.constant(k):
            pad = rank - len(w.shape(k))
            w.site(k, {a - pad: (total, a) for a in axes_of(total) if shape[a] > 1})
    w.emit(total)


def _meet(
    w: Walk, a: Labels, a_shape: tuple[int, ...], b: Labels, b_shape: tuple[int, ...], op: str
) -> tuple[Labels, Labels]:
    """Decide each axis: an operand of size 1 there ties nothing; one of full size without labels fixes it."""
    text = f"{op} joins it with a value whose channels are fixed"
    for axis in range(a.ndim):
        if a.shape[axis] > 1 and b.shape[axis] == 1 and b_shape[axis] > 1:
            a = w.same_along(a, axis, text)
        elif b.shape[axis] > 1 and a.shape[axis] == 1 and a_shape[axis] > 1:
            b = w.same_along(b, axis, text)
    return a, b


def prelu(w: Walk) -> None:
    """PRelu: the slope broadcasts onto x; before opset 7 a slope (C,) lies along axis 1."""
    rank, slope = len(w.shape(0)), w.shape(1)
    if not w.constant(1):
        tie(w)
        return
    labels = w.lab(0)
    if w.opset < 7 and len(slope) == 1 and rank > 1:
        if slope[0] > 1:
            w.site(1, {0: (labels, 1)})
    else:
        pad = rank - len(slope)
        w.site(1, {a - pad: (labels, a) for a in axes_of(labels) if a >= pad and slope[a - pad] > 1})
    w.emit(labels)


def legacy_broadcast(w: Walk) -> None:
    """Add, Sub, Mul, Div, Pow before opset 7: `broadcast` and `axis` attributes place the second operand."""
    if w.opset >= 7 or not w.attr("broadcast", 0) or w.attr("axis", None) is None:
        tie(w)
        return
    axis, labels, shape = int(w.attr("axis")), w.lab(0), w.shape(1)
    axis += len(w.shape(0)) if axis < 0 else 0
    if w.constant(1):
        w.site(
            1, {a - axis: (labels, a) for a in axes_of(labels) if axis <= a < axis + len(shape) and shape[a - axis] > 1}
        )
    else:
        other = w.lab(1).reshape((1,) * axis + w.lab(1).shape + (1,) * (len(w.shape(0)) - axis - len(shape)))
        full = (1,) * axis + shape + (1,) * (len(w.shape(0)) - axis - len(shape))
        labels, other = _meet(w, labels, w.shape(0), other, full, w.node.op_type)
        if axes_of(labels) and axes_of(other):
            w.tie(labels, other, f"{w.node.op_type} ties it to another branch")
        elif axes_of(other):
            labels = other
    w.emit(labels)


def batch_norm(w: Walk) -> None:
    """BatchNormalization: per channel on axis 1, four parameters (C,)."""
    labels = w.lab(0)
    if any(len(w.shape(k)) != 1 for k in range(1, 5)):
        raise Refused("its parameters are not one number per channel")
    if any(not w.constant(k) for k in range(1, 5)):
        raise Refused("its parameters are computed from the input")
    others = [a for a in axes_of(labels) if a > 1]
    labels = w.protect_axis(labels, others, "BatchNormalization has one parameter for all positions")
    for k in range(1, 5):
        w.site(k, {0: (labels, 1)} if labels.shape[1] > 1 else {})
    for k in range(len(w.node.output)):
        if k == 0:
            w.emit(labels)
        elif w.node.output[k] and w.facts.shape(w.node.output[k]) is not None:
            w.emit(labels.reshape(-1) if labels.shape[1] > 1 else np.zeros(1, np.int64), k)


def quantize(w: Walk) -> None:
    """QuantizeLinear, DequantizeLinear: scale and zero point are one number, or one per channel along `axis`."""
    labels = w.lab(0)
    scale = w.shape(1)
    if int(w.attr("block_size", 0)):
        raise Refused("it quantizes in blocks")
    if len(scale) == 1 and scale[0] > 1:
        axis = int(w.attr("axis", 1))
        axis += labels.ndim if axis < 0 else 0
        if labels.shape[axis] > 1:
            for k in (1, 2):
                if w.has(k):
                    if not w.constant(k):
                        raise Refused("its scale is computed from the input")
                    w.site(k, {0: (labels, axis)})
    elif len(scale) > 1:
        raise Refused("its scale is a tensor")
    w.emit(labels)


def pool(w: Walk) -> None:
    """Pooling, GridSample, RoiAlign and the like: channels on axis 1 pass, labels of positions do not."""
    labels = w.lab(0)
    labels = w.protect_axis(labels, [a for a in axes_of(labels) if a > 1], f"{w.node.op_type} mixes positions")
    for k in range(1, len(w.node.input)):
        if w.has(k) and w.node.input[k] in w.labels:
            w.protect(w.lab(k), f"they steer {w.node.op_type}")
    for k in range(1, len(w.node.output)):
        if w.node.output[k]:
            raise Refused("its index output counts channels")
    w.emit(labels)


def resize(w: Walk) -> None:
    """Resize, Upsample: labels pass along axes whose size stays; constant sizes follow the channels."""
    labels, before, after = w.lab(0), w.shape(0), w.out_shape()
    changed = [a for a in axes_of(labels) if before[a] != after[a]]
    labels = w.protect_axis(labels, changed, f"{w.node.op_type} changes the size of this axis")
    sizes = 3 if w.opset >= 11 else -1
    if sizes > 0 and w.has(sizes) and axes_of(labels) and w.shape(sizes)[0]:
        w.edit("target", input=sizes, labels=labels, axes=w.attr("axes", None))
    w.emit(labels)
