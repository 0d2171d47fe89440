"""Ops that mix channels: norms, reductions, softmax, LRN, contractions."""

from __future__ import annotations

import math

import numpy as np

from onnxcar.channels import Labels
from onnxcar.rules._walk import Refused, Walk, axes_of


def instance_norm(w: Walk) -> None:
    """InstanceNormalization: statistics of each channel over its positions."""
    labels = w.lab(0)
    if w.norms == "rewrite" and labels.shape[1] == 1 and w.shape(0)[1] == 1 and len(axes_of(labels)) == 1:
        _rewritten(w, labels, list(range(2, labels.ndim)), param_axis=None)  # how exporters write GroupNorm(1, C)
        return
    for axis in range(2, labels.ndim):
        labels = w.same_along(labels, axis, "the norm's statistics run over these channels")
    if labels.shape[1] > 1:
        for k in (1, 2):
            if not w.constant(k):
                raise Refused("its parameters are computed from the input")
            w.site(k, {0: (labels, 1)})
    w.emit(labels)


def group_norm(w: Walk) -> None:
    """GroupNormalization: the channels of a norm group leave together; `num_groups` follows."""
    labels, n = w.lab(0), int(w.attr("num_groups"))
    if w.norms == "rewrite" and n == 1 and axes_of(labels) == [1]:
        per_channel = w.shape(1)[0] == labels.shape[1]
        _rewritten(w, labels, list(range(1, labels.ndim)), param_axis=1 if per_channel else None)
        return
    for axis in range(2, labels.ndim):
        labels = w.same_along(labels, axis, "the norm's statistics run over these channels")
    if labels.shape[1] > 1:
        rows = labels.reshape(n, -1)
        if n == 1:
            w.protect(labels, "the norm's statistics run over all channels")
        else:
            w.tie(rows[:, :1], rows, "a group of GroupNormalization leaves as a whole")
        for k in (1, 2):
            if not w.constant(k):
                raise Refused("its parameters are computed from the input")
            w.site(k, {0: (labels, 1) if w.shape(k)[0] == labels.shape[1] else (rows[:, 0], 0)})
        w.edit("norm_groups", labels=rows[:, 0])
    w.emit(labels)


def layer_norm(w: Walk) -> None:
    """LayerNormalization: statistics over the axes from `axis` on; labels on the axes before it pass."""
    labels = w.lab(0)
    axis = int(w.attr("axis", -1))
    axis += labels.ndim if axis < 0 else 0
    hit = [a for a in axes_of(labels) if a >= axis]
    if w.norms == "rewrite" and len(hit) == 1 == len(axes_of(labels)) and not any(list(w.node.output)[1:]):
        _rewritten(w, labels, list(range(axis, labels.ndim)), param_axis=hit[0], params_from=axis)
        return
    labels = w.protect_axis(labels, hit, "the norm's statistics run over all channels")
    for k in range(len(w.node.output)):  # mean and deviation too have the axes in front
        w.emit(labels, k)


def _rewritten(w: Walk, labels: Labels, axes: list[int], param_axis: int | None, params_from: int = 1) -> None:
    """A norm over channels that may go: it reads them, and is rewritten with the original number of channels.

    With removed channels as zeros, T positions in all and a share r of them gone, the statistics of the original
    over the kept positions are mean = sum / T and var = sum((x - mean)^2) / T + r mean^2.
    """
    for k in range(1, len(w.node.input)):
        if w.has(k) and not w.constant(k):
            raise Refused("its parameters are computed from the input")
    w.read(0)
    for k in range(1, len(w.node.input)):
        if w.has(k) and param_axis is not None:
            at = 0 if len(w.shape(k)) == 1 else param_axis - params_from
            if w.shape(k)[at] > 1:
                w.site(k, {at: (labels, param_axis)})
    w.edit("norm", labels=labels, axes=axes, total=math.prod(w.shape(0)[a] for a in axes), param_axis=param_axis)
    w.emit(labels)


def rms_norm(w: Walk) -> None:
    """RMSNormalization: mean of squares over the axes from `axis` on; exact with the original count."""
    labels = w.lab(0)
    axis = int(w.attr("axis", -1))
    axis += labels.ndim if axis < 0 else 0
    hit = [a for a in axes_of(labels) if a >= axis]
    if w.norms == "rewrite" and len(hit) == 1 == len(axes_of(labels)):
        _rewritten(w, labels, list(range(axis, labels.ndim)), param_axis=hit[0], params_from=axis)
        return
    w.emit(w.protect_axis(labels, hit, "the norm's statistics run over all channels"))


def mean_variance(w: Walk) -> None:
    """MeanVarianceNormalization: statistics over `axes` (default 0, 2, 3)."""
    labels = w.lab(0)
    axes = [a + labels.ndim if a < 0 else a for a in w.attr("axes", None) or (0, 2, 3)]
    hit = [a for a in axes_of(labels) if a in axes]
    w.emit(w.protect_axis(labels, hit, "the norm's statistics run over these channels"))


def lp_norm(w: Walk) -> None:
    """LpNormalization: a sum over `axis` in which a masked channel adds nothing, so that axis is read."""
    labels = w.lab(0)
    axis = int(w.attr("axis", -1))
    if labels.shape[axis] > 1:
        w.read(0)
    w.emit(labels)


def lrn(w: Walk) -> None:
    """LRN: a window over neighbouring channels; where channels go it is rewritten with the original neighbours."""
    labels = w.lab(0)
    labels = w.protect_axis(labels, [a for a in axes_of(labels) if a != 1], "LRN is over channels")
    if labels.shape[1] > 1:
        w.read(0, labels)
        w.edit("lrn", labels=labels.reshape(-1), channels=w.shape(0)[1])
    w.emit(labels)


