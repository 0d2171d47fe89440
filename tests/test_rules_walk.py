"""The walk: every rule has a case, what has none protects, and what holds for graphs as a whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcar.model import from_proto
from onnxcar.rules import RULES, analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import (
    Net,
    assert_exact,
    assert_protected,
    layer_of,
    n_groups,
    prunable,
    weights_of,
)
from tests.test_rules_elementwise import COMPARE, FLOATS, INTEGERS, LOGIC, UNARY, joined

C = 8


def start(filters: int = C, **options) -> tuple[Net, str]:
    net = Net(**options)
    return net, net.conv(net.input(), filters)


# --- every rule --------------------------------------------------------------------------------------------------

Case = Callable[[Net, str], str]  # from a value (N, 8, 8, 8) with 8 prunable channels to what a head reads


def norm(net: Net, op: str, a: str) -> str:
    return str(net.op(op, a, net.positive(C), net.random(C)))


def dense(net: Net, op: str, a: str) -> str:
    v = net.op("Flatten", net.op("GlobalAveragePool", a))
    return str(net.op(op, v, net.random(C, 7)))


def quantized(net: Net, a: str) -> str:
    return str(net.op("DequantizeLinear", net.op("QuantizeLinear", a, np.float32(0.02), np.int8(0)), np.float32(0.02)))


def sized(net: Net, op: str, a: str) -> str:
    """The value scaled by a number computed from its sizes."""
    n = net.op(op, a)
    if op == "Shape":
        n = net.op("Gather", n, np.asarray(1, np.int64))
    root = net.op("Sqrt", net.op("Cast", n, to=1))
    return str(net.op("Div", a, root))


def halves(net: Net, a: str) -> str:
    p, q = net.op("Split", a, net.ints(3, 5), n=2, axis=1)
    return str(net.op("Concat", q, p, axis=1))


def recurrent(net: Net, op: str, a: str) -> str:
    """Every row of positions a step, the channels its features."""
    gates, hidden = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 5
    steps = net.op("Transpose", net.op("ReduceMax", a, net.ints(3), keepdims=0), perm=[2, 0, 1])
    w, r = net.random(1, gates * hidden, C, scale=0.4), net.random(1, gates * hidden, hidden, scale=0.4)
    y = net.op(op, steps, w, r, net.random(1, 2 * gates * hidden), hidden_size=hidden)  # (steps, 1, N, hidden)
    return str(net.op("Transpose", net.op("Squeeze", y, net.ints(1)), perm=[1, 2, 0]))


def regions(net: Net, op: str, a: str) -> str:
    if op == "RoiAlign":
        boxes = np.asarray([[0, 0, 5, 5]], np.float32)
        return str(net.op(op, a, boxes, np.zeros(1, np.int64), output_height=3, output_width=3))
    return str(net.op(op, a, np.asarray([[0, 0, 0, 5, 5]], np.float32), pooled_shape=[3, 3]))


def chosen(net: Net, op: str, a: str) -> str:
    if op == "TopK":
        return str(net.op(op, a, net.ints(4), n=2, axis=3)[0])
    return str(net.op("Cast", net.op(op, a, axis=3), to=1))


MORE: dict[str, Case] = {
    "AveragePool": lambda net, a: net.op("AveragePool", a, kernel_shape=[2, 2]),
    "BatchNormalization": lambda net, a: net.norm(a),
    "Concat": lambda net, a: net.op("Concat", a, "x", axis=1),
    "Conv": lambda net, a: net.conv(a, 4, name="more"),
    "ConvTranspose": lambda net, a: net.op("ConvTranspose", a, net.random(C, 4, 2, 2)),
    "CumSum": lambda net, a: net.op("CumSum", a, np.asarray(2, np.int64)),
    "DepthToSpace": lambda net, a: net.op("DepthToSpace", a, blocksize=2),
    "DequantizeLinear": quantized,
    "Einsum": lambda net, a: net.op("Einsum", a, net.random(C, 4), equation="nchw,cd->ndhw"),
    "Expand": lambda net, a: net.op("Expand", net.op("GlobalMaxPool", a), net.ints(1, C, 4, 4)),
    "Flatten": lambda net, a: net.op("Flatten", a),
    "Gather": lambda net, a: net.op("Gather", a, net.ints(*range(C)[::-1]), axis=1),
    "GatherND": lambda net, a: net.op(
        "Transpose",
        net.op("GatherND", net.op("Transpose", a, perm=[1, 0, 2, 3]), np.arange(C)[::-1, None].astype(np.int64)),
        perm=[1, 0, 2, 3],
    ),
    "Gemm": lambda net, a: dense(net, "Gemm", a),
    "GridSample": lambda net, a: net.op(
        "GridSample", a, net.op("Transpose", net.conv("x", 2, name="grid"), perm=[0, 2, 3, 1]), align_corners=1
    ),
    "GroupNormalization": lambda net, a: net.declare(
        net.op("GroupNormalization", a, net.positive(C), net.random(C), num_groups=2), ["N", C, 8, 8]
    ),
    "InstanceNormalization": lambda net, a: norm(net, "InstanceNormalization", a),
    "LRN": lambda net, a: net.op("LRN", a, size=3, alpha=0.9),
    "LayerNormalization": lambda net, a: net.op("LayerNormalization", a, net.positive(8), axis=3),
    "LpNormalization": lambda net, a: net.op("LpNormalization", a, axis=1),
    "LpPool": lambda net, a: net.op("LpPool", a, kernel_shape=[2, 2]),
    "MatMul": lambda net, a: dense(net, "MatMul", a),
    "MaxPool": lambda net, a: net.op("MaxPool", a, kernel_shape=[2, 2]),
    "MeanVarianceNormalization": lambda net, a: net.op("MeanVarianceNormalization", a, axes=[0, 2, 3]),
    "PRelu": lambda net, a: net.op("PRelu", a, net.positive(C, 1, 1)),
    "Pad": lambda net, a: net.op("Pad", a, net.ints(0, 1, 0, 0, 0, 1, 0, 0)),
    "QuantizeLinear": quantized,
    "RMSNormalization": lambda net, a: net.op("RMSNormalization", a, net.positive(8), axis=3),
    "Reshape": lambda net, a: net.reshape(a, 0, C, 64),
    "Resize": lambda net, a: net.op("Resize", a, "", np.asarray([1, 1, 2, 2], np.float32)),
    "SpaceToDepth": lambda net, a: net.op("SpaceToDepth", a, blocksize=2),
    "Slice": lambda net, a: net.op("Slice", a, net.ints(2), net.ints(7), net.ints(1)),
    "Split": halves,
    "Squeeze": lambda net, a: net.op("Squeeze", net.op("GlobalAveragePool", a), net.ints(2, 3)),
    "Tile": lambda net, a: net.op("Tile", a, net.ints(1, 2, 1, 1)),
    "Transpose": lambda net, a: net.op("Transpose", a, perm=[0, 1, 3, 2]),
    "Unsqueeze": lambda net, a: net.op("Squeeze", net.op("Unsqueeze", a, net.ints(2)), net.ints(2)),
    "Upsample": lambda net, a: net.op("Upsample", a, np.asarray([1, 1, 2, 2], np.float32)),
    **{op: (lambda net, a, op=op: net.op(op, a)) for op in ("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool")},
    "Shape": lambda net, a: sized(net, "Shape", a),
    **{op: (lambda net, a, op=op: recurrent(net, op, a)) for op in ("LSTM", "GRU", "RNN")},
    **{op: (lambda net, a, op=op: regions(net, op, a)) for op in ("MaxRoiPool", "RoiAlign")},
    **{op: (lambda net, a, op=op: net.op(op, a, axis=3)) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{op: (lambda net, a, op=op: chosen(net, op, a)) for op in ("ArgMax", "ArgMin", "TopK")},
    **{
        op: (lambda net, a, op=op: net.reduce(op, net.op("Abs", net.op("Tanh", a)), [3]))
        for op in RULES
        if op.startswith("Reduce")
    },
    # the mean of all elements, as exporters write it
    "Size": lambda net, a: net.op(
        "Mul", a, net.op("Div", net.op("ReduceSum", a, keepdims=0), net.op("Cast", net.op("Size", a), to=1))
    ),
}
PAIRED = FLOATS | LOGIC | COMPARE | INTEGERS | {"Where"}
SINCE = {"Gelu": 20, "Swish": 24, "RMSNormalization": 23, "GroupNormalization": 21, "Upsample": 9}
GROUPS = {"DepthToSpace": 2, "GroupNormalization": 2}  # where channels leave in bundles; all others stay free


@pytest.mark.parametrize("op", sorted(RULES))
def test_every_rule_has_a_case_in_which_channels_are_prunable(op):
    net, a = start(opset=SINCE.get(op, 18), ir=10)
    y = joined(net, op, a, net.conv("x", C, name="other")) if op in PAIRED else {**UNARY, **MORE}[op](net, a)
    model = net.model(net.head(y, filters=3))
    space = analyze(model)
    assert any(n.op_type == op and any(x in space.labels for x in n.input) for n in model.proto.graph.node)
    assert space.unsupported == {}
    assert n_groups(space, "conv") == GROUPS.get(op, C)
    if op in MORE:  # the others are run in the tests of elementwise ops
        assert_exact(model, share=0.3, seeds=(0,), batches=(2,))


# --- what has no rule --------------------------------------------------------------------------------------------


def test_an_unknown_op_protects_what_enters_and_is_named():
    net, a = start()
    y = net.op("Det", a, name="odd")  # the determinant of each channel's map
    y = net.op("Unsqueeze", net.op("Tanh", y), net.ints(2))
    y = net.op("Conv", y, net.random(5, C, 1, scale=0.3), net.random(5), name="next")
    model = net.model(net.op("Gemm", net.op("Flatten", net.op("Tanh", y)), net.random(5, 4)))
    space = analyze(model)
    assert space.unsupported == {"Det": 1}
    assert_protected(space, "conv", "odd", "Det has no rule")
    assert n_groups(space, "next") == 5
    assert_exact(model)


def test_an_op_of_another_domain_protects_what_enters():
    net, a = start()
    y = net.op("FusedConv", a, net.random(5, C, 3, 3), name="fused", domain="com.microsoft", activation="Relu")
    net.declare(y, ["N", 5, 6, 6])
    space = analyze(from_proto(net.proto(net.head(y))))
    assert space.unsupported == {"FusedConv": 1}
    assert_protected(space, "conv", "fused", "domain com.microsoft")
    assert prunable(space, "tail") == 5


def test_an_op_of_another_domain_that_shares_a_name_has_no_rule():
    net, a = start()
    y = net.op("Relu", a, name="mine", domain="my.ops")
    net.declare(y, ["N", C, 8, 8])
    space = analyze(from_proto(net.proto(net.head(y))))
    assert_protected(space, "conv", "mine", "domain my.ops")


def test_functions_protect_what_enters():
    net, a = start()
    y = net.op("Twice", a, name="call", domain="local")
    net.declare(y, ["N", C, 8, 8])
    proto = net.proto(net.head(y))
    body = [helper.make_node("Add", ["v", "v"], ["w"])]
    imports = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("local", "Twice", ["v"], ["w"], body, imports))
    onnx.checker.check_model(proto, full_check=True)
    model = from_proto(proto)
    space = analyze(model)
    assert_protected(space, "conv", "call", "Twice has no rule")
    assert prunable(space, "tail") == 5
    assert_exact(model)


def test_a_function_that_shares_the_name_of_an_op_has_no_rule():
    net, a = start()
    proto = net.proto(net.head(net.op("Softsign", a, name="mine")))
    body = [helper.make_node("Softmax", ["input"], ["output"], axis=1)]  # not what the operator of this name does
    proto.functions.append(
        helper.make_function("", "Softsign", ["input"], ["output"], body, [helper.make_opsetid("", 17)])
    )
    space = analyze(from_proto(proto))
    assert_protected(space, "conv", "mine", "Softsign has no rule")


def conditional(net: Net, a: str) -> str:
    """If whose branches use `a` of the main graph."""
    kind = helper.make_tensor_value_info
    branches = [
        helper.make_graph([helper.make_node(op, [a], [f"{op}_inner"])], op, [], [kind(f"{op}_inner", 1, None)])
        for op in ("Relu", "Tanh")
    ]
    flag = net.op("Greater", net.op("ReduceMax", "x", keepdims=0), np.float32(0))
    return str(net.op("If", flag, name="choice", then_branch=branches[0], else_branch=branches[1]))


def test_what_a_branch_captures_is_protected():
    net, a = start()
    y = net.declare(conditional(net, a), ["N", C, 8, 8])
    y = net.op("Concat", y, net.conv("x", 4, name="free"), axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert_protected(space, "conv", "choice", "If has no rule")
    assert n_groups(space, "free") == 4
    assert_exact(model)


def test_a_weight_that_a_branch_captures_is_not_cut_under_it():
    net, a = start()
    shared = net.const(net.random(C, 1, 1), "shared")
    inner = helper.make_node("ReduceSum", [shared], ["inner"], keepdims=0)
    other = helper.make_node("ReduceMax", [shared], ["inner2"], keepdims=0)
    kind = helper.make_tensor_value_info
    then = helper.make_graph([inner], "then", [], [kind("inner", 1, [])])
    orelse = helper.make_graph([other], "else", [], [kind("inner2", 1, [])])
    flag = net.op("Greater", net.op("ReduceMax", "x", keepdims=0), np.float32(0))
    number = net.declare(net.op("If", flag, then_branch=then, else_branch=orelse, name="choice"), [])
    model = net.model(net.head(net.op("Add", net.op("Mul", a, shared), number)))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["shared"].shape == (C, 1, 1)


def test_a_loop_protects_what_it_carries():
    net, a = start()
    kind = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Tanh", ["v"], ["w"])],
        "body",
        [kind("i", TensorProto.INT64, []), kind("go", TensorProto.BOOL, []), kind("v", 1, None)],
        [kind("go_on", TensorProto.BOOL, []), kind("w", 1, None)],
    )
    y = net.op("Loop", np.asarray(2, np.int64), np.asarray(True), a, name="loop", body=body)
    y = net.declare(y, ["N", C, 8, 8])
    model = net.model(net.head(y))
    space = analyze(model)
    assert_protected(space, "conv", "loop", "Loop has no rule")
    assert_exact(model)


def test_sizes_that_are_not_known_protect():
    # NonZero: how many rows come out depends on the data
    net, a = start()
    rows = net.op("Transpose", net.op("NonZero", net.op("Relu", a)), name="rows")
    space = analyze(net.model(rows))
    assert prunable(space, "conv") == 0


# --- whole graphs ------------------------------------------------------------------------------------------------


def test_outputs_are_protected_and_what_lies_before_them_is_not():
    net, a = start()
    one = net.conv(a, 5, name="one")
    two = net.head(net.op("Relu", one))
    model = net.model(one, two)
    space = analyze(model)
    assert_protected(space, "one", one, "output of the network")
    assert (n_groups(space, "conv"), n_groups(space, "tail")) == (C, 5)
    for done in assert_exact(model):
        assert [o.name for o in done.pruned.proto.graph.output] == [one, two]


def test_an_output_in_the_middle_of_a_residual_stage_protects_all_of_it():
    net, a = start()
    b = net.op("Add", net.conv(a, C, name="block"), a)
    model = net.model(net.head(b), b)
    space = analyze(model)
    assert_protected(space, "conv", b, "output of the network")
    assert_protected(space, "block", b, "output of the network")
    assert_exact(model)


def test_several_inputs():
    net = Net()
    image, text = net.input(), net.input("t", ("N", 9))
    a = net.op("Relu", net.conv(image, C))
    g = net.op("Sigmoid", net.gemm(text, C, name="gate"))
    y = net.op("Mul", a, net.op("Unsqueeze", g, net.ints(2, 3)))
    model = net.model(net.head(y))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "gate").groups)
    for done in assert_exact(model):
        assert [i.name for i in done.pruned.proto.graph.input] == ["x", "t"]


def test_many_readers_of_one_value():
    net, a = start()
    parts = [net.conv(a, 3, name=f"reader{k}") for k in range(3)]
    y = net.op("Concat", *parts, net.op("MaxPool", a, kernel_shape=[3, 3], pads=[1] * 4), axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert len(space.groups) == C + 9 + 5
    (done,) = assert_exact(model, Plan([0, 1]))
    assert all(weights_of(done.pruned)[f"reader{k}_w"].shape[1] == C - 2 for k in range(3))
    assert_exact(model)


def test_one_value_read_twice_by_one_node():
    net, a = start()
    model = net.model(net.head(net.op("Mul", a, a)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_a_branch_that_reads_nothing_but_channels_gone_is_refused_and_not_emptied():
    net, a = start()
    part = net.op("Slice", a, net.ints(0), net.ints(2), net.ints(1))
    y = net.op("Concat", net.conv(part, 3, name="branch"), a, axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert not space.allows(1, {0})
    assert space.allows(1, {2})


@pytest.mark.parametrize("opset", range(7, 27))
def test_every_opset_that_runs(opset):
    net = Net(opset=opset, ir=3 if opset < 9 else 8 if opset < 19 else 10 if opset < 23 else 12)
    a = net.op("Relu", net.norm(net.conv(net.input(), C)))
    b = net.op("Relu", net.conv(a, C, group=C, name="depth"))
    b = net.conv(b, C, 1, name="point")
    y = net.op("Concat", net.op("Add", a, b), net.op("Dropout", a), axis=1)
    sizes = {"split": [4, 12]} if opset < 13 else {}
    p, q = net.op("Split", y, *([] if opset < 13 else [net.ints(4, 12)]), n=2, axis=1, **sizes)
    y = net.op("Concat", net.op("Sigmoid", q), p, axis=1)
    pads = [0, 1, 0, 0, 0, 1, 0, 0]
    y = net.op("Pad", y, pads=pads) if opset < 11 else net.op("Pad", y, net.ints(*pads))
    y = net.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = net.gemm(net.op("Tanh", net.gemm(net.op("Flatten", y), 5, name="dense")), 4)
    model = net.model(y)
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "dense")) == (C, 5)
    assert space.unsupported == {}
    assert_exact(model, seeds=(0,))


@pytest.mark.parametrize("ir", [3, 4, 7, 8, 10, 13])
def test_every_ir_version(ir):
    net, a = start(opset=8 if ir < 4 else 13, ir=ir)
    model = net.model(net.head(net.op("Relu", a)))
    assert n_groups(analyze(model), "conv") == C
    for done in assert_exact(model):
        assert done.pruned.proto.ir_version == ir


def test_nodes_without_names():
    net, a = start()
    y = net.head(net.op("Relu", a))
    for n in net.nodes:
        n.name = ""
    model = net.model(y)
    space = analyze(model)
    assert [x.node for x in space.layers] == ["Conv_0", "Conv_2", "Gemm_6"]
    assert space.groups[0].name == "Conv_0:0"
    assert_exact(model)


def test_weights_of_layers_that_are_wholly_protected():
    net, a = start()
    b = net.conv(a, 5, name="second")
    space = analyze(net.model(a, b))
    assert space.groups == ()
    for layer in space.layers:
        assert np.array_equal(space.weight(layer), weights_of(space.model)[layer.weight])


def test_nodes_of_one_name_do_not_mix_up_layers():
    net, a = start()
    y = net.head(net.op("Relu", net.conv(a, 5, name="second")))
    for n in net.nodes:
        n.name = "same"
    model = net.model(y)
    space = analyze(model)
    for layer in space.layers:
        assert space.weight(layer).shape[0] == layer.filters
        assert np.array_equal(space.weight(layer), weights_of(model)[layer.weight])


def test_analysis_does_not_change_the_model():
    net, a = start()
    model = net.model(net.head(net.op("Relu", a)))
    before = model.proto.SerializeToString()
    space = analyze(model)
    remove(space, Plan([0]))
    assert model.proto.SerializeToString() == before
