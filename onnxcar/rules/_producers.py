"""Ops with filters: they read the channels of their input and make new ones."""

from __future__ import annotations

import math

import numpy as np

from onnxcar.channels import Labels
from onnxcar.rules._walk import EqualCounts, RawLayer, RawTerm, Refused, Walk, aligned, axes_of


def _weight_root(w: Walk, k: int) -> str:
    """Name of the tensor behind a constant input: exporters store equal tensors once, behind Identity."""
    name = str(w.node.input[k])
    while name in w.facts.producers:
        node = w.graph.node[w.facts.producers[name]]
        if not node.input or node.op_type not in ("Identity", "DequantizeLinear", "Cast", "Transpose"):
            break
        name = str(node.input[0])
    return name


def _pair(w: Walk, k: int, reads: Labels, writes: Labels) -> None:
    """A weight that several nodes read is one weight: what it reads and writes leaves together."""
    root = _weight_root(w, k)
    held = w.shared.setdefault(root, (reads, writes))
    if held[0] is reads:
        return
    if held[0].shape != reads.shape or held[1].shape != writes.shape:
        w.protect(np.concatenate([reads, writes, *held]), f"weight '{root}' is shared by layers of different shapes")
        return
    w.tie(held[0], reads, f"weight '{root}' is shared")
    w.tie(held[1], writes, f"weight '{root}' is shared")


def _channels_only(w: Walk, labels: Labels, axis: int) -> Labels:
    """The labels along `axis` (n,), those along other axes protected."""
    others = [a for a in axes_of(labels) if a != axis]
    labels = w.protect_axis(labels, others, f"{w.node.op_type} mixes the positions along axis {others}")
    n = w.shape(0)[axis]
    return np.broadcast_to(labels.reshape(-1), (n,)) if labels.size == 1 else labels.reshape(-1)


def conv(w: Walk) -> None:
    """Conv: the weight (out, in / conv_groups, ...) reads the input's channels and writes new ones."""
    _convolution(w, transposed=False)


def conv_transpose(w: Walk) -> None:
    """ConvTranspose: the weight is (in, out / conv_groups, ...)."""
    _convolution(w, transposed=True)


def _convolution(w: Walk, *, transposed: bool) -> None:
    if not w.constant(1):
        raise Refused("its weight is computed from the input")
    shape, blocks = w.shape(1), int(w.attr("group", 1))
    c_in, c_out = (shape[0], shape[1] * blocks) if transposed else (shape[1] * blocks, shape[0])
    if c_in != w.shape(0)[1]:
        raise Refused(f"its weight {shape} does not fit its input {w.shape(0)}")
    if not transposed and _along_positions(w):
        return
    x = _channels_only(w, w.lab(0), 1)
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    spatial = math.prod(w.out_shape()[2:]) if not transposed else math.prod(w.shape(0)[2:])
    scale = float(spatial * math.prod(shape[2:]))
    rank = len(w.out_shape())
    if blocks > 1 and c_in == blocks:
        y = _depthwise(w, x, c_out, transposed=transposed)
    else:
        y = w.fresh(c_out) if c_out > 1 else np.zeros(1, np.int64)
        if blocks == 1:
            w.read(0)
            w.site(1, {in_axis: (x, 0), out_axis: (y, 0)})
        else:
            _grouped(w, x, y, blocks, transposed=transposed)
    kind = "depthwise" if blocks > 1 and c_in == blocks else "conv"
    if kind == "depthwise":
        out_axis = 0
    if c_out > 1 or kind == "depthwise":
        w.layers.append(RawLayer(w.index, 1, out_axis, kind, y))
    if w.constant(2):
        w.site(2, {0: (y, 0)})
    elif w.has(2):
        w.protect(y, "its bias is computed from the input")
    w.terms.append(RawTerm(w.index, scale, x, y, blocks))
    _pair(w, 1, x, y)
    w.emit(y.reshape((1, c_out) + (1,) * (rank - 2)))


def _along_positions(w: Walk) -> bool:
    """A Conv that runs along the channels of a layer, which are its positions (ECA, Wang et al. 2020, 1910.03151).

    Removed positions are zeros to their neighbours. Positions of the result are channels of their own; the surgery
    lines up the window of every one that is kept, so that the Conv steps from window to window. Its filters stay.
    """
    labels = w.lab(0)
    axes = axes_of(labels)
    if len(axes) != 1 or axes[0] < 2 or w.attr("auto_pad", "NOTSET") not in ("NOTSET", b"NOTSET"):
        return False
    axis, positions = axes[0], w.out_shape()[axes[0]]
    c_out = w.shape(1)[0]
    if c_out > 1:
        y = w.fresh(c_out)
        w.protect(y, "it runs along the channels of another layer")
        w.layers.append(RawLayer(w.index, 1, 0, "conv", y))
    w.read(0)
    made = w.fresh(positions).reshape([positions if a == axis else 1 for a in range(labels.ndim)])
    w.edit("windows", labels=labels, made=made, axis=axis)
    w.emit(made)
    return True


