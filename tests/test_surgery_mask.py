"""Masking: zeros where channels are read, nowhere else, and no shape changes."""

from __future__ import annotations

import numpy as np

from onnxcar.rules import analyze
from onnxcar.surgery import Plan, mask
from tests.graphs import Net, assert_exact, assert_valid, feeds, run, weights_of


def test_a_mask_multiplies_in_front_of_the_readers():
    net = Net()
    a = net.op("Relu", net.norm(net.conv(net.input(), 6)))
    model = net.model(net.head(a))
    space = analyze(model)
    masked = mask(space, Plan([1, 4]))
    assert_valid(masked)
    extra = [n for n in masked.proto.graph.node if n.name not in {x.name for x in model.proto.graph.node}]
    assert [n.op_type for n in extra] == ["Mul"]
    assert extra[0].input[0] == a
    values = weights_of(masked)[extra[0].input[1]]
    assert values.shape == (1, 6, 1, 1)
    assert values.ravel().tolist() == [1, 0, 1, 1, 0, 1]
    reader = next(n for n in masked.proto.graph.node if n.name == "tail")
    assert reader.input[0] == extra[0].output[0]


def test_masking_equals_zeroing_what_the_reader_weighs():
    # an oracle of its own: the reading weight's columns set to zero
    net = Net()
    a = net.op("Relu", net.norm(net.conv(net.input(), 6)))
    model = net.model(net.head(a))
    space = analyze(model)
    zeroed = model.with_proto(type(model.proto).FromString(model.proto.SerializeToString()))
    for t in zeroed.proto.graph.initializer:
        if t.name == "tail_w":
            values = weights_of(model)["tail_w"].copy()
            values[:, [1, 4]] = 0
            t.raw_data = values.tobytes()
    given = feeds(model, 3)
    want, got, base = run(zeroed, given)[0], run(mask(space, Plan([1, 4])), given)[0], run(model, given)[0]
    assert np.abs(want - base).max() > 1e-2
    assert np.abs(want - got).max() < 1e-5


def test_a_zeroed_filter_is_not_the_reference():
    # behind a BatchNormalization a zeroed filter still gives a constant: the case that masks at readers exist for
    net = Net()
    a = net.norm(net.conv(net.input(), 6))
    model = net.model(net.head(a))
    space = analyze(model)
    zeroed = model.with_proto(type(model.proto).FromString(model.proto.SerializeToString()))
    for t in zeroed.proto.graph.initializer:
        if t.name in ("conv_w", "conv_b"):
            values = weights_of(model)[t.name].copy()
            values[[1, 4]] = 0
            t.raw_data = values.tobytes()
    given = feeds(model, 3)
    wrong, right = run(zeroed, given)[0], run(mask(space, Plan([1, 4])), given)[0]
    assert np.abs(wrong - right).max() > 1e-2


def test_one_value_with_two_readers_is_masked_once():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    y = net.op("Concat", net.conv(a, 3, name="one"), net.conv(a, 3, name="two"), axis=1)
    model = net.model(net.head(y))
    masked = mask(analyze(model), Plan([0]))
    assert sum(n.op_type == "Mul" for n in masked.proto.graph.node) == 1


def test_readers_without_weights_are_masked():
    # a product of two activations reads its channels; zeroing weights would never show it
    net = Net()
    x = net.input("x", ("N", 5, 9))
    q = net.op("MatMul", x, net.random(9, 6, scale=0.4), name="q")
    k = net.op("MatMul", x, net.random(9, 6, scale=0.4), name="k")
    y = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]), name="scores")
    model = net.model(net.op("Tanh", y))
    space = analyze(model)
    assert sorted(r.value for r in space.reads) == sorted([q, "transpose_y"])
    assert_exact(model)


def test_a_mask_keeps_every_shape_and_the_original():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    model = net.model(net.head(net.conv(a, 4, name="second")))
    before = model.proto.SerializeToString()
    masked = mask(analyze(model), Plan([0, 7]))
    assert model.proto.SerializeToString() == before
    old, new = weights_of(model), weights_of(masked)
    assert all(np.array_equal(old[n], new[n]) for n in old)


def test_masks_of_half_precision():
    net = Net(dtype=np.float16)
    a = net.op("Relu", net.conv(net.input(), 6))
    model = net.model(net.head(a))
    masked = mask(analyze(model), Plan([0]))
    assert {str(v.dtype) for v in weights_of(masked).values()} == {"float16"}


def test_joint_channels_are_masked_on_both_axes():
    net = Net()
    a = net.op("Relu", net.gemm(net.input("x", ("N", 9)), 6))
    y = net.op("MatMul", net.reshape(a, 0, 2, 3), net.random(3, 5), name="dense")
    model = net.model(net.op("MatMul", net.op("Relu", y), net.random(5, 4)))
    space = analyze(model)
    read = next(r for r in space.reads if r.value == "reshape_y")
    assert read.groups.shape[-1] == 3
    assert_exact(model)
