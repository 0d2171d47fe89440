"""The criterion that asks what a refit can make up for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcar.criteria import Context, find
from onnxcar.errors import PlanError
from onnxcar.model import Model
from onnxcar.recovery import Reconstruction
from onnxcar.recovery._surgeon import RIDGE, Surgeon, inverse
from onnxcar.rules import analyze
from tests.graphs import Net
from tests.test_recovery import groups_of, redundant, samples


def lost(weights: np.ndarray, moments: np.ndarray, gone: np.ndarray) -> float:
    """Least (W - V)' M (W - V) over all V whose rows `gone` are zero."""
    kept = np.setdiff1d(np.arange(len(weights)), gone)
    near = moments + RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments))
    new = np.zeros_like(weights)
    new[kept] = np.linalg.solve(near[np.ix_(kept, kept)], near[kept] @ weights)
    gap = weights - new
    return float(np.trace(gap.T @ near @ gap))


def test_a_cost_is_the_least_error_that_a_refit_leaves() -> None:
    rng = np.random.default_rng(0)
    weights, x = rng.standard_normal((8, 3)), rng.standard_normal((40, 8)) @ rng.standard_normal((8, 8))
    moments, groups = x.T @ x / 40, np.array([0, 0, 1, 1, -1, -1, 2, 3])
    surgeon = Surgeon(weights.copy(), inverse(moments), groups)
    for group, cost in surgeon.costs().items():
        np.testing.assert_allclose(cost, lost(weights, moments, np.flatnonzero(groups == group)), rtol=1e-9)
    first = surgeon.costs()[1]
    assert surgeon.drop(1)
    assert not surgeon.drop(1)
    for group, cost in surgeon.costs().items():
        both = np.flatnonzero((groups == group) | (groups == 1))
        np.testing.assert_allclose(first + cost, lost(weights, moments, both), rtol=1e-9)


def test_of_two_twins_either_is_free_but_not_both() -> None:
    model = redundant("duplicates")
    space = analyze(model)
    twins = [next(iter(groups_of(space, "first", [i]).groups)) for i in (0, 4)]
    judge = Reconstruction(space, samples(model, 300))
    alone = judge.importances(frozenset())
    other = next(iter(groups_of(space, "first", [2]).groups))
    # the ridge splits the work between twins: half of its share of a variance is left
    assert alone[twins].max() < 0.01 * alone[other]
    after = judge.importances(frozenset([twins[1]]))
    assert np.isnan(after[twins[1]])
    assert after[twins[0]] > 0.1 * alone[other]
    # asked for a smaller set again, it starts anew and says the same
    np.testing.assert_array_equal(judge.importances(frozenset()), alone)


def test_the_order_of_removal_does_not_matter() -> None:
    model = redundant("conv")
    space = analyze(model)
    ids = sorted(groups_of(space, "first", [0, 3]).groups)
    data = samples(model, 60)
    one, two = Reconstruction(space, data), Reconstruction(space, data)
    one.importances(frozenset(ids[1:]))
    np.testing.assert_allclose(one.importances(frozenset(ids)), two.importances(frozenset(ids)), rtol=1e-5)


def test_a_layer_whose_errors_reach_the_output_weighs_more() -> None:
    net = Net()
    y = net.op("Tanh", net.conv(net.input(), 6, name="first"))
    strong, weak = (net.conv(y, 2, name=name) for name in ("strong", "weak"))
    y = net.op("Add", strong, net.op("Mul", weak, np.float32(0.1)))
    model = net.model(y)
    judge = Reconstruction(analyze(model), samples(model, 100))
    found = {name: judge.weights[value] for name, value in (("strong", strong), ("weak", weak))}
    assert found["weak"] == pytest.approx(0.01 * found["strong"], rel=0.15)


def test_it_is_a_criterion() -> None:
    model = redundant("duplicates")
    space = analyze(model)
    row = find("reconstruction")
    assert row.greedy
    context = Context(data=samples(model, 50), seed=2)
    want = Reconstruction(space, samples(model, 50), seed=2).importances(frozenset())
    np.testing.assert_array_equal(row.function(space, context), want)
    held = context.memo["reconstruction"]
    row.function(space, context)
    assert context.memo["reconstruction"] is held


def test_groups_that_something_else_reads_stay() -> None:
    net = Net()
    x = net.conv(net.input(), 4, name="first")
    half = net.op("Cast", net.const(net.random(4, 4, 1, 1).astype(np.float16), "half"), to=onnx.TensorProto.FLOAT)
    y = net.op("Tanh", net.op("Conv", x, half, name="odd"))
    model = net.model(net.conv(y, 3, name="reader"))
    space = analyze(model)
    found = Reconstruction(space, samples(model)).importances(frozenset())
    assert np.isinf(found[sorted(groups_of(space, "first", [0, 1, 2, 3]).groups)]).all()
    assert np.isfinite(found[sorted(groups_of(space, "odd", [0, 1, 2, 3]).groups)]).all()
    net = Net()
    y = net.op("Conv", net.conv(net.input(), 4, name="first"), net.op("Cast", np.ones((2, 4, 1, 1), np.float16), to=1))
    alone = net.model(y)
    with pytest.raises(PlanError, match=r"come out of a Cast.*--criterion car"):
        Reconstruction(analyze(alone), samples(alone))


class Told:
    """Reports, as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, done: float, total: float | None, text: str = "", unit: str = "") -> None:
        assert total is not None
        assert 0 <= done <= total
        self.texts.append(text)


def deep() -> Model:
    """Four readers, one of them grouped."""
    net = Net()
    y = net.op("Relu", net.conv(net.input(), 8, name="first"))
    y = net.op("Relu", net.conv(y, 8, group=2, name="second"))
    y = net.op("Relu", net.conv(y, 6, name="third"))
    return net.model(net.conv(y, 3, name="last"))


def test_little_memory_takes_more_passes_and_says_the_same() -> None:
    model = deep()
    space = analyze(model)
    data = samples(model, 150)
    free, told = Reconstruction(space, data, progress=(heard := Told())), Told()
    bound = Reconstruction(space, data, memory_bytes=150_000, progress=told)
    assert free.passes == 1
    assert bound.passes > 1
    assert free._shelf.written == 0 < bound._shelf.written
    assert "inputs of all layers" in heard.texts
    assert "inputs of layers, pass 2" in told.texts
    assert "what errors in second cost" in told.texts
    removed: frozenset[int] = frozenset()
    for _ in range(8):
        one, two = free.importances(removed), bound.importances(removed)
        np.testing.assert_allclose(one, two, rtol=1e-4)
        assert np.nanargmin(one) == np.nanargmin(two)
        removed |= {int(np.nanargmin(one))}
    np.testing.assert_allclose(free.importances(frozenset()), bound.importances(frozenset()), rtol=1e-4)


def test_a_layer_that_alone_takes_more_than_the_bound_is_told() -> None:
    model = deep()
    with pytest.raises(PlanError, match=r"'second' has 36 inputs.*--memory \dMiB"):
        Reconstruction(analyze(model), samples(model), memory_bytes=20_000)
