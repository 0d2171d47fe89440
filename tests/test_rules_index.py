"""Ops that move channels: the labels move with them, and sizes in the graph follow what is left."""

from __future__ import annotations

import numpy as np
import pytest

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
    run,
    weights_of,
)

C = 6


def start(filters: int = C, **options) -> tuple[Net, str]:
    net = Net(**options)
    return net, net.op("Relu", net.conv(net.input(), filters))


def attribute(node, name):
    return next(list(a.ints) or a.i for a in node.attribute if a.name == name)


# --- Concat ------------------------------------------------------------------------------------------------------


def test_concat_of_channels_keeps_every_part_free():
    net, a = start()
    b = net.conv("x", 4, name="other")
    y = net.op("Concat", a, b, a, axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "other")) == (6, 4)
    (done,) = assert_exact(model, Plan([0, 2, 8]))
    assert weights_of(done.pruned)["tail_w"].shape[1] == 4 + 3 + 4
    assert_exact(model)


def test_concat_along_positions_ties_its_parts():
    net, a = start()
    b = net.conv("x", C, name="other")
    model = net.model(net.head(net.op("Concat", a, b, axis=-2)))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "other").groups)
    assert n_groups(space, "conv") == C
    assert_exact(model)


def test_concat_along_positions_with_an_input_protects():
    net = Net()
    x = net.input("x", ("N", C, 8, 8))
    y = net.op("Concat", net.conv(x, C), x, axis=2, name="cat")
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "cat", "along another axis")


