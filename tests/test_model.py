"""Loading: the wall against damaged and hostile files, external data, hashes, parameters."""

import hashlib
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxcar._tensors
import onnxcar.model
from onnxcar.errors import ModelError
from onnxcar.model import Model, count_params, from_proto, load, parameters

MakeModel = Callable[..., ModelProto]


def write(folder: Path, content: ModelProto | bytes, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def refused(path: Path, *words: str) -> str:
    """The one line with which a file is refused; it must name the file and end in advice."""
    with pytest.raises(ModelError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", ")"))
    assert path.name in text
    for word in words:
        assert word in text
    return text


def external_copy(proto: ModelProto, folder: Path, location: str = "m.data") -> Path:
    """The model with every initializer in an external file, as onnx writes it."""
    twin = ModelProto()
    twin.CopyFrom(proto)
    onnx.save_model(twin, folder / "m.onnx", save_as_external_data=True, location=location, size_threshold=0)
    return folder / "m.onnx"


def set_entry(path: Path, key: str, value: str | None, index: int = 0) -> None:
    """Change one external-data entry of one tensor in a file."""
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[index]
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for k, v in [*kept, *([(key, value)] if value is not None else [])]:
        tensor.external_data.add(key=k, value=v)
    path.write_bytes(proto.SerializeToString())


# --- what loads -------------------------------------------------------------------------------------------------------


def test_a_good_model_loads_with_hash_and_size_of_its_file(cnn: ModelProto, tmp_path: Path) -> None:
    path = write(tmp_path, cnn)
    model = load(str(path))
    assert model.proto == cnn
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (model.path, model.external, model.n_bytes) == (path, False, path.stat().st_size)


def test_nan_weights_load(cnn: ModelProto, tmp_path: Path) -> None:
    tensor = cnn.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))
    assert np.isnan(load(write(tmp_path, cnn)).array(tensor)).all()


def test_a_file_and_its_protobuf_have_one_hash(cnn: ModelProto, tmp_path: Path) -> None:
    path = write(tmp_path, cnn)
    model = from_proto(onnx.load(path))
    assert model.sha256 == load(path).sha256
    assert model.n_bytes == path.stat().st_size
    assert model.path is None


def test_every_shared_model_loads_as_it_is(shared: Path) -> None:
    paths = sorted((shared / "models").glob("*.onnx"))
    assert len(paths) > 10
    for path in paths:
        assert load(path).proto == onnx.load(path)


# --- what is no ONNX model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"hello", "no ONNX model"),
        (bytes(4096), "no ONNX model"),
        (b"PK\x03\x04rest", "torch.onnx.export"),
        (pickle.dumps({"weights": 1}), "never opened"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_foreign_files_are_named(content: bytes, word: str, tmp_path: Path) -> None:
    refused(write(tmp_path, content), word)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(part: float, cnn: ModelProto, tmp_path: Path) -> None:
    raw = cnn.SerializeToString()
    refused(write(tmp_path, raw[: int(len(raw) * part)]))


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    refused(write(tmp_path, pickle.dumps(Trap())))
    assert not (tmp_path / "sprung").exists()


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nope.onnx", "No such file")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "folder")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.onnx")
        refused(tmp_path / "pipe.onnx", "no regular file")
    with pytest.raises(ModelError):
        load("nul\0byte.onnx")


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_never_gets_past_the_error_tree(seed: int, cnn: ModelProto, tmp_path: Path) -> None:
    raw = bytearray(cnn.SerializeToString())
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 3, 30])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    path = write(tmp_path, bytes(raw))
    try:
        model = load(path)
    except ModelError:
        refused(path)
    else:
        assert count_params(model) >= 0


# --- structure --------------------------------------------------------------------------------------------------------


def clear_opset(proto: ModelProto) -> None:
    del proto.opset_import[:]


def double_opset(proto: ModelProto) -> None:
    proto.opset_import.add(version=11)


def newer_opset(proto: ModelProto) -> None:
    proto.opset_import[0].version = 99


def newer_ir(proto: ModelProto) -> None:
    proto.ir_version = 99


def no_ir(proto: ModelProto) -> None:
    proto.ClearField("ir_version")


def no_nodes(proto: ModelProto) -> None:
    del proto.graph.node[:]


def no_graph(proto: ModelProto) -> None:
    proto.ClearField("graph")


def cycle(proto: ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


def unsorted(proto: ModelProto) -> None:
    first = ModelProto()
    first.CopyFrom(proto)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(first.graph.node))


