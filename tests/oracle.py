"""A judge of pruned files that knows nothing of the program that made them.

From two files alone: is PRUNED exactly ORIGINAL with the removed channels silenced? Which rows and columns of every
weight are gone is found by matching values; the reference is ORIGINAL with zeros in the columns by which Conv,
ConvTranspose, Gemm and MatMul read what is gone (and in the rows that made it); both files run in ONNX Runtime, and
their outputs are compared, in front of saturating ops as well.

    python tests/oracle.py ORIGINAL.onnx PRUNED.onnx

Verdicts:
    exact      something is gone, and the outputs are those of the reference
    untouched  no weight changed its shape, and the outputs are the same
    differs    outputs differ, or a weight is no part of its original
    broken     the pruned file fails the checker or strict shape inference where the original passes, or does not run

Limits:
    - Weights must tell their channels apart: all-equal weights (out of ConstantOfShape) match anywhere. Weights of few
      values (int8) are matched by the order of what is kept;
      where chance makes another row fit, the verdict is `differs` with a weight that is no part of its original.
    - Surviving weight values must be untouched: nothing may have been retrained or corrected.
    - Layers are paired by the name of their first output, else by their place among the layers.
    - What reads channels without a weight of its own (LayerNormalization, a mean over channels, the product of two
      activations) is silenced only as far as the rows that made those channels were zeroed. Where a
      BatchNormalization or another constant in between makes them other than zero again, `differs` can be the
      reference's fault, and a masked model is the judge to ask.
    - QLinearConv and its kin, and weights inside If and Loop bodies, are not silenced.
    - Inputs are random; a fault in what they do not reach is not seen. `moved` says how far silencing moved the
      outputs at all: where it is 0, `exact` says nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]

# Largest |difference| over the largest |reference| of an output: another order of summation in float32 makes 1e-6 per
# layer at most; half precision carries 11 bits, and a quantized activation may fall on the other side of a step.
TOLERANCE = 2e-4
COARSE = 5e-2
BATCH = 2
SIZES = (32, 64, 224, 256, 320, 16, 8, 4, 1)  # tried for dynamic axes after the first, until the original runs
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
READERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SATURATING = ("Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Tanh", "ArgMax", "ArgMin")
PASSING = (
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Cast",
    "Transpose",
    "QuantizeLinear",
    "DequantizeLinear",
)
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


class OriginalError(Exception):
    """The original itself cannot be run, so that there is nothing to hold the pruned file against."""


@dataclass(frozen=True)
class Judgement:
    """What the two files say.

    Attributes:
        verdict: exact, untouched, differs or broken.
        error: Largest |difference| over the largest |reference|, of any output; inf where shapes differ.
        moved: The same between the original and the reference: how much was silenced at all.
        convs: Conv and ConvTranspose nodes with constant weights.
        filters: Their filters.
        removed: How many of those are gone.
        cut: Weights that lost rows or columns.
        unmatched: Layers whose weight is no part of the original's.
        text: What is wrong, in words.
    """

    verdict: str
    error: float = 0.0
    moved: float = 0.0
    convs: int = 0
    filters: int = 0
    removed: int = 0
    cut: int = 0
    unmatched: list[str] = field(default_factory=list)
    text: str = ""


def judge(original: onnx.ModelProto, pruned: onnx.ModelProto, *, seed: int = 0) -> Judgement:
    """Whether `pruned` is `original` with the channels that are gone silenced; neither is changed.

    Raises:
        OriginalError: ONNX Runtime does not run the original.
    """
    feeds, plain = first_run(original, seed)
    text = unusable(original, pruned)
    if text:
        return Judgement("broken", float("inf"), text=text)
    reference, found = silence(original, pruned)
    tapped = taps(original)
    other = taps(pruned)
    try:
        got = run(pruned, feeds, other)
    except Exception as exc:
        return Judgement("broken", float("inf"), **found, text=f"does not run: {_line(exc)}")
    want = run(reference, feeds, tapped)
    if len(want) != len(got):
        return Judgement("differs", float("inf"), **found, text="its outputs are made otherwise")
    error = max((distance(a, b) for a, b in zip(want, got, strict=True)), default=float("inf"))
    moved = max((distance(a, b) for a, b in zip(plain, want, strict=True)), default=0.0)
    limit = COARSE if coarse(original) else TOLERANCE
    verdict, text = "exact" if found["cut"] else "untouched", ""
    if not error <= limit:
        verdict, text = "differs", f"outputs differ by {error:.1e} of their largest value"
    elif found["unmatched"]:
        verdict, text = "differs", f"the weight of {found['unmatched'][0]} is no part of the original's"
    return Judgement(verdict, error, moved, **found, text=text)


# --- which channels are gone --------------------------------------------------------------------------------------


def silence(original: onnx.ModelProto, pruned: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The original with zeros where it reads and makes what `pruned` no longer has, and what was found."""
    reference = onnx.ModelProto()
    reference.CopyFrom(original)
    reference.ir_version = max(reference.ir_version, 4)
    mine, theirs = Constants(original), Constants(pruned)
    pairs = dict(paired(original, pruned, mine, theirs))
    found: dict[str, Any] = {"convs": 0, "filters": 0, "removed": 0, "cut": 0, "unmatched": []}
    for k, node in enumerate(original.graph.node):
        at = weight_input(node, mine)
        if at is None:
            continue
        full = mine[node.input[at]]
        writes, blocks = layout(node, at, full)
        if node.op_type.startswith("Conv"):
            found["convs"] += 1
            found["filters"] += full.shape[writes] * (blocks if node.op_type == "ConvTranspose" else 1)
        twin = pairs.get(k)
        held = None if twin is None else weight_input(twin, theirs)
        if twin is None or held is None:
            found["unmatched"].append(node.name or node.output[0])
            continue
        cut = theirs[twin.input[held]]
        keep = kept_mask(full, cut, blocks, layout(twin, held, cut)[1])
        if keep is None:
            found["unmatched"].append(node.name or node.output[0])
            continue
        gone = ~keep.any(axis=tuple(a for a in range(full.ndim) if a != writes))
        if node.op_type == "ConvTranspose" and blocks > 1:
            per = keep.reshape(blocks, -1, *keep.shape[1:]).any(axis=(1, *range(3, keep.ndim + 1)))
            gone = ~per.reshape(-1)
        if node.op_type.startswith("Conv"):
            found["removed"] += int(gone.sum())
        if keep.all():
            continue
        found["cut"] += 1
        values = np.where(keep | _twins(full, keep, writes), full, np.zeros((), full.dtype))
        _replace(reference, k, at, values)
        _zero_bias(reference, k, mine, gone & ~_twin_rows(full, writes, gone))
    return reference, found