def test_concat_with_a_constant_in_the_channels():
    net, a = start()
    k = net.const(net.random(1, 3, 8, 8), "k")
    a = net.reshape(a, 1, C, 8, 8)
    net.inputs[0].type.tensor_type.shape.dim[0].dim_value = 1
    y = net.op("Concat", a, k, axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["tail_w"].shape[1] == 4 + 3


def test_concat_of_a_class_token_along_positions_cuts_the_constant():
    net = Net()
    x = net.input("x", (1, 5, 9))
    a = net.op("MatMul", x, net.random(9, 7, scale=0.4), name="embed")
    token = net.const(net.random(1, 1, 7), "token")
    a = net.op("Concat", token, a, axis=1)
    a = net.op("Add", a, net.const(net.random(1, 6, 7), "positions"))
    model = net.model(net.op("MatMul", a, net.random(7, 4, scale=0.4), name="out"))
    space = analyze(model)
    assert n_groups(space, "embed") == 7
    (done,) = assert_exact(model, Plan([0, 3]))
    held = weights_of(done.pruned)
    assert held["token"].shape == (1, 1, 5)
    assert held["positions"].shape == (1, 6, 5)


# --- Split, Slice, Gather ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 11, 12, 13, 17, 18])
@pytest.mark.parametrize("sizes", [None, (2, 4), (2, 2, 2)])
def test_split_sizes_follow_channels(opset, sizes):
    net, a = start(opset=opset, ir=3 if opset < 9 else 8)
    n = 2 if sizes is None else len(sizes)
    if sizes is None:
        parts = net.op("Split", a, n=n, name="split", axis=1, **({"num_outputs": 2} if opset == 18 else {}))
    elif opset < 13:
        parts = net.op("Split", a, n=n, name="split", axis=1, split=list(sizes))
    else:
        parts = net.op("Split", a, net.ints(*sizes), n=n, name="split", axis=1)
    y = [net.op("Sigmoid", p) if i else p for i, p in enumerate(parts)]
    model = net.model(net.head(net.op("Concat", *y[::-1], axis=1)))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    (done,) = assert_exact(model, Plan([0, 3, 4]))
    node = node_of(done.pruned, "split")
    kept = attribute(node, "split") if opset < 13 else weights_of(done.pruned)[node.input[1]].tolist()
    assert kept == {None: [2, 1], (2, 4): [1, 2], (2, 2, 2): [1, 1, 1]}[sizes]
    assert_exact(model)


def test_a_part_of_a_split_with_one_channel_keeps_it():
    net, a = start()
    parts = net.op("Split", a, net.ints(2, 1, 3), n=3, axis=1, name="split")
    y = net.op("Concat", net.op("Sigmoid", parts[0]), parts[1], parts[2], axis=1)
    space = analyze(net.model(net.head(y)))
    assert n_groups(space, "conv") == C - 1
    assert_protected(space, "conv", "split", "single channel", filters=1)


def test_a_part_of_a_split_is_never_emptied():
    net, a = start()
    p, q = net.op("Split", a, net.ints(2, 4), n=2, axis=1)
    y = net.op("Concat", net.op("Sigmoid", p), q, axis=1)
    space = analyze(net.model(net.head(y)))
    assert not space.allows(1, {0})
    assert 1 in space.blocked({0})
    assert not space.allows(5, {2, 3, 4})
    assert space.allows(1, {2, 3, 4})


def test_halves_of_a_split_that_meet_again_tie():
    net, a = start()
    p, q = net.op("Split", a, n=2, axis=1, num_outputs=2) if net.opset >= 18 else net.op("Split", a, n=2, axis=1)
    model = net.model(net.head(net.op("Mul", p, net.op("Sigmoid", q), name="glu")))
    space = analyze(model)
    assert n_groups(space, "conv") == 3
    assert space.groups[0].filters == (("conv_w", 0), ("conv_w", 3))
    assert_exact(model)


BOUNDS = {
    "forward": (1, 5, 1, [1, 2, 3, 4]),
    "strided": (0, 6, 2, [0, 2, 4]),
    "from the end": (-4, 2**31, 1, [2, 3, 4, 5]),
    "to before the end": (0, -1, 1, [0, 1, 2, 3, 4]),
    "backward": (-1, -(2**31), -1, [5, 4, 3, 2, 1, 0]),
    "backward by two": (4, -7, -2, [4, 2, 0]),
}


# before opset 10 a Slice has no steps
SLICES = [(k, which) for k in (9, 10, 13) for which in sorted(BOUNDS) if k >= 10 or BOUNDS[which][2] == 1]


@pytest.mark.parametrize(("opset", "which"), SLICES)
def test_slice_bounds_follow_channels(opset, which):
    s, e, t, taken = BOUNDS[which]
    net, a = start(opset=opset)
    if opset < 10:
        part = net.op("Slice", a, name="slice", starts=[s, 1], ends=[e, 7], axes=[1, 2])
    else:
        part = net.op("Slice", a, net.ints(s, 1), net.ints(e, 7), net.ints(-3, 2), net.ints(t, 1), name="slice")
    y = net.op("Concat", net.op("GlobalAveragePool", part), net.op("GlobalMaxPool", a), axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    assert space.labels[part].reshape(-1).tolist() == taken
    assert_exact(model, Plan([0, 3]))
    assert_exact(model, share=0.3, seeds=(0, 1, 2))


def test_chunks_by_slices_of_computed_bounds():
    # what torch exports for chunk and split of a size it reads from the shape
    net, a = start(8)
    c = net.op("Gather", net.op("Shape", a), np.asarray(1, np.int64), axis=0)
    half = net.op("Div", net.op("Unsqueeze", c, net.ints(0)), net.ints(2))
    one = net.op("Slice", a, net.ints(0), half, net.ints(1), name="one")
    two = net.op("Slice", a, half, net.op("Mul", half, net.ints(2)), net.ints(1), name="two")
    y = net.op("Concat", net.op("Sigmoid", one), two, axis=1)
    y = net.op("Conv", y, net.random(5, 8, 3, 3, scale=0.2), name="next")  # onnx does not infer what these bounds are
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == 8
    (done,) = assert_exact(model, Plan([0, 1, 5]), batches=(1, 2, 5))
    assert weights_of(done.pruned)["next_c"].shape[1] == 5
    assert_exact(model)


def test_slices_along_other_axes_leave_channels_alone():
    net, a = start()
    model = net.model(net.head(net.op("Slice", a, net.ints(1), net.ints(-1), net.ints(3))))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_a_slice_steered_by_the_input_protects():
    net, a = start()
    k = net.op("Cast", net.op("Squeeze", net.reduce("ReduceMax", "x", [1, 2, 3], 0), net.ints(0)), to=7)
    net.inputs[0].type.tensor_type.shape.dim[0].dim_value = 1
    bounds = net.op("Unsqueeze", net.op("Clip", k, np.asarray(3), np.asarray(3)), net.ints(0))
    part = net.op("Slice", a, net.ints(0), bounds, net.ints(1), name="slice")
    space = analyze(net.model(net.op("GlobalMaxPool", net.op("ReduceMax", part, axes=[1]))))
    assert prunable(space, "conv") == 0
    assert_protected(space, "conv", "slice", "")


@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_gather_picks_channels(kind):
    net, a = start()
    order = np.asarray([4, -6, 2, 2, 5], kind)
    part = net.op("Gather", a, order, axis=1, name="pick")
    y = net.op("Concat", net.op("Sigmoid", part), a, axis=1)
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 4]))
    picked = weights_of(done.pruned)[node_of(done.pruned, "pick").input[1]]
    assert picked.tolist() == [1, 1, 3]
    assert picked.dtype == kind
    assert_exact(model)


