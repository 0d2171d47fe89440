"""Shapes, small values and constness, known without running; MACs counted by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcar.facts import BATCHES, captured, trace, uses
from onnxcar.model import from_proto
from onnxcar.rules import analyze
from tests.graphs import Net


def value_of(net: Net, name: str):
    """What is known of a value of an unfinished network."""
    model = from_proto(net.proto(net.op("Identity", "x")))
    return trace(model).value(name)


# --- shapes ------------------------------------------------------------------------------------------------------


def test_shapes_are_concrete_and_the_batch_is_told_apart():
    net = Net()
    a = net.conv(net.input(), 6, strides=[2, 2])
    b = net.op("Flatten", a)
    facts = trace(net.model(net.head(a), b))
    assert BATCHES == (2, 3)
    assert facts.shape(a) == (2, 6, 4, 4)
    assert facts.shape(b) == (2, 96)
    assert facts.dims_fixed(a) == (False, True, True, True)
    assert facts.dims_fixed("conv_w") == (True,) * 4
    assert facts.shape("nobody") is None
    assert facts.dims_fixed("nobody") == ()


def test_a_batch_merged_with_positions_is_not_fixed():
    net = Net()
    a = net.conv(net.input(), 6)
    b = net.reshape(net.op("Transpose", a, perm=[0, 2, 3, 1]), -1, 6)
    facts = trace(net.model(net.head(a), b))
    assert facts.shape(b) == (128, 6)
    assert facts.dims_fixed(b) == (False, True)


def test_a_fixed_batch_is_fixed():
    net = Net()
    a = net.conv(net.input("x", (4, 3, 8, 8)), 6)
    facts = trace(net.model(net.head(a)))
    assert facts.shape(a) == (4, 6, 8, 8)
    assert all(facts.dims_fixed(a))


def test_dynamic_sizes_are_those_for_which_the_graph_fits():
    # only 32 pixels give the 16 x 16 positions that the dense layer takes
    net = Net()
    net.input("x", ("N", 3, "H", "W"))
    a = net.op("Conv", "x", net.random(6, 3, 3, 3), strides=[2, 2], pads=[1] * 4, name="conv")
    net.declare(b := net.op("Flatten", a), ["N", 6 * 256])
    facts = trace(net.model(net.op("Gemm", b, net.random(6 * 256, 4))))
    assert facts.shape(a) == (2, 6, 16, 16)


def test_a_dynamic_channel_axis_is_what_the_first_conv_reads():
    net = Net()
    net.input("x", ("N", "C", "H", "W"))
    a = net.op("Conv", "x", net.random(6, 5, 1, 1), name="conv")
    facts = trace(net.model(a))
    assert facts.shape("x")[:2] == (2, 5)
    assert facts.shape(a)[1] == 6


def test_declared_shapes_stand_in_where_inference_fails():
    net = Net()
    a = net.conv(net.input(), 6)
    b = net.op("Odd", a, domain="some.where")
    net.declare(b, ["N", 6, 5, 5])
    facts = trace(from_proto(net.proto(net.op("Relu", b))))
    assert facts.shape(b) == facts.shape("relu_y") == (2, 6, 5, 5)
    assert not facts.dims_fixed(b)[0]


def test_declared_shapes_do_not_beat_inference():
    net = Net()
    a = net.conv(net.input(), 6)
    model = net.model(net.head(a))
    wrong = onnx.ModelProto.FromString(model.proto.SerializeToString())
    wrong.graph.value_info.append(helper.make_tensor_value_info(a, TensorProto.FLOAT, [1, 1, 1, 1]))
    assert trace(from_proto(wrong)).shape(a) == (2, 6, 8, 8)


def test_an_unknown_symbol_stays_unknown():
    net = Net()
    b = net.op("Odd", net.input(), domain="some.where")
    net.declare(b, ["N", "who knows"])
    assert trace(from_proto(net.proto(b))).shape(b) is None


def test_types():
    net = Net()
    a = net.op("Cast", net.input(), to=TensorProto.FLOAT16)
    facts = trace(net.model(net.op("ArgMax", a, axis=1), a))
    assert facts.dtype("x") == TensorProto.FLOAT
    assert facts.dtype(a) == TensorProto.FLOAT16
    assert facts.dtype("argmax_y") == TensorProto.INT64
    assert facts.dtype("nobody") == 0


# --- values ------------------------------------------------------------------------------------------------------


def test_shape_arithmetic_folds():
    net = Net()
    x = net.input()
    shape = net.op("Shape", x)
    batch, height = (net.op("Gather", shape, np.asarray(k, np.int64), axis=0) for k in (0, 2))
    half = net.op("Div", height, np.asarray(3, np.int64))
    sizes = net.op("Concat", net.op("Unsqueeze", batch, net.ints(0)), net.op("Unsqueeze", half, net.ints(0)), axis=0)
    root = net.op("Sqrt", net.op("Cast", height, to=1))
    facts = trace(net.model(net.op("Identity", sizes), root, net.op("Slice", shape, net.ints(1), net.ints(3))))
    assert facts.value(shape).tolist() == [2, 3, 8, 8]
    assert facts.value(sizes).tolist() == [2, 2]
    assert facts.traces[1].values[sizes].tolist() == [3, 2]
    assert facts.value(root) == pytest.approx(8**0.5)
    assert facts.value("slice_y").tolist() == [3, 8]
    assert facts.steady(shape) is None
    assert facts.steady(height) == 8
    assert facts.steady("slice_y").tolist() == [3, 8]


@pytest.mark.parametrize(("a", "b", "want"), [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-8, 3, -2)])
def test_integer_division_truncates_toward_zero(a, b, want):
    net = Net()
    net.input()
    y = net.op("Div", np.asarray(a, np.int64), np.asarray(b, np.int64))
    assert value_of(net, y) == want


def test_division_by_zero_is_not_known():
    net = Net()
    net.input()
    y = net.op("Div", np.asarray(1, np.int64), np.asarray(0, np.int64))
    assert value_of(net, y) is None


def test_shape_with_start_and_end():
    net = Net()
    y = net.op("Shape", net.input(), start=1, end=-1)
    assert value_of(net, y).tolist() == [3, 8]


def test_size():
    net = Net()
    assert value_of(net, net.op("Size", net.input())) == 2 * 3 * 64


@pytest.mark.parametrize(
    ("kind", "want"), [("value_int", 3), ("value_ints", [1, 2]), ("value_float", 0.5), ("value_floats", [1.5])]
)
def test_constant_nodes_of_every_kind(kind, want):
    net = Net()
    net.input()
    y = net.op("Constant", **{kind: want})
    assert value_of(net, y).tolist() == want


def test_large_values_are_not_kept():
    net = Net()
    net.input()
    y = net.op("ConstantOfShape", net.ints(300, 300))
    facts = trace(from_proto(net.proto(net.op("Identity", "x"))))
    assert facts.shape(y) == (300, 300)
    assert facts.value(y) is None
    assert facts.constant(y)
    assert facts.array(y).shape == (300, 300)


# --- constants ---------------------------------------------------------------------------------------------------


def test_what_depends_on_weights_only_is_constant():
    net = Net()
    x = net.input()
    w = net.op("Transpose", net.op("Cast", net.random(6, 3).astype(np.float64), to=1), perm=[1, 0])
    y = net.op("MatMul", net.reshape(x, -1, 3), w)
    facts = trace(net.model(y))
    assert facts.constant(w)
    assert facts.constant("matmul_y") is False
    assert facts.constant("x") is False
    held = {t.name: t for t in facts.model.proto.graph.initializer}
    assert np.allclose(facts.array(w), facts.model.array(held["cast_c"]).T)
    with pytest.raises(KeyError):
        facts.array(y)


def test_random_numbers_and_shapes_of_values_are_not_constant():
    net = Net()
    x = net.input()
    noise = net.op("RandomNormal", shape=[2, 2])
    facts = trace(net.model(net.op("Shape", x), noise))
    assert not facts.constant("shape_y")
    assert not facts.constant(noise)


def test_what_branches_capture_counts_as_a_use():
    def named(*names):
        return [onnx.ValueInfoProto(name=n) for n in names]

    nested = helper.make_graph([helper.make_node("Relu", ["deep"], ["r"])], "nested", [], named("r"))
    body = [
        helper.make_node("Identity", ["first"], ["own"]),
        helper.make_node("Add", ["outer", "own"], ["s"]),
        helper.make_node("If", ["flag2"], ["t"], then_branch=nested),
    ]
    branch = helper.make_graph(body, "branch", [], named("s", "straight"))
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch)
    assert captured(node) == {"outer", "first", "flag2", "deep", "straight"}
    graph = helper.make_graph([node, helper.make_node("Add", ["a", "a"], ["b"])], "main", [], [])
    found = uses(graph)
    assert found["outer"] == [(0, -1)]
    assert found["flag"] == [(0, 0)]
    assert found["a"] == [(1, 0), (1, 1)]


# --- size --------------------------------------------------------------------------------------------------------


def test_macs_by_hand():
    net = Net()
    a = net.conv(net.input(), 6, strides=[2, 2])  # 4 x 4 positions
    b = net.conv(a, 6, group=6, name="depth")
    c = net.conv(b, 8, 1, group=2, name="grouped")
    d = net.op("ConvTranspose", c, net.random(8, 5, 2, 2), strides=[2, 2])
    e = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", d)), 4)
    space = analyze(net.model(e))
    conv, depth, grouped = 16 * 6 * 27, 16 * 6 * 9, 16 * 8 * 3
    up, dense = 16 * 8 * 5 * 4, 5 * 4
    assert space.cost().macs == conv + depth + grouped + up + dense


def test_macs_do_not_depend_on_the_batch_of_the_file():
    counts = []
    for batch in ("N", 1, 4):
        net = Net()
        a = net.op("Relu", net.conv(net.input("x", (batch, 3, 8, 8)), 6))
        tokens = net.op("Transpose", net.reshape(a, 0, 6, 64), perm=[0, 2, 1])
        y = net.op("MatMul", tokens, net.random(6, 7))
        counts.append(analyze(net.model(y)).cost().macs)
    assert counts == [64 * 6 * 27 + 64 * 6 * 7] * 3
