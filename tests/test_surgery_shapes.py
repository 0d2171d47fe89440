"""Sizes that a graph computes: they follow the channels that are left, at every batch size."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.errors import UnsupportedError
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import Net, assert_exact, n_groups, node_of, weights_of

C = 8


def start(**options):
    net = Net(**options)
    return net, net.op("Relu", net.conv(net.input(), C))


def size(net: Net, value: str, axis: int) -> str:
    return net.op("Gather", net.op("Shape", value), np.asarray(axis, np.int64), axis=0)


def test_a_computed_size_is_patched_and_its_chain_stays():
    net, a = start()
    n = net.op("Unsqueeze", size(net, a, 0), net.ints(0))
    sizes = net.op("Concat", n, net.ints(C, 64), axis=0)
    model = net.model(net.head(net.op("Reshape", a, sizes, name="flat")))
    (done,) = assert_exact(model, Plan([0, 1]), batches=(1, 2, 5))
    where = next(n for n in done.pruned.proto.graph.node if n.op_type == "Where")
    assert where.output[0] == node_of(done.pruned, "flat").input[1]
    held = weights_of(done.pruned)
    assert held[where.input[0]].tolist() == [False, True, True]  # the batch stays what the chain computes
    assert held[where.input[1]].tolist() == [0, C - 2, 64]


def test_a_size_that_follows_by_itself_is_left_alone():
    net, a = start()
    y = net.op("Reshape", net.op("Sigmoid", a), net.op("Shape", a), name="same")
    model = net.model(net.head(y))
    (done,) = assert_exact(model, Plan([0, 1]), batches=(1, 2, 5))
    assert [n.name for n in done.pruned.proto.graph.node] == [n.name for n in model.proto.graph.node]


def test_a_number_computed_from_a_size_keeps_its_value():
    # 1 / sqrt(C) as attention has it: the function that was trained, not that of the new width
    net, a = start()
    root = net.op("Sqrt", net.op("Cast", size(net, a, 1), to=1))
    model = net.model(net.head(net.op("Div", a, root, name="scale")))
    (done,) = assert_exact(model, Plan([0, 1, 2]))
    held = weights_of(done.pruned)
    assert held[node_of(done.pruned, "scale").input[1]] == pytest.approx(C**0.5)


@pytest.mark.parametrize("integers", [False, True])
def test_a_number_of_batch_and_channels_is_scaled(integers):
    net, a = start()
    count = net.op("Size", a)
    if integers:
        y = net.op("Add", net.op("Cast", a, to=7), count)
        y = net.op("Mul", net.op("Add", net.op("Cast", y, to=1), a), np.float32(1e-2))
    else:
        y = net.op("Mul", a, net.op("Div", net.op("ReduceSum", a, keepdims=0), net.op("Cast", count, to=1)))
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, Plan([0, 1, 4]), batches=(1, 2, 5))


def test_a_sum_of_batch_and_channels_is_refused_with_its_node():
    net, a = start()
    total = net.op("Add", size(net, a, 0), size(net, a, 1))
    y = net.op("Mul", a, net.op("Cast", total, to=1), name="odd")
    space = analyze(net.model(net.head(y)))
    with pytest.raises(UnsupportedError, match=r"'odd'.*--exclude") as caught:
        remove(space, Plan([0]))
    assert caught.value.node == "odd"


def test_sizes_halved_and_doubled_on_the_way():
    net, a = start()
    c = net.op("Div", net.op("Mul", size(net, a, 1), np.asarray(2, np.int64)), np.asarray(2, np.int64))
    one = [net.op("Unsqueeze", v, net.ints(0)) for v in (size(net, a, 0), c)]
    y = net.declare(net.op("Reshape", a, net.op("Concat", *one, net.ints(64), axis=0)), ["N", C, 64])
    model = net.model(net.head(y))
    for done in assert_exact(model, batches=(1, 2, 5)):
        assert done.pruned is not model


def test_a_range_over_channels_follows():
    # positions along the channels, made from their number
    net, a = start()
    steps = net.op("Range", np.asarray(0, np.int64), size(net, a, 1), np.asarray(1, np.int64))
    scale = net.op("Unsqueeze", net.op("Cast", steps, to=1), net.ints(1, 2))
    model = net.model(net.head(net.op("Mul", a, net.op("Add", net.op("Mul", scale, np.float32(0.1)), np.float32(1)))))
    assert_exact(model)


def test_a_mask_made_by_constant_of_shape():
    net, a = start()
    ones = net.op("ConstantOfShape", net.op("Shape", a))
    model = net.model(net.head(net.op("Add", a, net.op("Add", ones, np.float32(0.3)))))
    assert_exact(model, batches=(1, 2, 5))


def test_sizes_at_opset_9():
    net, a = start(opset=9)
    n = net.op("Unsqueeze", net.op("Gather", net.op("Shape", a), np.asarray(0, np.int64), axis=0), axes=[0])
    flat = net.op("Concat", n, net.ints(-1), axis=0)
    y = net.declare(net.op("Reshape", a, flat), ["N", C * 64])
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, batches=(1, 2, 5))


def test_sizes_of_a_value_that_inference_does_not_know():
    # the shape of another domain's op is only declared; sizes are read from it for a value that is cut
    net, a = start()
    odd = net.op("QuickGelu", net.conv("x", C, name="kept"), domain="com.microsoft")
    net.declare(odd, ["N", C, 8, 8])
    y = net.declare(net.op("Reshape", a, net.op("Shape", odd)), ["N", C, 8, 8])
    model = net.model(net.head(net.op("Concat", y, odd, axis=1)))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "kept")) == (C, 0)
    assert_exact(model, Plan([0, 1]), batches=(1, 2, 5))
