"""Ops that treat every channel alike, or tie branches position by position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import helper

from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import (
    Net,
    assert_exact,
    assert_kept,
    assert_protected,
    assert_valid,
    layer_of,
    n_groups,
    prunable,
    weights_of,
)

C = 6


def start(**options) -> tuple[Net, str]:
    """A network whose first Conv has C filters."""
    net = Net(**options)
    return net, net.conv(net.input(), C)


# --- labels pass -------------------------------------------------------------------------------------------------


def positive(net: Net, a: str) -> str:
    return str(net.op("Add", net.op("Abs", a), np.float32(0.5)))


def small(net: Net, a: str) -> str:
    return str(net.op("Mul", net.op("Tanh", a), np.float32(0.9)))


def as_float(net: Net, a: str) -> str:
    return str(net.op("Cast", a, to=1))


PLAIN = (
    "Abs Atan Ceil Celu Cos Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Mish Neg Relu Round "
    "Selu Sigmoid Sign Sin Softplus Softsign Tanh ThresholdedRelu Shrink Tan Sinh"
)
UNARY: dict[str, Callable[[Net, str], str]] = {
    **{op: (lambda net, a, op=op: str(net.op(op, a))) for op in PLAIN.split(" ")},
    "Acos": lambda net, a: net.op("Acos", small(net, a)),
    "Acosh": lambda net, a: net.op("Acosh", net.op("Add", positive(net, a), np.float32(1))),
    "Asin": lambda net, a: net.op("Asin", small(net, a)),
    "Asinh": lambda net, a: net.op("Asinh", a),
    "Atanh": lambda net, a: net.op("Atanh", small(net, a)),
    "BitwiseNot": lambda net, a: as_float(net, net.op("BitwiseNot", net.op("Cast", a, to=6))),
    "Cast": lambda net, a: as_float(net, net.op("Cast", a, to=10)),
    "CastLike": lambda net, a: net.op("CastLike", a, np.zeros(1, np.float32)),
    "Clip": lambda net, a: net.op("Clip", a, np.float32(-0.5), np.float32(0.7)),
    "Cosh": lambda net, a: net.op("Cosh", small(net, a)),
    "Dropout": lambda net, a: net.op("Dropout", a),
    "Gelu": lambda net, a: net.op("Gelu", a),
    "IsInf": lambda net, a: net.op("Where", net.op("IsInf", a), a, net.op("Neg", a)),
    "IsNaN": lambda net, a: net.op("Where", net.op("IsNaN", a), a, net.op("Neg", a)),
    "Log": lambda net, a: net.op("Log", positive(net, a)),
    "Not": lambda net, a: as_float(net, net.op("Not", net.op("Greater", a, np.float32(0.1)))),
    "Reciprocal": lambda net, a: net.op("Reciprocal", positive(net, a)),
    "Sqrt": lambda net, a: net.op("Sqrt", positive(net, a)),
    "Swish": lambda net, a: net.op("Swish", a),
}


@pytest.mark.parametrize("op", sorted(UNARY))
def test_what_treats_channels_alike_lets_them_pass(op):
    opset = {"Gelu": 20, "Swish": 24, "BitwiseNot": 18, "Mish": 18, "CastLike": 19}.get(op, 17)
    net, a = start(opset=opset, ir=8 if opset < 19 else 10)
    bias = net.random(1, C, 1, 1)
    y = UNARY[op](net, net.op("Add", a, bias, name="shift"))
    model = net.model(net.head(y, filters=3))
    space = analyze(model)
    assert any(n.op_type == op for n in model.proto.graph.node)
    assert (n_groups(space, "conv"), len(space.groups)) == (C, C + 3)
    assert space.unsupported == {}
    assert_exact(model, Plan([1, 4]))


def test_dropout_with_its_mask_and_opset_11():
    net, a = start(opset=11)
    y, kept = net.op("Dropout", a, n=2, ratio=0.5)
    y = net.op("Where", kept, y, net.op("Neg", y))
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2]}),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("LpPool", {"kernel_shape": [2, 2], "p": 2}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("GlobalLpPool", {"p": 2}),
    ],
)
def test_pools_let_channels_pass(op, options):
    net, a = start()
    model = net.model(net.head(net.op("Relu", net.op(op, a, name="pool", **options))))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    assert_exact(model)


def test_grid_sample_lets_channels_pass_but_not_those_of_its_grid():
    net = Net(opset=17)
    x = net.input()
    a = net.conv(x, C)
    grid = net.op("Transpose", net.op("Tanh", net.conv(x, 2, name="grid")), perm=[0, 2, 3, 1])
    model = net.model(net.head(net.op("GridSample", a, grid, name="sample", align_corners=1)))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    assert_protected(space, "grid", "sample", "steer")
    assert_exact(model)


@pytest.mark.parametrize("op", ["RoiAlign", "MaxRoiPool"])
def test_regions_of_interest_let_channels_pass(op):
    net, a = start(opset=16)
    if op == "RoiAlign":
        boxes = np.asarray([[0, 0, 4, 4], [1, 1, 7, 6]], np.float32)
        y = net.op(op, a, boxes, np.asarray([0, 0], np.int64), output_height=3, output_width=3)
    else:
        boxes = np.asarray([[0, 0, 0, 4, 4], [0, 1, 1, 7, 6]], np.float32)
        y = net.op(op, a, boxes, pooled_shape=[3, 3])
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_the_indices_of_a_max_pool_protect():
    net, a = start()
    y, indices = net.op("MaxPool", a, n=2, name="pool", kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("MaxUnpool", y, indices, kernel_shape=[2, 2], strides=[2, 2])
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "pool", "index output")


def test_the_unused_indices_of_a_max_pool_do_not_matter():
    net, a = start()
    net.nodes.append(helper.make_node("MaxPool", [a], ["p", ""], "pool", kernel_shape=[2, 2]))
    model = net.model(net.head("p"))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 19])
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resize_lets_channels_pass(opset, by):
    net = Net(opset=opset, ir=4 if opset < 12 else 9)
    a = net.conv(net.input(), C)
    scales = np.asarray([1, 1, 2, 2], np.float32)
    if opset == 9:
        y = net.op("Upsample", a, scales)
    elif opset == 10:
        y = net.op("Resize", a, scales)
    elif by == "scales":
        y = net.op("Resize", a, np.zeros(0, np.float32), scales)
    else:
        # the batch stays what it is: exporters take it from the shape
        batch = net.op("Slice", net.op("Shape", a), net.ints(0), net.ints(1))
        sizes = net.op("Concat", batch, net.ints(C, 16, 16), axis=0)
        y = net.op("Resize", a, np.zeros(0, np.float32), np.zeros(0, np.float32), sizes)
    y = net.op("Conv", y, net.random(5, C, 3, 3, scale=0.2))  # onnx infers no shape from the sizes of opset 11
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_resize_by_sizes_of_axes():
    net, a = start(opset=18)
    nothing = np.zeros(0, np.float32)
    y = net.op("Resize", a, nothing, nothing, net.ints(C, 16, 12), axes=[1, 2, 3])
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_resizing_the_channels_protects_them():
    net, a = start()
    y = net.op("Resize", a, np.zeros(0, np.float32), np.asarray([1, 2, 1, 1], np.float32), name="grow", mode="nearest")
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "grow", "size of this axis")
    assert prunable(space, "tail") == 5


def test_batch_normalization_is_cut_and_a_masked_channel_does_not_come_back():
    net, a = start()
    model = net.model(net.head(net.norm(a)))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    (done,) = assert_exact(model, Plan([0, 5]))
    assert all(weights_of(done.pruned)[n].shape == (4,) for n in weights_of(model) if n.startswith("bn_c"))
    assert_exact(model)


def test_batch_normalization_with_computed_parameters_protects():
    net, a = start()
    scale = net.op("Squeeze", net.reduce("ReduceMean", net.conv("x", C, name="other"), [0, 2, 3], 0))
    y = net.op("BatchNormalization", a, scale, net.random(C), net.random(C), net.positive(C), name="odd")
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "odd", "computed from the input")
    assert_protected(space, "other", "odd", "computed from the input")


@pytest.mark.parametrize(("shape", "opset"), [((C, 1, 1), 17), ((1, 1, 1), 17), ((1,), 9), ((C, 1, 1), 7)])
def test_prelu_slopes_follow_channels(shape, opset):
    net, a = start(opset=opset, ir=3 if opset < 10 else 8)
    model = net.model(net.head(net.op("PRelu", a, net.positive(*shape), name="act")))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 3]))
    assert weights_of(done.pruned)["act_c"].shape == tuple(4 if n == C else n for n in shape)


def test_prelu_with_a_computed_slope_ties():
    net, a = start()
    slope = net.conv("x", C, name="slope")
    model = net.model(net.head(net.op("PRelu", a, slope)))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "slope").groups)
    assert_exact(model)


# --- ties --------------------------------------------------------------------------------------------------------

FLOATS = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Pow"}
LOGIC = {"And", "Or", "Xor"}
COMPARE = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
INTEGERS = {"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod"}


def joined(net: Net, op: str, a: str, b: str) -> str:
    """`op` of two values, its result a float."""
    if op in LOGIC:
        return as_float(net, net.op(op, net.op("Greater", a, np.float32(0)), net.op("Less", b, np.float32(0.3))))
    if op == "Equal":
        return as_float(net, net.op(op, net.op("Floor", a), net.op("Floor", b)))
    if op in COMPARE:
        return as_float(net, net.op(op, a, b))
    if op in INTEGERS:
        kind = 12 if op == "BitShift" else 6
        x, y = (
            net.op("Cast", net.op("Add", net.op("Abs", net.op("Mul", v, np.float32(3))), np.float32(1)), to=kind)
            for v in (a, b)
        )
        options = {"direction": "RIGHT"} if op == "BitShift" else {}
        return net.op("Mul", as_float(net, net.op(op, x, y, **options)), np.float32(0.2))
    if op == "Pow":
        return net.op(op, positive(net, a), b)
    if op == "Div":
        return net.op(op, a, positive(net, b))
    if op == "Where":
        return net.op(op, net.op("Greater", a, np.float32(0)), a, b)
    return net.op(op, a, b)


@pytest.mark.parametrize("op", sorted(FLOATS | LOGIC | COMPARE | INTEGERS | {"Where"}))
def test_two_branches_tie_position_by_position(op):
    net, a = start(opset=18)
    b = net.conv("x", C, name="other")
    model = net.model(net.head(joined(net, op, a, b), filters=3))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "other").groups)
    assert (n_groups(space, "conv"), len(space.groups)) == (C, C + 3)
    assert space.groups[2].filters == (("conv_w", 2), ("other_w", 2))
    assert_exact(model, Plan([0, 2]))
    assert_exact(model, seeds=(1,))


@pytest.mark.parametrize("op", ["Max", "Min", "Mean", "Sum"])
def test_variadic_ops_tie_all_their_inputs(op):
    net, a = start()
    parts = [a, net.conv("x", C, name="second"), net.random(C, 1, 1), net.conv("x", C, name="third")]
    model = net.model(net.head(net.op(op, *parts)))
    space = analyze(model)
    assert len(space.groups) == C + 5
    assert_exact(model)


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (C, 1, 1), (C, 8, 8), (1, 1, 1, 1), (1, 1, 8, 8), ()])
@pytest.mark.parametrize("side", [0, 1])
def test_constants_of_arithmetic_are_cut_where_they_have_channels(shape, side):
    net, a = start()
    constant = net.const(net.random(*shape) if shape else np.float32(0.7), "k")
    model = net.model(net.head(net.op("Relu", net.op("Sub", *((a, constant) if side else (constant, a))))))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 3]))
    assert weights_of(done.pruned)["k"].shape == tuple(4 if n == C else n for n in shape)


def test_a_branch_with_one_channel_ties_nothing():
    net, a = start()
    gate = net.op("Sigmoid", net.conv("x", 1, name="gate"))
    model = net.model(net.head(net.op("Mul", a, gate)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_an_input_of_the_network_fixes_what_is_added_to_it():
    net = Net()
    x = net.input("x", ("N", C, 8, 8))
    y = net.op("Add", net.conv(x, C), x, name="join")
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "join", "channels are fixed")
    assert prunable(space, "tail") == 5


def test_squeeze_and_excite_ties_the_gate():
    net, a = start()
    a = net.op("Relu", a)
    g = net.op("Relu", net.conv(net.op("GlobalAveragePool", a), 3, 1, name="squeeze"))
    g = net.op("HardSigmoid", net.conv(g, C, 1, name="excite"))
    model = net.model(net.head(net.op("Mul", a, g)))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "excite").groups)
    assert (n_groups(space, "conv"), n_groups(space, "squeeze")) == (C, 3)
    assert_exact(model)


def test_swiglu_ties_gate_and_value():
    net = Net()
    x = net.input("x", ("N", 5, 9))
    gate, value = (net.op("MatMul", x, net.random(9, 7, scale=0.4), name=n) for n in ("gate", "value"))
    y = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), value)
    model = net.model(net.op("MatMul", y, net.random(7, 4, scale=0.4)))
    space = analyze(model)
    assert len(space.groups) == 7
    assert_exact(model)


def test_residuals_tie_a_whole_stage():
    net, a = start()
    a = net.op("Relu", a)
    for k in range(2):
        b = net.op("Relu", net.conv(a, 4, name=f"inner{k}"))
        a = net.op("Relu", net.op("Add", net.conv(b, C, name=f"outer{k}"), a))
    model = net.model(net.head(a))
    space = analyze(model)
    assert space.groups[0].filters == (("conv_w", 0), ("outer0_w", 0), ("outer1_w", 0))
    assert len(space.groups) == C + 4 + 4 + 5
    assert_exact(model)


@pytest.mark.parametrize("axis", [1, -3])
def test_broadcast_by_attribute_before_opset_7(axis):
    net = Net(opset=6, ir=3)
    x = net.input()
    a = net.op("Conv", x, net.random(C, 3, 3, 3, scale=0.3), name="conv", pads=[1] * 4)
    b = net.op("Add", a, net.random(C), name="shift", axis=axis, broadcast=1)
    b = net.op("Mul", b, net.random(C), name="scale", axis=1, broadcast=1)
    b = net.op("Relu", b)
    y = net.op("Conv", b, net.random(5, C, 3, 3, scale=0.3), name="next")
    z = net.op("Flatten", net.op("GlobalAveragePool", y))
    model = net.model(net.op("Gemm", z, net.random(4, 5), net.random(4), transB=1, broadcast=1))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "next")) == (C, 5)
    # ONNX Runtime does not run this opset, so only what can be read off the file is checked
    pruned = remove(space, Plan([0, 2, 7]))
    assert_valid(pruned)
    assert_kept(space, Plan([0, 2, 7]), pruned)
    assert [weights_of(pruned)[n].shape for n in ("shift_c", "scale_c", "next_c")] == [(4,), (4,), (4, 4, 3, 3)]


def test_legacy_broadcast_of_two_branches_ties_along_the_axis():
    net = Net(opset=6, ir=3)
    x = net.input()
    a = net.op("Conv", x, net.random(C, 3, 3, 3, scale=0.3), name="conv", pads=[1] * 4)
    g = net.op("Conv", net.op("GlobalAveragePool", x), net.random(C, 3, 1, 1), name="gate")
    g = net.op("Squeeze", g, axes=[2, 3])
    g = net.op("ReduceSum", g, axes=[0], keepdims=0)
    b = net.op("Mul", a, g, axis=1, broadcast=1)
    space = analyze(net.model(net.op("Conv", b, net.random(4, C, 1, 1), name="last")))
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "gate").groups)
    assert n_groups(space, "conv") == C


def test_channels_never_broadcast_against_positions():
    # (N, C, 1, 1) + (N, 1, 8, 8) of a matrix product: axes of different labels
    net, a = start()
    b = net.op("Transpose", net.conv("x", 8, name="other"), perm=[0, 2, 1, 3])  # (N, 8, 8 channels, 8)
    b = net.reduce("ReduceMean", b, [1])
    model = net.model(net.head(net.op("Add", a, b)))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    assert prunable(space, "other") == 0
    assert_exact(model)


# --- quantization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
def test_activations_may_be_quantized(per_channel):
    net, a = start()
    if per_channel:
        scale, zero = net.positive(C) * np.float32(0.02), np.zeros(C, np.int8)
    else:
        scale, zero = np.float32(0.02), np.int8(3)
    q = net.op("QuantizeLinear", a, scale, zero, name="q", axis=1)
    b = net.op("DequantizeLinear", q, scale, zero, name="dq", axis=1)
    model = net.model(net.head(b))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 4]))
    if per_channel:
        assert weights_of(done.pruned)["q_c"].shape == (4,)
    assert_exact(model)


def test_a_computed_scale_per_channel_protects():
    net, a = start(opset=19, ir=9)
    scale = net.op("Abs", net.op("Squeeze", net.reduce("ReduceMean", net.conv("x", C, name="other"), [0, 2, 3], 0)))
    q = net.op("QuantizeLinear", a, scale, np.zeros(C, np.int8), name="q", axis=1)
    space = analyze(net.model(net.head(net.op("DequantizeLinear", q, np.float32(0.1), np.int8(0)))))
    assert_protected(space, "conv", "q", "computed from the input")


def test_a_quantized_network():
    # weights, activations and biases as quantization tools write them
    net = Net(opset=13)
    x = net.input()

    def qdq(value, scale=0.02):
        q = net.op("QuantizeLinear", value, np.float32(scale), np.int8(0))
        return net.op("DequantizeLinear", q, np.float32(scale), np.int8(0))

    def layer(value, c_in, c_out, name):
        w = net.rng.integers(-60, 60, (c_out, c_in, 3, 3)).astype(np.int8)
        scale = net.positive(c_out) * np.float32(0.005)
        weight = net.op("DequantizeLinear", net.const(w, f"{name}_w"), scale, np.zeros(c_out, np.int8), axis=0)
        b = net.const(net.rng.integers(-3000, 3000, c_out).astype(np.int32), f"{name}_b")
        bias = net.op("DequantizeLinear", b, scale * np.float32(0.02), np.zeros(c_out, np.int32), axis=0)
        return net.op("Conv", value, weight, bias, name=name, pads=[1] * 4)

    a = qdq(net.op("Relu", layer(qdq(x), 3, 8, "one")))
    b = qdq(net.op("Relu", layer(a, 8, 8, "two")))
    model = net.model(net.head(net.op("Add", a, b)))
    space = analyze(model)
    assert n_groups(space, "one") == 8
    assert space.groups[0].filters == (("one_w", 0), ("two_w", 0))
    for done in assert_exact(model):
        held = weights_of(done.pruned)
        kept = 8 - len(done.plan.removed(done.space).get("one_w", []))
        assert held["one_w"].dtype == np.int8
        assert held["one_w"].shape[0] == held["two_w"].shape[1] == held["one_b"].shape[0] == kept
