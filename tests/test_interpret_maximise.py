"""Images made for filters: of a filter written by hand it must be the kernel's own pattern."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxcar as car
from onnxcar import interpret
from onnxcar.errors import ConfigError, RuntimeMissingError
from onnxcar.explanation import explain
from tests.test_cli import run

COLOUR, EDGE, TWIN = range(3)


def kernels() -> np.ndarray:
    """(3, 3, 5, 5): red against green and blue; a vertical edge; the same edge a third as strong."""
    w = np.zeros((3, 3, 5, 5), np.float32)
    w[COLOUR] = np.asarray([1, -1, -1])[:, None, None]
    w[EDGE] = np.asarray([-1, -1, 0, 1, 1])[None, None, :]
    w[TWIN] = w[EDGE] / 3
    return w


def network(tail: str = "z = Flatten (p)") -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> made (float[N,3,12,12] x) => (float[N,3] z) {{
        [conv] a = Conv (x, w)
        [relu] r = Relu (a)
        [pool] p = GlobalMaxPool (r)
        [flat] {tail}
    }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(kernels(), "w"))
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 12, 12, 3), np.uint8)
    onnx.save(network(), folder / "m.onnx")
    np.savez(folder / "d.npz", images=images, labels=np.arange(12) % 3)
    return folder / "m.onnx", folder / "d.npz"


@pytest.fixture(scope="module")
def known(files):
    pytest.importorskip("torch", reason="needs onnxcar[torch]")
    pytest.importorskip("onnx2fx", reason="needs onnxcar[torch]")
    space = car.analyze(car.load(files[0]))
    data = car.Npz(files[1], car.Preprocess.preset("unit")).for_input((None, 3, 12, 12))
    return space, data, interpret.responses(space, data, threads=1)


@pytest.fixture(scope="module")
def made(known):
    found, left = interpret.maximise(known[0], known[2], known[1], seconds=600, threads=1)
    assert not left
    return found[0]


def test_the_image_of_a_filter_is_its_kernels_pattern(made):
    assert made.pictures.shape == (3, 5, 5, 3)
    for i in (COLOUR, EDGE, TWIN):
        pattern = made.pictures[i].astype(float) - 127.5
        pattern[:, 2] *= i == COLOUR  # the kernel of the edge does not look at its middle
        kernel = np.moveaxis(kernels()[i], 0, -1)
        assert np.corrcoef(pattern.ravel(), kernel.ravel())[0, 1] > 0.95, i


def test_the_response_is_that_of_the_network_and_near_the_largest_there_can_be(known, made):
    pixels = made.pictures / 255
    want = np.einsum("nhwc,nchw->n", pixels, kernels())
    assert made.responses == pytest.approx(want, rel=0.02)
    possible = np.maximum(kernels(), 0).sum(axis=(1, 2, 3))
    assert (made.responses > 0.9 * possible).all()
    assert (made.responses > known[2].layers[0].high).all()  # noise does not excite them as much


def test_filters_excited_by_the_same_images_are_alike(made):
    found = made.correlation()
    assert found[EDGE, TWIN] == pytest.approx(1, abs=0.01)
    assert found[EDGE, COLOUR] < 0.5


def test_an_image_depends_on_the_seed_alone(known, made, monkeypatch):
    monkeypatch.setattr("onnxcar.interpret._maximise.MOST", 1)
    again, _ = interpret.maximise(known[0], known[2], known[1], seconds=600, threads=1)
    other, _ = interpret.maximise(known[0], known[2], known[1], seconds=600, threads=1, seed=1)
    assert np.abs(again[0].pictures.astype(int) - made.pictures).max() <= 1
    assert (other[0].pictures != made.pictures).any()


def test_no_time_is_said_and_gives_no_image(known):
    found, left = interpret.maximise(known[0], known[2], known[1], seconds=0, threads=1)
    assert not found
    assert left == {0: "time for 0 of 3 filters"}


def test_what_cannot_be_converted_is_left_out_with_the_reason(known, monkeypatch):
    import onnx2fx

    monkeypatch.setattr(onnx2fx, "convert", lambda proto: (_ for _ in ()).throw(NotImplementedError("Odd op")))
    found, left = interpret.maximise(known[0], known[2], known[1], seconds=600, threads=1)
    assert not found
    assert "Odd op" in left[0]


def test_a_conversion_that_answers_otherwise_is_not_believed(known, monkeypatch):
    import onnx2fx

    right = onnx2fx.convert

    def wrong(proto):
        network = right(proto)
        for parameter in network.parameters():
            parameter.data *= 1.1
        for buffer in network.buffers():
            buffer.data *= 1.1
        return network

    monkeypatch.setattr(onnx2fx, "convert", wrong)
    found, left = interpret.maximise(known[0], known[2], known[1], seconds=600, threads=1)
    assert not found
    assert "otherwise" in left[0]


def test_without_the_extra_it_is_refused_before_anything_is_run(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx2fx", None)
    with pytest.raises(RuntimeMissingError, match=r"onnxcar\[torch\]"):
        interpret.need_torch()
    args = [str(files[0]), "--data", str(files[1]), "--preprocess", "unit", "-o", str(tmp_path / "out")]
    result = run("explain", *args, "--maximise", "1m")
    assert result.exit_code == 1
    assert "onnxcar[torch]" in result.stderr
    assert not (tmp_path / "out").exists()


def test_similarity_by_images_needs_them(known):
    with pytest.raises(ConfigError, match="--maximise"):
        explain(known[0], known[1], similarity="maximised", car=False)


def test_the_page_shows_them_and_clusters_by_them(known, files, tmp_path):
    args = [str(files[0]), "--data", str(files[1]), "--preprocess", "unit", "-o", str(tmp_path / "out")]
    more = ["--maximise", "10m", "--similarity", "maximised", "--no-car", "--json", "-"]
    result = run("explain", *args, *more)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["maximised"] == {"images": 3, "left": []}
    clusters = [row["cluster"] for row in facts["filters"]]
    assert clusters[EDGE] == clusters[TWIN] != clusters[COLOUR]
    assert facts["filters"][EDGE]["made"] > facts["filters"][EDGE]["largest"]
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count('"z":[') == 3
