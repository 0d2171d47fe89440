"""Sessions, providers and cuts, on ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcar import runtime
from onnxcar.errors import DataError, ModelError, RuntimeMissingError
from onnxcar.model import from_proto


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)


def test_cpu_is_always_there():
    assert runtime.resolve_provider("cpu").ort_names == ("CPUExecutionProvider",)


def test_auto_says_what_it_took():
    found = runtime.resolve_provider("auto")
    assert found.name in ("cpu", "cuda")
    assert found.note


def test_a_provider_that_does_not_load_is_an_error():
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    with pytest.raises(RuntimeMissingError, match=r"'cuda' is not in this build.*--provider cpu") as caught:
        runtime.resolve_provider("cuda")
    assert caught.value.provider == "cuda"


def test_an_unknown_provider_is_an_error():
    with pytest.raises(RuntimeMissingError, match="no provider 'gpu'"):
        runtime.resolve_provider("gpu")


def test_without_onnx_runtime_both_wheels_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"onnxcar\[cpu\][\s\S]*onnxcar\[gpu\]"):
        runtime.resolve_provider("cpu")


def test_the_only_input_needs_no_name(cnn, images):
    made = runtime.session(cnn, threads=1)
    assert np.array_equal(made.run({"": images})[0], made.run({"x": images})[0])


def test_a_wrong_shape_is_named(cnn, images):
    with pytest.raises(DataError, match=r"Input 'x' takes shape \(any, 3, 8, 8\), the data has \(7, 3, 8, 7\)"):
        runtime.session(cnn, threads=1).run({"": images[..., :7]})


def test_a_missing_input_is_named(residual, images):
    with pytest.raises(DataError, match="no array for input 'x'"):
        runtime.session(residual, threads=1).run({"y": images, "z": images})


def test_what_onnx_runtime_cannot_load_is_a_model_error(cnn):
    broken = onnx.ModelProto()
    broken.CopyFrom(cnn)
    broken.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(ModelError, match="does not load"):
        runtime.session(broken)


def test_a_cut_gives_the_same_values(cnn, images):
    front, back = runtime.cut(cnn, ["x"], ["b"]), runtime.cut(cnn, ["b"], ["y"])
    middle = runtime.session(front, threads=1).run({"x": images})[0]
    ends = runtime.session(back, threads=1).run({"b": middle})[0]
    whole = runtime.session(cnn, threads=1).run({"x": images})[0]
    np.testing.assert_array_equal(ends, whole)
    assert [node.op_type for node in front.graph.node] == ["Conv", "Relu"]
    assert len(back.graph.initializer) == 4


def test_a_cut_that_leaves_an_input_open_is_refused(residual):
    with pytest.raises(ModelError, match="leaves input 'x' on the way"):
        runtime.cut(residual, ["e"], ["y"])


def test_weights_among_the_inputs_need_no_feed(make_model, images):
    body = "a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Relu (a) c = GlobalAveragePool (b) y = Flatten (c)"
    proto = make_model(body, "float[N,3,8,8] x, float[4,3,3,3] w", weights={"w": (4, 3, 3, 3)}, ir=3, opset=8)
    assert [i.name for i in runtime.batch_inputs(proto)] == ["x"]
    assert [i.name for i in runtime.session(proto, threads=1).inputs] == ["x"]
    assert len(proto.graph.input) == 2  # the file's own graph is left alone


def fixed(proto, size):
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for info in (made.graph.input[0], made.graph.output[0]):
        info.type.tensor_type.shape.dim[0].Clear()
        info.type.tensor_type.shape.dim[0].dim_value = size
    return made


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_is_freed_in_a_copy(cnn, images, size):
    network = runtime.open_network(from_proto(fixed(cnn, size)), threads=1)
    assert network.fixed is None
    np.testing.assert_allclose(network.run({"": images})[0], runtime.session(cnn).run({"": images})[0], atol=1e-5)


def test_a_reshape_to_the_old_batch_is_freed(make_model, images):
    body = "a = Conv (x, w) b = GlobalMaxPool (a) y = Reshape (b, s)"
    weights = {"w": (4, 3, 3, 3), "s": np.asarray([1, 4])}
    network = runtime.open_network(make_model(body, "float[1,3,8,8] x", "float[1,4] y", weights), threads=1)
    assert network.fixed is None
    assert network.run({"": images})[0].shape == (7, 4)


def test_a_batch_that_cannot_be_freed_runs_in_pieces(make_model, images):
    body = "a = Conv (x, w) b = GlobalMaxPool (a) c = Flatten (b) y = Add (c, z)"
    weights = {"w": (4, 3, 3, 3), "z": np.arange(8, dtype=np.float32).reshape(2, 4)}
    proto = make_model(body, "float[2,3,8,8] x", "float[2,4] y", weights)
    network = runtime.open_network(proto, threads=1)
    assert network.fixed == 2
    out = network.run({"": images})[0]
    pairs = [runtime.session(proto).run({"": images[i : i + 2]})[0] for i in (0, 2, 4)]
    np.testing.assert_array_equal(out[:6], np.concatenate(pairs))
    assert out.shape == (7, 4)


def test_a_batch_that_leaks_between_samples_is_not_freed(make_model, images):
    # Adding the mean over the batch is nothing special at batch 1, and mixes samples at any other.
    body = "a = ReduceMean <axes = [0], keepdims = 1> (x) b = Add (x, a) c = Conv (b, w) d = GlobalMaxPool (c)"
    body += " y = Flatten (d)"
    proto = make_model(body, "float[1,3,8,8] x", "float[1,4] y", {"w": (4, 3, 3, 3)}, opset=13)
    network = runtime.open_network(proto, threads=1)
    assert network.fixed == 1
    one = runtime.session(proto).run({"": images[3:4]})[0]
    np.testing.assert_array_equal(network.run({"": images})[0][3:4], one)


def test_feeds_take_the_graphs_type():
    inputs = [helper.make_tensor_value_info("x", TensorProto.INT8, ["n", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])]
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=1)], "g", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    out = runtime.session(proto).run({"": np.asarray([[-200.0, 3.4], [127.6, -0.6]], np.float32)})[0]
    assert out.tolist() == [[-128, 3], [127, -1]]


def test_several_inputs_want_names(make_model, images):
    proto = make_model("s = Add (x, z) c = Conv (s, w) d = GlobalMaxPool (c) y = Flatten (d)",
                       "float[N,3,8,8] x, float[N,3,8,8] z", weights={"w": (4, 3, 3, 3)})  # fmt: skip
    made = runtime.session(proto, threads=1)
    with pytest.raises(DataError, match=r"2 inputs \('x', 'z'\)"):
        made.run({"": images})
    assert made.run({"x": images, "z": images})[0].shape == (7, 4)