def test_gather_of_one_channel_protects_it():
    net, a = start()
    part = net.op("Gather", a, np.asarray(2, np.int64), axis=1, name="pick")
    y = net.op("Add", a, net.op("Unsqueeze", part, net.ints(1)))
    model = net.model(net.head(y))
    space = analyze(model)
    assert n_groups(space, "conv") == C - 1
    assert_protected(space, "conv", "pick", "", filters=1)
    assert_exact(model)


def test_gather_along_another_axis_lets_channels_pass():
    net, a = start()
    part = net.op("Gather", a, np.asarray(3, np.int64), axis=2)
    model = net.model(net.head(part))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_gather_with_computed_indices_protects():
    net, a = start()
    index = net.op("ArgMax", net.op("Flatten", "x"), axis=1, keepdims=0)
    index = net.op("Mod", index, np.asarray(C, np.int64))
    part = net.op("Gather", a, index, axis=1, name="pick")
    space = analyze(net.model(net.op("ReduceMax", part, axes=[1, 2, 3, 4][:3])))
    assert_protected(space, "conv", "pick", "computed from the input")


def test_gather_nd_as_the_dynamo_exporter_writes_it():
    net = Net()
    x = net.input("x", (3, 8, 8))
    a = net.op("Relu", net.op("Conv", net.op("Unsqueeze", x, net.ints(0)), net.random(C, 3, 3, 3), name="conv"))
    a = net.op("Squeeze", a, net.ints(0))
    part = net.op("GatherND", a, np.asarray([[5], [1], [-6], [2]], np.int64), name="pick")
    y = net.op("Unsqueeze", net.op("Concat", part, a, axis=0), net.ints(0))
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, Plan([0, 5]))
    assert_exact(model)


def test_gather_nd_of_single_elements_protects():
    net, a = start()
    part = net.op("GatherND", a, np.asarray([[0, 1], [0, 2]], np.int64), name="pick")
    space = analyze(net.model(part))
    assert_protected(space, "conv", "pick", "single elements")