def softmax(w: Walk) -> None:
    """Softmax and its kin: a sum of exponentials over `axis` (before opset 13: from `axis` on) keeps its channels."""
    labels = w.lab(0)
    axis = int(w.attr("axis", -1 if w.opset >= 13 else 1))
    axis += labels.ndim if axis < 0 else 0
    over = [axis] if w.opset >= 13 else list(range(axis, labels.ndim))
    hit = [a for a in axes_of(labels) if a in over]
    w.emit(w.protect_axis(labels, hit, f"{w.node.op_type} compares all channels"))


def along_axis(w: Walk) -> None:
    """ArgMax, TopK, CumSum...: labels pass along other axes than theirs, along theirs they stay."""
    labels = w.lab(0)
    rank = labels.ndim
    op = w.node.op_type
    if op == "CumSum":
        known = w.value(1)
        if known is None:
            raise Refused("its axis is computed")
        axis = int(np.asarray(known).ravel()[0])
    else:
        axis = int(w.attr("axis", -1 if op == "TopK" else 0))
    axis += rank if axis < 0 else 0
    labels = w.protect_axis(labels, [axis], f"{op} works along this axis")
    for k in range(len(w.node.output)):
        if w.node.output[k]:
            drop = len(w.out_shape(k)) < rank
            w.emit(np.asarray(labels.take(0, axis=axis)) if drop else labels, k)


BOUNDS = ("ReduceMax", "ReduceMin")
SUMS = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")  # zero adds nothing: exact over masked channels


def reduce(w: Walk) -> None:
    """Reductions: over positions labels pass; a sum over channels reads them; others over channels protect."""
    labels = w.lab(0)
    rank = labels.ndim
    given = w.value(1) if w.has(1) else None
    if w.has(1) and given is None:
        raise Refused("its axes are computed")
    axes = [int(a) for a in given] if given is not None else list(w.attr("axes", None) or [])
    if not axes:
        axes = [] if w.attr("noop_with_empty_axes", 0) else list(range(rank))
    axes = sorted({a + rank if a < 0 else a for a in axes})
    hit = [a for a in axes_of(labels) if a in axes]
    kept = [a for a in axes_of(labels) if a not in axes]
    op = w.node.op_type
    if hit and kept:
        for a in hit:
            labels = w.same_along(labels, a, f"{op} joins them")
    elif hit and (op in SUMS or (w.norms == "rewrite" and (op == "ReduceMean" or (op in BOUNDS and w.opset >= 8)))):
        w.read(0)
        if op == "ReduceMean":
            w.edit("mean", labels=labels, axes=hit)
        elif op in BOUNDS:
            w.edit("bound", labels=labels, axes=hit)
        labels = np.zeros((1,) * rank, np.int64)
    elif hit:
        labels = w.protect_axis(labels, hit, f"{op} runs over all channels")
    if not w.attr("keepdims", 1):
        labels = labels.reshape([n for a, n in enumerate(labels.shape) if a not in axes])
    w.emit(labels)


def einsum(w: Walk) -> None:
    """Einsum: letters that vanish are contracted and read, letters that stay pass or tie."""
    equation = str(w.attr("equation")).replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Refused("its equation has an ellipsis or no output")
    left, out = equation.split("->")
    terms = left.split(",")
    if any(len(set(t)) != len(t) for t in terms):
        raise Refused("its equation takes a diagonal")
    n = len(terms)
    arrays = [w.lab(k) for k in range(n)]
    for k, t in enumerate(terms):
        # joint channels follow one letter: a contracted one if there is, else the longest
        free = max(axes_of(arrays[k]), key=lambda a: (t[a] not in out, arrays[k].shape[a]), default=-1)
        for axis in axes_of(arrays[k]):
            if axis != free:
                arrays[k] = w.same_along(arrays[k], axis, "Einsum keeps equal sizes along the other axes")
    where: dict[str, Labels] = {}
    for k, t in enumerate(terms):
        for axis in axes_of(arrays[k]):
            letter = t[axis]
            mine = arrays[k].reshape(-1)
            if letter in where:
                w.tie(where[letter], mine, "Einsum joins two values over these channels")
            where.setdefault(letter, mine)
    own = {c: w.shape(k)[a] for k, t in enumerate(terms) if w.constant(k) for a, c in enumerate(t) if c in out}
    own = {c: n for c, n in own.items() if n > 1 and sum(c in t for t in terms) == 1}
    if own and not any(c in where for c in out):  # like a dense layer's, but of one axis only
        letter = max(own, key=lambda c: own[c])
        where[letter] = w.fresh(own[letter])
    for k, t in enumerate(terms):
        hit = {axis: where[letter] for axis, letter in enumerate(t) if letter in where and w.shape(k)[axis] > 1}
        if w.constant(k):
            w.site(k, {axis: (labels, 0) for axis, labels in hit.items()})
            continue
        for axis, labels in hit.items():
            if arrays[k].shape[axis] == 1:
                w.protect(labels, "Einsum joins them with a value whose channels are fixed")
    for k, t in enumerate(terms):
        if not w.constant(k) and any(letter in where and letter not in out for letter in t):
            w.read(k)
    carried = [a for a, letter in enumerate(out) if letter in where and where[letter].any()]
    if len(carried) > 1:
        for a in carried[1:]:
            w.protect(where[out[a]], "Einsum's result has channels on two axes")
        carried = carried[:1]
    result = np.zeros((1,) * len(out), np.int64)
    for a in carried:
        result = where[out[a]].reshape([-1 if x == a else 1 for x in range(len(out))])
    w.emit(result)