def _depthwise(w: Walk, x: Labels, c_out: int, *, transposed: bool) -> Labels:
    """Every input channel has `m` outputs of its own: they leave with it, and nothing is read."""
    m = c_out // len(x)
    y = np.repeat(x, m)
    if transposed:
        w.site(1, {0: (x, 0)})
    else:
        w.site(1, {0: (y, 0)})
    w.edit("blocks", reads=x, writes=y, blocks=len(x))
    return y


def _grouped(w: Walk, x: Labels, y: Labels, blocks: int, *, transposed: bool) -> None:
    """1 < conv_groups < channels: whole blocks leave, or every block keeps the same number."""
    xs, ys = x.reshape(blocks, -1), y.reshape(blocks, -1)
    w.read(0)
    rows, columns = (x, y) if transposed else (y, x)
    w.site(1, {0: (rows, 0), 1: (columns, 0)}, blocks=blocks)
    if blocks >= xs.shape[1]:
        w.tie(xs[:, :1], xs, "a block of a grouped Conv leaves as a whole")
        w.tie(xs[:, :1], ys, "a block of a grouped Conv leaves as a whole")
    else:
        w.equal.append(EqualCounts(w.index, tuple(xs)))
        w.equal.append(EqualCounts(w.index, tuple(ys)))
    w.edit("blocks", reads=x, writes=y, blocks=blocks)


def gemm(w: Walk) -> None:
    """Gemm: alpha A' B' + beta C, B constant."""
    if not w.constant(1) or w.constant(0):
        raise Refused(
            "it multiplies two values that both depend on the input" if not w.constant(1) else "A is constant"
        )
    if w.attr("transA", 0):
        raise Refused("it transposes its input")
    shape = w.shape(1)
    k_axis, n_axis = (1, 0) if w.attr("transB", 0) else (0, 1)
    x = _channels_only(w, w.lab(0), 1)
    y = w.fresh(shape[n_axis]) if shape[n_axis] > 1 else np.zeros(1, np.int64)
    w.read(0)
    w.site(1, {k_axis: (x, 0), n_axis: (y, 0)})
    if w.has(2):
        if not w.constant(2):
            w.protect(y, "its C is computed from the input")
        elif w.shape(2) and w.shape(2)[-1] == len(y) > 1:
            w.site(2, {len(w.shape(2)) - 1: (y, 0)})
    if len(y) > 1:
        w.layers.append(RawLayer(w.index, 1, n_axis, "dense", y))
    w.terms.append(RawTerm(w.index, 1.0, x, y))
    _pair(w, 1, x, y)
    w.emit(y.reshape(1, -1))


def matmul(w: Walk) -> None:
    """MatMul: with a constant a dense layer along its axis; of two values a contraction."""
    a, b = w.constant(0), w.constant(1)
    if not a and not b:
        try:
            _contract(w)
        except Refused:
            for name in w.node.input:
                if name in w.crossing:
                    w.protect(w.crossing[name], "both axes of a product carry channels")
            raise
        return
    const, live = (0, 1) if a else (1, 0)
    shape, rank = w.shape(const), len(w.out_shape())
    if len(shape) < 2 or len(w.shape(live)) < 2:
        raise Refused("it multiplies by a vector")
    labels = w.lab(live)
    # the axis of each operand that is contracted, and the one that remains
    k_live, keep_live = (-2, -1) if a else (-1, -2)
    k_const, n_const = (-1, -2) if a else (-2, -1)
    n = w.shape(live)[k_live]
    others = [x for x in axes_of(labels) if x != labels.ndim + k_live]
    if others and labels.shape[k_live] > 1:
        for axis in others:
            labels = w.same_along(labels, axis, "MatMul contracts one axis of joint channels")
        others = []
    out = np.zeros((1,) * rank, np.int64)
    if others:
        # the constant mixes another axis than the labelled one: labels pass; a constant with such an axis is cut too
        passed = aligned(labels, rank)
        for axis in axes_of(passed):
            back = axis - rank
            if back < -2 and len(shape) >= -back and shape[back] > 1:
                w.site(const, {len(shape) + back: (passed, axis)})
            elif back == keep_live:
                pass
        w.emit(passed)
        return
    x = np.broadcast_to(labels.reshape(-1), (n,))
    if len(shape) > 2 and math.prod(shape[:-2]) > 1:
        w.protect(labels, "its constant is a stack of matrices")
        return
    y = w.fresh(shape[n_const]) if shape[n_const] > 1 else np.zeros(1, np.int64)
    w.read(live, labels)
    w.site(const, {len(shape) + k_const: (x, 0), len(shape) + n_const: (y, 0)})
    if len(y) > 1:
        w.layers.append(RawLayer(w.index, const, len(shape) + n_const, "dense", y))
    rows = math.prod(w.out_shape()) // (w.out_shape()[0] * len(y)) if rank > 1 else 1
    w.terms.append(RawTerm(w.index, float(rows), x, y))
    _pair(w, const, x, y)
    out_axis = rank - 2 if a else rank - 1
    w.emit(np.moveaxis(y.reshape((1,) * (rank - 1) + (-1,)), -1, out_axis) if len(y) > 1 else out)


