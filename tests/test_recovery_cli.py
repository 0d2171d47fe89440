"""``onnxcar recover`` on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.graphs import Net
from tests.test_cli import run

DIGITS = Path(__file__).parents[1] / "models" / "digits"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with small.onnx, the digits network at half, and its record."""
    monkeypatch.chdir(tmp_path)
    options = ["--criterion", "l1", "--ratio", "0.5", "-o", "small.onnx", "--threads", "1", "--quiet"]
    assert run("prune", str(DIGITS / "model.onnx"), *options).exit_code == 0
    return tmp_path


def repair(*more: str, model: str = "small.onnx", out: str = "out.onnx"):
    config = ["--config", str(DIGITS / "onnxcar.toml"), "--threads", "1"]
    return run("recover", model, "--like", str(DIGITS / "model.onnx"), *config, "-o", out, *more)


def test_accuracy_comes_back_and_the_record_says_how(small: Path) -> None:
    result = repair()
    assert result.exit_code == 0, result.output
    record = json.loads((small / "out.json").read_text())
    assert record["test_pruned"]["value"] < 0.9 < 0.97 < record["test_final"]["value"]
    assert record["recovery"]["after"] < record["recovery"]["before"] / 10
    assert [f["method"] for f in record["recovery"]["layers"]] == ["least-squares"] * 3
    assert record["plan_from"] == "plan"
    assert record["optimistic"] is False
    held = {p.key: p.value for p in onnx.load(small / "out.onnx").metadata_props}
    assert held["onnxcar.recover"] == "least-squares"
    assert json.loads(held["onnxcar.removed_filters"]) == record["removed"]
    assert "0.98" in result.stdout
    assert "3 of 3 layers changed" in result.stderr


def test_what_is_gone_is_found_without_record_and_metadata(small: Path) -> None:
    repair(out="known.onnx")
    (small / "small.json").unlink()
    proto = onnx.load(small / "small.onnx")
    assert repair(out="told.onnx").exit_code == 0
    del proto.metadata_props[:]
    onnx.save(proto, small / "bare.onnx")
    assert repair(model="bare.onnx", out="found.onnx").exit_code == 0
    assert json.loads((small / "told.json").read_text())["plan_from"] == "metadata"
    assert json.loads((small / "found.json").read_text())["plan_from"] == "weights"
    weights = [
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(small / name).graph.initializer}
        for name in ("known.onnx", "told.onnx", "found.onnx")
    ]
    for name, value in weights[0].items():
        assert np.array_equal(value, weights[1][name])
        assert np.array_equal(value, weights[2][name])


