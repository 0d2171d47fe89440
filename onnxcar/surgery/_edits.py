"""Structural changes of single nodes: sizes, counts and indices that follow the channels that survive.

Each function is named in an `Edit.kind` that a rule noted; `EDITS` is the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxcar.channels import Edit, Labels
from onnxcar.errors import InternalError
from onnxcar.facts import Facts, attribute
from onnxcar.surgery._tensors import Tensors

Alive = npt.NDArray[np.bool_]


@dataclass
class Bench:
    """What an edit works on.

    Attributes:
        nodes: New nodes by original index.
        table: Which groups live, by id; index -1 is True.
    """

    facts: Facts
    nodes: list[list[onnx.NodeProto]]
    tensors: Tensors
    table: Alive
    fresh: Callable[[str], str]

    def along(self, labels: Labels, axis: int) -> Alive:
        """Which positions of `axis` survive (n,), True (1,) where it carries no labels."""
        alive = self.table[labels]
        moved = np.moveaxis(alive, axis, 0).reshape(alive.shape[axis], -1)
        return np.asarray(moved.any(axis=1))


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set or replace one attribute."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(helper.make_attribute(name, value))


def drop_attribute(node: onnx.NodeProto, name: str) -> None:
    """Remove one attribute if it is there."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _blocks(b: Bench, edit: Edit) -> None:
    n = int(edit.args["blocks"])
    reads = b.table[edit.args["reads"]].reshape(n, -1).any(axis=1)
    writes = b.table[edit.args["writes"]].reshape(n, -1).any(axis=1)
    left = int((reads & writes).sum())
    if left < n:
        set_attribute(b.nodes[edit.node][0], "group", left)


def _split(b: Bench, edit: Edit) -> None:
    axis = int(edit.args["axis"])
    sizes = [int(b.along(p, axis).sum()) for p in edit.args["parts"]]
    if sizes == [p.shape[axis] for p in edit.args["parts"]]:
        return
    node = b.nodes[edit.node][0]
    if b.facts.opset < 13:
        set_attribute(node, "split", sizes)
        return
    drop_attribute(node, "num_outputs")
    name = b.tensors.constant(np.asarray(sizes, np.int64), f"{node.output[0]}_split")
    del node.input[1:]
    node.input.append(name)


def _slice(b: Bench, edit: Edit) -> None:
    node, labels = b.nodes[edit.node][0], edit.args["labels"]
    index: dict[int, npt.NDArray[np.int64]] = edit.args["index"]
    if all(b.along(labels, a).all() for a in index):
        return
    steps: dict[int, tuple[int, int, int] | npt.NDArray[np.int64]] = {}
    for axis, taken in index.items():
        alive = b.along(labels, axis)
        position = np.cumsum(alive) - 1
        steps[axis] = _as_slice(position[taken[alive[taken]]], int(alive.sum()))
    _write_slice(b, edit.node, node, steps)


def _as_slice(index: npt.NDArray[np.int64], n: int) -> tuple[int, int, int] | npt.NDArray[np.int64]:
    """`index` as (start, end, step) if it is a forward run, else itself."""
    if len(index) == 0:
        raise InternalError("A Slice would take nothing; the plan should have been refused.")
    if len(index) == 1:
        return int(index[0]), int(index[0]) + 1, 1
    gaps = np.diff(index)
    if (gaps == gaps[0]).all() and gaps[0] > 0:
        return int(index[0]), min(int(index[-1]) + 1, n), int(gaps[0])
    return index