def _contract(w: Walk) -> None:
    """MatMul of two values: the contracted axes leave together and are read; the other axes pass."""
    rank = len(w.out_shape())
    if len(w.shape(0)) < 2 or len(w.shape(1)) < 2:
        raise Refused("it multiplies by a vector")
    a, b = aligned(w.lab(0), rank), aligned(w.lab(1), rank)
    text = "heads of an attention product keep equal sizes"
    for axis in range(rank - 2):
        if a.shape[axis] > 1 and len(axes_of(a)) > 1:
            a = w.same_along(a, axis, text)
        if b.shape[axis] > 1 and len(axes_of(b)) > 1:
            b = w.same_along(b, axis, text)
    for labels, keep, contracted in ((a, rank - 2, rank - 1), (b, rank - 1, rank - 2)):
        if labels.shape[keep] > 1 and labels.shape[contracted] > 1:
            raise Refused("both axes of a factor carry channels")
    a, left = _rows_and_columns(w, 0, a, rank - 1)
    b, right = _rows_and_columns(w, 1, b, rank - 2)
    if left.shape[-1] > 1 or right.shape[-2] > 1:
        n = w.shape(0)[-1]
        one = left if left.shape[-1] > 1 else np.zeros((1,) * (rank - 1) + (n,), np.int64)
        other = right if right.shape[-2] > 1 else np.zeros((1,) * (rank - 2) + (n, 1), np.int64)
        w.tie(one, other.swapaxes(-1, -2), "the two factors of a product are contracted over these channels")
        w.read(0, left.reshape(left.shape[rank - len(w.shape(0)) :]))
        w.read(1, right.reshape(right.shape[rank - len(w.shape(1)) :]))
    shape_a = (1,) * (rank - len(w.shape(0))) + w.shape(0)
    shape_b = (1,) * (rank - len(w.shape(1))) + w.shape(1)
    for axis in range(rank - 2):
        # a batch axis that both have is tied like any product; one that only one has passes
        if a.shape[axis] > 1 and b.shape[axis] > 1:
            w.tie(a, b, "the factors of a product share a batch axis")
        elif a.shape[axis] > 1 and shape_b[axis] > 1:
            a = w.protect_axis(a, [axis], "the other factor of the product has this axis fixed")
        elif b.shape[axis] > 1 and shape_a[axis] > 1:
            b = w.protect_axis(b, [axis], "the other factor of the product has this axis fixed")
    if axes_of(a) and axes_of(b) and axes_of(a) != axes_of(b):
        if _feeds_products(w) and axes_of(a) == [rank - 2] and axes_of(b) == [rank - 1]:
            w.emit(a)
            if w.node.output[0] in w.labels:
                w.crossing[w.node.output[0]] = b
            else:
                w.emit(b)
            return
        # one axis can follow: the rows, which a softmax leaves free, unless the columns hold far more that may go
        text = "both axes of a product carry channels"
        if w.freedom(b) > 2 * w.freedom(a):
            a = w.protect_axis(a, axes_of(a), text)
        else:
            b = w.protect_axis(b, axes_of(b), text)
    w.emit(a if axes_of(a) else b)


def _rows_and_columns(w: Walk, k: int, labels: Labels, contracted: int) -> tuple[Labels, Labels]:
    """Labels of a factor along what it keeps, and along its contracted axis; a product of products has both."""
    none = np.zeros((1,) * labels.ndim, np.int64)
    second = w.crossing.get(w.node.input[k])
    second = none if second is None else aligned(second, labels.ndim)
    both = [x for x in (labels, second) if axes_of(x)]
    kept = [x for x in both if x.shape[contracted] == 1]
    gone = [x for x in both if x.shape[contracted] > 1]
    return (kept[0] if kept else none), (gone[0] if gone else none)


def _feeds_products(w: Walk) -> bool:
    """Whether all that follows is products with another value, which know labels on two axes."""
    name, nodes = w.node.output[0], w.graph.node
    users = w.users.get(name, [])
    return (
        bool(users)
        and all(
            k in (0, 1)
            and nodes[i].op_type == "MatMul"
            and not w.facts.constant(nodes[i].input[1 - k])
            and nodes[i].input[1 - k] != name
            for i, k in users
        )
        and all(o.name != name for o in w.graph.output)
    )


def recurrent(w: Walk) -> None:
    """LSTM, GRU, RNN: W (directions, gates x hidden, in) reads the last axis of X; the state keeps all."""
    for k in w.labelled():
        if k:
            w.protect(w.lab_raw(k), f"they steer {w.node.op_type}")
    if 0 not in w.labelled():
        return
    if not w.constant(1):
        raise Refused("its weight is computed from the input")
    x = _channels_only(w, w.lab(0), 2)
    w.read(0)
    w.site(1, {2: (x, 0)})
    directions, gates, n = w.shape(1)
    if n != len(x):
        raise Refused(f"its weight {w.shape(1)} does not fit its input {w.shape(0)}")
    steps = w.shape(0)[1 if w.attr("layout", 0) else 0]
    w.terms.append(RawTerm(w.index, float(directions * steps), x, np.zeros(gates, np.int64)))
