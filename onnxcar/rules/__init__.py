"""One rule per operator, in one table, and the one walk that applies them.

A rule is a function of the `Walk` at a node. What has no rule protects the channels that enter it, and is listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxcar.channels import ChannelSpace
from onnxcar.facts import Facts, captured, trace
from onnxcar.model import Model
from onnxcar.rules import _elementwise as e
from onnxcar.rules import _index as x
from onnxcar.rules import _mixing as m
from onnxcar.rules import _producers as p
from onnxcar.rules._finish import finish
from onnxcar.rules._walk import Refused, Walk

Rule = Callable[[Walk], None]


def _nothing(w: Walk) -> None:
    """Sizes are no channels; what is computed from them is patched by `surgery` where channels are gone."""


_UNARY = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
_NARY = [
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Or",
    "Sum",
    "Where",
    "Xor",
]
_POOLS = [
    "AveragePool",
    "GlobalAveragePool",
    "GlobalLpPool",
    "GlobalMaxPool",
    "GridSample",
    "LpPool",
    "MaxPool",
    "MaxRoiPool",
    "RoiAlign",
]
_REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, e.same),
    **dict.fromkeys(_NARY, e.tie),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow"), e.legacy_broadcast),
    **dict.fromkeys(_POOLS, e.pool),
    **dict.fromkeys(_REDUCTIONS, m.reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), m.softmax),
    **dict.fromkeys(("ArgMax", "ArgMin", "TopK", "CumSum"), m.along_axis),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), x.reshape),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), e.quantize),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), p.recurrent),
    **dict.fromkeys(("Resize", "Upsample"), e.resize),
    **dict.fromkeys(("Shape", "Size"), _nothing),
    "BatchNormalization": e.batch_norm,
    "Concat": x.concat,
    "Conv": p.conv,
    "ConvTranspose": p.conv_transpose,
    "DepthToSpace": x.depth_to_space,
    "Einsum": m.einsum,
    "Expand": x.expand,
    "Gather": x.gather,
    "GatherND": x.gather_nd,
    "Gemm": p.gemm,
    "GroupNormalization": m.group_norm,
    "InstanceNormalization": m.instance_norm,
    "LRN": m.lrn,
    "LayerNormalization": m.layer_norm,
    "LpNormalization": m.lp_norm,
    "MatMul": p.matmul,
    "MeanVarianceNormalization": m.mean_variance,
    "PRelu": e.prelu,
    "Pad": x.pad,
    "RMSNormalization": m.rms_norm,
    "Slice": x.slice_,
    "SpaceToDepth": x.space_to_depth,
    "Split": x.split,
    "Tile": x.tile,
    "Transpose": x.transpose,
}

_MAKERS = (p.conv, p.conv_transpose, p.gemm, p.matmul, x.expand)  # rules that make labels where none enter


def analyze(model: Model, *, norms: str = "protect", facts: Facts | None = None) -> ChannelSpace:
    """Layers, groups, sites and reads of a model; no weight is read.

    Args:
        model: The network. Channels of its inputs and outputs never leave.
        norms: "protect" keeps channels under LayerNorm, one-group GroupNorm and channel means; "rewrite" frees them.
        facts: What is known of the values, where the caller has it already.
    """
    walk = Walk(facts if facts is not None else trace(model), norms=norms)
    functions = {(f.domain, f.name) for f in model.proto.functions}
    for index, node in enumerate(walk.graph.node):
        walk.index = index
        touched = [k for k in walk.labelled()]
        inner = [n for n in captured(node) if n in walk.labels]
        if all(walk.facts.constant(o) or not o for o in node.output):
            continue
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if (node.domain, node.op_type) in functions:
            rule = None
        if rule is not None and (touched or rule in _MAKERS):
            _apply(walk, rule, touched)
        elif rule is None and (touched or inner):
            walk.unsupported[node.op_type] = walk.unsupported.get(node.op_type, 0) + 1
            text = f"{node.op_type} has no rule" + (f" (domain {node.domain})" if node.domain else "")
            for name in [*(node.input[k] for k in touched), *inner]:
                walk.protect(walk.labels[name], text)
    return finish(walk)


def _apply(walk: Walk, rule: Rule, touched: list[int]) -> None:
    """Run a rule; where it refuses, take back what it noted and protect the channels that enter."""
    noted: tuple[list[Any], ...] = (walk.sites, walk.reads, walk.edits, walk.terms, walk.layers, walk.equal)
    before = [len(x) for x in noted]
    try:
        rule(walk)
    except Refused as exc:
        for held, n in zip(noted, before, strict=True):
            del held[n:]
        for name in walk.node.output:
            walk.labels.pop(name, None)
        op = walk.node.op_type
        if touched:
            walk.unsupported[op] = walk.unsupported.get(op, 0) + 1
        for k in touched:
            walk.protect(walk.lab_raw(k), f"{op}: {exc}")