def kept_mask(full: Array, cut: Array, blocks: int, left: int) -> Array | None:
    """Which elements of `full` survive in `cut`: a boolean array of its shape; None if `cut` is no part of it.

    A grouped Conv (its weight is `blocks` blocks along axis 0, `left` of them in `cut`) may lose whole blocks, and
    other rows and columns in every block.
    """
    keep = np.zeros(full.shape, bool)
    if blocks <= 1 or full.ndim != cut.ndim:
        index = matched(full, cut)
        if index is None:
            return None
        keep[np.ix_(*index)] = True
        return keep
    if full.shape[0] % blocks or left < 1 or cut.shape[0] % left:
        return None
    if full.shape[1] == cut.shape[1] == 1:  # depthwise: the rows are all there is
        index = matched(full, cut)
        if index is None:
            return None
        keep[index[0]] = True
        return keep
    wholes, parts = np.split(full, blocks), np.split(cut, left)
    views, last = np.split(keep, blocks), -1
    for part in parts:
        for b in range(last + 1, blocks):
            index = matched(wholes[b], part)
            if index is not None:
                views[b][np.ix_(*index)] = True
                last = b
                break
        else:
            return None
    return keep


def matched(full: Array, cut: Array) -> list[Array] | None:
    """For each axis of `full` the positions that survive in `cut`, in `cut`'s order; None if it is no part of it."""
    if full.ndim != cut.ndim or full.dtype != cut.dtype or (np.array(cut.shape) > full.shape).any():
        return None
    if full.shape == cut.shape and np.array_equal(full, cut):
        return [np.arange(n) for n in full.shape]
    axes = [a for a in range(full.ndim) if full.shape[a] != cut.shape[a]] or list(range(min(2, full.ndim)))
    for first in axes[:2]:
        for way in (by_rare_values, by_order):
            index = _found(full, cut, [first, *(a for a in axes if a != first)], way)
            if index is not None:
                return index
    return None


