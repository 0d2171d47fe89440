"""Saving: whole or not at all, everything of the protobuf kept, external data streamed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxcar.model
from onnxcar._tensors import is_external
from onnxcar.errors import ModelError, OutputError
from onnxcar.model import check_output, from_proto, load, save

MakeModel = Callable[..., ModelProto]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def rich(cnn: ModelProto) -> ModelProto:
    """A model with all that a careless writer drops."""
    cnn.producer_name, cnn.producer_version, cnn.model_version = "trainer", "1.2", 7
    cnn.domain, cnn.doc_string = "org.example", "trained on Sunday"
    cnn.metadata_props.add(key="author", value="Ada")
    cnn.metadata_props.add(key="onnxcar.version", value="old")
    cnn.graph.doc_string = "the graph"
    cnn.graph.metadata_props.add(key="pkg", value="m")
    cnn.graph.node[0].doc_string = "first"
    cnn.graph.node[0].metadata_props.add(key="namespace", value="conv1")
    cnn.graph.initializer[0].doc_string = "weights"
    cnn.graph.quantization_annotation.add(tensor_name="a")
    cnn.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 6, 8, 8]))
    body = [helper.make_node("Relu", ["p"], ["q"])]
    cnn.functions.append(helper.make_function("d", "F", ["p"], ["q"], body, [helper.make_opsetid("", 17)]))
    cnn.opset_import.add(domain="d", version=1)
    return cnn


def lazy(
    proto: ModelProto, folder: Path, monkeypatch: pytest.MonkeyPatch, location: str = "weights.bin"
) -> onnxcar.model.Model:
    """The model loaded with its two large tensors left on disk."""
    monkeypatch.setattr(onnxcar.model, "LAZY_BYTES", 1500)
    monkeypatch.setattr(onnxcar.model, "_SMALL_BYTES", 100)
    folder.mkdir()
    onnx.save_model(proto, folder / "m.onnx", save_as_external_data=True, location=location, size_threshold=0)
    model = load(folder / "m.onnx")
    assert sum(is_external(t) for t in model.proto.graph.initializer) == 2
    return model


def test_everything_of_the_protobuf_survives(rich: ModelProto, tmp_path: Path) -> None:
    saved = save(from_proto(rich), tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == rich
    assert saved.proto == rich
    assert names(tmp_path) == {"out.onnx"}


def test_the_result_is_what_load_gives(rich: ModelProto, tmp_path: Path) -> None:
    saved = save(from_proto(rich), tmp_path / "out.onnx", metadata={"onnxcar.final": "0.9"})
    again = load(tmp_path / "out.onnx")
    assert (saved.sha256, saved.n_bytes, saved.path) == (again.sha256, again.n_bytes, again.path)
    assert saved.proto == again.proto


def test_metadata_joins_what_is_there(rich: ModelProto, tmp_path: Path) -> None:
    model = from_proto(rich)
    saved = save(model, tmp_path / "out.onnx", metadata={"onnxcar.version": "new", "onnxcar.base": "0.9"})
    expected = {"author": "Ada", "onnxcar.version": "new", "onnxcar.base": "0.9"}
    assert {entry.key: entry.value for entry in saved.proto.metadata_props} == expected
    assert model.proto.metadata_props[1].value == "old"


def test_same_model_same_bytes(rich: ModelProto, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        save(from_proto(rich), tmp_path / name, metadata={"k": "v"})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# --- refusals leave nothing behind ------------------------------------------------------------------------------------


def test_an_existing_file_stays_without_force(cnn: ModelProto, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="--force"):
        save(from_proto(cnn), target)
    assert target.read_bytes() == b"precious"
    save(from_proto(cnn), target, force=True)
    assert load(target).proto == cnn
    assert names(tmp_path) == {"out.onnx"}


def test_a_dangling_link_counts_as_existing(cnn: ModelProto, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"):
        save(from_proto(cnn), tmp_path / "out.onnx")


def test_bad_targets_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "no" / "out.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, force=True)
    (tmp_path / "m.data").write_bytes(b"")
    check_output(tmp_path / "m.onnx")
    with pytest.raises(OutputError, match=r"m\.data"):
        check_output(tmp_path / "m.onnx", external=True)
    assert names(tmp_path) == {"m.data"}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that not even root may write to")
def test_a_read_only_folder_is_refused(cnn: ModelProto) -> None:
    with pytest.raises(OutputError, match="not writable") as caught:
        save(from_proto(cnn), "/proc/self/out.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_nothing(
    external: bool, cnn: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    model = lazy(cnn, tmp_path / "in", monkeypatch) if external else from_proto(cnn)
    out = tmp_path / "out"
    out.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the system's own way to fail a write
    try:
        with pytest.raises(OutputError, match="Nothing was written"):
            save(model, out / "out.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(out) == set()


@pytest.mark.parametrize("external", [False, True])
def test_a_model_that_fails_inference_never_appears(
    external: bool, cnn: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cnn.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 7, 8, 8]))
    model = lazy(cnn, tmp_path / "in", monkeypatch) if external else from_proto(cnn)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match="strict shape inference"):
        save(model, out / "out.onnx")
    assert names(out) == set()
    monkeypatch.setattr(onnxcar.model, "_CHECK_FILE_BYTES", 0)  # the way of models above that size
    with pytest.raises(ModelError, match="strict shape inference"):
        save(model, out / "out.onnx")
    assert names(out) == set()


def test_an_interrupt_leaves_nothing(cnn: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert len(names(tmp_path)) == 1  # the draft is there
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", interrupt)
    model = onnxcar.model.Model(cnn, "")
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out.onnx")
    assert names(tmp_path) == set()


# --- external data ----------------------------------------------------------------------------------------------------


def test_lazy_tensors_are_streamed_and_replaced_ones_written(
    rich: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {t.name: numpy_helper.to_array(t) for t in rich.graph.initializer}
    model = lazy(rich, tmp_path / "in", monkeypatch)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    changed = proto.graph.initializer[2]
    assert is_external(changed)
    expected[changed.name] = np.full(changed.dims, 3, np.float32)
    changed.CopyFrom(numpy_helper.from_array(expected[changed.name], changed.name))
    out = tmp_path / "out"
    out.mkdir()
    saved = save(model.with_proto(proto), out / "net.onnx", metadata={"k": "v"})
    assert names(out) == {"net.onnx", "net.data"}
    assert saved.external
    again = load(out / "net.onnx")
    assert (again.sha256, again.n_bytes) == (saved.sha256, saved.n_bytes)
    for made in (saved, again):
        assert sum(is_external(t) for t in made.proto.graph.initializer) == 2
        for tensor in made.proto.graph.initializer:
            assert np.array_equal(made.array(tensor), expected[tensor.name])
        assert made.proto.graph.initializer[0].doc_string == "weights"
    # All but weights and the new entry is untouched.
    loaded = onnx.load(out / "net.onnx")
    del loaded.graph.initializer[:], rich.graph.initializer[:]
    assert loaded.metadata_props.pop().key == "k"
    assert loaded == rich


def test_offsets_are_aligned_and_the_file_runs(make_model: MakeModel, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    weights = {"a": (4, 300), "b": (300, 300), "c": (300, 4)}
    proto = make_model("p = MatMul (x, a) q = MatMul (p, b) y = MatMul (q, c)", "float[N,4] x", weights=weights)
    model = onnxcar.model.Model(proto, "", external=True)
    saved = save(model, tmp_path / "net.onnx")
    assert saved.proto == load(tmp_path / "net.onnx").proto == proto  # little enough to be held
    tensors = onnx.load(tmp_path / "net.onnx", load_external_data=False).graph.initializer
    offsets = [int(next(e.value for e in t.external_data if e.key == "offset")) for t in tensors]
    assert offsets == [0, 8192, 368192]  # b has pages of its own, the others do not
    feed = {"x": np.ones((2, 4), np.float32)}
    runs = [
        ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for source in (str(tmp_path / "net.onnx"), proto.SerializeToString())
    ]
    assert np.array_equal(*runs)


def test_shared_external_values_stay_shared(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = make_model(
        "p = MatMul (x, a) y = MatMul (p, b)", "float[N,30] x", "float[N,30] y", weights={"a": (30, 30), "b": (30, 30)}
    )
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    a, b = proto.graph.initializer
    del b.external_data[:]
    b.external_data.extend(a.external_data)
    (tmp_path / "shared.onnx").write_bytes(proto.SerializeToString())
    monkeypatch.setattr(onnxcar.model, "LAZY_BYTES", 1000)
    monkeypatch.setattr(onnxcar.model, "_SMALL_BYTES", 100)
    save(load(tmp_path / "shared.onnx"), tmp_path / "out.onnx")
    assert (tmp_path / "out.data").stat().st_size == 3600


@pytest.mark.parametrize("target", ["weights.bin", "weights.onnx"])
def test_the_models_own_weights_are_never_replaced(
    target: str, cnn: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = "weights.bin" if target == "weights.bin" else "weights.data"
    model = lazy(cnn, tmp_path / "in", monkeypatch, location)
    before = (tmp_path / "in" / location).read_bytes()
    with pytest.raises(OutputError, match="own weights"):
        save(model, tmp_path / "in" / target, force=True)
    assert (tmp_path / "in" / location).read_bytes() == before
    save(model, tmp_path / "in" / "other.onnx")


def test_a_pair_is_replaced_as_a_pair(cnn: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lazy(cnn, tmp_path / "in", monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    save(model, out / "net.onnx")
    before = {name: (out / name).read_bytes() for name in names(out)}
    save(model, out / "net.onnx", force=True, metadata={"second": "time"})
    assert (out / "net.onnx").read_bytes() != before["net.onnx"]

    # A target that turns into a folder between check and rename: the first rename must be taken back.
    (out / "net.onnx").unlink()
    (out / "net.data").write_bytes(b"previous")
    monkeypatch.setattr(onnxcar.model, "check_output", lambda *_, **__: (out / "net.onnx").mkdir())
    with pytest.raises(OutputError):
        save(model, out / "net.onnx", force=True)
    assert (out / "net.data").read_bytes() == b"previous"
    assert names(out) == {"net.onnx", "net.data"}


BIG = """
import resource, sys, numpy as np, onnx
from pathlib import Path
from onnx import TensorProto, helper
from onnxcar.model import count_params, load, save

