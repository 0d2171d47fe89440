"""Ops that move positions: the op is applied to the labels themselves."""

from __future__ import annotations

import numpy as np

from onnxcar.channels import Labels
from onnxcar.rules._walk import Refused, Walk, axes_of, reshaped


def _axis(w: Walk, default: int = 0, rank: int | None = None) -> int:
    axis, n = int(w.attr("axis", default)), len(w.shape(0)) if rank is None else rank
    return axis + n if axis < 0 else axis


def concat(w: Walk) -> None:
    """Concat: label arrays concatenate along its axis; along other labelled axes the parts tie."""
    axis = _axis(w, 1, len(w.out_shape()))
    arrays = [w.lab(k) for k in range(len(w.node.input))]
    shapes = [w.shape(k) for k in range(len(w.node.input))]
    carries = any(x.shape[axis] > 1 for x in arrays)
    others = sorted({a for x in arrays for a in axes_of(x)} - {axis})
    donor = next((x for x in arrays if axes_of(x)), None)
    if donor is None:
        return
    parts: list[Labels] = []
    for k, x in enumerate(arrays):
        want = [n if a in others or (a == axis and carries) else 1 for a, n in enumerate(shapes[k])]
        if w.constant(k):
            x = _constant_part(w, k, axis, donor, carries=carries, others=others)
        elif not others and w.filled(k):
            # one number everywhere, as long as a computed shape says: that entry of the shape follows
            x = w.fresh(shapes[k][axis]).reshape([n if a == axis else 1 for a, n in enumerate(shapes[k])])
            w.fill(k, x)
        elif any(x.shape[a] == 1 for a in others):
            x = np.zeros_like(x)  # no labels along an axis where the other parts have some: fixed there
        parts.append(np.broadcast_to(x, want))
    if not carries:
        for p in parts[1:]:
            w.tie(parts[0], p, "Concat joins them along another axis")
        w.emit(np.ascontiguousarray(parts[0]))
        return
    w.emit(np.concatenate(parts, axis=axis))


def _constant_part(w: Walk, k: int, axis: int, donor: Labels, *, carries: bool, others: list[int]) -> Labels:
    """A constant in a Concat has labels of its own along the joined axis, or is cut along the others."""
    shape = w.shape(k)
    if not others:
        own = w.fresh(shape[axis]).reshape([n if a == axis else 1 for a, n in enumerate(shape)])
        w.site(k, {axis: (own, axis)})
        return own
    if carries or axes_of(donor) != others:
        raise Refused("it joins a constant to joint channels")
    w.site(k, {a: (donor, a) for a in others})
    return donor


def split(w: Walk) -> None:
    """Split: each output takes its part; sizes follow what is left."""
    axis, labels = _axis(w), w.lab(0)
    start, parts = 0, []
    for k, name in enumerate(w.node.output):
        n = w.out_shape(k)[axis] if name else 0
        part = labels if labels.shape[axis] == 1 else np.take(labels, range(start, start + n), axis=axis)
        parts.append(part)
        start += n
        w.emit(part, k)
    if labels.shape[axis] > 1:
        w.edit("split", axis=axis, parts=parts)


def slice_(w: Walk) -> None:
    """Slice with known bounds: an index along each labelled axis."""
    labels, shape = w.lab(0), w.shape(0)
    rank = len(shape)
    if w.opset < 10:
        starts, ends = list(w.attr("starts")), list(w.attr("ends"))
        axes, steps = list(w.attr("axes", None) or range(len(starts))), [1] * len(starts)
    else:
        raw = [w.value(k) for k in (1, 2, 3, 4)]
        known_axes = raw[2] if raw[2] is not None else None
        if w.has(3) and raw[2] is None:
            raise Refused("its axes are computed")
        n = w.shape(1)[0]
        axes = [int(a) for a in known_axes] if known_axes is not None else list(range(n))
        touched = [a + rank if a < 0 else a for a in axes]
        if raw[0] is None or raw[1] is None or (w.has(4) and raw[3] is None):
            hit = [a for a in touched if labels.shape[a] > 1]
            if hit:
                raise Refused("its bounds are computed from the input")
            w.emit(labels)
            return
        starts, ends = [int(x) for x in raw[0]], [int(x) for x in raw[1]]
        steps = [int(x) for x in raw[3]] if raw[3] is not None else [1] * n
    out, index = labels, {}
    for s, e, a, t in zip(starts, ends, axes, steps, strict=True):
        a = a + rank if a < 0 else a
        if labels.shape[a] == 1:
            continue
        taken = np.arange(shape[a])[slice(*_bounds(s, e, t, shape[a]))]
        index[a] = taken
        out = np.take(out, taken, axis=a)
    if index:
        w.edit("slice", labels=labels, index=index)
    w.emit(out)


def _bounds(start: int, end: int, step: int, n: int) -> tuple[int, int | None, int]:
    """ONNX's clamping: with a negative step an end below -n means "through the first element"."""
    start = max(start + n, 0) if start < 0 else min(start, n if step > 0 else n - 1)
    if end < 0:
        end += n
    if step < 0 and end < 0:
        return start, None, step
    return start, min(max(end, 0), n), step