def unknown_input(proto: ModelProto) -> None:
    proto.graph.node[1].input[0] = "nobody"


def twice(proto: ModelProto) -> None:
    proto.graph.node.append(proto.graph.node[0])


def weight_twice(proto: ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def lost_output(proto: ModelProto) -> None:
    proto.graph.output[0].name = "nobody"


def unknown_op(proto: ModelProto) -> None:
    proto.graph.node[1].op_type = "Zork"


def unknown_attribute(proto: ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("stridez", 1))


def negative_input(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -3


def huge_input(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**40


def sparse_weight(proto: ModelProto) -> None:
    proto.graph.sparse_initializer.add().values.name = "s"


def recursive_function(proto: ModelProto) -> None:
    body = [helper.make_node("F", ["a"], ["b"], domain="d")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], body, opsets))
    proto.opset_import.add(domain="d", version=1)


DAMAGE = {
    clear_opset: "imports no opset",
    double_opset: "twice",
    newer_opset: "Upgrade onnx",
    newer_ir: "Upgrade onnx",
    no_ir: "IR version 0",
    no_nodes: "no nodes",
    no_graph: "no nodes",
    cycle: "cycle",
    unsorted: "out of order",
    unknown_input: "'nobody', which nothing makes",
    twice: "made already",
    weight_twice: "initializers",
    lost_output: "'nobody'",
    unknown_op: "Zork",
    unknown_attribute: "stridez",
    negative_input: "impossible dims",
    huge_input: "impossible dims",
    sparse_weight: "sparse",
    recursive_function: "calls itself",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_structure_is_refused(damage: Callable[[ModelProto], None], cnn: ModelProto, tmp_path: Path) -> None:
    damage(cnn)
    refused(write(tmp_path, cnn), DAMAGE[damage])
    with pytest.raises(ModelError):
        from_proto(cnn)


def test_a_branch_sees_outer_names_and_is_checked_too(make_model: MakeModel, tmp_path: Path) -> None:
    proto = make_model(
        """
        s = ReduceSum <keepdims = 0> (x)
        zero = Constant <value = float {0}> ()
        c = Greater (s, zero)
        y = If (c) <then_branch = a () => (float[N,4] p) { p = Identity (x) },
                    else_branch = b () => (float[N,4] q) { q = Neg (x) }>
        """,
        inputs="float[N,4] x",
    )
    assert load(write(tmp_path, proto)).proto == proto
    branch = proto.graph.node[-1].attribute[0].g
    branch.node[0].input[0] = "nobody"
    refused(write(tmp_path, proto), "a branch of", "nobody")


def test_a_name_that_is_no_text_is_refused(cnn: ModelProto, tmp_path: Path) -> None:
    raw = cnn.SerializeToString().replace(b"relu1", b"rel\xff1")
    refused(write(tmp_path, raw), "UTF-8")


def test_names_from_the_file_cannot_break_the_line_or_the_terminal(cnn: ModelProto, tmp_path: Path) -> None:
    cnn.graph.node[1].input[0] = "a\n\x1b[31m" + "z" * 5000
    text = refused(write(tmp_path, cnn))
    assert "\x1b" not in text
    assert len(text) < 500
    cnn.graph.node[1].input[0] = "a"
    cnn.graph.node[1].op_type = "\x1b[31m" + "Z" * 5000
    text = refused(write(tmp_path, cnn), "checker")
    assert "\x1b" not in text
    assert len(text) < 800


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "word"),
    [
        ([2**40, 3, 3, 3], "impossible dims"),
        ([-3, 3, 3, 3], "impossible dims"),
        ([2**62] * 4, "impossible dims"),
        ([1] * 65, "impossible dims"),
        ([0, 2**62], "impossible dims"),
        ([7, 3, 3, 3], "needs 756 bytes and has 648"),
        ([5, 3, 3, 3], "needs 540 bytes and has 648"),
    ],
)
def test_dims_that_do_not_fit_the_values_are_refused(
    dims: list[int], word: str, cnn: ModelProto, tmp_path: Path
) -> None:
    tensor = cnn.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    refused(write(tmp_path, cnn), word, "conv1_w")


