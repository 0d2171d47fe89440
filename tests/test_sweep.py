"""A sweep: models of one path, the table and the plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

import onnxcar as car
from onnxcar.cli import app
from onnxcar.data import Npz
from onnxcar.errors import PlanError
from onnxcar.search import prune
from onnxcar.steps import Stop
from onnxcar.sweep import sweep

DIGITS = Path(__file__).resolve().parents[1] / "models" / "digits"
L2 = {"criterion": "l2", "scope": "global", "provider": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def digits():
    return car.load(DIGITS / "model.onnx")


@pytest.fixture(scope="module")
def select():
    return Npz(DIGITS / "select.npz", car.Preprocess(channels="gray")).for_input((None, 1, 8, 8))


def test_every_point_is_the_first_model_of_one_path_at_or_below_its_fraction(digits, select):
    found = sweep(digits, select, [0.5, 0.8, 0.25], **L2, multiple_of=2)
    assert [point.fraction for point in found.points] == [0.8, 0.5, 0.25]
    plans = [point.run.plan.groups for point in found.points]
    assert plans[0] < plans[1] < plans[2]
    for point in found.points:
        # The same search with that one target ends in the same model.
        alone = prune(digits, select, stop=Stop(target_macs=point.fraction), multiple_of=2, **L2)
        assert point.run.plan == alone.plan
        assert point.run.record["final"] == alone.record["final"]
        assert point.run.record["removed"] == alone.record["removed"]
        assert point.run.record["sweep"] == {"fraction": point.fraction}
    rows = found.to_dict()["points"]
    assert rows[0]["value"] == found.points[0].run.record["base"]["value"]
    assert [row["value"] for row in rows[1:]] == [p.run.record["final"]["value"] for p in found.points]
    assert [row["reached"] <= row["fraction"] for row in rows] == [True] * 4
    assert rows[0]["filters"] == 70
    assert rows[-1]["filters"] == 70 - sum(len(ids) for ids in found.points[-1].run.record["removed"].values())


def test_points_beyond_the_end_of_the_path_stay_empty(digits, select):
    found = sweep(digits, select, [0.9, 0.1], stop=Stop(steps=8), **L2)
    assert [point.run is None for point in found.points] == [False, True]
    assert found.stopped == "steps"
    assert found.to_dict()["points"][-1]["macs"] is None


def test_every_point_is_recovered_on_its_own(digits, select):
    plain = sweep(digits, select, [0.4, 0.2], **L2)
    mended = sweep(digits, select, [0.4, 0.2], recover="least-squares", **L2)
    for a, b in zip(plain.points, mended.points, strict=True):
        assert a.run.plan == b.run.plan
        assert b.run.record["recovery"]["layers"]
        assert b.run.record["final"]["value"] >= a.run.record["final"]["value"]
    assert mended.points[1].run.record["final"]["value"] > plain.points[1].run.record["final"]["value"] + 0.05


@pytest.mark.parametrize("bad", [[], [1.0], [0.5, 0.0]])
def test_fractions_out_of_range_are_refused(digits, select, bad):
    with pytest.raises(PlanError, match="between 0 and 1"):
        sweep(digits, select, bad, **L2)


def cli(*args: str):
    return CliRunner().invoke(app, ["prune", str(DIGITS / "model.onnx"), *args])


def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "c.toml").write_text("")
    where = ["--config", str(tmp_path / "c.toml"), "--data", str(DIGITS / "select.npz"), "--channels", "gray"]
    return [*where, "--criterion", "l2", "--scope", "global", "--threads", "1"]


def test_the_command_writes_models_records_table_and_plot(tmp_path):
    result = cli(*flags(tmp_path), "--sweep", "0.3,0.6", "-o", str(tmp_path / "m.onnx"))
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()} - {"c.toml"}
    models = {"m.macs0.6.onnx", "m.macs0.6.json", "m.macs0.3.onnx", "m.macs0.3.json"}
    assert names == models | {"m.sweep.csv", "m.sweep.json", "m.sweep.png"}
    table = json.loads((tmp_path / "m.sweep.json").read_text())
    assert [row["fraction"] for row in table["points"]] == [1.0, 0.6, 0.3]
    for row in table["points"][1:]:
        assert car.analyze(car.load(row["path"])).cost().macs == row["macs"]
    with (tmp_path / "m.sweep.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [row["value"] for row in table["points"]]
    assert (tmp_path / "m.sweep.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = cli(*flags(tmp_path), "--sweep", "0.3,0.6", "-o", str(tmp_path / "m.onnx"))
    assert again.exit_code == 1
    assert "exists" in str(again.exception)
    assert cli(*flags(tmp_path), "--sweep", "0.3,0.6", "-o", str(tmp_path / "m.onnx"), "--force").exit_code == 0
    assert {path: path.read_bytes() for path in before if path.suffix == ".onnx"} == {
        path: data for path, data in before.items() if path.suffix == ".onnx"
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sweep", "0.9,1.5"], "between 0 and 1"),
        (["--sweep", "0.9", "--plan", "p.json"], "--plan"),
        (["--sweep", "0.9", "--guarantee", "0.9", "--max-drop", "0.1"], "--guarantee"),
        (["--sweep", "0.9", "--target-macs", "0.5"], "--target-macs: its fractions are the targets"),
        (["--sweep", "0.9", "--report", "r"], "--report: onnxcar compare --html"),
    ],
)
def test_what_makes_no_sense_is_usage(args, words):
    result = cli(*args)
    assert result.exit_code == 2
    assert words in result.output


def test_with_dropped_rows_it_says_which_class_is_which(tmp_path):
    options = (
        *flags(tmp_path),
        "--sweep",
        "0.6,0.3",
        "--classes",
        "7,1,3",
        "--drop-outputs",
        "-o",
        str(tmp_path / "m.onnx"),
    )
    result = cli(*options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m.classes.txt").read_text() == "1\n3\n7\n"
    for fraction in ("0.6", "0.3"):
        out = onnx.load(tmp_path / f"m.macs{fraction}.onnx").graph.output[0]
        assert out.type.tensor_type.shape.dim[1].dim_value == 3
    (tmp_path / "m.classes.txt").write_text("mine")
    for file in tmp_path.glob("m.macs*"):
        file.unlink()
    for file in tmp_path.glob("m.sweep*"):
        file.unlink()
    refused = cli(*options)
    assert refused.exit_code == 1
    assert "m.classes.txt exists" in str(refused.exception)
