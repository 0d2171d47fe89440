"""Verifying: a right removal passes with its error, a wrong one is never written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcar.errors import InternalError, ModelError
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove, verify
from tests.graphs import Net, feeds, run, weights_of


@pytest.fixture
def case():
    net = Net()
    a = net.op("Relu", net.norm(net.conv(net.input(), 6)))
    space = analyze(net.model(net.head(a)))
    plan = Plan([1, 4])
    return space, plan, remove(space, plan)


def changed(model, name, values):
    """The model with other values of one weight."""
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    for t in proto.graph.initializer:
        if t.name == name:
            t.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return model.with_proto(proto)


def test_a_right_removal_passes(case):
    space, plan, pruned = case
    found = verify(space, plan, pruned)
    assert 0 <= found.max_abs_error < 1e-5
    assert found.max_rel_error < 1e-5
    assert found.samples == 2


def test_given_inputs_are_used(case):
    space, plan, pruned = case
    assert verify(space, plan, pruned, feeds=feeds(space.model, 7)).samples == 7


def test_a_wrong_weight_is_found(case):
    space, plan, pruned = case
    values = weights_of(pruned)["tail_w"].copy()
    values[:, [0, 1]] = values[:, [1, 0]]  # two channels of the reader swapped: every shape is right
    with pytest.raises(InternalError, match="differs from the masked original"):
        verify(space, plan, changed(pruned, "tail_w", values))


def test_the_wrong_filters_are_found(case):
    space, plan, _ = case
    with pytest.raises(InternalError, match="differs"):
        verify(space, plan, remove(space, Plan([1, 3])))


def test_a_changed_output_shape_is_found():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    y = net.head(a)
    space = analyze(net.model(y))
    other = Net()
    b = other.op("Relu", other.conv(other.input(), 6))
    wrong = other.model(other.head(b, classes=3))
    with pytest.raises(InternalError, match="changed its shape"):
        verify(space, Plan([0]), wrong)


def test_a_saturated_softmax_hides_nothing():
    # logits of some hundreds: the softmax is one-hot whatever the rest does
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    logits = net.op("Mul", net.head(a), np.float32(900), name="logits")
    space = analyze(net.model(net.op("Softmax", logits, axis=1)))
    plan = Plan([1])
    pruned = remove(space, plan)
    assert verify(space, plan, pruned).max_rel_error < 1e-5
    wrong = changed(pruned, "tail_w", weights_of(pruned)["tail_w"] * np.float32(1.1))
    given = feeds(space.model, 2)
    assert np.abs(run(wrong, given)[0] - run(pruned, given)[0]).max() < 1e-4
    with pytest.raises(InternalError, match=r"'logits_y'.*differs"):
        verify(space, plan, wrong, feeds=given)


def test_a_model_that_does_not_run_is_the_models_fault(case):
    space, plan, pruned = case
    with pytest.raises(ModelError, match="cannot run"):
        verify(space, plan, pruned, feeds={"x": np.zeros((2, 4, 8, 8), np.float32)})


def test_several_inputs_of_several_types():
    net = Net()
    x, ids = net.input(), net.input("ids", ("N",), np.int64)
    table = net.const(net.random(10, 6), "table")
    row = net.op("Unsqueeze", net.op("Gather", table, ids), net.ints(2, 3))
    y = net.op("Add", net.conv(x, 6), net.op("Tanh", row))
    model = net.model(net.head(net.op("Concat", y, net.conv(x, 4, name="free"), axis=1)))
    space = analyze(model)
    plan = Plan([space.groups[0].id])
    assert verify(space, plan, remove(space, plan)).max_rel_error < 1e-5


def test_nan_where_the_original_has_nan_is_equal():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    y = net.head(a)
    y = net.op("Log", net.op("Add", net.op("Mul", y, np.float32([0, 1, 1, 1])), np.float32([-1, 9, 9, 9])))
    space = analyze(net.model(y))
    plan = Plan([2])
    assert verify(space, plan, remove(space, plan)).max_rel_error < 1e-5


def as_type(model, kind):
    """The model with all floats of another type."""
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    for t in proto.graph.initializer:
        if t.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(t).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
            t.CopyFrom(numpy_helper.from_array(values, t.name))
    for v in (*proto.graph.input, *proto.graph.output):
        v.type.tensor_type.elem_type = kind
    return model.with_proto(proto)


@pytest.mark.parametrize("kind", [onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE], ids=["bfloat16", "double"])
def test_a_type_without_kernels_is_compared_in_single_precision(kind):
    net = Net(opset=22)
    a = net.op("Relu", net.conv(net.input(), 6))
    space = analyze(as_type(net.model(net.head(net.op("Relu", net.conv(a, 6)))), kind))
    plan = Plan([1, 4])
    pruned = remove(space, plan)
    assert {t.data_type for t in pruned.proto.graph.initializer if len(t.dims) == 4} == {kind}
    assert verify(space, plan, pruned).max_rel_error < 1e-5
    with pytest.raises(InternalError, match="differs"):
        verify(space, plan, remove(space, Plan([1, 3])))
