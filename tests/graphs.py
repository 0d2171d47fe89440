"""Small networks for tests, and the one check they are all held to: removed equals masked.

`Net` builds a graph node by node with seeded random weights; `assert_exact` removes random plans from it and holds
the result against the masked original in plain ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcar.channels import ChannelSpace
from onnxcar.model import Model, from_proto
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, mask, remove

# Outputs are of order one (asserted), made of sums of at most some thousand products: another order of summation in
# float32 moves them by 1e-5 at most. Half precision carries 11 bits, which some ten layers add up to 1e-2.
ATOL = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-10, np.dtype(np.float16): 1e-2}
MOVED = 1e-3  # masking must change an output by this and by ten times the tolerance, else the case shows nothing

Value = str | np.ndarray
Dim = int | str


class Net:
    """A graph under construction; values are names, arrays given as inputs become initializers.

    Args:
        opset: Version of the default operator set.
        ir: IR version; below 4 the weights are listed among the inputs.
        dtype: Type of weights and inputs.
        seed: Of the weights.
    """

    def __init__(self, *, opset: int = 17, ir: int = 8, dtype: Any = np.float32, seed: int = 0) -> None:
        self.opset, self.ir, self.dtype = opset, ir, np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.declared: list[onnx.ValueInfoProto] = []
        self.domains: dict[str, int] = {"": opset}
        self._names: set[str] = set()

    def name(self, like: str) -> str:
        """A name that is not taken yet."""
        name, k = like, 1
        while name in self._names:
            k += 1
            name = f"{like}{k}"
        self._names.add(name)
        return name

    def input(self, name: str = "x", shape: Sequence[Dim] = ("N", 3, 8, 8), dtype: Any = None) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(self.name(name), kind, list(shape)))
        return name

    def const(self, value: Any, name: str = "const") -> str:
        """An initializer; single floats take the network's type."""
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype == np.float64:
            array = array.astype(self.dtype)
        name = self.name(name)
        self.weights.append(numpy_helper.from_array(np.array(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.asarray(values, np.int64), "ints")

    def random(self, *dims: int, scale: float = 1.0) -> np.ndarray:
        return (self.rng.standard_normal(dims) * scale).astype(self.dtype)

    def positive(self, *dims: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, dims).astype(self.dtype)

    def op(self, op_type: str, *inputs: Value, n: int = 1, name: str = "", domain: str = "", **attributes: Any) -> Any:
        """Output name of a new node, a list of names with `n` above 1."""
        name = self.name(name or op_type.lower())
        ins = [x if isinstance(x, str) else self.const(x, f"{name}_c") for x in inputs]
        outs = [self.name(f"{name}_y" if n == 1 else f"{name}_y{i}") for i in range(n)]
        self.nodes.append(helper.make_node(op_type, ins, outs, name, domain=domain, **attributes))
        if domain:
            self.domains.setdefault(domain, 1)
        return outs[0] if n == 1 else outs

    def declare(self, value: str, shape: Sequence[Dim]) -> str:
        """Write down the shape of a value that shape inference does not find."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.declared = [i for i in self.declared if i.name != value]
        self.declared.append(helper.make_tensor_value_info(value, kind, list(shape)))
        return value

    def shape(self, value: str) -> list[int]:
        """Shape of a value, 0 where symbolic."""
        kind = self._infer([value])[value]
        return [d.dim_value for d in kind.tensor_type.shape.dim]

    def conv(
        self,
        x: str,
        filters: int,
        kernel: int = 3,
        *,
        group: int = 1,
        bias: bool = True,
        name: str = "conv",
        weight: Value | None = None,
        **attributes: Any,
    ) -> str:
        """Conv over any number of spatial axes, `same` padding."""
        shape = self.shape(x)
        spatial = len(shape) - 2
        name = self.name(name)
        if weight is None:
            dims = (filters, shape[1] // group, *(kernel,) * spatial)
            scale = (1.5 / np.prod(dims[1:])) ** 0.5
            weight = self.const(self.random(*dims, scale=scale), f"{name}_w")
        inputs = [x, weight] + ([self.const(self.random(filters, scale=0.3), f"{name}_b")] if bias else [])
        attributes.setdefault("pads", [kernel // 2] * 2 * spatial)
        attributes.setdefault("kernel_shape", [kernel] * spatial)
        self._names.discard(name)
        return str(self.op("Conv", *inputs, name=name, group=group, **attributes))

    def gemm(self, x: str, units: int, *, name: str = "fc", bias: bool = True) -> str:
        n = self.shape(x)[-1]
        name = self.name(name)
        inputs = [x, self.const(self.random(units, n, scale=n**-0.5), f"{name}_w")]
        if bias or self.opset < 11:
            inputs.append(self.const(self.random(units, scale=0.3), f"{name}_b"))
        self._names.discard(name)
        return str(self.op("Gemm", *inputs, name=name, transB=1))

    def norm(self, x: str, name: str = "bn") -> str:
        c = self.shape(x)[1]
        params = [self.positive(c), self.random(c, scale=0.3), self.random(c, scale=0.3), self.positive(c)]
        return str(self.op("BatchNormalization", x, *params, name=name))

    def reduce(self, op_type: str, x: Value, axes: Sequence[int], keepdims: int = 1, name: str = "") -> str:
        """A reduction with its axes where the opset wants them."""
        since = 13 if op_type == "ReduceSum" else 18
        if self.opset >= since:
            return str(self.op(op_type, x, self.ints(*axes), keepdims=keepdims, name=name))
        return str(self.op(op_type, x, axes=list(axes), keepdims=keepdims, name=name))

    def reshape(self, x: str, *sizes: int, name: str = "") -> str:
        return str(self.op("Reshape", x, self.ints(*sizes), name=name))

    def head(self, x: str, classes: int = 4, filters: int = 5) -> str:
        """A reader behind any value: a Conv where it has positions, their mean, a Gemm.

        The Conv has `filters` prunable filters of its own, the Gemm's units are the output.
        """
        rank = len(self.shape(x))
        if rank > 2:
            y = self.conv(x, filters, 3, name="tail")
            y = self.op("LeakyRelu", y, name="tail_act", alpha=0.1)  # no filter is dead on any input
            y = self.op("Flatten", self.op("GlobalAveragePool", y, name="tail_pool"), name="tail_flat")
        else:
            y = self.op("LeakyRelu", self.gemm(x, filters, name="tail"), name="tail_act", alpha=0.1)
        return self.gemm(y, classes, name="head")

    def proto(self, *outputs: str) -> onnx.ModelProto:
        """The model with these outputs, checked in full."""
        return self._build([*self._infer(outputs).items()])

    def model(self, *outputs: str) -> Model:
        proto = self.proto(*outputs)
        onnx.checker.check_model(proto, full_check=True)
        return from_proto(proto)

    def _build(self, outputs: Iterable[tuple[str, onnx.TypeProto]]) -> onnx.ModelProto:
        outs = [helper.make_value_info(k, v) for k, v in outputs]
        inputs = list(self.inputs)
        if self.ir < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.weights]
        graph = helper.make_graph(self.nodes, "net", inputs, outs, self.weights, value_info=self.declared)
        imports = [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        return helper.make_model(graph, opset_imports=imports, ir_version=self.ir)

    def _infer(self, values: Sequence[str]) -> dict[str, onnx.TypeProto]:
        unknown = helper.make_tensor_type_proto(onnx.TensorProto.UNDEFINED, None)
        proto = self._build((v, unknown) for v in values if v not in {i.name for i in self.inputs})
        found = onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=False).graph
        types = {i.name: i.type for i in (*found.input, *found.output, *found.value_info)}
        return {v: types[v] for v in values}


# --- running -----------------------------------------------------------------------------------------------------


Feeds = dict[str, np.ndarray]
Runner = Callable[[Model, Sequence[Feeds]], list[list[np.ndarray]]]


def run(model: Model, given: Feeds) -> list[np.ndarray]:
    """All outputs in plain ONNX Runtime, one thread."""
    return run_all(model, [given])[0]


def run_all(model: Model, given: Sequence[Feeds]) -> list[list[np.ndarray]]:
    """`run` for several inputs in one session."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    data = model.proto.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [list(session.run(None, x)) for x in given]


def run_reference(model: Model, given: Sequence[Feeds]) -> list[list[np.ndarray]]:
    """`run_all` in onnx's reference evaluator, for what ONNX Runtime does not do."""
    session = ReferenceEvaluator(model.proto)
    return [list(session.run(None, x)) for x in given]


def feeds(model: Model, batch: int, seed: int = 0, size: int = 8) -> Feeds:
    """Random inputs: symbolic first axes get `batch`, other symbolic axes `size`."""
    rng = np.random.default_rng(seed)
    held = {t.name for t in model.proto.graph.initializer}
    out = {}
    for i in model.proto.graph.input:
        if i.name in held:
            continue
        kind = i.type.tensor_type
        dims = [d.dim_value or (batch if a == 0 else size) for a, d in enumerate(kind.shape.dim)]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype == np.bool_:
            out[i.name] = rng.random(dims) < 0.5
        elif np.issubdtype(dtype, np.integer):
            out[i.name] = rng.integers(0, 2, dims).astype(dtype)
        else:
            out[i.name] = rng.standard_normal(dims).astype(dtype)
    return out


def batches_of(model: Model, wanted: Sequence[int]) -> Sequence[int]:
    """`wanted` where the batch is symbolic, else the one it is fixed to."""
    first = model.proto.graph.input[0].type.tensor_type.shape.dim[0]
    return [first.dim_value] if first.dim_value else wanted


# --- plans -------------------------------------------------------------------------------------------------------


def random_plan(space: ChannelSpace, share: float = 0.4, seed: int = 0) -> Plan:
    """A share of the groups in random order, each taken only where `space.allows` it; at least one."""
    rng = np.random.default_rng(seed)
    gone: set[int] = set()
    want = max(1, round(share * len(space.groups)))
    for g in rng.permutation(len(space.groups)).tolist():
        if len(gone) >= want:
            break
        if space.allows(g, gone):
            gone.add(g)
    assert gone, "no group of this model may go"
    return Plan(gone)


@dataclass(frozen=True)
class Exact:
    """One plan that was held against its mask."""

    space: ChannelSpace
    plan: Plan
    pruned: Model
    masked: Model
    moved: float  # what masking changed at most, in units of what it must


def assert_exact(
    model: Model,
    plan: Plan | None = None,
    *,
    share: float = 0.4,
    seeds: Sequence[int] = (0, 1),
    batches: Sequence[int] = (1, 3),
    norms: str = "protect",
    size: int = 8,
    atol: float | None = None,
    runner: Runner | None = None,
    trivial: bool = False,
) -> list[Exact]:
    """Remove `plan`, or a random one for each of `seeds`, and hold it against the mask; returns what was checked.

    With `trivial` a plan that changes no output is no failure: the caller counts them.
    """
    space = analyze(model, norms=norms)
    out = []
    for seed in seeds if plan is None else (0,):
        chosen = random_plan(space, share, seed) if plan is None else plan
        done = _assert_one(space, chosen, batches, seed, size, atol, runner or run_all)
        assert trivial or done.moved > 1, "masking changed nothing: the case is trivial"
        out.append(done)
    return out


def _assert_one(
    space: ChannelSpace, plan: Plan, batches: Sequence[int], seed: int, size: int, atol: float | None, runner: Runner
) -> Exact:
    model = space.model
    pruned, masked = remove(space, plan), mask(space, plan)
    assert_valid(pruned)
    assert_kept(space, plan, pruned)
    changes = []
    given = [feeds(model, b, seed, size) for b in batches_of(model, batches)]
    for base, want, got in zip(*(runner(m, given) for m in (model, masked, pruned)), strict=True):
        for o, x, y, z in zip(model.proto.graph.output, base, want, got, strict=True):
            assert y.shape == z.shape == x.shape, o.name
            assert y.dtype == z.dtype
            if not np.issubdtype(x.dtype, np.floating):
                assert np.array_equal(y, z), o.name
                continue
            limit = atol or ATOL[x.dtype]
            x, y, z = (v.astype(np.float64) for v in (x, y, z))
            assert np.isfinite(x).all(), "the unpruned network overflows: the case shows nothing"
            assert np.abs(y).max() < 100, "outputs so large that the absolute tolerance is too strict"
            assert np.abs(y - z).max() <= limit, (
                f"{o.name}: off by {np.abs(y - z).max():.3g}, plan {sorted(plan.groups)}"
            )
            changes.append(np.abs(x - y).max() / max(MOVED, 10 * limit))
    return Exact(space, plan, pruned, masked, max(changes))


def assert_valid(model: Model) -> None:
    """Full checker, and strict shape inference with the shapes it declares."""
    onnx.checker.check_model(model.proto, full_check=True)
    onnx.shape_inference.infer_shapes(model.proto, check_type=True, strict_mode=True, data_prop=True)


def assert_kept(space: ChannelSpace, plan: Plan, pruned: Model) -> None:
    """What must survive a removal does: names, types of inputs and outputs, metadata, values bit for bit."""
    old, new = space.model.proto, pruned.proto
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(new, field) == getattr(old, field), field
    assert list(new.metadata_props) == list(old.metadata_props)
    assert list(new.opset_import) == list(old.opset_import)
    assert list(new.functions) == list(old.functions)
    assert new.graph.name == old.graph.name
    assert new.graph.doc_string == old.graph.doc_string
    assert list(new.graph.output) == list(old.graph.output)
    weights = {t.name: t for t in old.graph.initializer}
    assert [i for i in new.graph.input if i.name in {x.name for x in old.graph.input} - weights.keys()] == [
        i for i in old.graph.input if i.name not in weights
    ]
    originals = {n.name for n in old.graph.node}
    order = [n.name for n in new.graph.node if n.name in originals]
    assert order == [n.name for n in old.graph.node if n.name in set(order)], "nodes changed places"
    held = {t.name: t for t in new.graph.initializer}
    gone = 0
    for name, t in held.items():
        if name in weights:
            before, after = numpy_helper.to_array(weights[name]), numpy_helper.to_array(t)
            assert before.dtype == after.dtype
            assert before.ndim == after.ndim
            assert t.doc_string == weights[name].doc_string
            assert np.isin(after.view(_bits(after)), before.view(_bits(before))).all(), f"values of {name} changed"
            gone += before.size - after.size
    removed = plan.removed(space)
    assert sum(map(len, removed.values())), "nothing was removed"
    for layer in space.layers:
        if layer.weight in removed and layer.weight in held and held[layer.weight].dims != weights[layer.weight].dims:
            _assert_filters(layer, weights[layer.weight], held[layer.weight], removed[layer.weight])


def _assert_filters(layer: Any, before: onnx.TensorProto, after: onnx.TensorProto, removed: list[int]) -> None:
    """Each surviving filter holds values of the original filter of its index, in the original order."""
    a, b = numpy_helper.to_array(before), numpy_helper.to_array(after)
    if a.shape[layer.axis] != layer.filters:  # ConvTranspose with conv_groups
        return
    kept = [i for i in range(layer.filters) if i not in set(removed)]
    assert b.shape[layer.axis] == len(kept), layer
    for i, j in enumerate(kept):
        assert np.isin(np.take(b, i, layer.axis), np.take(a, j, layer.axis)).all(), f"filter {j} of {layer.weight}"


def _bits(array: np.ndarray) -> Any:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize]


def weights_of(model: Model) -> dict[str, np.ndarray]:
    """Initializers by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}


def node_of(model: Model, name: str) -> onnx.NodeProto:
    return next(n for n in model.proto.graph.node if n.name == name)


def layer_of(space: ChannelSpace, node: str) -> Any:
    return next(x for x in space.layers if x.node == node)


def prunable(space: ChannelSpace, node: str) -> int:
    """How many filters of a layer may go."""
    return int((layer_of(space, node).groups >= 0).sum())


def n_groups(space: ChannelSpace, node: str) -> int:
    """How many groups the prunable filters of a layer form."""
    ids = layer_of(space, node).groups
    return len(set(ids[ids >= 0].tolist()))


def assert_protected(space: ChannelSpace, layer: str, node: str, words: str, filters: int | None = None) -> None:
    """Filters of `layer` (all where `filters` is None) are protected by `node` for a reason that says `words`."""
    found = [p for p in space.protected if p.layer == layer]
    hits = [p for p in found if p.node == node and words in p.reason]
    n = layer_of(space, layer).filters if filters is None else filters
    assert sum(len(p.filters) for p in hits) == n, found