# --- Reshape and its kin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["Flatten", "-1", "0", "0 -1", "computed", "sizes"])
def test_positions_flattened_into_a_dense_layer(how):
    net, a = start()
    a = net.op("MaxPool", a, kernel_shape=[4, 4], strides=[4, 4])  # (N, C, 2, 2)
    if how == "Flatten":
        y = net.op("Flatten", a)
    elif how == "-1":
        y = net.reshape(a, -1, C * 4)
    elif how == "0":
        y = net.reshape(a, 0, C * 4)
    elif how == "0 -1":
        y = net.reshape(a, 0, -1)
    elif how == "sizes":
        # every size from the shape: N, C * H * W
        shape = net.op("Shape", a)
        n = net.op("Slice", shape, net.ints(0), net.ints(1))
        rest = net.op("ReduceProd", net.op("Slice", shape, net.ints(1), net.ints(4)), axes=[0], keepdims=1)
        y = net.op("Reshape", a, net.op("Concat", n, rest, axis=0))
    else:
        n = net.op("Gather", net.op("Shape", a), np.asarray(0, np.int64), axis=0)
        sizes = net.op("Concat", net.op("Unsqueeze", n, net.ints(0)), net.ints(C * 4), axis=0)
        y = net.op("Reshape", a, sizes)
    w = net.const(net.random(7, C * 4, scale=0.3), "dense_w")
    y = net.op("Relu", net.op("Gemm", y, w, net.random(7), transB=1, name="dense"))
    model = net.model(net.gemm(y, 4))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "dense")) == (C, 7)
    (done,) = assert_exact(model, Plan([1, 5]), batches=(1, 2, 5))
    assert weights_of(done.pruned)["dense_w"].shape == (7, 16)
    before = weights_of(model)["dense_w"].reshape(7, C, 4)
    assert np.array_equal(weights_of(done.pruned)["dense_w"].reshape(7, 4, 4), before[:, [0, 2, 3, 4]])
    assert_exact(model)


def test_a_dynamic_batch_stays_dynamic():
    net, a = start()
    n = net.op("Gather", net.op("Shape", a), np.asarray(0, np.int64), axis=0)
    sizes = net.op("Concat", net.op("Unsqueeze", n, net.ints(0)), net.ints(C, 64), axis=0)
    model = net.model(net.head(net.op("Reshape", a, sizes)))
    for done in assert_exact(model, batches=(1, 2, 5)):
        assert done.pruned.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
        assert done.pruned.proto.graph.output[0] == model.proto.graph.output[0]


def test_computed_sizes_that_hold_the_channels():
    # (N, C, H, W) -> (N, C, H * W) with every size read from the shape
    net, a = start()
    shape = net.op("Shape", a)
    one = [net.op("Gather", shape, net.ints(k), axis=0) for k in range(4)]
    sizes = net.op("Concat", one[0], one[1], net.op("Mul", one[2], one[3]), axis=0)
    model = net.model(net.head(net.op("Reshape", a, sizes)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, batches=(1, 2, 5))


def test_sizes_of_another_value_that_is_cut():
    # the sizes come from a value that loses channels, the value that is reshaped does not
    net = Net()
    x = net.input("x", ("N", C, 8, 8))
    a = net.op("Relu", net.conv(x, C))
    y = net.op("Reshape", x, net.op("Shape", a))
    y = net.op("Concat", y, a, axis=1)
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, batches=(1, 2, 5))


def test_squeeze_and_unsqueeze_move_channels():
    net, a = start()
    g = net.op("Squeeze", net.op("GlobalAveragePool", a), net.ints(2, 3))
    g = net.op("Relu", net.gemm(g, 5, name="dense"))
    g = net.op("Sigmoid", net.gemm(g, C, name="gate"))
    g = net.op("Unsqueeze", net.op("Unsqueeze", g, net.ints(-1)), net.ints(3))
    model = net.model(net.head(net.op("Mul", a, g)))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "gate").groups)
    assert (n_groups(space, "conv"), n_groups(space, "dense")) == (C, 5)
    assert_exact(model)