def _found(full: Array, cut: Array, axes: list[int], way: Callable[[Array, Array, int], Array | None]) -> Any:
    """Positions axis after axis: the last one by whole slices, those before by `way`."""
    index: list[Array] = [np.arange(n) for n in full.shape]
    for axis in axes:
        found = (by_slices if axis == axes[-1] else way)(full, cut, axis)
        if found is None:
            return None
        full, index[axis] = np.take(full, found, axis=axis), found
    return index if np.array_equal(full, cut) else None


def by_slices(full: Array, cut: Array, axis: int) -> Array | None:
    """Positions of whole slices along `axis`; of equal ones the next in order."""
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(np.ascontiguousarray(np.moveaxis(full, axis, 0))):
        places.setdefault(row.tobytes(), []).append(i)
    found, last = [], -1
    for row in np.ascontiguousarray(np.moveaxis(cut, axis, 0)):
        held = places.get(row.tobytes())
        if not held:
            return None
        i = next((p for p in held if p > last), held[0])
        held.remove(i)
        found.append(last := i)
    return np.asarray(found)


def by_rare_values(full: Array, cut: Array, axis: int) -> Array | None:
    """Positions along `axis` told by values that `full` holds once; None if some slice has none of them."""
    values, first, counts = np.unique(full, return_index=True, return_counts=True)
    rows = np.moveaxis(cut, axis, 0).reshape(cut.shape[axis], -1)
    at = np.minimum(np.searchsorted(values, rows), len(values) - 1)
    rare = (values[at] == rows) & (counts[at] == 1)
    if not rare.any(axis=1).all():
        return None
    places = np.unravel_index(first[at], full.shape)[axis]
    return np.asarray([np.bincount(p[r]).argmax() for p, r in zip(places, rare, strict=True)])


def by_order(full: Array, cut: Array, axis: int) -> Array | None:
    """Positions along `axis` of slices that hold the cut slices in their order: for each the first after the last."""
    other = next((a for a in range(full.ndim) if a != axis and full.shape[a] != cut.shape[a]), 1 - axis)

    def words(x: Array) -> list[list[bytes]]:
        moved = np.moveaxis(x, (axis, other), (0, 1))
        return [[w.tobytes() for w in row] for row in np.ascontiguousarray(moved)]

    whole, found, last = words(full), [], -1
    for part in words(cut):
        for i in range(last + 1, len(whole)):
            rest = iter(whole[i])
            if all(w in rest for w in part):
                break
        else:
            return None
        found.append(last := i)
    return np.asarray(found)


def _twin_rows(full: Array, writes: int, gone: Array) -> Array:
    """Rows that are gone and equal one that stays: which of them went cannot be told."""
    if not gone.any() or gone.shape[0] != full.shape[writes]:
        return np.zeros(gone.shape, bool)
    rows = [r.tobytes() for r in np.ascontiguousarray(np.moveaxis(full, writes, 0))]
    stay = {r for r, g in zip(rows, gone, strict=True) if not g}
    return np.asarray([g and r in stay for r, g in zip(rows, gone, strict=True)])


def _twins(full: Array, keep: Array, writes: int) -> Array:
    """Elements of such rows, as far as their columns stay."""
    gone = ~keep.any(axis=tuple(a for a in range(full.ndim) if a != writes))
    twin = _twin_rows(full, writes, gone)
    columns = keep.any(axis=writes, keepdims=True)
    return np.logical_and(columns, twin.reshape([-1 if a == writes else 1 for a in range(full.ndim)]))


# --- layers ---------------------------------------------------------------------------------------------------------


