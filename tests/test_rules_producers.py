"""Conv, ConvTranspose, Gemm, MatMul: what is prunable, what is protected and why, removed equals masked."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from onnxcar.rules import analyze
from onnxcar.surgery import Plan
from tests.graphs import (
    Net,
    assert_exact,
    assert_protected,
    layer_of,
    n_groups,
    node_of,
    prunable,
    random_plan,
    weights_of,
)

# --- Conv --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_every_filter_of_a_conv_is_a_group_of_its_own(spatial, bias):
    net = Net()
    x = net.input("x", ("N", 3, *(6,) * spatial))
    y = net.op("Relu", net.conv(x, 8, bias=bias))
    model = net.model(net.head(y))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (8, 8)
    assert (prunable(space, "tail"), n_groups(space, "tail")) == (5, 5)
    assert prunable(space, "head") == 0
    assert len(space.groups) == 13
    assert [g.name for g in space.groups[:2]] == ["conv:0", "conv:1"]
    assert space.groups[3].filters == (("conv_w", 3),)
    assert_exact(model)


def test_a_removed_filter_leaves_weights_bias_and_the_reader():
    net = Net()
    y = net.op("Relu", net.conv(net.input(), 8))
    model = net.model(net.head(y))
    (done,) = assert_exact(model, Plan([1, 4]))
    before, after = weights_of(model), weights_of(done.pruned)
    keep = [0, 2, 3, 5, 6, 7]
    assert np.array_equal(after["conv_w"], before["conv_w"][keep])
    assert np.array_equal(after["conv_b"], before["conv_b"][keep])
    assert np.array_equal(after["tail_w"], before["tail_w"][:, keep])
    assert np.array_equal(after["tail_b"], before["tail_b"])
    assert np.array_equal(after["head_w"], before["head_w"])
    assert after.keys() == before.keys()


def test_outputs_protect_the_filters_that_make_them():
    net = Net()
    net.conv(net.input(), 8)
    y = net.op("Relu", "conv_y")
    z = net.conv(y, 4, name="last")
    space = analyze(net.model(z))
    assert prunable(space, "conv") == 8
    assert_protected(space, "last", z, "output of the network")


def test_a_conv_whose_bias_is_computed_is_protected():
    net = Net()
    x = net.input()
    bias = net.op("Squeeze", net.reduce("ReduceMean", net.conv(x, 6, name="other"), [2, 3], 0), net.ints(0))
    y = net.op("Conv", net.conv(x, 5), net.random(6, 5, 1, 1), bias, name="odd")
    net.inputs[0].type.tensor_type.shape.dim[0].dim_value = 1
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "odd", "odd", "bias is computed")
    assert prunable(space, "conv") == 5


def test_one_filter_is_no_choice():
    net = Net()
    y = net.conv(net.conv(net.input(), 1), 6, name="next")
    space = analyze(net.model(net.head(y)))
    assert all(x.node != "conv" or prunable(space, "conv") == 0 for x in space.layers)
    assert prunable(space, "next") == 6


def test_depthwise_filters_follow_their_input():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 8))
    b = net.op("Relu", net.conv(a, 8, group=8, name="dw"))
    model = net.model(net.head(b))
    space = analyze(model)
    assert layer_of(space, "dw").kind == "depthwise"
    assert np.array_equal(layer_of(space, "dw").groups, layer_of(space, "conv").groups)
    assert len(space.groups) == 13
    assert space.groups[2].filters == (("conv_w", 2), ("dw_w", 2))
    for done in assert_exact(model):
        kept = 8 - len(done.plan.removed(done.space).get("conv_w", []))
        assert next(a.i for a in node_of(done.pruned, "dw").attribute if a.name == "group") == kept


@pytest.mark.parametrize("multiplier", [2, 3])
def test_a_depthwise_multiplier_ties_all_outputs_of_a_channel(multiplier):
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    b = net.op("Relu", net.conv(a, 6 * multiplier, group=6, name="dw"))
    model = net.model(net.head(b))
    space = analyze(model)
    assert n_groups(space, "conv") == n_groups(space, "dw") == 6
    expected = tuple(("dw_w", 4 * multiplier + i) for i in range(multiplier))
    assert space.groups[4].filters == (("conv_w", 4), *expected)
    assert_exact(model)


def test_depthwise_over_the_input_cannot_go():
    net = Net()
    a = net.conv(net.input(), 6, group=3, name="dw")
    space = analyze(net.model(net.head(net.op("Relu", a))))
    assert prunable(space, "dw") == 0
    assert prunable(space, "tail") == 5


def test_blocks_of_a_grouped_conv_keep_equal_counts():
    # 12 channels in 3 blocks of 4: a choice per position and block is free only in threes, one from each block
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 12))
    b = net.op("Relu", net.conv(a, 18, group=3, name="grouped"))
    model = net.model(net.head(b))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (12, 4)
    assert (prunable(space, "grouped"), n_groups(space, "grouped")) == (18, 6)
    for g in space.groups:
        blocks = [i * 3 // {"conv_w": 12, "grouped_w": 18, "tail_w": 15}[w] for w, i in g.filters]
        assert g.filters[0][0] == "tail_w" or sorted(blocks) == [0, 1, 2]
    for done in assert_exact(model):
        assert next(a.i for a in node_of(done.pruned, "grouped").attribute if a.name == "group") == 3


def test_many_small_blocks_leave_as_a_whole():
    # 12 channels in 6 blocks of 2
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 12))
    b = net.op("Relu", net.conv(a, 18, group=6, name="grouped"))
    model = net.model(net.head(b))
    space = analyze(model)
    assert n_groups(space, "conv") == n_groups(space, "grouped") == 6
    assert space.groups[0].filters == tuple([("conv_w", i) for i in (0, 1)] + [("grouped_w", i) for i in (0, 1, 2)])
    (done,) = assert_exact(model, Plan([1, 4]))
    assert next(a.i for a in node_of(done.pruned, "grouped").attribute if a.name == "group") == 4
    assert weights_of(done.pruned)["grouped_w"].shape == (12, 2, 3, 3)
    assert_exact(model)


def test_a_grouped_conv_over_the_input_keeps_equal_counts():
    net = Net()
    x = net.input("x", ("N", 6, 8, 8))
    a = net.op("Relu", net.conv(x, 10, group=2, name="grouped"))
    model = net.model(net.head(a))
    space = analyze(model)
    assert (prunable(space, "grouped"), n_groups(space, "grouped")) == (10, 5)
    assert_exact(model)


def test_an_unequal_tie_across_blocks_is_protected_with_its_reason():
    # the first block's channels are fixed by the input they are added to, so the second block has no partners
    net = Net()
    x = net.input("x", ("N", 4, 8, 8))
    left = net.op("Add", net.conv(x, 4, name="left"), x)
    both = net.op("Concat", left, net.conv(x, 4, name="right"), axis=1)
    y = net.conv(both, 8, group=2, name="grouped")
    space = analyze(net.model(net.head(y)))
    assert prunable(space, "left") == 0
    assert_protected(space, "right", "grouped", "equal counts")
    assert n_groups(space, "grouped") == 4


# --- ConvTranspose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_conv_transpose_filters_are_groups(spatial):
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ("N", 3, *(5,) * spatial)), 6))
    weight = net.random(6, 7, *(3,) * spatial, scale=0.2)
    b = net.op("ConvTranspose", a, weight, net.random(7), name="up", strides=[2] * spatial)
    model = net.model(net.head(net.op("Relu", b)))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "up")) == (6, 7)
    (done,) = assert_exact(model, Plan([0, 5, 6, 8]))
    assert weights_of(done.pruned)["up_c"].shape[:2] == (4, 5)
    assert_exact(model)


def test_conv_transpose_with_output_shape_and_groups():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 12))
    weight = net.random(12, 4, 3, 3, scale=0.2)
    b = net.op("ConvTranspose", a, weight, net.random(12), name="up", strides=[2, 2], group=3, output_shape=[17, 17])
    model = net.model(net.head(net.op("Relu", b)))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (12, 4)
    assert (prunable(space, "up"), n_groups(space, "up")) == (12, 4)
    assert_exact(model)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_conv_transpose_follows_its_input(multiplier):
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    weight = net.random(6, multiplier, 2, 2)
    b = net.op("ConvTranspose", a, weight, net.random(6 * multiplier), name="up", strides=[2, 2], group=6)
    model = net.model(net.head(b))
    space = analyze(model)
    assert n_groups(space, "conv") == 6
    assert len(space.groups) == 11
    assert_exact(model)


def test_many_small_blocks_of_a_conv_transpose_leave_as_a_whole():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 12))
    b = net.op("ConvTranspose", a, net.random(12, 3, 2, 2), name="up", strides=[2, 2], group=6)
    model = net.model(net.head(b))
    assert n_groups(analyze(model), "conv") == 6
    assert_exact(model)


# --- Gemm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("c_shape", [None, (7,), (1, 7), (1,), ()])
def test_gemm_units_are_groups(trans, c_shape):
    net = Net()
    x = net.input("x", ("N", 9))
    a = net.op("Relu", net.gemm(x, 6, name="first"))
    weight = net.random(*((7, 6) if trans else (6, 7)))
    inputs = [a, weight] + ([] if c_shape is None else [net.random(*c_shape) if c_shape else np.asarray(0.5)])
    b = net.op("Gemm", *inputs, name="dense", transB=trans, alpha=0.7, beta=1.3)
    model = net.model(net.head(net.op("Tanh", b)))
    space = analyze(model)
    assert (n_groups(space, "first"), n_groups(space, "dense")) == (6, 7)
    assert layer_of(space, "dense").kind == "dense"
    (done,) = assert_exact(model, Plan([0, 1, 6, 8, 9]))
    assert sorted(weights_of(done.pruned)["dense_c"].shape) == [4, 4]
    assert_exact(model)


def test_gemm_that_transposes_its_input_is_refused():
    net = Net()
    x = net.input("x", (4, 9))
    a = net.gemm(x, 6, name="first")
    b = net.op("Gemm", a, net.random(4, 7), name="odd", transA=1)
    model = net.model(b)
    space = analyze(model)
    assert_protected(space, "first", "odd", "transposes its input")
    assert space.unsupported == {"Gemm": 1}


def test_gemm_of_two_values_is_refused():
    net = Net()
    x = net.input("x", (6, 9))
    a, b = net.gemm(x, 6, name="left"), net.gemm(x, 6, name="right")
    space = analyze(net.model(net.op("Gemm", a, b, name="product")))
    assert_protected(space, "left", "product", "depend on the input")
    assert_protected(space, "right", "product", "depend on the input")


# --- MatMul ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [("N", 9), ("N", 5, 9), ("N", 2, 5, 9)])
def test_matmul_with_a_constant_on_the_right_is_a_dense_layer(shape):
    net = Net()
    x = net.input("x", shape)
    a = net.op("MatMul", x, net.random(9, 6, scale=0.4), name="first")
    a = net.op("Relu", net.op("Add", a, net.random(6), name="bias"))
    b = net.op("MatMul", a, net.random(6, 7, scale=0.5), name="second")
    b = net.op("Relu", net.op("Add", b, net.random(1, 7)))
    y = net.op("MatMul", b, net.random(7, 4, scale=0.5), name="third")
    model = net.model(y)
    space = analyze(model)
    assert (n_groups(space, "first"), n_groups(space, "second"), n_groups(space, "third")) == (6, 7, 0)
    (done,) = assert_exact(model, Plan([2, 6, 7]))
    held = weights_of(done.pruned)
    assert held["first_c"].shape == (9, 5)
    assert held["second_c"].shape == (5, 5)
    assert held["bias_c"].shape == (5,)
    assert_exact(model)


def test_matmul_with_a_constant_on_the_left_writes_the_axis_before_last():
    net = Net()
    x = net.input("x", ("N", 9, 5))
    a = net.op("Relu", net.op("MatMul", net.random(6, 9, scale=0.4), x, name="first"))
    b = net.op("Relu", net.op("MatMul", net.random(7, 6, scale=0.4), a, name="second"))
    y = net.op("MatMul", net.random(4, 7, scale=0.4), b, name="third")
    model = net.model(y)
    space = analyze(model)
    assert (n_groups(space, "first"), n_groups(space, "second"), n_groups(space, "third")) == (6, 7, 0)
    assert_exact(model)


def test_matmul_along_positions_lets_channels_pass():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    b = net.op("MatMul", a, net.random(8, 8, scale=0.4), name="mix")
    model = net.model(net.head(b))
    space = analyze(model)
    assert n_groups(space, "conv") == 6
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["mix_c"].shape == (8, 8)
    assert_exact(model)


def test_a_stack_of_matrices_along_the_channel_axis_is_cut_with_it():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    b = net.op("MatMul", a, net.random(6, 8, 8, scale=0.4), name="mix")
    model = net.model(net.head(b))
    assert n_groups(analyze(model), "conv") == 6
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["mix_c"].shape == (4, 8, 8)
    assert_exact(model)


def test_a_stack_of_matrices_that_contracts_channels_is_refused():
    net = Net()
    x = net.input("x", ("N", 3, 5, 9))
    a = net.op("MatMul", x, net.random(9, 6), name="first")
    y = net.op("MatMul", a, net.random(3, 6, 4), name="stack")
    space = analyze(net.model(y))
    assert_protected(space, "first", "stack", "stack of matrices")


def test_a_product_with_a_vector_is_refused():
    net = Net()
    a = net.op("MatMul", net.input("x", ("N", 9)), net.random(9, 6), name="first")
    space = analyze(net.model(net.op("MatMul", a, net.random(6), name="dot")))
    assert_protected(space, "first", "dot", "vector")


def test_a_product_of_two_values_ties_what_it_contracts():
    net = Net()
    x = net.input("x", ("N", 5, 9))
    q = net.op("MatMul", x, net.random(9, 6, scale=0.4), name="q")
    k = net.op("MatMul", x, net.random(9, 6, scale=0.4), name="k")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]), name="scores")
    v = net.op("MatMul", x, net.random(9, 7, scale=0.4), name="v")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v, name="mixed")
    y = net.op("MatMul", mixed, net.random(7, 4, scale=0.4), name="out")
    model = net.model(y)
    space = analyze(model)
    assert np.array_equal(layer_of(space, "q").groups, layer_of(space, "k").groups)
    assert (n_groups(space, "q"), n_groups(space, "v")) == (6, 7)
    assert {r.value for r in space.reads} >= {"q_y"}
    assert_exact(model)


@pytest.mark.parametrize("scaled", [False, True])
def test_attention_with_heads(scaled):
    heads, size = 2, 4
    net = Net()
    x = net.input("x", ("N", 5, 9))

    def split(name, perm):
        y = net.op("MatMul", x, net.random(9, heads * size, scale=0.4), name=name)
        y = net.op("Add", y, net.random(heads * size))
        return net.op("Transpose", net.reshape(y, 0, 0, heads, size), perm=perm)

    q, k, v = split("q", [0, 2, 1, 3]), split("k", [0, 2, 3, 1]), split("v", [0, 2, 1, 3])
    if scaled:
        # 1 / sqrt(d) as exporters compute it: from the shape of q, but a number, not a size
        d = net.op("Gather", net.op("Shape", q), np.asarray(3, np.int64), axis=0)
        q = net.op("Div", q, net.op("Sqrt", net.op("Cast", d, to=1)))
    weights = net.op("Softmax", net.op("MatMul", q, k, name="scores"), axis=-1)
    y = net.op("Transpose", net.op("MatMul", weights, v, name="mixed"), perm=[0, 2, 1, 3])
    y = net.reshape(y, 0, 0, heads * size)
    model = net.model(net.op("MatMul", y, net.random(heads * size, 4, scale=0.4), name="out"))
    space = analyze(model)
    # positions inside a head leave together over heads: the head axis stays a box
    assert (n_groups(space, "q"), n_groups(space, "k"), n_groups(space, "v")) == (size, size, size)
    assert np.array_equal(layer_of(space, "q").groups, layer_of(space, "k").groups)
    assert not set(layer_of(space, "v").groups.tolist()) & set(layer_of(space, "q").groups.tolist())
    assert_exact(model, batches=(1, 2, 5))


# --- shared weights ----------------------------------------------------------------------------------------------


def test_a_weight_that_two_layers_read_ties_them():
    net = Net()
    x = net.input()
    weight = net.const(net.random(6, 3, 3, 3, scale=0.3), "shared")
    a = net.op("Relu", net.conv(x, 6, weight=weight, name="one"))
    b = net.op("Sigmoid", net.conv(x, 6, weight=weight, name="two"))
    model = net.model(net.head(net.op("Concat", a, b, axis=1)))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "one").groups, layer_of(space, "two").groups)
    assert n_groups(space, "one") == 6
    assert space.groups[0].filters == (("shared", 0),)
    (done,) = assert_exact(model, Plan([1, 2]))
    assert weights_of(done.pruned)["shared"].shape[0] == 4
    assert_exact(model)


def test_a_weight_shared_by_layers_of_different_shapes_is_protected():
    net = Net()
    x = net.input()
    weight = net.const(net.random(6, 3, 3, 3, scale=0.2), "shared")
    a = net.op("Relu", net.conv(x, 6, weight=weight, name="one"))
    b = net.op("ConvTranspose", a, weight, pads=[1, 1, 1, 1], name="two")
    model = net.model(net.head(b))
    space = analyze(model)
    assert_protected(space, "one", "two", "shared by layers of different shapes")
    assert prunable(space, "tail") == 5


def test_equal_biases_behind_identity_tie_nothing():
    # the legacy torch exporter stores equal tensors once
    net = Net()
    x = net.input()
    bias = net.const(net.random(6), "bias")
    a = net.op("Conv", x, net.random(6, 3, 3, 3, scale=0.3), bias, name="one", pads=[1] * 4)
    b = net.op(
        "Conv", x, net.random(6, 3, 3, 3, scale=0.3), net.op("Identity", bias, name="copy"), name="two", pads=[1] * 4
    )
    model = net.model(net.head(net.op("Relu", net.op("Concat", a, b, axis=1))))
    space = analyze(model)
    assert len(space.groups) == 17
    (done,) = assert_exact(model, Plan([0, 7]))
    held = weights_of(done.pruned)
    sizes = {node_of(done.pruned, n).input[2]: 5 for n in ("one", "two")}
    assert len(sizes) == 2
    assert held["one_c"].shape[0] == held["two_c"].shape[0] == 5
    assert_exact(model)
    (same,) = assert_exact(model, Plan([0, 6]))  # cut alike in both uses: in place, under its name
    assert weights_of(same.pruned)["bias"].shape == (5,)


def test_one_bias_read_directly_by_two_layers_ties_nothing():
    net = Net()
    x = net.input()
    bias = net.const(net.random(6), "bias")
    ys = [
        net.op("Conv", x, net.random(6, 3, 3, 3, scale=0.3), bias, name=name, pads=[1] * 4) for name in ("one", "two")
    ]
    model = net.model(net.head(net.op("Relu", net.op("Concat", *ys, axis=1))))
    assert len(analyze(model).groups) == 17
    assert_exact(model)


# --- where weights hide ------------------------------------------------------------------------------------------


def hidden(net: Net, kind: str, dims: tuple[int, ...]) -> str:
    """A weight of `dims` that only appears after a node of `kind`."""
    values = net.random(*dims, scale=0.3)
    if kind == "Constant":
        return net.op("Constant", value=numpy_helper.from_array(values))
    if kind == "ConstantOfShape":
        # a constant times a random vector: nothing but ConstantOfShape would leave all filters alike
        filled = net.op("ConstantOfShape", net.ints(*dims), value=helper.make_tensor("v", 1, [1], [0.2]))
        return net.op("Mul", filled, values)
    if kind == "Identity":
        return net.op("Identity", net.op("Identity", values))
    if kind == "Cast":
        return net.op("Cast", values.astype(np.float64), to=1)
    if kind == "Transpose":
        return net.op("Transpose", np.ascontiguousarray(values.transpose(2, 3, 1, 0)), perm=[3, 2, 0, 1])
    if kind == "Reshape":
        return net.reshape(net.const(values.reshape(dims[0], -1)), *dims)
    if kind == "DequantizeLinear":
        return net.op(
            "DequantizeLinear", net.rng.integers(-99, 99, dims).astype(np.int8), np.float32(0.004), np.int8(1)
        )
    if kind == "per channel":
        q = net.rng.integers(-99, 99, dims).astype(np.int8)
        zero = net.rng.integers(-2, 3, dims[0]).astype(np.int8)
        return net.op("DequantizeLinear", q, net.positive(dims[0]) * np.float32(0.004), zero, axis=0)
    if kind == "Q DQ":
        q = net.op("QuantizeLinear", values, np.float32(0.01), np.int8(0))
        return net.op("DequantizeLinear", q, np.float32(0.01), np.int8(0))
    raise AssertionError(kind)


KINDS = (
    "Constant",
    "ConstantOfShape",
    "Identity",
    "Cast",
    "Transpose",
    "Reshape",
    "DequantizeLinear",
    "per channel",
    "Q DQ",
)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_hide_behind_other_nodes(kind):
    net = Net()
    x = net.input()
    a = net.op("Relu", net.conv(x, 8, weight=hidden(net, kind, (8, 3, 3, 3))))
    b = net.op("Relu", net.conv(a, 6, weight=hidden(net, kind, (6, 8, 3, 3)), name="second"))
    model = net.model(net.head(b))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "second")) == (8, 6)
    plan = random_plan(space, 0.4, 1)
    (done,) = assert_exact(model, plan)
    stored = sum(v.size for v in weights_of(done.pruned).values())
    if kind != "Constant":
        assert stored < sum(v.size for v in weights_of(model).values())
    assert_exact(model)


def test_a_weight_filled_by_constant_of_shape_is_cut():
    # `light_*` models of the onnx wheel hold their weights like this; the values are all alike, so are the filters
    net = Net()
    filled = net.op("ConstantOfShape", net.ints(8, 3, 3, 3), value=helper.make_tensor("v", 1, [1], [0.2]))
    a = net.op("Relu", net.conv(net.input(), 8, weight=filled))
    model = net.model(net.head(a))
    assert n_groups(analyze(model), "conv") == 8
    assert_exact(model)


def test_weights_that_are_inputs_too_follow_in_ir_3():
    net = Net(ir=3, opset=9)
    a = net.op("Relu", net.conv(net.input(), 8))
    model = net.model(net.head(a))
    for done in assert_exact(model):
        dims = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in done.pruned.proto.graph.input}
        for name, value in weights_of(done.pruned).items():
            assert dims[name] == list(value.shape)


def test_float16():
    net = Net(dtype=np.float16)
    a = net.op("Relu", net.norm(net.conv(net.input(), 8)))
    b = net.op("Relu", net.op("Add", net.conv(a, 8, name="second"), a))
    model = net.model(net.head(b))
    assert n_groups(analyze(model), "conv") == 8
    assert_exact(model)


def test_double():  # ONNX Runtime has no Conv of doubles on the CPU
    net = Net(dtype=np.float64)
    a = net.op("Sigmoid", net.gemm(net.input("x", ("N", 9)), 8))
    b = net.op("Add", net.op("MatMul", a, net.random(8, 8, scale=0.3), name="second"), a)
    model = net.model(net.head(b))
    assert n_groups(analyze(model), "fc") == 8
    assert_exact(model)
