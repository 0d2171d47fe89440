"""Cutting constants per use: in place where all uses agree, else a copy for each way of cutting."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.channels import Site
from onnxcar.rules import analyze
from onnxcar.surgery import Plan
from onnxcar.surgery._tensors import Cut, cut_of
from tests.graphs import Net, assert_exact, node_of, weights_of


def test_a_cut_takes_indices_along_axes():
    x = np.arange(24).reshape(2, 3, 4)
    got = Cut(((1, (0, 2)), (2, (3,)))).apply(x)
    assert got.tolist() == [[[3], [11]], [[15], [23]]]
    assert got.flags.c_contiguous
    assert not np.shares_memory(got, x)


def test_a_cut_by_blocks_takes_columns_block_by_block():
    # 2 blocks of 2 rows; columns 0..2 belong to the first block, 3..5 to the second
    x = np.arange(12).reshape(4, 3)
    got = Cut(((0, (0, 3)), (1, (1, 2, 3, 5))), blocks=2).apply(x)
    assert got.tolist() == [[1, 2], [9, 11]]


def test_a_block_that_leaves_takes_its_columns_along():
    x = np.arange(12).reshape(4, 3)
    assert Cut(((0, (2, 3)), (1, (3, 4, 5))), blocks=2).apply(x).tolist() == [[6, 7, 8], [9, 10, 11]]


def test_a_site_that_loses_nothing_needs_no_cut():
    site = Site(0, 1, {0: np.asarray([0, 1, -1])})
    assert cut_of(site, np.asarray([True, True, True])) is None
    assert cut_of(site, np.asarray([True, False, True])) == Cut(((0, (0, 2)),))


@pytest.mark.parametrize("other", ["same", "different", "none"])
def test_one_constant_in_two_places(other):
    # a scale that two branches share: cut alike, cut apart, or cut in one place only
    net = Net()
    x = net.input()
    scale = net.const(net.positive(6, 1, 1), "scale")
    a = net.op("Mul", net.conv(x, 6, name="one"), scale, name="first")
    b = net.conv(x, 6, name="two") if other != "none" else net.op("Tile", x, net.ints(1, 2, 1, 1))
    b = net.op("Mul", b, scale, name="second")
    model = net.model(net.head(net.op("Concat", a, b, axis=1)))
    assert len(analyze(model).groups) == (11 if other == "none" else 17)
    plan = {"same": [1, 2, 7, 8], "different": [1, 2, 9], "none": [1, 2]}[other]
    (done,) = assert_exact(model, Plan(plan))
    held = weights_of(done.pruned)
    first, second = (node_of(done.pruned, n).input[1] for n in ("first", "second"))
    assert held[first].size == 4
    assert held[second].size == {"same": 4, "different": 5, "none": 6}[other]
    assert (first == second) is (other == "same")
    if other == "same":
        assert first == "scale"
    if other == "none":
        assert second == "scale"
    assert_exact(model)


def test_a_constant_that_is_an_output_too_is_copied():
    net = Net()
    k = net.op("Identity", net.const(net.positive(6, 1, 1), "scale"), name="out")
    y = net.op("Mul", net.conv(net.input(), 6), "scale", name="use")
    model = net.model(net.head(y), k)
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["scale"].shape == (6, 1, 1)
    assert weights_of(done.pruned)[node_of(done.pruned, "use").input[1]].shape == (4, 1, 1)


def test_a_constant_that_is_an_output_itself_keeps_its_values():
    net = Net()
    k = net.op("Identity", net.const(net.positive(6, 1, 1), "scale"), name="out")
    y = net.op("Mul", net.conv(net.input(), 6), k, name="use")
    model = net.model(net.head(y), k)
    (done,) = assert_exact(model, Plan([0, 1]))
    assert node_of(done.pruned, "out").input[0] == "scale"
    assert weights_of(done.pruned)["scale"].shape == (6, 1, 1)
    assert weights_of(done.pruned)[node_of(done.pruned, "use").input[1]].shape == (4, 1, 1)


def test_the_chain_behind_a_weight_is_followed():
    net = Net()
    stored = net.const(net.random(3, 3, 3, 6).astype(np.float64), "stored")
    w = net.op("Transpose", net.op("Cast", net.op("Identity", stored), to=1), perm=[3, 2, 0, 1])
    y = net.op("Relu", net.conv(net.input(), 6, weight=w))
    model = net.model(net.head(y))
    (done,) = assert_exact(model, Plan([0, 5]))
    assert weights_of(done.pruned)["stored"].shape == (3, 3, 3, 4)
    assert weights_of(done.pruned)["stored"].dtype == np.float64
    assert [n.op_type for n in done.pruned.proto.graph.node] == [n.op_type for n in model.proto.graph.node]


def test_a_chain_that_two_layers_share_and_cut_apart():
    net = Net()
    stored = net.const(net.random(6), "stored")
    x = net.input()
    bias = net.op("Identity", net.op("Identity", stored, name="inner"), name="outer")
    a = net.op("Conv", x, net.random(6, 3, 1, 1), bias, name="one")
    b = net.op("Conv", x, net.random(6, 3, 1, 1), bias, name="two")
    model = net.model(net.head(net.op("Concat", a, net.op("Relu", b), axis=1)))
    (done,) = assert_exact(model, Plan([0, 1, 8]))
    held = weights_of(done.pruned)
    assert "stored" not in held or held["stored"].size in (4, 5)
    assert_exact(model)