class Constants:
    """Values that a model knows without inputs: initializers, and nodes of which all inputs are known."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._held = {t.name: t for t in model.graph.initializer}
        self._made: dict[str, onnx.NodeProto] = {}
        for node in model.graph.node:
            graphs = any(a.HasField("g") for a in node.attribute)
            known = all(not x or x in self._held or x in self._made for x in node.input)
            if known and not graphs and node.op_type not in RANDOM:
                self._made.update(dict.fromkeys(node.output, node))
        self._values: dict[str, Array] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._made

    def __getitem__(self, name: str) -> Array:
        if name not in self._values:
            self._values[name] = self._compute(name)
        return self._values[name]

    def _compute(self, name: str) -> Array:
        if name in self._held:
            return numpy_helper.to_array(self._held[name])
        node = self._made[name]
        if node.op_type == "Identity":
            return self[node.input[0]]
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            return numpy_helper.to_array(node.attribute[0].t)
        wanted, nodes, held = [name], [], {}
        while wanted:
            value = wanted.pop()
            if value in self._held:
                held[value] = self._held[value]
            elif value in self._made and self._made[value] not in nodes:
                nodes.append(self._made[value])
                wanted.extend(x for x in self._made[value].input if x)
        nodes = [n for n in self._model.graph.node if n in nodes]
        graph = helper.make_graph(nodes, "constant", [], [onnx.ValueInfoProto(name=name)], list(held.values()))
        small = helper.make_model(
            graph, opset_imports=list(self._model.opset_import), ir_version=max(4, self._model.ir_version)
        )
        return np.asarray(_session(small).run([name], {})[0])


def weight_input(node: onnx.NodeProto, known: Constants) -> int | None:
    """Which input of a layer is its weight, None where the node is no layer."""
    if node.op_type not in READERS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return None
    if node.input[1] in known and node.input[0] not in known and known[node.input[1]].ndim > 1:
        return 1
    other = node.op_type == "MatMul" and node.input[0] in known and node.input[1] not in known
    return 0 if other and known[node.input[0]].ndim > 1 else None


def layout(node: onnx.NodeProto, at: int, weight: Array) -> tuple[int, int]:
    """The axis of a weight that holds its filters, and its number of blocks."""
    numbers = {a.name: a.i for a in node.attribute}
    last = weight.ndim - 1
    if node.op_type == "Conv":
        return 0, numbers.get("group", 1)
    if node.op_type == "ConvTranspose":
        return 1, numbers.get("group", 1)
    if node.op_type == "Gemm":
        return (0 if numbers.get("transB", 0) else 1), 1
    return (last if at == 1 else last - 1), 1


def paired(
    original: onnx.ModelProto, pruned: onnx.ModelProto, mine: Constants, theirs: Constants
) -> Iterator[tuple[int, onnx.NodeProto]]:
    """(index of a layer in the original, its node in the pruned model)."""
    layers = [(k, n) for k, n in enumerate(original.graph.node) if weight_input(n, mine) is not None]
    others = [n for n in pruned.graph.node if weight_input(n, theirs) is not None]
    by_output = {n.output[0]: n for n in others}
    in_order = [n.op_type for _, n in layers] == [n.op_type for n in others]
    for place, (k, node) in enumerate(layers):
        twin = by_output.get(node.output[0])
        if twin is None and in_order:
            twin = others[place]
        if twin is not None and twin.op_type == node.op_type:
            yield k, twin


def _replace(model: onnx.ModelProto, node: int, at: int, values: Array) -> None:
    """One input of one node gets a tensor of its own: others may share the old one."""
    name = f"oracle_{node}_{at}"
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    model.graph.node[node].input[at] = name


def _zero_bias(model: onnx.ModelProto, index: int, known: Constants, gone: Array) -> None:
    node = model.graph.node[index]
    if len(node.input) < 3 or node.input[2] not in known or not gone.any():
        return
    bias = known[node.input[2]]
    if bias.ndim and bias.shape[-1] == len(gone):
        _replace(model, index, 2, np.where(gone, np.zeros((), bias.dtype), bias))


# --- running --------------------------------------------------------------------------------------------------------


def unusable(original: onnx.ModelProto, pruned: onnx.ModelProto) -> str:
    """What the checker or strict shape inference hold against the pruned model and not against the original."""

    def check(model: onnx.ModelProto) -> None:
        onnx.checker.check_model(model, full_check=True)

    def infer(model: onnx.ModelProto) -> None:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)

    for what, step in (("the checker", check), ("shape inference", infer)):
        try:
            step(pruned)
        except Exception as exc:
            try:
                step(original)
            except Exception:
                continue
            return f"fails {what}: {_line(exc)}"
    return ""


def taps(model: onnx.ModelProto) -> list[str]:
    """The outputs, and what enters the saturating ops that make them."""
    made = {o: n for n in model.graph.node for o in n.output}
    names: list[str] = []
    for out in model.graph.output:
        names.append(out.name)
        node = made.get(out.name)
        if out.type.tensor_type.elem_type not in FLOATS:
            node = _compared(node, made)
        while node is not None and node.op_type in (*SATURATING, *PASSING) and node.input:
            if node.op_type in SATURATING:
                names.append(node.input[0])
            node = made.get(node.input[0])
    given = {i.name for i in model.graph.input} | {t.name for t in model.graph.initializer}
    return [n for n in dict.fromkeys(names) if n not in given]


def _compared(node: onnx.NodeProto | None, made: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The nearest node that turns floats into indices, `node` or above it: numbers made of those hide much."""
    seen: set[str] = set()
    wave = [] if node is None else [node]
    while wave:
        for n in wave:
            if n.op_type in ("ArgMax", "ArgMin"):
                return n
        names = [x for n in wave for x in n.input if x not in seen]
        seen.update(names)
        wave = [made[x] for x in names if x in made]
    return node


