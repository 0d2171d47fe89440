"""Searches that promise something: a drop on unseen data, and recovered networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import onnxcar as car
from onnxcar.cli import app
from onnxcar.data import Dataset, Npz, overlap
from onnxcar.errors import DataError, PlanError
from onnxcar.guarantee import p_value
from onnxcar.search import prune, write
from onnxcar.steps import Stop

DIGITS = Path(__file__).resolve().parents[1] / "models" / "digits"
ONE = {"provider": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def digits():
    return car.load(DIGITS / "model.onnx")


def npz(name: str) -> Dataset:
    return Npz(DIGITS / name, car.Preprocess(channels="gray")).for_input((None, 1, 8, 8))


@pytest.fixture(scope="module")
def both():
    """All 900 images of the digits as one data set: enough for a promise of 2 %."""
    a, b = npz("select.npz"), npz("test.npz")
    x = np.concatenate([p.inputs(np.arange(len(p)))[""] for p in (a, b)])
    from onnxcar.data._sources import ArraySource

    return Dataset(ArraySource({"": x}, "both"), np.concatenate([a.labels, b.labels]), path="both")


def test_what_is_shipped_is_the_last_model_of_the_sequence_that_passes(digits, both):
    run = prune(digits, both, stop=Stop(max_drop=0.02), guarantee=0.9, criterion="l2", multiple_of=2, **ONE)
    said = run.record["guarantee"]
    tests = said["tests"]
    assert len(tests) >= 3
    assert [t["passed"] for t in tests] == [True] * (len(tests) - 1) + [False]
    assert run.stopped == "guarantee"
    assert len(run.plan.groups) == tests[-2]["removed"]
    assert [t["macs"] for t in tests] == sorted((t["macs"] for t in tests), reverse=True)
    assert run.record["result"]["macs"] == tests[-2]["macs"]
    held = both.subset(np.asarray([h for h in range(len(both)) if _is_in(both, h, said)]))
    assert held.sha256 == said["split"]["held"]["sha256"]
    # The shipped model, on the untouched images, by a run of its own.
    old, new = car.evaluate(digits, held, **ONE).outcomes, car.evaluate(run.model, held, **ONE).outcomes
    lost, won = int((old.correct & ~new.correct).sum()), int((new.correct & ~old.correct).sum())
    assert (lost, won, len(held)) == (tests[-2]["lost"], tests[-2]["won"], tests[-2]["samples"])
    assert tests[-2]["p"] == p_value(lost, won, len(held), 0.02, 1 - 0.9) <= 0.1 < tests[-1]["p"]
    # Filters were chosen on the rest, in multiples of two.
    assert run.record["data"] == said["split"]["choosing"]
    assert run.record["data"]["samples"] + len(held) == len(both)
    assert all(len(removed) % 2 == 0 for removed in run.record["removed"].values())
    assert run.record["base"]["samples"] == run.record["data"]["samples"]


def _is_in(data, index, said):
    from onnxcar.guarantee import split

    if not hasattr(_is_in, "rows"):
        parts = split(data, said["max_drop"], said["confidence"], said["split"]["seed"])
        _is_in.rows = {row.tobytes() for row in parts.held.inputs(np.arange(len(parts.held)))[""]}
    return data.inputs([index])[""][0].tobytes() in _is_in.rows


def test_where_no_model_passes_the_original_is_shipped(digits, both):
    wild = prune(digits, both, stop=Stop(max_drop=0.03), guarantee=0.9, criterion="random", seed=3, per_step=12, **ONE)
    assert [t["passed"] for t in wild.record["guarantee"]["tests"]] == [False]
    assert wild.record["removed"] == {}
    assert wild.stopped == "guarantee"
    assert len(wild.path.given_back) >= 12


def test_a_promise_needs_enough_data_and_says_so_before_the_search(digits):
    seen = []

    class Meter:
        def update(self, done, total, text="", unit=""):
            seen.append(text)

    with pytest.raises(DataError, match="2019 in all, and there are 400"):
        prune(digits, npz("select.npz"), stop=Stop(max_drop=0.005), guarantee=0.95, progress=Meter(), **ONE)
    assert seen == []
    with pytest.raises(PlanError, match="--max-drop"):
        prune(digits, npz("select.npz"), stop=Stop(ratio=0.5), guarantee=0.9, **ONE)
    with pytest.raises(DataError, match="--data"):
        prune(digits, criterion="l2", stop=Stop(ratio=0.5, max_drop=0.1), guarantee=0.9, **ONE)


def test_recovery_may_not_see_the_images_of_the_promise(digits, both):
    options = {"stop": Stop(max_drop=0.04), "guarantee": 0.9, "recover": "bias", "criterion": "l2", **ONE}
    with pytest.raises(DataError, match="are among the calibration data"):
        prune(digits, both, calibration_data=both.subset(np.arange(100)), **options)


def test_a_recovered_model_is_what_is_tested_and_shipped(digits, both):
    run = prune(digits, both, stop=Stop(ratio=0.7, max_drop=0.5), criterion="l2", guarantee=0.9, recover="bias", **ONE)
    assert run.record["recovery"]["method"] == "bias"
    assert run.record["guarantee"]["tests"][0]["passed"] is True
    assert run.record["calibration_data"] == run.record["guarantee"]["split"]["choosing"]
    assert run.record["verify"]["max_rel_error"] < 1e-5


def test_recovery_is_scored_recorded_and_verified_before(digits):
    select, test = npz("select.npz"), npz("test.npz")
    stop = Stop(ratio=0.75)
    plain = prune(digits, select, criterion="l2", stop=stop, test_data=test, **ONE)
    mended = prune(digits, select, criterion="l2", stop=stop, test_data=test, recover="least-squares", **ONE)
    assert mended.plan == plain.plan
    assert mended.record["verify"] == plain.record["verify"]
    assert mended.record["test_final"]["value"] > plain.record["test_final"]["value"] + 0.2
    assert mended.record["test_final"]["correct"] == car.evaluate(mended.model, test, **ONE).correct
    assert (plain.record["recover"], plain.record["recovery"]) == ("none", None)
    assert mended.record["recover"] == "least-squares"
    assert {layer["node"] for layer in mended.record["recovery"]["layers"]}
    assert mended.record["calibration_data"]["samples"] == 400


def test_where_a_repair_follows_a_global_search_chooses_what_it_can_make_up_for(digits, tmp_path):
    select = npz("select.npz")
    asked = {"scope": "global", "stop": Stop(target_macs=0.7), "per_step": 8}
    run = prune(digits, select, recover="least-squares", **asked, **ONE)
    assert run.record["criterion"] == "reconstruction"
    named = prune(digits, select, recover="least-squares", criterion="reconstruction", **asked, **ONE)
    assert named.plan == run.plan
    for other in ({"recover": "none"}, {"recover": "bias"}, {"recover": "least-squares", "scope": "layer"}):
        options = asked | {"stop": Stop(steps=1)} | other
        assert prune(digits, select, **options, **ONE).record["criterion"] == "car"
    out, copy = tmp_path / "p.onnx", tmp_path / "m.onnx"  # beside the model of the digits a config names CAR
    copy.write_bytes((DIGITS / "model.onnx").read_bytes())
    line = ["prune", str(copy), "--scope", "global", "--recover", "least-squares", "--steps", "2"]
    line += ["--data", str(DIGITS / "select.npz"), "--preprocess", "unit", "--channels", "gray"]
    said = CliRunner().invoke(app, [*line, "-o", str(out)])
    assert said.exit_code == 0, said.output
    assert "Criterion reconstruction" in said.stderr
    assert json.loads(out.with_suffix(".json").read_text())["criterion"] == "reconstruction"
    assert "Criterion" not in CliRunner().invoke(app, [*line, "--criterion", "car", "--force", "-o", str(out)]).stderr


def test_calibration_data_are_what_recovery_fits_on(digits):
    select = npz("select.npz")
    other = npz("test.npz").limit(120)
    run = prune(digits, select, criterion="l2", stop=Stop(ratio=0.5), recover="bias", calibration_data=other, **ONE)
    assert run.record["calibration_data"]["sha256"] == other.sha256
    assert run.record["recovery"]["samples"] + run.record["recovery"]["held"] == 120
    same = prune(digits, select, criterion="l2", stop=Stop(ratio=0.5), recover="bias", **ONE)
    assert same.record["result"] | {"sha256": 0} == run.record["result"] | {"sha256": 0}
    assert same.model.sha256 != run.model.sha256
    assert overlap(select, other) == 0


def test_a_journal_of_other_calibration_data_is_refused(digits, tmp_path):
    select, options = npz("select.npz").limit(100), {"stop": Stop(steps=2), "recover": "bias", **ONE}
    prune(digits, select, journal=tmp_path / "j.jsonl", **options)
    with pytest.raises(car.JournalError, match="calibration_data"):
        prune(digits, select, journal=tmp_path / "j.jsonl", calibration_data=npz("test.npz").limit(50), **options)
    with pytest.raises(car.JournalError, match=r"arguments\.recover "):
        prune(digits, select, journal=tmp_path / "j.jsonl", **{**options, "recover": "none"})


@pytest.mark.parametrize("bad", [{"recover": "magic"}, {"recover_every": 3}, {"recover": "bias", "recover_every": -1}])
def test_bad_recovery_is_refused(digits, bad):
    with pytest.raises(PlanError, match="recover"):
        prune(digits, npz("select.npz"), stop=Stop(ratio=0.5), **bad, **ONE)


def test_recovery_without_images_is_refused(digits):
    with pytest.raises(DataError, match="--calibration-data or --data"):
        prune(digits, criterion="l2", stop=Stop(ratio=0.5), recover="bias", **ONE)


# --- the command ----------------------------------------------------------------------------------------------------


def cli(*args: str):
    return CliRunner().invoke(app, ["prune", str(DIGITS / "model.onnx"), "--threads", "1", *args])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--guarantee", "0.9", "--ratio", "0.5"], "--max-drop"),
        (["--guarantee", "0.9", "--max-drop", "0.05", "--metric", "loss"], "counts none"),
        (["--guarantee", "0.9", "--max-drop", "0.05", "--plan", "p.json"], "--plan"),
        (["--guarantee", "1"], "not a number in (0, 1)"),
        (["--recover-every", "3"], "--recover-every is about recovery"),
        (["--calibration-data", "x.npz"], "--calibration-data is about recovery"),
        (["--recover", "magic"], "magic"),
    ],
)
def test_what_makes_no_sense_is_usage(args, words):
    result = cli(*args)
    assert result.exit_code == 2
    assert words in result.output


def test_the_command_says_what_was_promised(tmp_path):
    out = tmp_path / "m.onnx"
    config = tmp_path / "c.toml"
    config.write_text("")
    said = cli(
        *("--config", str(config), "--data", str(DIGITS / "select.npz"), "--channels", "gray", "--criterion", "l2"),
        *("--max-drop", "0.06", "--guarantee", "0.8", "--recover", "bias", "-o", str(out)),
    )
    assert said.exit_code == 0, said.output
    text = " ".join(said.output.split())
    assert "Guaranteed: a drop below 0.06 with confidence 0.8" in text
    assert "Recovered (bias) on" in text
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["arguments"]["guarantee"] == 0.8
    again = prune(
        car.load(DIGITS / "model.onnx"),
        npz("select.npz"),
        stop=Stop(max_drop=0.06),
        guarantee=0.8,
        criterion="l2",
        recover="bias",
        **ONE,
    )
    write(again, tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").read_bytes() == out.read_bytes()


def test_a_search_that_recovers_on_the_way_sees_the_repaired_network_and_resumes_to_the_same_bytes(digits, tmp_path):
    data = npz("select.npz").limit(120)
    options = {"metric": "loss", "stop": Stop(steps=6), "per_step": 5, "scope": "global", "recover": "bias", **ONE}
    whole = prune(digits, data, recover_every=10, journal=tmp_path / "a.jsonl", **options)
    late = prune(digits, data, **options)
    assert whole.record["arguments"]["recover_every"] == 10
    # After ten groups the answers are those of a repaired network.
    losses = [[step.mark.value for step in run.steps] for run in (whole, late)]
    assert losses[0][:10] == pytest.approx(losses[1][:10], abs=1e-5)
    assert losses[0][10:] != pytest.approx(losses[1][10:], abs=1e-3)
    repaired = prune(digits, data, metric="loss", plan=_plan(digits, whole, 20), recover="bias", **ONE)
    masked = prune(digits, data, metric="loss", plan=_plan(digits, whole, 20), **ONE)
    # Step 5 was scored by masking on what was rebuilt at ten and twenty groups; step 4 ends at twenty.
    gap = [abs(run.record["final"]["value"] - losses[0][19]) for run in (repaired, masked)]
    assert gap[0] < gap[1]
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 6
    for n in (3, len(lines) - 1):
        (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:n]))
        again = prune(digits, data, recover_every=10, journal=tmp_path / "b.jsonl", **options)
        assert (tmp_path / "b.jsonl").read_bytes() == b"".join(lines)
        assert again.model.sha256 == whole.model.sha256
        assert [step.mark for step in again.steps] == [step.mark for step in whole.steps]


def _plan(digits, run, n):
    from onnxcar.surgery import Plan

    return Plan(step.group for step in run.steps[:n]).to_json(run.space)


def test_a_drop_ends_a_recovering_search_only_where_the_recovered_network_breaks_it(digits, tmp_path):
    data = npz("select.npz").limit(150)
    options = {"criterion": "l2", "scope": "global", "recover": "least-squares", "multiple_of": 1, **ONE}
    stop = Stop(max_drop=0.02, ratio=0.85)
    late = prune(digits, data, stop=stop, **options)
    # Never due: only the drop asks for it.
    seen = prune(digits, data, stop=stop, recover_every=1000, journal=tmp_path / "a.jsonl", **options)
    assert late.stopped == "max_drop"
    assert len(seen.plan.groups) > len(late.plan.groups) + 3
    for run in (late, seen):
        assert run.record["base"]["value"] - run.record["final"]["value"] <= 0.02 + 1e-9
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:-6]))
    again = prune(digits, data, stop=stop, recover_every=1000, journal=tmp_path / "b.jsonl", **options)
    assert again.model.sha256 == seen.model.sha256
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(lines)
