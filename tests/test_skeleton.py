"""Large files: weights that stay in the file until they are asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcar import _skeleton, model, search
from onnxcar.errors import ModelError
from onnxcar.greedy import Stop
from onnxcar.model import Model, load, save


def _network(width: int = 64, *, prefix: int = 0) -> onnx.ModelProto:
    """Two Convs; the second kernel, (width, width, 3, 3), is above 64 KiB and lies at an odd place."""
    rng = np.random.default_rng(0)
    arrays = {
        "w0": rng.normal(size=(width, 3, 3, 3)),
        "b0": rng.normal(size=width),
        "w1": rng.normal(size=(width, width, 3, 3)),
        "w2": rng.normal(size=(5, width)),
    }
    weights = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], "second"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w2"], ["y"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g" * (1 + prefix),
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made.metadata_props.add(key="who", value="me")
    made.doc_string = "a text"
    return made


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size count as large."""
    monkeypatch.setattr(model, "LAZY_FILE_BYTES", 1)


def _write(folder: Path, proto: onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
def test_skeleton_has_all_but_the_large_values(tmp_path: Path, prefix: int) -> None:
    proto = _network(prefix=prefix)
    path = _write(tmp_path, proto)
    found = _skeleton.read(path)
    assert found is not None
    left = {t.name for t in found.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert left == {"w1"}
    assert found.ByteSize() < proto.ByteSize() / 4
    held = Model(found, "", path).held().proto
    assert held == proto


def test_model_loaded_lazily_is_the_same_model(tmp_path: Path, lazily: None) -> None:
    proto = _network()
    path = _write(tmp_path, proto)
    found = load(path)
    assert found.proto.ByteSize() < path.stat().st_size / 4
    assert not found.external
    assert found.n_bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for tensor, want in zip(found.proto.graph.initializer, proto.graph.initializer, strict=True):
        np.testing.assert_array_equal(found.array(tensor), numpy_helper.to_array(want))


def test_pruned_is_the_same_as_of_the_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, _network())

    def pruned(name: str) -> Path:
        run = search.prune(load(path), criterion="l2", stop=Stop(ratio=0.4))
        return search.write(run, tmp_path / name)["result"]["path"]

    plain = pruned("plain.onnx")
    monkeypatch.setattr(model, "LAZY_FILE_BYTES", 1)
    streamed = pruned("streamed.onnx")
    assert not (tmp_path / "streamed.data").exists()
    a, b = onnx.load(plain), onnx.load(streamed)
    assert [list(t.dims) for t in a.graph.initializer] != [list(t.dims) for t in _network().graph.initializer]
    for proto in (a, b):  # only the hash of what was written and the seconds may differ
        del proto.metadata_props[:]
    assert a == b


def test_saved_whole_and_loaded_again(tmp_path: Path, lazily: None) -> None:
    proto = _network()
    source = load(_write(tmp_path, proto))
    saved = save(source, tmp_path / "copy.onnx", metadata={"k": "v"})
    assert not (tmp_path / "copy.data").exists()
    proto.metadata_props.add(key="k", value="v")
    assert onnx.load(saved.path) == proto
    assert saved.sha256 == hashlib.sha256((tmp_path / "copy.onnx").read_bytes()).hexdigest()
    (tmp_path / "m.onnx").unlink()
    assert saved.held().proto == proto  # it does not need the first file any more


@pytest.mark.parametrize("cut", [1, 100, 30_000, 140_000])
def test_file_cut_short_is_refused_like_a_small_one(tmp_path: Path, lazily: None, cut: int) -> None:
    path = _write(tmp_path, _network())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelError, match=r"damaged|needs \d+ bytes|no nodes|holds no values|ONNX checker"):
        load(path)


def test_noise_is_read_whole(tmp_path: Path) -> None:
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(np.random.default_rng(0).bytes(100_000))
    assert _skeleton.read(noise) is None


def test_values_that_do_not_fit_the_dims_are_refused(tmp_path: Path, lazily: None) -> None:
    proto = _network()
    proto.graph.initializer[2].dims[0] += 1
    with pytest.raises(ModelError, match=r"needs .* bytes and has"):
        load(_write(tmp_path, proto))


def test_a_file_that_changed_is_no_source_any_more(tmp_path: Path, lazily: None) -> None:
    path = _write(tmp_path, _network())
    found = load(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="truncated"):
        found.held()


def test_links_and_odd_names_are_read_whole(tmp_path: Path, lazily: None) -> None:
    path = _write(tmp_path, _network())
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    assert load(link).proto == _network()
    odd = _write(tmp_path, _network(), "a:b.onnx")
    assert load(odd).proto == _network()