def gather(w: Walk) -> None:
    """Gather with known indices along a labelled axis; along another axis labels pass."""
    axis, labels, shape = _axis(w), w.lab(0), w.shape(0)
    if w.node.input[1] in w.labels:
        w.protect(w.lab(1), "they are indices of Gather")
    rank_i = len(w.shape(1))
    if labels.shape[axis] == 1:
        taken = (1,) * rank_i
        w.emit(labels.reshape(labels.shape[:axis] + taken + labels.shape[axis + 1 :]))
        return
    index = w.value(1)
    if index is None:
        raise Refused("its indices are computed from the input")
    index = np.where(index < 0, index + shape[axis], index).astype(np.int64)
    out = np.take(labels, index, axis=axis)
    w.edit("gather", input=1, axis=axis, labels=labels, index=index)
    w.emit(out)


def gather_nd(w: Walk) -> None:
    """GatherND with an index (n, 1): what torch's dynamo exporter makes of `x[idx]`, a Gather along axis 0."""
    labels, index = w.lab(0), w.value(1)
    if int(w.attr("batch_dims", 0)) or index is None or index.ndim != 2 or index.shape[1] != 1:
        raise Refused("it gathers single elements")
    if labels.shape[0] == 1:
        w.emit(labels)
        return
    flat = np.where(index[:, 0] < 0, index[:, 0] + w.shape(0)[0], index[:, 0]).astype(np.int64)
    w.edit("gather", input=1, axis=0, labels=labels, index=flat.reshape(-1, 1))
    w.emit(np.take(labels, flat, axis=0))


def reshape(w: Walk) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: by runs of axes; a run that mixes channels with the batch ties over it."""
    a, b = w.shape(0), w.out_shape()
    labels = w.lab(0)
    fixed = w.facts.dims_fixed(w.node.output[0])
    out = reshaped(labels, a, b)
    for axis in axes_of(out):
        if not fixed[axis]:
            out = w.same_along(out, axis, "it is merged with the batch axis")
    if w.node.op_type == "Reshape":
        w.edit("target", input=1, labels=out, axes=None)
    w.emit(out)


def transpose(w: Walk) -> None:
    """Transpose: the axes of the labels move."""
    labels = w.lab(0)
    w.emit(labels.transpose(w.attr("perm", None) or range(labels.ndim)[::-1]))


def expand(w: Walk) -> None:
    """Expand: labelled axes keep their size; a constant that is repeated over the batch has labels of its own."""
    before, after = w.shape(0), w.out_shape()
    labels = w.lab(0)
    if w.constant(0):
        axis = max((a for a, n in enumerate(before) if n > 1), default=None)
        if axis is None:
            return
        labels = w.fresh(before[axis]).reshape([-1 if a == axis else 1 for a in range(len(before))])
        w.site(0, {axis: (labels, axis)})
    labels = labels.reshape((1,) * (len(after) - labels.ndim) + labels.shape)
    if axes_of(labels):
        w.edit("target", input=1, labels=labels, axes=None)
    w.emit(labels)


def tile(w: Walk) -> None:
    """Tile: labels repeat with the positions."""
    labels, before, after = w.lab(0), w.shape(0), w.out_shape()
    repeats = [n // m if labels.shape[a] > 1 else 1 for a, (m, n) in enumerate(zip(before, after, strict=True))]
    w.emit(np.tile(labels, repeats))


def depth_to_space(w: Walk) -> None:
    """DepthToSpace: the b x b channels that become one position leave together."""
    labels, b = w.lab(0), int(w.attr("blocksize"))
    labels = w.protect_axis(labels, [a for a in axes_of(labels) if a != 1], "DepthToSpace moves positions")
    if labels.shape[1] == 1:
        w.emit(labels)
        return
    n = labels.shape[1] // (b * b)
    blocks = labels.reshape(b * b, n) if w.attr("mode", "DCR") == "DCR" else labels.reshape(n, b * b).T
    w.tie(blocks[:1], blocks, f"DepthToSpace spreads {b * b} channels over one")
    w.emit(np.ascontiguousarray(blocks[0]).reshape(1, n, *(1,) * (labels.ndim - 2)))


def space_to_depth(w: Walk) -> None:
    """SpaceToDepth: every channel becomes b x b, block by block."""
    labels, b = w.lab(0), int(w.attr("blocksize"))
    labels = w.protect_axis(labels, [a for a in axes_of(labels) if a != 1], "SpaceToDepth moves positions")
    w.emit(np.tile(labels, (1, b * b, 1, 1)) if labels.shape[1] > 1 else labels)


def pad(w: Walk) -> None:
    """Pad: padded channels have labels of their own (zeros that a residual may tie to filters)."""
    labels, shape = w.lab(0), w.shape(0)
    rank = len(shape)
    if w.opset < 11:
        pads = list(w.attr("pads", None) or w.attr("paddings"))
        axes = list(range(rank))
    else:
        known = w.value(1)
        if known is None:
            raise Refused("its pads are computed from the input")
        pads = [int(x) for x in known]
        given = w.value(3)
        axes = [int(a) for a in given] if given is not None else list(range(rank))
    axes = [a + rank if a < 0 else a for a in axes]
    out = labels
    plan = {}
    for i, a in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        if labels.shape[a] == 1 or (before == 0 and after == 0):
            continue
        if str(w.attr("mode", "constant")) != "constant" or before < 0 or after < 0:
            raise Refused("it pads or crops channels by other than a constant")
        own = [w.fresh(n).reshape([n if x == a else 1 for x in range(rank)]) for n in (before, after)]
        for other in [x for x in axes_of(out) if x != a]:
            out = w.same_along(out, other, "it pads one axis of joint channels")
        plan[a] = (own[0].ravel(), own[1].ravel())
        out = np.concatenate([own[0], out, own[1]], axis=a)
    if plan:
        w.edit("pad", axes=axes, pads=pads, own=plan)
    w.emit(out)