def _write_slice(
    b: Bench, at: int, node: onnx.NodeProto, steps: dict[int, tuple[int, int, int] | npt.NDArray[np.int64]]
) -> None:
    """The Slice with new bounds on some axes; axes that are no run any more become a Gather behind it."""
    bounds = _old_bounds(b, node)
    for axis, new in steps.items():
        bounds.pop(axis, None)
        if isinstance(new, tuple):
            bounds[axis] = new
    gathers = {a: s for a, s in steps.items() if not isinstance(s, tuple)}
    made: list[onnx.NodeProto] = []
    value, final = node.input[0], node.output[0]
    if bounds:
        target = final if not gathers else b.fresh(final)
        axes = sorted(bounds)
        columns = [[bounds[a][i] for a in axes] for i in range(3)]
        if b.facts.opset < 10:
            cut = helper.make_node("Slice", [value], [target], node.name, axes=axes, starts=columns[0], ends=columns[1])
        else:
            inputs = [
                b.tensors.constant(np.asarray(v, np.int64), f"{final}_{what}")
                for what, v in (("starts", columns[0]), ("ends", columns[1]), ("axes", axes), ("steps", columns[2]))
            ]
            cut = helper.make_node("Slice", [value, *inputs], [target], node.name)
        made.append(cut)
        value = target
    for i, (axis, picked) in enumerate(gathers.items()):
        target = final if i == len(gathers) - 1 else b.fresh(final)
        name = b.tensors.constant(np.asarray(picked, np.int64), f"{final}_indices")
        own = node.name if not made else b.fresh(node.name or target)  # one node keeps the name
        made.append(helper.make_node("Gather", [value, name], [target], own, axis=axis))
        value = target
    for n in made:
        n.doc_string = node.doc_string
    b.nodes[at] = made


