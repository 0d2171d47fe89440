"""Explanations: the network made by hand gives exactly the picture that it was made to give."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

import onnxcar as car
from onnxcar.errors import DataError, PlanError
from onnxcar.explanation import explain, read_removed, read_scores
from onnxcar.pages._html import data_block
from onnxcar.pages._sheets import pack
from tests import known_net
from tests.known_net import BLUE, BRIGHT, DEAD, RED, SAME
from tests.test_cli import run

TAG = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    model, data = known_net.write(tmp_path_factory.mktemp("known"))
    network = car.load(model)
    return network, car.Npz(data, car.Preprocess.preset("unit")).for_input((None, 3, 8, 8))


@pytest.fixture(scope="module")
def found(known):
    return explain(*known, threads=1, removed={"w": [SAME]})


def test_the_known_network_is_explained_as_it_was_made(found):
    facts = found.to_dict()
    conv, head = facts["layers"]
    assert (conv["before"], conv["after"], conv["dead"], conv["clusters"]) == (5, 4, 1, 3)
    assert head["before"] == 3
    f = facts["filters"][:5]
    assert [row["dead"] for row in f] == [i == DEAD for i in range(5)]
    assert [row["removed"] for row in f] == [i == SAME for i in range(5)]
    assert f[RED]["cluster"] == f[SAME]["cluster"]
    assert f[RED]["twins"][0] == [SAME, 1.0]
    # Each red filter can stand in for the other one; the blue one serves a class alone.
    assert [row["importance"] for row in f] == [0.0, 0.0, 0.0, pytest.approx(1 / 3), 0.0]
    assert f[BLUE]["rank"] == 5
    entry = {e[0]: e for e in f[BLUE]["by_class"]["entries"]}
    assert f[BLUE]["by_class"]["speaks"]
    assert entry["blue"][2] == 1.0
    assert entry["blue"][6] is True
    assert (entry["red"][2], entry["gray"][2]) == (0.0, 0.0)
    assert not entry["red"][6]
    assert not f[BRIGHT]["by_class"]["speaks"]
    assert not f[DEAD]["by_class"]["speaks"]
    assert f[RED]["colour"] == pytest.approx(1, abs=1e-5)
    assert f[BRIGHT]["colour"] == pytest.approx(0, abs=1e-4)
    assert f[DEAD]["colour"] is None
    assert f[BLUE]["responds"][0][0] == "blue"


def blocks(text, name):
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_is_one_file_that_loads_nothing(found, tmp_path):
    path = found.to_html(tmp_path / "index.html")
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", text)
    assert "default-src 'none'" in html.unescape(text)
    assert "unsafe" not in text
    rows = blocks(text, "rows")
    assert [len(row.get("p", ())) for row in rows[:5]] == [9, 9, 0, 9, 9]
    page = blocks(text, "page")
    images = [page["images"][place[0]] for place in rows[BLUE]["p"]]
    assert all(name.startswith("blue") for name in images)


def test_names_cannot_leave_their_place(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    model, data = known_net.write(folder, classes=(TAG, "</script><b>", "a&b"))
    odd = model.rename(folder / "<script>alert(1)<script>.onnx")
    proto = car.load(odd).proto
    proto.graph.node[0].name = TAG
    images = car.Npz(data, car.Preprocess.preset("unit")).for_input((None, 3, 8, 8))
    text = explain(car.from_proto(proto), images, threads=1).to_html(tmp_path / "p.html").read_text()
    assert text.count("<script>") == 1
    assert TAG not in text
    assert "<b>" not in text
    assert blocks(text, "rows")[BLUE]["e"][0][0] == "a&b"
    assert blocks(text, "page")["layers"][0][0] == TAG


def test_a_block_ends_nothing():
    assert "</" not in data_block({"x": "</script><!-- & \u2028"})
    assert json.loads(data_block({"x": "</script>&\u2028"})) == {"x": "</script>&\u2028"}


def test_scores_of_an_earlier_run_are_taken(known, found, tmp_path):
    network, data = known
    again = explain(network, data, scores=car.importance(network, data, by_class=True, threads=1), threads=1)
    mine, theirs = (x.to_dict()["filters"][BLUE] for x in (again, found))
    assert mine["importance"] == theirs["importance"]
    assert mine["by_class"]["q"] == theirs["by_class"]["q"]
    plain = explain(network, data, car=False, threads=1).to_dict()
    assert plain["base"] is None
    assert plain["filters"][BLUE]["importance"] is None
    assert plain["filters"][BLUE]["colour"] == theirs["colour"]


def test_layers_restrict_what_is_explained(known):
    assert [x["node"] for x in explain(*known, car=False, layers=["conv"]).to_dict()["layers"]] == ["conv"]


def test_files_of_other_models_are_refused(known, tmp_path):
    network, _ = known
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"schema": 1, "model_sha256": network.sha256, "removed": {"w": [1]}}))
    assert read_removed(plan, network) == {"w": [1]}
    plan.write_text(json.dumps({"schema": 1, "model_sha256": "0" * 64, "removed": {"w": [1]}}))
    with pytest.raises(PlanError, match="another model"):
        read_removed(plan, network)
    plan.write_text("{}")
    with pytest.raises(PlanError, match="what was removed"):
        read_removed(plan, network)
    with pytest.raises(DataError, match="no result"):
        read_scores(plan, network)
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(tmp_path / "none.json", network)


def test_pictures_lie_where_the_sheets_say():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(7, 7), (3, 9), (44, 30), (112, 112), (1, 1)]]
    sheets = pack(pictures, 10_000_000)
    import base64
    import io

    from PIL import Image

    for picture, (sheet, x, y, w, h) in zip(pictures, sheets.places, strict=True):
        raw = base64.b64decode(sheets.uris[sheet].split(",")[1])
        canvas = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
        assert (h, w) == picture.shape[:2]
        if max(h, w) <= 20:
            assert (canvas[y : y + h, x : x + w] == picture).all()
    small = pack(pictures, 1)
    assert sum(map(len, small.uris)) < sum(map(len, sheets.uris))


def test_explain_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known_net.write(tmp_path)
    assert run("prune", "known.onnx", "--data", "known.npz", "--steps", "2", "-o", "p.onnx").exit_code == 0
    done = run("explain", "known.onnx", "--data", "known.npz", "--plan", "p.onnx", "-o", "page", "--json", "e.json")
    assert done.exit_code == 0, done.output
    assert "2 never respond" in done.stdout
    facts = json.loads((tmp_path / "e.json").read_text())
    assert facts["layers"][0]["after"] == 3
    assert (tmp_path / "page" / "index.html").stat().st_size < 200_000
    again = run("explain", "known.onnx", "--data", "known.npz", "-o", "page")
    assert again.exit_code == 1
    assert "--force" in again.stderr
    scored = run("score", "known.onnx", "--data", "known.npz", "--by-class", "--json", "s.json")
    assert scored.exit_code == 0
    args = ("--data", "known.npz", "-o", "page", "--force", "--scores", "s.json", "--json", "-")
    done = run("explain", "known.onnx", *args)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["filters"][BLUE]["rank"] == 5


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "explain needs data"),
        (["--data", "known.npz", "--plan", "known.onnx"], 1, "what was removed"),
        (["--data", "known.npz", "-o", "no/where/at/all"], 1, "does not exist"),
    ],
)
def test_explain_refuses_before_it_works(tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    known_net.write(tmp_path)
    done = run("explain", "known.onnx", *args)
    assert done.exit_code == code
    assert says in done.stderr