folder, layers, side = Path(sys.argv[1]), int(sys.argv[2]), 4096  # 64 MiB a layer
nodes, tensors = [], []
for i in range(layers):
    nodes.append(helper.make_node("Conv", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"conv{i}"))
    t = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[side, side, 1, 1])
    t.data_location = TensorProto.EXTERNAL
    for k, v in (("location", "big.data"), ("offset", i * side * side * 4), ("length", side * side * 4)):
        t.external_data.add(key=k, value=str(v))
    tensors.append(t)
shape = ["N", side, 1, 1]
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
graph = helper.make_graph(nodes, "big", [value("v0")], [value(f"v{layers}")], tensors)
(folder / "big.onnx").write_bytes(
    helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
with open(folder / "big.data", "wb") as f:
    f.truncate(layers * side * side * 4)
    f.seek(-4, 2)
    f.write(np.float32(7).tobytes())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(folder / "big.onnx")
assert count_params(model) == layers * side * side
saved = save(model, folder / "out.onnx", metadata={"onnxcar.version": "x"})
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert saved.array(saved.proto.graph.initializer[-1])[-1, -1, 0, 0] == 7
print((after - before) // 1024, saved.n_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB, sparse files")
def test_a_model_above_two_gib_is_saved_in_little_memory(tmp_path: Path) -> None:
    layers = 33
    run = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path), str(layers)], capture_output=True, text=True, check=True
    )
    peak_mib, n_bytes = map(int, run.stdout.split())
    assert n_bytes > 2**31
    assert peak_mib < 300  # the largest tensor has 64 MiB; the whole, 2112