def test_a_model_whose_norms_were_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = Net()
    y = net.conv(net.input(), 6, name="first")
    y = net.op("Transpose", y, perm=[0, 2, 3, 1])
    y = net.op("LayerNormalization", y, net.positive(6), net.random(6))
    y = net.conv(net.op("Transpose", y, perm=[0, 3, 1, 2]), 5, name="reader")
    onnx.save(net.proto(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", y))), 4)), "m.onnx")
    rng = np.random.default_rng(0)
    np.savez("x.npz", images=rng.standard_normal((80, 3, 8, 8)).astype(np.float32))
    options = ["--norms", "rewrite", "--criterion", "l1", "--ratio", "0.3", "--layers", "first", "-o", "p.onnx"]
    assert run("prune", "m.onnx", *options).exit_code == 0
    result = run("recover", "p.onnx", "--like", "m.onnx", "--data", "x.npz", "--json", "r.json")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("r.json").read_text())
    assert found["removed"]
    assert [f["node"] for f in found["recovery"]["layers"]] == ["reader", "fc"]


def test_labels_are_not_needed(small: Path) -> None:
    images = np.load(DIGITS / "select.npz")
    np.savez(small / "bare.npz", images=images["images"])
    result = repair("--data", "bare.npz", "--method", "bias")
    assert result.exit_code == 0, result.output
    record = json.loads((small / "out.json").read_text())
    assert record["final"] is None
    assert record["test_final"]["value"] > record["test_pruned"]["value"]
    assert record["recover"] == "bias"


def test_the_record_is_a_plan(small: Path) -> None:
    repair()
    result = run("prune", str(DIGITS / "model.onnx"), "--plan", "out.json", "-o", "again.onnx", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert onnx.load(small / "again.onnx").graph.initializer[0] == onnx.load(small / "small.onnx").graph.initializer[0]


def test_refusals(small: Path) -> None:
    assert repair().exit_code == 0
    again = repair()
    assert again.exit_code == 1
    assert "out.onnx exists" in again.stderr
    assert repair("--force").exit_code == 0
    assert run("recover", "small.onnx").exit_code == 2
    assert run("recover", "small.onnx", "--like", str(DIGITS / "model.onnx")).exit_code == 2
    wrong = repair(model=str(DIGITS / "model.onnx"), out="same.onnx")
    assert "nothing to make up for" in wrong.stderr
    other = repair("--plan", str(DIGITS / "onnxcar.toml"), out="other.onnx")
    assert other.exit_code == 1
    assert "Cannot read the plan" in other.stderr
    assert not (small / "other.onnx").exists()


def unlabelled(folder: Path) -> None:
    """200 images of digits without labels, as a flat folder `flat`."""
    (folder / "flat").mkdir()
    with np.load(DIGITS / "select.npz") as held:
        for i, image in enumerate(held["images"][:200]):
            Image.fromarray(image.squeeze()).save(folder / "flat" / f"{i:03}.png")


def test_without_labels_reconstruction_chooses_and_nothing_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unlabelled(tmp_path)
    pixels = ["--preprocess", "unit", "--channels", "gray", "--threads", "1", "--layers", "conv1"]
    model = str(DIGITS / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(Path(model).read_bytes())  # no onnxcar.toml beside it
    options = ["prune", "model.onnx", *pixels, "--criterion", "reconstruction"]
    result = run(*options, "--data", "flat", "--ratio", "0.5", "-o", "a.onnx")
    assert result.exit_code == 0, result.output
    assert "No labels in flat" in result.stderr
    assert "Next: onnxcar compare model.onnx a.onnx\n" in result.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["base"] is None
    assert record["final"] is None
    assert record["data"]["samples"] == 200
    more = ["--recover", "least-squares", "--test-data", str(DIGITS / "test.npz")]
    result = run(*options, "--calibration-data", "flat", "--ratio", "0.5", "-o", "b.onnx", *more)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "b.json").read_text())
    assert told["removed"] == record["removed"]
    assert told["final"] is None
    assert told["test_base"]["value"] - told["test_final"]["value"] < 0.02
    # who asks for scores needs labels
    for asked in (["--max-drop", "0.01"], ["--ratio", "0.5", "--criterion", "car"]):
        result = run(*options, "--data", "flat", *asked, "-o", "c.onnx")
        assert result.exit_code == 1
        assert "label" in result.stderr
        assert not (tmp_path / "c.onnx").exists()


def test_calibration_data_that_nobody_looks_at_are_refused(tmp_path: Path) -> None:
    model, data = str(DIGITS / "model.onnx"), str(DIGITS / "select.npz")
    for criterion in ("l1", "car"):
        options = ["--criterion", criterion, "--ratio", "0.5", "--calibration-data", data]
        result = run("prune", model, *options, "-o", str(tmp_path / "x.onnx"))
        assert result.exit_code == 2
        assert "--calibration-data is about recovery" in result.stderr


def test_a_run_that_fails_before_it_chose_leaves_no_journal(tmp_path: Path) -> None:
    model, data = str(DIGITS / "model.onnx"), str(DIGITS / "select.npz")
    options = [
        "--data",
        data,
        "--channels",
        "gray",
        "--criterion",
        "reconstruction",
        "--ratio",
        "0.5",
        "--threads",
        "1",
    ]
    result = run("prune", model, *options, "--memory", "4MiB", "-o", str(tmp_path / "x.onnx"))
    assert result.exit_code == 1
    assert "Give --memory 6MiB or more" in result.stderr
    assert not list(tmp_path.iterdir())


def test_rows_that_were_dropped_cannot_be_recovered(tmp_path: Path) -> None:
    model, data = str(DIGITS / "model.onnx"), str(DIGITS / "select.npz")
    options = ["--data", data, "--channels", "gray", "--threads", "1"]
    more = ["--criterion", "l1", "--ratio", "0.5", "--classes", "1,2", "--drop-outputs", "-o", str(tmp_path / "x.onnx")]
    assert run("prune", model, *options, *more).exit_code == 0
    result = run("recover", str(tmp_path / "x.onnx"), "--like", model, *options, "-o", str(tmp_path / "y.onnx"))
    assert result.exit_code == 1
    assert "output rows for 2 classes only" in result.stderr


def test_nothing_to_recover_shows_no_empty_table(tmp_path: Path) -> None:
    model, data = str(DIGITS / "model.onnx"), str(DIGITS / "select.npz")
    options = ["--data", data, "--channels", "gray", "--threads", "1", "-o", str(tmp_path / "y.onnx")]
    result = run("recover", model, "--like", model, *options)
    assert result.exit_code == 0
    assert "nothing to make up for" in result.stderr
    assert "refitted" not in result.stdout
    assert "layers changed" not in result.stderr


def test_without_labels_what_needs_none_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8), np.uint8))
    model, data = str(DIGITS / "model.onnx"), ["--data", str(tmp_path / "x.npz"), "--channels", "gray"]
    result = run("prune", model, *data, "--ratio", "0.5", "-o", str(tmp_path / "y.onnx"))
    assert result.exit_code == 1
    assert "choose without labels: --criterion reconstruction" in result.stderr
    result = run("score", model, *data, "--criterion", "variance", "--layers", "conv1", "--threads", "1")
    assert result.exit_code == 0, result.output


def test_recovering_between_steps_is_said_to_change_nothing_where_nobody_looks(tmp_path: Path) -> None:
    model, data = str(DIGITS / "model.onnx"), str(DIGITS / "select.npz")
    options = ["--data", data, "--channels", "gray", "--threads", "1", "--layers", "conv1", "--limit", "100"]
    more = ["--recover", "bias", "--recover-every", "2", "--ratio", "0.2"]
    plain = run("prune", model, *options, *more, "--criterion", "l1", "-o", str(tmp_path / "x.onnx"))
    assert plain.exit_code == 0, plain.output
    assert "--recover-every changes nothing: l1" in plain.stderr
    seen = run("prune", model, *options, *more, "--criterion", "car", "-o", str(tmp_path / "y.onnx"))
    assert seen.exit_code == 0, seen.output
    assert "changes nothing" not in seen.stderr