def test_transpose_to_channels_last_and_back():
    net, a = start()
    y = net.op("Transpose", a, perm=[0, 2, 3, 1])
    y = net.op("Relu", net.op("Add", net.op("MatMul", y, net.random(C, 7, scale=0.4), name="dense"), net.random(7)))
    model = net.model(net.head(net.op("Transpose", y, perm=[0, 3, 1, 2])))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "dense")) == (C, 7)
    assert_exact(model)


def test_channels_merged_with_the_batch_are_protected():
    net, a = start()
    y = net.reshape(a, -1, 1, 8, 8, name="merge")
    y = net.conv(y, 4, name="each")
    y = net.op("ReduceSum", net.op("GlobalAveragePool", y), net.ints(1))
    model = net.model(y)
    space = analyze(model)
    assert prunable(space, "conv") == 0
    assert_protected(space, "conv", "merge", "")
    assert n_groups(space, "each") == 4


def shuffle(net: Net, a: str, groups: int, channels: int) -> str:
    y = net.reshape(a, -1, groups, channels // groups, 8, 8, name="shuffle1")
    y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4], name="shuffle2")
    return net.reshape(y, -1, channels, 8, 8, name="shuffle3")


def test_a_channel_shuffle_keeps_every_channel_free():
    net, a = start(8)
    y = shuffle(net, a, 2, 8)
    p, q = net.op("Split", y, n=2, axis=1)
    y = net.op("Concat", net.op("Sigmoid", p), net.conv(q, 3, name="branch"), axis=1)
    model = net.model(net.head(y))
    space = analyze(model)
    assert n_groups(space, "conv") == 8
    (done,) = assert_exact(model, Plan([0, 1, 6]))
    assert not any(n.op_type == "Transpose" for n in done.pruned.proto.graph.node)
    assert_exact(model)


def test_an_uncut_channel_shuffle_stays_as_it_is():
    net, a = start(8)
    y = shuffle(net, a, 2, 8)
    model = net.model(net.head(y))
    space = analyze(model)
    tail = next(g.id for g in space.groups if g.name == "tail:1")
    (done,) = assert_exact(model, Plan([tail]))
    assert [n.name for n in done.pruned.proto.graph.node] == [n.name for n in model.proto.graph.node]


def test_grouped_convs_around_a_shuffle_keep_equal_counts():
    net, a = start(8)
    y = net.op("Relu", net.conv(a, 8, group=2, name="first"))
    y = net.op("Relu", net.conv(shuffle(net, y, 2, 8), 8, group=2, name="second"))
    model = net.model(net.head(y))
    space = analyze(model)
    assert prunable(space, "conv") == prunable(space, "first") == prunable(space, "second") == 8
    assert n_groups(space, "conv") == 4
    assert_exact(model)


def test_joint_channels_are_cut_as_a_box():
    # (N, 6) -> (N, 2, 3): kept channels must fill a box, so a position leaves in both rows
    net = Net()
    a = net.op("Relu", net.gemm(net.input("x", ("N", 9)), C))
    y = net.reshape(a, 0, 2, 3)
    y = net.op("MatMul", y, net.random(3, 5, scale=0.5), name="dense")
    model = net.model(net.op("MatMul", net.op("Relu", y), net.random(5, 4), name="out"))
    space = analyze(model)
    assert (prunable(space, "fc"), n_groups(space, "fc")) == (C, 3)
    assert space.groups[0].filters == (("fc_w", 0), ("fc_w", 3))
    assert_exact(model)


def test_channels_that_are_all_tied_together_are_protected_for_it():
    # a square box and its transpose: rows tie to columns, so that all four leave at once or never
    net = Net()
    a = net.op("Relu", net.gemm(net.input("x", ("N", 9)), 4))
    y = net.reshape(a, 0, 2, 2)
    y = net.op("Add", y, net.op("Transpose", y, perm=[0, 2, 1]))
    model = net.model(net.gemm(net.op("Tanh", net.gemm(net.reshape(y, 0, 4), 5, name="next")), 4))
    space = analyze(model)
    assert {p.reason for p in space.protected if p.layer == "fc"} == {
        "all channels of this value leave together, and it would be empty"
    }
    assert n_groups(space, "next") == 5
    assert_exact(model)


