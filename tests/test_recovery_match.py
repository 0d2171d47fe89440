"""Finding out what is gone from a pruned model."""

from __future__ import annotations

import onnx
import pytest
from onnx import numpy_helper

from onnxcar.errors import PlanError
from onnxcar.model import Model, from_proto
from onnxcar.recovery import plan_of, recover
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import Net, random_plan
from tests.test_recovery import groups_of, samples


def changed(model: Model, name: str) -> Model:
    """The model with one weight scaled."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    t = next(t for t in proto.graph.initializer if t.name == name)
    t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * 2, name))
    return from_proto(proto)


def network() -> Model:
    """A chain with a norm, a residual sum, a depthwise layer, a concat, a ConvTranspose and dense layers."""
    net = Net()
    y = net.op("Relu", net.norm(net.conv(net.input(), 8, name="first")))
    z = net.conv(net.op("Relu", net.conv(y, 6, name="inner")), 8, name="outer")
    y = net.op("Relu", net.op("Add", y, z))
    y = net.op("Concat", net.conv(y, 8, name="depthwise", group=8), net.conv(y, 3, name="side"), axis=1)
    y = net.op("ConvTranspose", y, net.const(net.random(11, 5, 2, 2), "up_w"), name="up", strides=[2, 2])
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", y)))
    return net.model(net.gemm(net.op("Relu", net.gemm(y, 7)), 4))


@pytest.mark.parametrize("seed", range(6))
def test_surviving_weights_tell_what_is_gone(seed: int) -> None:
    space = analyze(network())
    plan = random_plan(space, 0.1 + 0.15 * seed, seed)
    assert plan_of(space, remove(space, plan)) == (plan, "weights")


def test_nothing_gone_is_an_empty_plan() -> None:
    model = network()
    assert plan_of(analyze(model), model) == (Plan(), "weights")


def test_a_repaired_model_needs_its_plan() -> None:
    model = network()
    space = analyze(model)
    plan = random_plan(space, 0.4)
    repaired = recover(space, plan, remove(space, plan), samples(model, 400))
    assert not repaired.kept
    found = repaired.model
    with pytest.raises(PlanError, match=r"bit for bit.*--plan"):
        plan_of(space, found)
    assert plan_of(space, found, plan.to_json(space)) == (plan, "plan")
    # and what was repaired once can be repaired again
    again = recover(space, plan, found, samples(model), method="least-squares")
    assert again.after <= again.before


def test_metadata_of_a_pruned_model_are_believed_if_they_fit() -> None:
    model = network()
    space = analyze(model)
    plan = groups_of(space, "inner", [1, 2])
    compact = changed(remove(space, plan), "inner_w")
    proto = onnx.ModelProto()
    proto.CopyFrom(compact.proto)
    proto.metadata_props.add(key="onnxcar.source_sha256", value=model.sha256)
    proto.metadata_props.add(key="onnxcar.removed_filters", value='{"inner_w":[1,2]}')
    assert plan_of(space, from_proto(proto)) == (plan, "metadata")
    proto.metadata_props[-1].value = '{"inner_w":[1]}'
    with pytest.raises(PlanError, match="has shape"):
        plan_of(space, from_proto(proto))


def test_another_original_is_refused() -> None:
    space = analyze(network())
    other = Net()
    model = other.model(other.conv(other.input(), 4, name="elsewhere"))
    with pytest.raises(PlanError, match="no weight 'first_w'"):
        plan_of(space, model)
    pruned = remove(space, groups_of(space, "inner", [0]))
    with pytest.raises(PlanError, match="bit for bit"):
        plan_of(space, changed(pruned, "outer_w"))
    with pytest.raises(PlanError, match="has shape"):
        plan_of(space, pruned, groups_of(space, "inner", [0, 1]).to_json(space))
