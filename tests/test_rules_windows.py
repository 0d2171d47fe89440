"""A Conv that runs along the channels of another layer (ECA): its windows follow the channels that are left."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import Net, assert_exact, assert_protected, feeds, n_groups, node_of, prunable, run


def gated(net: Net, filters: int = 8, **conv):
    """A Conv whose channels are gated by a 1-d Conv along them."""
    x = net.op("Relu", net.conv(net.input(), filters))
    pooled = net.reduce("ReduceMean", x, [2, 3])
    line = net.reshape(pooled, 0, 1, filters)
    size, c_out = conv.pop("size", 3), conv.pop("c_out", 1)
    line = net.op("Conv", line, net.random(c_out, 1, size), net.random(c_out), name="eca", **conv)
    if c_out > 1:
        line = net.reduce("ReduceSum", line, [1])
    gate = net.reshape(net.op("Sigmoid", line), 0, filters, 1, 1)
    return net.model(net.head(net.op("Mul", x, gate)))


@pytest.mark.parametrize(
    ("size", "conv"),
    [
        (3, {"pads": [1, 1]}),
        (5, {"pads": [2, 2]}),
        (3, {"pads": [2, 2], "dilations": [2]}),
        (3, {"pads": [2, 0]}),
        (4, {"pads": [1, 2]}),
        (1, {}),
    ],
)
@pytest.mark.parametrize("opset", [9, 17])
def test_channels_under_a_conv_along_them_may_go(size, conv, opset):
    model = gated(Net(opset=opset), size=size, **conv)
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (8, 8)
    assert_exact(model)


def test_neighbours_that_are_gone_are_zeros_and_the_weight_stays():
    model = gated(Net(), size=3, pads=[1, 1])
    (done,) = assert_exact(model, Plan([2, 3, 7]))
    node = node_of(done.pruned, "eca")
    attributes = {a.name: list(a.ints) for a in node.attribute if a.name != "kernel_shape"}
    assert attributes == {"pads": [0, 0], "strides": [3], "dilations": [1]}
    before = {t.name: t for t in model.proto.graph.initializer}
    after = {t.name: t for t in done.pruned.proto.graph.initializer}
    assert after[node.input[1]] == before[node.input[1]]


def test_a_two_dimensional_conv_with_channels_along_one_axis():
    # triplet attention: channels and rows change places, a Conv over both makes one map
    net = Net()
    x = net.op("Relu", net.conv(net.input(), 6))
    turned = net.op("Transpose", x, perm=[0, 2, 1, 3])
    pooled = net.reduce("ReduceMax", turned, [1])
    gate = net.op("Conv", pooled, net.random(1, 1, 3, 5), pads=[1, 2, 1, 2], name="both")
    y = net.op("Transpose", net.op("Mul", turned, net.op("Sigmoid", gate)), perm=[0, 2, 1, 3])
    model = net.model(net.head(y))
    assert prunable(analyze(model), "conv") == 6
    assert_exact(model)


def test_several_filters_along_channels_stay():
    model = gated(Net(), size=3, pads=[1, 1], c_out=4)
    space = analyze(model)
    assert prunable(space, "conv") == 8
    assert_protected(space, "eca", "eca", "runs along the channels of another layer", 4)
    assert_exact(model)


@pytest.mark.parametrize("strides", [[1], [2]])
def test_positions_that_feed_a_dense_layer(strides):
    net = Net()
    x = net.op("Relu", net.conv(net.input(), 9))
    line = net.reshape(net.reduce("ReduceMean", x, [2, 3]), 0, 1, 9)
    line = net.op("Conv", line, net.random(1, 1, 3), name="along", strides=strides)
    model = net.model(net.gemm(net.op("Flatten", line), 4), net.head(x))
    assert prunable(analyze(model), "conv") == 9
    assert_exact(model)


def test_pruning_twice_is_pruning_once():
    model = gated(Net(), filters=9, size=3, pads=[1, 1])
    space = analyze(model)
    first = remove(space, Plan([1, 4]))
    again = analyze(first)
    assert prunable(again, "conv") == 7
    twice = remove(again, Plan([2, 6]))  # 3 and 8 of the original
    given = feeds(model, 2)
    for a, b in zip(run(twice, given), run(remove(space, Plan([1, 3, 4, 8])), given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_automatic_pads_protect():
    model = gated(Net(), size=3, auto_pad="SAME_UPPER")
    assert_protected(analyze(model), "conv", "eca", "mixes the positions along axis", 8)