# --- sizes of channels -------------------------------------------------------------------------------------------


def test_expand_keeps_channels():
    net, a = start()
    g = net.op("GlobalAveragePool", a)
    model = net.model(net.head(net.op("Expand", g, net.ints(1, C, 4, 4))))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_expand_to_the_shape_of_a_value():
    net, a = start()
    g = net.op("Sigmoid", net.op("GlobalAveragePool", net.conv("x", C, name="gate")))
    y = net.op("Mul", a, net.op("Expand", g, net.op("Shape", a)))
    model = net.model(net.head(y))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "gate").groups)
    assert n_groups(space, "conv") == C
    assert_exact(model, batches=(1, 2, 5))


def test_expand_of_one_channel_to_many():
    net, a = start()
    one = net.reduce("ReduceMax", a, [1])
    y = net.op("Expand", one, net.ints(1, 4, 8, 8), name="grow")
    y = net.op("Concat", y, net.conv("x", 5, name="free"), axis=1)
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "free") == 5
    assert_exact(model)


def test_expanded_channels_may_meet_channels_that_go():
    # (N, 1, H, W) grown to the channels of another value: its sizes must follow
    net, a = start()
    one = net.op("Sigmoid", net.conv("x", 1, name="gate"))
    y = net.op("Mul", a, net.op("Expand", one, net.op("Shape", a), name="grow"))
    model = net.model(net.head(y))
    space = analyze(model)
    assert prunable(space, "tail") == 5
    assert_exact(model, batches=(1, 2, 5))


def test_tile_repeats_channels():
    net, a = start()
    model = net.model(net.head(net.op("Tile", a, net.ints(1, 2, 1, 3))))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 5]))
    assert weights_of(done.pruned)["tail_w"].shape[1] == 8
    assert_exact(model)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_ties_what_becomes_one_channel(mode):
    net, a = start(12)
    model = net.model(net.head(net.op("DepthToSpace", a, blocksize=2, mode=mode)))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (12, 3)
    members = [i for _, i in space.groups[1].filters]
    assert members == ([1, 4, 7, 10] if mode == "DCR" else [4, 5, 6, 7])
    assert_exact(model)


def test_space_to_depth_repeats_channels():
    net, a = start()
    model = net.model(net.head(net.op("SpaceToDepth", a, blocksize=2)))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["tail_w"].shape[1] == 16
    assert_exact(model)


def test_pixel_shuffle_by_reshapes():
    net, a = start(12)
    y = net.reshape(a, -1, 3, 2, 2, 8, 8)
    y = net.op("Transpose", y, perm=[0, 1, 4, 2, 5, 3])
    model = net.model(net.head(net.reshape(y, -1, 3, 16, 16)))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (12, 3)
    assert_exact(model)


# --- Pad ---------------------------------------------------------------------------------------------------------