def test_stripped_doubled_and_unknown_values_are_refused(cnn: ModelProto, tmp_path: Path) -> None:
    tensor = cnn.graph.initializer[1]
    tensor.float_data.append(1.0)
    refused(write(tmp_path, cnn), "twice")
    tensor.ClearField("raw_data")
    refused(write(tmp_path, cnn), "needs 24 bytes and has 4")
    tensor.ClearField("float_data")
    refused(write(tmp_path, cnn), "holds no values")
    tensor.data_type = 77
    refused(write(tmp_path, cnn), "77")


def test_a_tensor_inside_a_node_is_checked_too(make_model: MakeModel, tmp_path: Path) -> None:
    proto = make_model("c = Constant <value = float[4] {1, 2, 3, 4}> () y = Add (x, c)", inputs="float[N,4] x")
    proto.graph.node[0].attribute[0].t.dims[0] = 2**40
    refused(write(tmp_path, proto), "impossible dims")


RAW_TYPES = [t for t in TensorProto.DataType.values() if t in onnxcar._tensors._BITS]


@given(st.sampled_from(RAW_TYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_sizes_agree_with_onnx_for_every_type_and_layout(dtype: int, dims: list[int], raw: bool) -> None:
    values = np.ones(dims, dtype=helper.tensor_dtype_to_np_dtype(dtype))
    if raw:
        tensor = numpy_helper.from_array(values, "t")
        assert tensor.data_type == dtype
    else:
        flat = [complex(1)] if values.dtype.kind == "c" else [1]
        tensor = helper.make_tensor("t", dtype, dims, flat * values.size)
    onnxcar._tensors.check_tensor(tensor)
    data = onnxcar._tensors.raw_bytes(tensor, None)
    assert len(data) == onnxcar._tensors.n_bytes(tensor)
    assert np.array_equal(onnxcar._tensors.to_array(tensor, None), values)


# --- external data ----------------------------------------------------------------------------------------------------


def test_small_external_data_is_read_and_hashed(cnn: ModelProto, tmp_path: Path) -> None:
    path = external_copy(cnn, tmp_path)
    model = load(path)
    both = path.read_bytes() + (tmp_path / "m.data").read_bytes()
    assert model.external
    assert (model.sha256, model.n_bytes) == (hashlib.sha256(both).hexdigest(), len(both))
    assert {t.name: t.raw_data for t in model.proto.graph.initializer} == {
        t.name: t.raw_data for t in cnn.graph.initializer
    }


def test_large_external_data_stays_on_disk(cnn: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxcar.model, "LAZY_BYTES", 1500)
    monkeypatch.setattr(onnxcar.model, "_SMALL_BYTES", 100)
    model = load(external_copy(cnn, tmp_path))
    lazy = [t.name for t in model.proto.graph.initializer if onnxcar._tensors.is_external(t)]
    assert lazy == ["conv1_w", "conv2_w"]
    for tensor, source in zip(model.proto.graph.initializer, cnn.graph.initializer, strict=True):
        assert np.array_equal(model.array(tensor), numpy_helper.to_array(source))
    assert count_params(model) == 467


@pytest.mark.parametrize(
    "location",
    [
        *("/etc/passwd", "../m.data", "sub/../../m.data", "..", ".", "", "sub/", "file:///etc/passwd", "m.data\0"),
        *("C:\\m.data", "C:m.data", "\\\\host\\m.data", "..\\m.data", "m.data:stream"),
    ],
)
def test_external_data_elsewhere_is_refused(location: str, cnn: ModelProto, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    path = external_copy(cnn, folder)
    (tmp_path / "m.data").write_bytes((folder / "m.data").read_bytes())
    set_entry(path, "location", location)
    refused(path, "External data", "refused")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("offset", "-4", "no number"),
        ("offset", "1_0", "no number"),
        ("offset", "٣", "no number"),  # a digit to int()
        ("offset", "9" * 40, "no number"),
        ("offset", "1221", "truncated"),
        ("length", "644", "need 648"),
        ("length", "-1", "no number"),
        ("location", None, "refused"),
        ("location", "no.bin", "missing"),
    ],
)
def test_external_entries_that_do_not_fit_are_refused(
    key: str, value: str | None, word: str, cnn: ModelProto, tmp_path: Path
) -> None:
    path = external_copy(cnn, tmp_path)
    assert (tmp_path / "m.data").stat().st_size == 1868
    load(path)
    set_entry(path, key, value)
    refused(path, word, "conv1_w" if key != "location" or value is None else "no.bin")


def test_a_location_given_twice_is_refused(cnn: ModelProto, tmp_path: Path) -> None:
    path = external_copy(cnn, tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    refused(write(tmp_path, proto), "gives 'location' twice")


def test_a_truncated_data_file_is_refused(cnn: ModelProto, tmp_path: Path) -> None:
    path = external_copy(cnn, tmp_path)
    data = tmp_path / "m.data"
    load(path)
    data.write_bytes(data.read_bytes()[:-1])
    refused(path, "truncated", "fc_b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes are POSIX")
def test_links_and_pipes_are_refused_as_data(cnn: ModelProto, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    path = external_copy(cnn, inside)
    data = inside / "m.data"
    data.rename(outside / "m.data")
    data.symlink_to(outside / "m.data")
    refused(path, "link")
    data.unlink()
    os.mkfifo(data)
    refused(path, "not a regular file")
    (inside / "folder").symlink_to(outside)
    for index in range(6):
        set_entry(path, "location", "folder/m.data", index)
    refused(path, "link")


def test_a_data_file_in_a_sub_folder_is_fine(cnn: ModelProto, tmp_path: Path) -> None:
    path = external_copy(cnn, tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "m.data").rename(tmp_path / "sub" / "m.data")
    for index in range(6):
        set_entry(path, "location", "sub/m.data", index)
    assert load(path).external


def test_a_protobuf_with_external_data_needs_its_folder(cnn: ModelProto, tmp_path: Path) -> None:
    path = external_copy(cnn, tmp_path)
    proto = onnx.load(path, load_external_data=False)
    with pytest.raises(ModelError, match="no path"):
        from_proto(proto)
    model = from_proto(proto, path)
    assert model.external
    assert model.array(proto.graph.initializer[0]).shape == (6, 3, 3, 3)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match="missing"):
        model.array(proto.graph.initializer[0])


def test_surgery_keeps_where_a_model_came_from(cnn: ModelProto, tmp_path: Path) -> None:
    model = load(external_copy(cnn, tmp_path))
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.node[0].name = "renamed"
    after = model.with_proto(proto)
    assert (after.path, after.external) == (model.path, True)
    assert after.sha256 != model.sha256


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_by_hand(cnn: ModelProto) -> None:
    assert parameters(from_proto(cnn)) == {
        "conv1_w": 162,
        "conv1_b": 6,
        "conv2_w": 270,
        "conv2_b": 5,
        "fc_w": 20,
        "fc_b": 4,
    }
    assert count_params(from_proto(cnn)) == 467


def test_shapes_scalars_and_scales_are_no_parameters(make_model: MakeModel) -> None:
    proto = make_model(
        """
        shape = Constant <value = int64[2] {0, 16}> ()
        six = Constant <value = float {6}> ()
        w = DequantizeLinear <axis = 0> (wq, scale, zero)
        a = Conv (x, w)
        b = Clip (a, , six)
        c = Resize <mode = "nearest"> (b, , scales)
        d = Reshape (c, shape)
        m = ConstantOfShape <value = float[1] {0.5}> (size)
        y = MatMul (d, m)
        """,
        inputs="float[N,3,2,2] x",
        weights={
            "wq": np.ones((4, 3, 1, 1), np.int8),
            "scale": np.ones(4, np.float32),
            "zero": np.zeros(4, np.int8),
            "scales": np.ones(4, np.float32),
            "size": np.array([16, 4]),
        },
    )
    assert parameters(from_proto(proto)) == {"wq": 12, "m": 64}


def test_a_shared_tensor_counts_once(make_model: MakeModel) -> None:
    proto = make_model("a = MatMul (x, w) y = MatMul (a, w)", inputs="float[N,4] x", weights={"w": (4, 4)})
    assert count_params(from_proto(proto)) == 16


def test_weightless_copy_is_equal_to_shape_inference(cnn: ModelProto) -> None:
    full = onnx.shape_inference.infer_shapes(cnn, strict_mode=True)
    light = onnx.shape_inference.infer_shapes(onnxcar._wall.weightless(cnn), strict_mode=True)
    assert list(light.graph.value_info) == list(full.graph.value_info)
    assert len(light.graph.value_info) == 6
    assert light.ByteSize() < full.ByteSize()


def test_models_are_frozen(cnn: ModelProto) -> None:
    model: Model = from_proto(cnn)
    with pytest.raises(AttributeError):
        model.sha256 = ""  # type: ignore[misc]


def test_a_long_path_is_named_whole(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 20) / ("er" * 40)
    folder.mkdir(parents=True)
    assert str(folder / "m.onnx") in refused(write(folder, b"hello"))
