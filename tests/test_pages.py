"""The pages of comparisons and prunings: what is on them is what was counted, and nothing gets out of its place."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

import onnxcar as car
from onnxcar.errors import OutputError
from onnxcar.pages import write
from onnxcar.pages._report import _Scale
from tests import known_net
from tests.test_cli import run

TAG = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model, path = known_net.write(tmp_path_factory.mktemp("known"), classes=(TAG, "red", "blue"))
    network = car.load(model)
    data = car.Npz(path, car.Preprocess.preset("unit")).for_input((None, 3, 8, 8))
    space = car.analyze(network)
    blue = next(group.id for group in space.groups if group.filters[0] == ("w", known_net.BLUE))
    return network, car.remove(space, car.Plan([blue])), data


def plain(path) -> str:
    """The text of a page without its tags."""
    body = path.read_text(encoding="utf-8").split("<main", 1)[1]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_what_is_on_the_page_is_what_was_counted(pair, tmp_path):
    network, cut, data = pair
    gates = car.Gates(max_drop=0.01)
    found = car.compare({"whole": network, "cut": cut}, data, gates=gates, runs=2, threads=1)
    path = found.to_html(tmp_path / "c.html", command="onnxcar compare whole.onnx cut.onnx")
    text = plain(path)
    assert "not met" in text
    assert "Only the base gets these right: 20" in text
    assert "Only the candidate gets these right: 0" in text
    assert "1 of 3 classes changed" in text
    assert f"blue {TAG} 0 20 +20" in text  # every blue image is now taken for the class with the odd name
    assert "onnxcar compare whole.onnx cut.onnx" in text
    assert network.sha256 in text
    raw = path.read_text(encoding="utf-8")
    assert raw.count("<img") == 20
    assert "<script" not in raw
    assert "script-src &#39;none&#39;" in raw
    assert not re.search(r"(src|href)=\"(?!data:|#)", raw)
    assert "style=" not in raw  # the policy would refuse it


def test_names_cannot_leave_their_place(pair, tmp_path):
    network, cut, data = pair
    found = car.compare({TAG: network, "</main><b>": cut}, data, runs=0)
    raw = found.to_html(tmp_path / "c.html", command=TAG, context={"provider": TAG}).read_text(encoding="utf-8")
    assert TAG not in raw
    assert "<b>" not in raw
    assert html.escape(TAG) in raw


def test_models_without_data_have_a_page_too(pair, tmp_path):
    network, cut, _ = pair
    text = plain(car.compare({"a": network, "b": cut}, runs=2, threads=1).to_html(tmp_path / "c.html"))
    assert "Size and speed" in text
    assert "Classes" not in text


def test_three_models_stand_side_by_side(pair, tmp_path):
    network, cut, data = pair
    text = plain(car.compare({"a": network, "b": cut, "c": network}, data, runs=0).to_html(tmp_path / "c.html"))
    assert "Classes, b" in text
    assert "Samples that changed, c" in text


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match="Cannot write"):
        write("x", tmp_path / "none" / "c.html")
    (tmp_path / "c.html").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        write("x", tmp_path / "c.html", force=False)
    assert (tmp_path / "c.html").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.html"]


@pytest.mark.parametrize("values", [[0.9, 0.91], [0.5, 0.5], [0.0, 0.0], [-3.0, 120.0], [1.0, 1.0001]])
def test_a_scale_holds_its_values_and_has_ticks(values):
    scale = _Scale(values, 8, 172)
    assert all(8 <= scale(v) <= 172 for v in values)
    assert 1 <= len(scale.ticks) <= 7
    assert all(scale.low - 1e-9 <= tick <= scale.high + 1e-9 for tick in scale.ticks)


def test_reports_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known_net.write(tmp_path)
    flags = ("--data", "known.npz", "--threads", "1")
    done = run("prune", "known.onnx", *flags, "--steps", "3", "-o", "p.onnx", "--report", "r")
    assert done.exit_code == 0, done.output
    text = plain(tmp_path / "r" / "index.html")
    assert "The search" in text
    assert "3 groups removed" in text
    assert "Criterion car" in text
    assert '"per_step": 1' in text
    refused = run("prune", "known.onnx", *flags, "--steps", "3", "-o", "q.onnx", "--report", "r")
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert not (tmp_path / "q.onnx").exists()
    done = run("compare", "known.onnx", "p.onnx", *flags, "--runs", "0", "--html", "c.html")
    assert done.exit_code == 0, done.output
    assert "Scores" in plain(tmp_path / "c.html")
    assert "onnxcar" in plain(tmp_path / "c.html")
    assert run("compare", "known.onnx", "p.onnx", "--runs", "0", "--html", "p.onnx").exit_code == 1


@pytest.mark.parametrize("flag", [("--dry-run",), ("--sweep", "0.8,0.6")])
def test_a_report_of_no_one_model_is_refused(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    known_net.write(tmp_path)
    done = run("prune", "known.onnx", "--data", "known.npz", "--report", "r", *flag)
    assert done.exit_code == 2
    assert "--report" in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_pruning_without_data_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known_net.write(tmp_path)
    done = run("prune", "known.onnx", "--criterion", "l1", "--steps", "2", "-o", "p.onnx", "--report", "r")
    assert done.exit_code == 0, done.output
    assert "No data was given" in (tmp_path / "r" / "index.html").read_text()


def test_pictures_on_the_page_are_those_of_the_samples(pair, tmp_path):
    import base64
    import io

    from PIL import Image

    network, cut, data = pair
    raw = car.compare({"a": network, "b": cut}, data, runs=0).to_html(tmp_path / "c.html").read_text()
    first = re.search(r'src="data:image/png;base64,([^"]+)" alt="known.npz\[(\d+)\]"', raw)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))).convert("RGB"))
    sample = data.inputs([int(first[2])])[""][0].transpose(1, 2, 0)
    assert (shown == np.rint(sample * 255)).all()