def padded(net: Net, value: str, pads: list[int], name: str = "pad", number: float = 0.0, **attributes) -> str:
    if net.opset < 11:
        return str(net.op("Pad", value, name=name, pads=pads, value=number, **attributes))
    return str(net.op("Pad", value, net.ints(*pads), np.float32(number), name=name, **attributes))


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
def test_a_parameter_free_shortcut(opset):
    # CIFAR ResNets, option A: every other position, zero channels on both sides
    net, a = start(4, opset=opset)
    if opset < 10:
        short = net.op("Slice", a, starts=[0, 0], ends=[99, 99], axes=[2, 3])
        short = net.op("MaxPool", short, kernel_shape=[1, 1], strides=[2, 2])
    else:
        short = net.op("Slice", a, net.ints(0, 0), net.ints(99, 99), net.ints(2, 3), net.ints(2, 2))
    short = padded(net, short, [0, 2, 0, 0, 0, 2, 0, 0])
    b = net.conv(a, 8, name="block", strides=[2, 2])
    model = net.model(net.head(net.op("Relu", net.op("Add", b, short))))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "block")) == (4, 8)
    block = layer_of(space, "block").groups
    assert np.array_equal(block[2:6], layer_of(space, "conv").groups)
    # padded channels leave with the filters they are added to
    (done,) = assert_exact(model, Plan([int(block[0]), int(block[3]), int(block[7])]))
    node = node_of(done.pruned, "pad")
    pads = attribute(node, "pads") if opset < 11 else weights_of(done.pruned)[node.input[1]].tolist()
    assert pads == [0, 1, 0, 0, 0, 1, 0, 0]
    assert_exact(model, seeds=(0, 1, 2))


def test_pad_with_axes():
    net, a = start(4, opset=18)
    short = net.op("Pad", a, net.ints(1, 3), np.float32(0), net.ints(-3), name="pad")
    b = net.conv("x", 8, name="block")
    model = net.model(net.head(net.op("Add", b, short)))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "block")) == (4, 8)
    assert_exact(model)


def test_pads_of_a_number_are_channels_of_that_number():
    net, a = start(4)
    short = padded(net, a, [0, 2, 0, 0, 0, 2, 0, 0], number=0.7)
    model = net.model(net.head(net.op("Add", net.conv("x", 8, name="block"), short)))
    assert n_groups(analyze(model), "block") == 8
    assert_exact(model)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pads_of_positions_leave_channels_alone(mode):
    net, a = start()
    model = net.model(net.head(padded(net, a, [0, 0, 1, 2, 0, 0, 2, 1], mode=mode)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


@pytest.mark.parametrize(
    ("pads", "mode"), [([0, 1, 0, 0, 0, 1, 0, 0], "reflect"), ([0, -1, 0, 0, 0, 0, 0, 0], "constant")]
)
def test_other_pads_of_channels_are_refused(pads, mode):
    net, a = start()
    y = padded(net, a, pads, mode=mode)
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "pad", "other than a constant")
    assert space.unsupported == {"Pad": 1}


def test_computed_pads_are_refused():
    net, a = start()
    total = net.op("Cast", net.reduce("ReduceMax", "x", [0, 1, 2, 3], 0), to=7)
    zero = net.op("Mul", total, net.ints(*[0] * 8))
    y = net.op("Pad", a, zero, name="pad")
    y = net.op("Conv", y, net.random(4, C, 1, 1))
    space = analyze(net.model(net.op("GlobalMaxPool", y)))
    assert_protected(space, "conv", "pad", "computed from the input")


def test_the_pruned_shuffle_gives_the_same_channels_at_any_size():
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ("N", 3, "H", "W")), 8))
    shape = net.op("Shape", a)
    n, c, h, w = (net.op("Gather", shape, net.ints(k), axis=0) for k in range(4))
    half = net.op("Div", c, net.ints(2))
    y = net.op("Reshape", a, net.op("Concat", n, net.ints(2), half, h, w, axis=0))
    y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = net.op("Reshape", y, net.op("Concat", n, c, h, w, axis=0))
    weight = net.random(5, 8, 3, 3, scale=0.2)
    y = net.op("Conv", y, weight, name="next")
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", y)))
    model = net.model(net.op("Gemm", y, net.random(4, 5), transB=1, name="fc"))
    space = analyze(model)
    assert n_groups(space, "conv") == 8
    (done,) = assert_exact(model, Plan([0, 3, 5]), batches=(1, 2, 5))
    x = {"x": np.random.default_rng(0).standard_normal((3, 3, 10, 12)).astype(np.float32)}
    assert np.abs(run(done.pruned, x)[0] - run(done.masked, x)[0]).max() < 1e-4