def first_run(model: onnx.ModelProto, seed: int) -> tuple[dict[str, Array], list[Array]]:
    """Feeds that a model runs on, and its outputs.

    Raises:
        OriginalError: It runs on none that were tried.
    """
    said = ""
    for size in SIZES:
        feeds = random_feeds(model, seed, size)
        try:
            return feeds, run(model, feeds, taps(model))
        except Exception as exc:
            said = said or _line(exc)
        if all(d.dim_value for i in _inputs(model) for d in list(i.type.tensor_type.shape.dim)[1:]):
            break
    raise OriginalError(f"ONNX Runtime does not run the original: {said}")


def random_feeds(model: onnx.ModelProto, seed: int, size: int) -> dict[str, Array]:
    """Normal floats and small integers for every input; dynamic axes get `size`, the first one `BATCH`."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for i in _inputs(model):
        tensor = i.type.tensor_type
        dims = [d.dim_value or (size if axis else BATCH) for axis, d in enumerate(tensor.shape.dim)]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        if dtype == np.bool_:
            feeds[i.name] = np.ones(dims, bool)
        elif dtype.kind in "iu":
            low, high = {"i1": (-100, 100), "u1": (0, 200)}.get(f"{dtype.kind}{dtype.itemsize}", (0, 2))
            feeds[i.name] = rng.integers(low, high, dims).astype(dtype)
        else:
            feeds[i.name] = rng.normal(size=dims).astype(dtype)
    return feeds


def run(model: onnx.ModelProto, feeds: dict[str, Array], names: Sequence[str]) -> list[Array]:
    """These values of a model."""
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    there = {o.name for o in wider.graph.output}
    wider.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in there)
    return [np.asarray(x) for x in _session(wider).run(list(names), feeds)]


def distance(want: Array, got: Array) -> float:
    """Largest |difference| over the largest |value| of `want`; inf where shapes, types or NaN differ."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    if not want.size or want.dtype.kind in "biuSUO":
        return 0.0  # what was compared to get them is tapped, too
    a, b = want.astype(np.float64), got.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    fine = np.isfinite(a)
    largest = float(np.abs(a[fine]).max(initial=0.0))
    return float(np.abs(a[fine] - b[fine]).max(initial=0.0)) / (largest + 1e-30)


def coarse(model: onnx.ModelProto) -> bool:
    """Whether a model computes in half precision or with quantized activations."""
    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return any(t.data_type in half and len(t.dims) > 1 for t in model.graph.initializer) or any(
        n.op_type == "QuantizeLinear" for n in model.graph.node
    )


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    held = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in held]


def _session(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # As it stands: fused integer kernels may saturate, and the reference's weights are floats where PRUNED's are not.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _line(exc: Exception) -> str:
    text = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {text[0][:200] if text else ''}"


def main(arguments: Sequence[str]) -> int:
    """Print one JSON line; 0 if exact."""
    original, pruned = (onnx.load(Path(a)) for a in arguments)
    result = judge(original, pruned)
    print(json.dumps(asdict(result)))
    return int(result.verdict != "exact")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
