"""Removing: what survives stays as it was, names, order, metadata, values, dead nodes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcar.model import count_params, from_proto, load, save
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, mask, remove
from tests.graphs import Net, assert_exact, assert_valid, feeds, node_of, random_plan, run, weights_of


def network(**options):
    net = Net(**options)
    a = net.op("Relu", net.norm(net.conv(net.input(), 8)))
    b = net.op("Relu", net.conv(a, 6, name="second"))
    return net, net.head(b)


def decorated() -> onnx.ModelProto:
    """A model with everything that a round trip through another graph class loses."""
    net, y = network()
    proto = net.proto(y)
    proto.producer_name, proto.producer_version, proto.domain = "maker", "1.2.3", "org.example"
    proto.model_version, proto.doc_string = 7, "a model"
    proto.graph.doc_string = "a graph"
    helper.set_model_props(proto, {"onnxcar.source": "test", "key": "värde"})
    for k, node in enumerate(proto.graph.node):
        node.doc_string = f"node {k}"
        node.metadata_props.add(key="k", value=str(k))
    for t in proto.graph.initializer:
        t.doc_string = f"weight {t.name}"
    proto.graph.input[0].doc_string = "the image"
    proto.graph.output[0].doc_string = "the classes"
    proto.graph.metadata_props.add(key="g", value="1")
    body = [helper.make_node("Relu", ["v"], ["w"])]
    proto.functions.append(helper.make_function("local", "Unused", ["v"], ["w"], body, [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    return proto


def test_everything_but_the_weights_stays():
    proto = decorated()
    model = from_proto(proto)
    space = analyze(model)
    (done,) = assert_exact(model, random_plan(space, 0.4, 1))
    new = done.pruned.proto
    assert [(n.name, n.doc_string, n.op_type) for n in new.graph.node] == [
        (n.name, n.doc_string, n.op_type) for n in proto.graph.node
    ]
    assert [list(n.metadata_props) for n in new.graph.node] == [list(n.metadata_props) for n in proto.graph.node]
    assert [t.name for t in new.graph.initializer] == [t.name for t in proto.graph.initializer]
    assert [t.doc_string for t in new.graph.initializer] == [t.doc_string for t in proto.graph.initializer]
    assert list(new.metadata_props) == list(proto.metadata_props)
    assert list(new.graph.metadata_props) == list(proto.graph.metadata_props)
    assert new.graph.input[0] == proto.graph.input[0]
    assert new.graph.output[0] == proto.graph.output[0]
    assert list(new.functions) == list(proto.functions)


def test_weights_that_lose_nothing_stay_bit_for_bit():
    net, y = network()
    model = net.model(y)
    space = analyze(model)
    pruned = remove(space, Plan([0]))
    before, after = ({t.name: t.SerializeToString() for t in m.proto.graph.initializer} for m in (model, pruned))
    same = [n for n in before if before[n] == after[n]]
    assert set(same) == {"second_b", "tail_w", "tail_b", "head_w", "head_b"}


def test_special_values_survive():
    net, y = network()
    proto = net.proto(y)
    t = next(t for t in proto.graph.initializer if t.name == "second_w")
    values = numpy_helper.to_array(t).copy()
    values[0, 0].view(np.uint32)[:] = 0x7FC12345  # a NaN with a payload
    values[1, 0, 0] = [np.inf, -np.inf, -0.0]
    t.CopyFrom(numpy_helper.from_array(values, t.name))
    space = analyze(from_proto(proto))
    pruned = remove(space, Plan([3, 9]))
    kept = weights_of(pruned)["second_w"]
    want = np.delete(np.delete(values, 1, 0), 3, 1)
    assert np.array_equal(kept.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("field", ["raw", "typed"])
def test_weights_stored_in_typed_fields(field):
    net, y = network()
    proto = net.proto(y)
    if field == "typed":
        for t in proto.graph.initializer:
            values = numpy_helper.to_array(t)
            t.CopyFrom(helper.make_tensor(t.name, t.data_type, values.shape, values.ravel().tolist()))
    assert_exact(from_proto(proto))


def test_nodes_that_were_dead_stay_and_those_that_die_go():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    net.op("Identity", net.op("Sigmoid", a, name="unused"), name="unused too")
    net.const(net.random(3), "spare")
    w = net.op("Transpose", net.const(net.random(3, 3, 6, 5), "stored"), perm=[3, 2, 0, 1], name="turn")
    w = net.reshape(w, 5, 6, 3, 3, name="fold")
    y = net.op("Conv", a, w, name="next")
    model = net.model(net.head(y))
    (done,) = assert_exact(model, Plan([0, 7]))
    names = [n.name for n in done.pruned.proto.graph.node]
    assert {"unused", "unused too"} <= set(names)
    assert "spare" in weights_of(done.pruned)
    assert "fold" not in names  # its result is cut and stored as it is
    assert "stored" not in weights_of(done.pruned)


def test_dead_nodes_follow_the_channels_they_read():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    net.op("Conv", a, net.const(net.random(4, 6, 1, 1), "dead_w"), name="dead")
    model = net.model(net.head(a))
    (done,) = assert_exact(model, Plan([1]))
    assert weights_of(done.pruned)["dead_w"].shape == (4, 5, 1, 1)
    assert node_of(done.pruned, "dead").input[1] == "dead_w"


def test_declared_shapes_of_values_follow():
    net, y = network()
    proto = onnx.shape_inference.infer_shapes(net.proto(y))
    assert len(proto.graph.value_info) > 5
    model = from_proto(proto)
    (done,) = assert_exact(model, Plan([0, 1, 9]))
    infos = done.pruned.proto.graph.value_info
    dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in infos}
    assert dims["conv_y"] == ["N", 6, 8, 8]
    assert dims["second_y"] == ["N", 5, 8, 8]
    assert dims["tail_y"] == ["N", 5, 8, 8]


def test_fixed_batches_stay_fixed():
    net = Net()
    y = net.head(net.op("Relu", net.conv(net.input("x", (2, 3, 8, 8)), 6)))
    for done in assert_exact(net.model(y)):
        assert [d.dim_value for d in done.pruned.proto.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 8, 8]


def test_new_names_never_meet_old_ones():
    # a name that surgery would choose is taken already
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    p, q = net.op("Split", a, n=2, axis=1, name="split")
    net.const(np.zeros(3, np.float32), f"{p}_split_onnxcar")
    net.const(np.zeros(2, np.float32), f"{p}_split_onnxcar1")
    y = net.op("Concat", net.op("Sigmoid", p), q, axis=1)
    model = net.model(net.head(y))
    (done,) = assert_exact(model, Plan([0, 1, 4]))
    assert node_of(done.pruned, "split").input[1] == f"{p}_split_onnxcar2"


def test_the_cost_of_what_is_left_is_that_of_the_file():
    net, y = network()
    model = net.model(y)
    space = analyze(model)
    for seed in range(5):
        plan = random_plan(space, 0.5, seed)
        pruned = remove(space, plan)
        again = analyze(pruned)
        assert space.cost(plan.groups).params == count_params(pruned) == again.cost().params
        assert space.cost(plan.groups).macs == again.cost().macs
        assert space.cost(plan.groups).params < space.cost().params


def test_a_pruned_model_can_be_saved_loaded_and_pruned_again(tmp_path):
    net, y = network()
    model = net.model(y)
    space = analyze(model)
    saved = save(remove(space, Plan([0, 9])), tmp_path / "a.onnx")
    again = load(tmp_path / "a.onnx")
    assert again.sha256 == saved.sha256
    assert_exact(again)


def test_external_weights_are_cut(tmp_path):
    net, y = network()
    proto = net.proto(y)
    inside = analyze(from_proto(proto))
    given = feeds(inside.model, 2)
    onnx.save_model(
        net.proto(y), str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=0
    )
    model = load(tmp_path / "m.onnx")
    space = analyze(model)
    plan = Plan([1, 2, 10])
    save(remove(space, plan), tmp_path / "pruned.onnx")
    want = run(mask(inside, plan), given)[0]
    assert np.abs(run(load(tmp_path / "pruned.onnx"), given)[0] - want).max() < 1e-4
    assert np.abs(run(inside.model, given)[0] - want).max() > 1e-3


def test_removal_is_the_same_twice():
    net, y = network()
    space = analyze(net.model(y))
    plan = random_plan(space, 0.4, 3)
    first, second = (remove(space, plan).proto.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert_valid(remove(space, plan))
