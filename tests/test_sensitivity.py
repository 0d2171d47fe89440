"""Score against ratio, one layer at a time: against models that are really pruned, and through the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import onnxcar as car
from onnxcar.cli import app
from onnxcar.data import Npz
from onnxcar.errors import OutputError, PlanError
from onnxcar.sensitivity import sensitivity
from onnxcar.surgery import Plan, remove

DIGITS = Path(__file__).resolve().parents[1] / "models" / "digits"
ONE = {"provider": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def digits():
    return car.load(DIGITS / "model.onnx")


@pytest.fixture(scope="module")
def select():
    return Npz(DIGITS / "select.npz", car.Preprocess(channels="gray")).for_input((None, 1, 8, 8)).limit(150)


@pytest.mark.parametrize("criterion", ["l2", "car"])
def test_every_point_is_the_score_of_the_network_that_is_really_pruned(digits, select, criterion):
    found = sensitivity(digits, select, criterion=criterion, ratios=(0.25, 0.5, 0.8), **ONE)
    assert [(curve.layer, curve.filters) for curve in found.curves] == [("conv1", 20), ("conv2", 50)]
    assert [p.removed for p in found.curves[0].points] == [5, 10, 16]
    values = set()
    for curve in found.curves:
        before = frozenset()
        for point in curve.points:
            assert before < point.groups
            before = point.groups
            assert {found.space.groups[g].name.split(":")[0] for g in point.groups} == {curve.layer}
            real = car.evaluate(remove(found.space, Plan(point.groups)), select, **ONE)
            assert (real.correct, real.samples) == (point.score.correct, 150)
            values.add(real.correct)
    assert len(values) > 3
    ranked = car.importance(digits, select, criterion=criterion, layers=["conv2"], **ONE)
    ids = np.asarray(ranked.groups)
    gone = np.isin(ids, list(found.curves[1].points[1].groups))
    assert ranked.values[gone].max() <= ranked.values[~gone].min()


def test_rows_count_from_the_whole_network(digits, select):
    found = sensitivity(digits, select, criterion="l2", ratios=(0.5,), layers=["conv1"], **ONE)
    (row,) = found.rows()
    assert row["drop"] == pytest.approx(found.base.value - row["value"])
    assert row["drop"] > 0
    assert found.to_dict()["layers"][0]["points"][0]["drop"] == row["drop"]


@pytest.mark.parametrize("ratios", [(), (0.0,), (0.5, 1.0)])
def test_ratios_out_of_range_are_refused(digits, select, ratios):
    with pytest.raises(PlanError, match="between 0 and 1"):
        sensitivity(digits, select, ratios=ratios, **ONE)


def test_a_plot_of_another_kind_is_refused_in_words(digits, select, tmp_path):
    found = sensitivity(digits, select, criterion="l2", ratios=(0.5,), **ONE)
    with pytest.raises(OutputError, match=r"\.png or \.svg"):
        found.draw(tmp_path / "plot.what")
    found.draw(tmp_path / "a.svg")
    assert "conv1" not in (tmp_path / "a.svg").read_text()[:200]
    assert "<svg" in (tmp_path / "a.svg").read_text()


def cli(*args: str):
    return CliRunner().invoke(app, ["score", str(DIGITS / "model.onnx"), "--threads", "1", "--criterion", "l2", *args])


def test_the_command_gives_table_json_csv_and_plot(tmp_path):
    plot = tmp_path / "p.png"
    said = cli("--by-layer", "--limit", "100", "--json", str(tmp_path / "s.json"), "--plot", str(plot))
    assert said.exit_code == 0, said.output
    assert "conv2" in said.output
    assert " 0.9 " in said.output.replace("\n", " ")  # the last ratio is there on 80 columns
    result = json.loads((tmp_path / "s.json").read_text())
    assert [point["ratio"] for point in result["layers"][0]["points"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli("--by-layer", "--limit", "100", "--json", str(tmp_path / "s.csv")).exit_code == 0
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert float(rows[3]["value"]) == result["layers"][0]["points"][3]["value"]


@pytest.mark.parametrize("args", [["--plot", "p.png"], ["--by-layer", "--by-class"]])
def test_what_makes_no_sense_is_usage(args):
    assert cli(*args).exit_code == 2