def _old_bounds(b: Bench, node: onnx.NodeProto) -> dict[int, tuple[int, int, int]]:
    """Axis -> (start, end, step) of a Slice as it stands."""
    rank = len(b.facts.shape(node.input[0]) or ())
    if b.facts.opset < 10:
        starts, ends = attribute(node, "starts"), attribute(node, "ends")
        axes, steps = attribute(node, "axes", list(range(len(starts)))), [1] * len(starts)
    else:
        values = [b.facts.steady(x) if x else None for x in list(node.input)[1:]]
        values += [None] * (4 - len(values))
        if values[0] is None or values[1] is None:
            raise InternalError(f"Slice '{node.name}' is cut but its bounds depend on the batch.")
        starts, ends = values[0].tolist(), values[1].tolist()
        axes = values[2].tolist() if values[2] is not None else list(range(len(starts)))
        steps = values[3].tolist() if values[3] is not None else [1] * len(starts)
    return {a + rank if a < 0 else a: (s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def _gather(b: Bench, edit: Edit) -> None:
    node, axis = b.nodes[edit.node][0], int(edit.args["axis"])
    alive = b.along(edit.args["labels"], axis)
    if alive.all():
        return
    index = edit.args["index"]
    position = np.cumsum(alive) - 1
    if index.ndim == 0:
        picked = np.asarray(position[index])
    else:
        live = alive[index]
        keep = [np.flatnonzero(np.moveaxis(live, a, 0).reshape(live.shape[a], -1).any(1)) for a in range(live.ndim)]
        picked = position[index[np.ix_(*keep)]]
    k = int(edit.args["input"])
    dtype = b.facts.dtype(node.input[k])
    kind = np.int32 if dtype == onnx.TensorProto.INT32 else np.int64
    node.input[k] = b.tensors.constant(picked.astype(kind), f"{node.output[0]}_indices")


def _target(b: Bench, edit: Edit) -> None:
    """Constant target sizes of Reshape, Expand, Resize; computed ones are patched by the shape pass."""
    node, k = b.nodes[edit.node][0], int(edit.args["input"])
    if not b.facts.constant(node.input[k]) or b.table[edit.args["labels"]].all():
        return
    old = b.facts.value(node.input[k])
    if old is None:
        raise InternalError(f"Target sizes of '{node.name}' are constant but not known.")
    new = resized(b, edit, old)
    if not np.array_equal(old, new):
        node.input[k] = b.tensors.constant(new, node.input[k])


def resized(b: Bench, edit: Edit, sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Target sizes with the counts of surviving channels; 0 and -1 stay."""
    labels, out = edit.args["labels"], np.array(sizes)
    axes = edit.args["axes"]
    where = list(axes) if axes is not None else list(range(labels.ndim))
    offset = labels.ndim - len(out) if axes is None else 0  # Expand's target may have fewer axes
    for i in range(len(out)):
        axis = where[i] if axes is not None else i + offset
        axis += labels.ndim if axis < 0 else 0
        if out[i] > 0 and labels.shape[axis] > 1 and int(out[i]) == labels.shape[axis]:
            out[i] = int(b.along(labels, axis).sum())
    return out


def _pad(b: Bench, edit: Edit) -> None:
    node, axes, pads = b.nodes[edit.node][0], list(edit.args["axes"]), list(edit.args["pads"])
    new = list(pads)
    for axis, (before, after) in edit.args["own"].items():
        i = axes.index(axis)
        new[i], new[i + len(axes)] = int(b.table[before].sum()), int(b.table[after].sum())
    if new == pads:
        return
    if b.facts.opset < 11:
        set_attribute(node, "pads" if attribute(node, "pads") is not None else "paddings", new)
    else:
        node.input[1] = b.tensors.constant(np.asarray(new, np.int64), f"{node.output[0]}_pads")


def _norm_groups(b: Bench, edit: Edit) -> None:
    alive = b.table[edit.args["labels"]]
    if not alive.all():
        set_attribute(b.nodes[edit.node][0], "num_groups", int(alive.sum()))


def _lrn(b: Bench, edit: Edit) -> None:
    """X / (bias + alpha / size * window(x * x)) ^ beta with the original neighbours that are left."""
    alive = b.table[edit.args["labels"]]
    if alive.all():
        return
    node = b.nodes[edit.node][0]
    size, channels = int(attribute(node, "size")), int(edit.args["channels"])
    alpha, beta = float(attribute(node, "alpha", 1e-4)), float(attribute(node, "beta", 0.75))
    kept = np.flatnonzero(np.broadcast_to(alive, (channels,)))
    gap = kept[None, :] - kept[:, None]
    band = (gap >= -((size - 1) // 2)) & (gap <= size // 2)  # the window is longer after the channel if size is even
    x, y = node.input[0], node.output[0]
    rank = len(b.facts.shape(x) or ())
    dtype = helper.tensor_dtype_to_np_dtype(b.facts.dtype(x))
    window = (band * (alpha / size)).astype(np.float64).reshape(len(kept), len(kept), *(1,) * (rank - 2)).astype(dtype)
    names = [b.fresh(f"{y}_{what}") for what in ("square", "window", "scale", "power")]
    legacy: dict[str, Any] = {"broadcast": 1} if b.facts.opset < 7 else {}
    weight = b.tensors.constant(window, f"{y}_neighbours")
    bias = b.tensors.constant(np.full(len(kept), attribute(node, "bias", 1.0), dtype), f"{y}_bias")
    power = b.tensors.constant(np.asarray(beta, dtype), f"{y}_beta")
    b.nodes[edit.node] = [
        helper.make_node("Mul", [x, x], [names[0]], names[0]),
        helper.make_node("Conv", [names[0], weight, bias], [names[1]], names[1]),
        helper.make_node("Pow", [names[1], power], [names[3]], names[3], **legacy),
        helper.make_node("Div", [x, names[3]], [y], node.name),
    ]


def _mean(b: Bench, edit: Edit) -> None:
    """A mean over channels keeps its original divisor: the mean of what is left times its share."""
    (axis,) = edit.args["axes"]
    alive = b.along(edit.args["labels"], axis)
    if alive.all():
        return
    node = b.nodes[edit.node][0]
    dtype = helper.tensor_dtype_to_np_dtype(b.facts.dtype(node.input[0]))
    share = b.tensors.constant(np.asarray(alive.sum() / alive.size, dtype), f"{node.output[0]}_share")
    final, inner = node.output[0], b.fresh(node.output[0])
    node.output[0] = inner
    legacy: dict[str, Any] = {"broadcast": 1} if b.facts.opset < 7 else {}
    b.nodes[edit.node].append(helper.make_node("Mul", [inner, share], [final], b.fresh(f"{final}_mul"), **legacy))


def _bound(b: Bench, edit: Edit) -> None:
    """A maximum (minimum) over channels of which some are gone, and so zero, is at least (at most) zero."""
    (axis,) = edit.args["axes"]
    if b.along(edit.args["labels"], axis).all():
        return
    node = b.nodes[edit.node][0]
    dtype = helper.tensor_dtype_to_np_dtype(b.facts.dtype(node.input[0]))
    zero = b.tensors.constant(np.asarray(0, dtype), f"{node.output[0]}_zero")
    final, inner = node.output[0], b.fresh(node.output[0])
    node.output[0] = inner
    kind = "Max" if node.op_type == "ReduceMax" else "Min"
    b.nodes[edit.node].append(helper.make_node(kind, [inner, zero], [final], b.fresh(f"{final}_bound")))


def _norm(b: Bench, edit: Edit) -> None:
    """LayerNormalization and its kin over the kept channels with the statistics of all, the removed ones zero.

    mean = sum / T; var = sum((x - mean)^2) / T + r mean^2, with T the original number of positions and r the share
    of them that is gone; RMSNormalization has no mean: var = sum(x^2) / T.
    """
    labels, axes, total = edit.args["labels"], list(edit.args["axes"]), int(edit.args["total"])
    alive = b.table[labels]
    if alive.all():
        return
    node = b.nodes[edit.node][0]
    gone = 1.0 - float(alive.sum()) / alive.size
    x, y, rank = node.input[0], node.output[0], len(b.facts.shape(node.input[0]) or ())
    stored = helper.tensor_dtype_to_np_dtype(b.facts.dtype(x))
    half = stored.itemsize < 4  # statistics are summed in float32, as the op itself does
    dtype = np.dtype(np.float32) if half else stored
    made: list[onnx.NodeProto] = []

    def op(kind: str, inputs: list[str], what: str, **attributes: Any) -> str:
        name = b.fresh(f"{y}_{what}")
        made.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def number(value: float, what: str) -> str:
        return b.tensors.constant(np.asarray(value, dtype), f"{y}_{what}")

    def total_of(value: str, what: str) -> str:
        if b.facts.opset < 13:
            return op("ReduceSum", [value], what, axes=axes, keepdims=1)
        return op("ReduceSum", [value, b.tensors.constant(np.asarray(axes, np.int64), f"{y}_axes")], what, keepdims=1)

    source = op("Cast", [x], "float", to=onnx.TensorProto.FLOAT) if half else x
    share = number(1.0 / total, "inverse_count")
    centred = source
    if node.op_type != "RMSNormalization":
        mean = op("Mul", [total_of(source, "sum"), share], "mean")
        centred = op("Sub", [source, mean], "centred")
    variance = op("Mul", [total_of(op("Mul", [centred, centred], "squares"), "sum_squares"), share], "variance")
    if node.op_type != "RMSNormalization":
        rest = op("Mul", [op("Mul", [mean, mean], "mean_square"), number(gone, "share_gone")], "variance_gone")
        variance = op("Add", [variance, rest], "variance_all")
    epsilon = number(float(attribute(node, "epsilon", 1e-5)), "epsilon")
    value = op("Div", [centred, op("Sqrt", [op("Add", [variance, epsilon], "stable")], "deviation")], "normal")
    if half:
        value = op("Cast", [value], "cast", to=b.facts.dtype(x))
    for k, kind in ((1, "Mul"), (2, "Add")):
        if len(node.input) > k and node.input[k]:
            value = op(kind, [value, _parameter(b, node, k, edit.args["param_axis"], rank, made)], kind.lower())
    made[-1].output[0] = y
    made[-1].name = node.name or made[-1].name
    b.nodes[edit.node] = made


def _parameter(b: Bench, node: onnx.NodeProto, k: int, axis: int | None, rank: int, made: list[onnx.NodeProto]) -> str:
    """Scale or bias of a norm, shaped to broadcast onto its input."""
    name = str(node.input[k])
    if axis is None or axis == rank - 1 or node.op_type != "GroupNormalization":
        return name
    shape = b.tensors.constant(np.asarray([-1] + [1] * (rank - 1 - axis), np.int64), f"{node.output[0]}_column")
    out = b.fresh(f"{name}_column")
    made.append(helper.make_node("Reshape", [name, shape], [out], out))
    return out


def _shuffle(b: Bench, edit: Edit) -> None:
    """A run of moves that permutes channels becomes one Gather; the nodes inside are swept as dead."""
    alive = b.table[edit.args["labels"]]
    if alive.all():
        return
    order = edit.args["index"]
    picked = (np.cumsum(alive) - 1)[order[alive[order]]]
    node = b.nodes[edit.node][0]
    name = b.tensors.constant(picked.astype(np.int64), f"{node.output[0]}_order")
    inputs = [edit.args["start"], name]
    b.nodes[edit.node] = [helper.make_node("Gather", inputs, [node.output[0]], node.name, axis=int(edit.args["axis"]))]


def _windows(b: Bench, edit: Edit) -> None:
    """A Conv along channels: the windows of the kept positions one after the other, gone neighbours as zeros.

    Pad by one zero, Gather the window of every kept position, and let the Conv step from window to window: its
    weight stays as it is.
    """
    axis = int(edit.args["axis"])
    alive, made = b.along(edit.args["labels"], axis), b.along(edit.args["made"], axis)
    if alive.all() and made.all():
        return
    node = b.nodes[edit.node][0]
    rank, n = len(b.facts.shape(node.input[0]) or ()), len(alive)
    at = axis - 2
    size = (b.facts.shape(node.input[1]) or ())[axis]
    pads = list(attribute(node, "pads", None) or [0] * (2 * (rank - 2)))
    steps = list(attribute(node, "strides", None) or [1] * (rank - 2))
    spread = list(attribute(node, "dilations", None) or [1] * (rank - 2))
    windows = steps[at] * np.flatnonzero(made)[:, None] - pads[at] + spread[at] * np.arange(size)[None, :]
    inside = (windows >= 0) & (windows < n)
    there = inside & alive[np.clip(windows, 0, n - 1)]
    kept = int(alive.sum())
    order = np.where(there, (np.cumsum(alive) - 1)[np.clip(windows, 0, n - 1)], kept)  # `kept` is the zero
    pads[at] = pads[at + rank - 2] = 0
    steps[at], spread[at] = int(size), 1
    for name, value in (("pads", pads), ("strides", steps), ("dilations", spread)):
        set_attribute(node, name, value)
    x, y = node.input[0], node.output[0]
    padded, gathered = b.fresh(f"{x}_zero"), b.fresh(f"{x}_windows")
    ends = [0] * (2 * rank)
    ends[rank + axis] = 1
    if b.facts.opset < 11:
        pad = helper.make_node("Pad", [x], [padded], padded, pads=ends)
    else:
        pad = helper.make_node(
            "Pad", [x, b.tensors.constant(np.asarray(ends, np.int64), f"{y}_ends")], [padded], padded
        )
    index = b.tensors.constant(order.ravel().astype(np.int64), f"{y}_windows")
    node.input[0] = gathered
    b.nodes[edit.node] = [pad, helper.make_node("Gather", [padded, index], [gathered], gathered, axis=axis), node]


EDITS: dict[str, Callable[[Bench, Edit], None]] = {
    "blocks": _blocks,
    "bound": _bound,
    "gather": _gather,
    "lrn": _lrn,
    "mean": _mean,
    "norm": _norm,
    "norm_groups": _norm_groups,
    "pad": _pad,
    "shuffle": _shuffle,
    "slice": _slice,
    "split": _split,
    "target": _target,
    "windows": _windows,
}
