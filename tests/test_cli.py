"""The commands through the real thing: small networks, real files, real subprocesses for exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from onnxcar.cli import app, border
from onnxcar.errors import ModelError, OnnxcarWarning
from onnxcar.scope import vector_width
from tests.graphs import Net

QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture
def folder(tmp_path: Path, cnn: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with m.onnx, and data that m.onnx gets mostly right."""
    rng = np.random.default_rng(1)
    # Each image has a colour, and the last bias centres the logits: so every class occurs.
    images = (rng.standard_normal((4000, 3, 8, 8)) + 2 * rng.standard_normal((4000, 3, 1, 1))).astype(np.float32)
    logits = onnxruntime.InferenceSession(cnn.SerializeToString()).run(None, {"x": images})[0]
    bias = next(t for t in cnn.graph.initializer if t.name == "fc_b")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) - logits.mean(0), "fc_b"))
    onnx.save(cnn, tmp_path / "m.onnx")
    answers = (logits - logits.mean(0)).argmax(1)
    for name, n, part in (("val", 60, slice(0, 2000)), ("test", 40, slice(2000, 4000))):
        x, y = images[part], answers[part]
        x = np.concatenate([x[y == k][: n // 4] for k in range(4)])
        y = np.repeat(np.arange(4), n // 4)
        assert len(x) == n
        y[rng.permutation(n)[: n // 6]] = rng.integers(0, 4, n // 6)
        np.savez(tmp_path / f"{name}.npz", images=x, labels=y.astype(np.int64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> Result:
    """The command in this process; an exception that leaves the border fails the test."""
    holder = []

    @click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
    def inside() -> None:
        holder.append(border.run(app, list(args)))

    result = CliRunner().invoke(inside, [], catch_exceptions=False)
    result.exit_code = holder[0]
    return result


def shell(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnxcar", *args]
    return subprocess.run(command, capture_output=True, text=True, env=QUIET, timeout=120, check=False, **kwargs)


# --- prune ----------------------------------------------------------------------------------------------------------


def test_prune_writes_model_and_record_and_says_where(folder):
    result = run("prune", "m.onnx", "--data", "val.npz", "--ratio", "0.4", "--threads", "1")
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "m.pruned.json").read_text())
    assert record["removed"] == {w: sorted(ids) for w, ids in record["removed"].items()}
    assert [len(ids) for ids in record["removed"].values()] == [3, 2]
    model = onnx.load(folder / "m.pruned.onnx")
    assert {i.name: i.dims[0] for i in model.graph.initializer}["conv1_w"] == 3
    assert {p.key for p in model.metadata_props} >= {"onnxcar.version", "onnxcar.removed_filters", "onnxcar.final"}
    assert record["optimistic"] is True
    assert "top1 on data (optimistic)" in result.stdout
    assert "m.pruned.onnx" in result.stderr
    assert "onnxcar compare m.onnx m.pruned.onnx --data val.npz" in result.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "m.onnx",
        "m.pruned.json",
        "m.pruned.onnx",
        "test.npz",
        "val.npz",
    ]


def test_prune_with_test_data_reports_on_it_and_is_not_optimistic(folder):
    result = run("prune", "m.onnx", "--data", "val.npz", "--test-data", "test.npz", "--steps", "1", "-o", "p.onnx")
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "p.json").read_text())
    assert record["optimistic"] is False
    assert record["test_base"]["samples"] == 40
    assert "top1 on test data" in result.stdout
    assert "optimistic" not in result.output


def test_prune_warns_of_test_data_that_filters_were_chosen_on(folder):
    result = run("prune", "m.onnx", "--data", "val.npz", "--test-data", "val.npz", "--steps", "1", "-o", "p.onnx")
    assert "Warning: 60 of the 60 samples of --test-data are among --data" in " ".join(result.stderr.split())


def test_json_on_stdout_is_the_record_alone(folder):
    done = shell("prune", "m.onnx", "--criterion", "l2", "--ratio", "0.4", "-o", "p.onnx", "--json", "-", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "p.json").read_text())
    assert "Record" in done.stderr


def test_quiet_leaves_stderr_empty(folder):
    done = shell("prune", "m.onnx", "--criterion", "l2", "--ratio", "0.4", "-o", "p.onnx", "-q", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "conv1" in done.stdout


def test_no_color_and_no_bar_in_a_pipe(folder):
    done = shell("prune", "m.onnx", "--data", "val.npz", "--ratio", "0.4", cwd=folder)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_plan_of_a_dry_run_removes_the_same_filters(folder):
    dry = run("prune", "m.onnx", "--criterion", "l1", "--ratio", "0.4", "-o", "p.onnx", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not (folder / "p.onnx").exists()
    plan = json.loads((folder / "p.plan.json").read_text())
    assert set(plan) == {"schema", "model_sha256", "removed"}
    assert {name: len(ids) for name, ids in plan["removed"].items()} == {"conv1_w": 3, "conv2_w": 2}
    done = run("prune", "m.onnx", "--plan", "p.plan.json", "-o", "p.onnx")
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "p.json").read_text())["removed"] == plan["removed"]
    again = run("prune", "m.onnx", "--plan", "p.json", "-o", "q.onnx")
    assert again.exit_code == 0, again.output
    assert (folder / "q.onnx").read_bytes() == (folder / "p.onnx").read_bytes()


def test_same_arguments_give_the_same_bytes(folder):
    for out in ("a.onnx", "b.onnx"):
        assert run("prune", "m.onnx", "--data", "val.npz", "--ratio", "0.4", "-o", out).exit_code == 0
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["p.onnx", "p.json"])
def test_outputs_that_exist_are_refused_before_any_work(folder, taken):
    (folder / taken).write_text("mine")
    began = time.monotonic()
    result = run("prune", "m.onnx", "--data", "val.npz", "--ratio", "0.4", "-o", "p.onnx")
    assert result.exit_code == 1
    assert f"{taken} exists" in result.stderr
    assert "--force" in result.stderr
    assert (folder / taken).read_text() == "mine"
    assert time.monotonic() - began < 5
    assert run("prune", "m.onnx", "--criterion", "l2", "--ratio", "0.4", "-o", "p.onnx", "--force").exit_code == 0


def test_the_model_itself_is_never_overwritten(folder):
    before = (folder / "m.onnx").read_bytes()
    for extra in (["-o", "m.onnx"], ["-o", "p.onnx", "--json", "m.onnx"], ["-o", "p.onnx", "--journal", "m.onnx"]):
        result = run("prune", "m.onnx", "--criterion", "l2", "--ratio", "0.4", "--force", *extra)
        assert result.exit_code == 1, extra
        assert (folder / "m.onnx").read_bytes() == before


def test_missing_folder_of_out_is_refused(folder):
    result = run("prune", "m.onnx", "--criterion", "l2", "--ratio", "0.4", "-o", "nowhere/p.onnx")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_refused(folder):
    (folder / "fixed").mkdir(mode=0o500)
    assert run("prune", "m.onnx", "--criterion", "l2", "--ratio", "0.4", "-o", "fixed/p.onnx").exit_code == 1


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["prune", "nope.onnx"], 1, "nope.onnx does not exist"),
        (["prune", "m.onnx"], 2, "needs data"),
        (["prune", "m.onnx", "--criterion", "l2"], 2, "needs a stop rule"),
        (["prune", "m.onnx", "--criterion", "l2", "--max-drop", "0.1"], 2, "--max-drop needs data"),
        (["prune", "m.onnx", "--criterion", "best"], 2, "best"),
        (["prune", "m.onnx", "--nonsense"], 2, "--nonsense"),
        (["prune"], 2, "MODEL"),
        (["prune", "m.onnx", "--criterion", "l2", "--ratio", "0.3", "--layers", "conv9"], 1, "conv9"),
        (["prune", "m.onnx", "--data", "nope.npz", "--ratio", "0.3"], 1, "nope.npz"),
        (["prune", "m.onnx", "--plan", "nope.json"], 1, "nope.json"),
        (["prune", "m.onnx", "--data", "val.npz", "--metric", "topless"], 1, "topless"),
        (["evaluate", "m.onnx"], 2, "needs data"),
        (["evaluate", "m.onnx", "--data", "m.onnx"], 1, "m.onnx"),
        (["evaluate", "m.onnx", "--data", "val.npz", "--provider", "cuda"], 1, "cuda"),
        (["evaluate", "m.onnx", "--data", "val.npz", "--label-offset", "9"], 1, "label"),
        (["compare", "m.onnx"], 2, "CANDIDATE"),
        (["compare", "m.onnx", "m.onnx", "--max-drop", "0.1"], 2, "needs data"),
        (["compare", "m.onnx", "m.onnx", "--max-latency-ratio", "1", "--runs", "0"], 2, "--runs 0"),
        (["score", "m.onnx"], 2, "needs data"),
        (["inspect", "."], 1, "folder"),
        (["prnue"], 2, "Did you mean 'prune'"),
    ],
)
def test_refusals_name_the_trouble_and_have_their_code(folder, args, code, says):
    before = sorted(p.name for p in folder.iterdir())
    result = run(*args)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "internal error" not in result.stderr
    assert result.stdout == ""
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_refused_model_leaves_no_file_and_no_traceback(folder):
    (folder / "bad.onnx").write_bytes((folder / "m.onnx").read_bytes()[:300])
    done = shell("prune", "bad.onnx", "--criterion", "l2", "--ratio", "0.3", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("bad.pruned*"))


# --- the border -----------------------------------------------------------------------------------------------------


def failing(exception: BaseException) -> click.Command:
    @click.command("failing")
    @click.option(
        "--traceback", is_flag=True, expose_value=False, callback=lambda c, _p, v: setattr(c.obj, "traceback", v)
    )
    def command() -> None:
        raise exception

    return command


@pytest.mark.parametrize(
    ("exception", "code", "says"),
    [
        (ModelError("This is no model. Take another."), 1, "Error: This is no model. Take another."),
        (ZeroDivisionError("oh\nno"), 1, "internal error (ZeroDivisionError: oh no)"),
        (MemoryError(), 1, "--memory"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (border.InterruptedRunError("Go on like so."), 130, "Go on like so."),
        (border.GateNotMetError("Gate not met: x."), 3, "Gate not met: x."),
        (click.UsageError("no"), 2, "no"),
    ],
)
def test_every_exception_has_its_code_and_no_traceback(capsys, exception, code, says):
    assert border.run(failing(exception), []) == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_traceback_shows_all(capsys):
    assert border.run(failing(ZeroDivisionError("oh")), ["--traceback"]) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert "in command" in said


def test_our_warnings_are_said_in_our_form_and_others_not(capsys):
    @click.command()
    def command() -> None:
        warnings.warn("Few samples. Take more.", OnnxcarWarning, stacklevel=1)
        warnings.warn("deprecated", UserWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert border.run(command, []) == 0
    assert capsys.readouterr().err == "Warning: Few samples. Take more.\n"


def test_a_reader_that_leaves_is_no_error_to_speak_of(folder):
    command = f"{sys.executable} -m onnxcar inspect m.onnx --groups | true"  # it leaves before a word is written
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=QUIET, timeout=60, check=False)
    assert "rror" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_start_up_imports_nothing_heavy():
    code = "import sys, onnxcar.cli; print(sorted({'onnx', 'numpy', 'onnxruntime', 'rich', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_and_help_are_quick_and_plain():
    assert shell("--version").stdout.startswith("onnxcar 0.")
    assert "Commands:" in shell("-h").stdout


# --- config ---------------------------------------------------------------------------------------------------------


def test_config_beside_the_model_gives_defaults_and_the_command_line_wins(folder, tmp_path_factory, monkeypatch):
    (folder / "onnxcar.toml").write_text(
        '[data]\ndata = "val.npz"\nthreads = 1\n[prune]\nsteps = 2\noutput = "c.onnx"\n'
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert run("prune", str(folder / "m.onnx")).exit_code == 0
    record = json.loads((folder / "c.json").read_text())
    assert len(record["steps"]) == 2
    assert run("prune", str(folder / "m.onnx"), "--steps", "1", "--force").exit_code == 0
    assert len(json.loads((folder / "c.json").read_text())["steps"]) == 1


def test_lists_and_layers_of_a_config_are_read(folder):
    text = '[data]\ndata = "val.npz"\n[prune]\nlayers = ["conv2"]\nratio = 0.4\n'
    (folder / "onnxcar.toml").write_text(text)
    assert run("prune", "m.onnx").exit_code == 0
    assert list(json.loads((folder / "m.pruned.json").read_text())["removed"]) == ["conv2_w"]


def test_unknown_key_of_a_config_is_an_error_with_the_nearest_key(folder):
    (folder / "onnxcar.toml").write_text("[prune]\nmax_dorp = 0.1\n")
    result = run("prune", "m.onnx")
    assert result.exit_code == 1
    assert "max_drop" in result.stderr


def test_bad_value_of_a_config_is_refused_like_a_flag(folder):
    (folder / "onnxcar.toml").write_text('[data]\ndata = "val.npz"\n[prune]\nratio = 1.5\n')
    assert run("prune", "m.onnx").exit_code == 2


def test_flag_of_a_config_that_is_not_built_is_refused(folder):
    (folder / "onnxcar.toml").write_text('[data]\ndata = "val.npz"\nexecutor = "ray"\n')
    result = run("prune", "m.onnx")
    assert result.exit_code == 2
    assert "not in this version" in result.stderr


def test_what_prune_writes_is_not_what_inspect_writes(folder):
    (folder / "onnxcar.toml").write_text('[prune]\njson = "record.json"\n')
    assert run("inspect", "m.onnx").exit_code == 0
    assert not (folder / "record.json").exists()


def test_help_does_not_need_a_good_config(folder):
    (folder / "onnxcar.toml").write_text("[prune]\nnonsense = 1\n")
    assert run("prune", "m.onnx", "--help").exit_code == 0


# --- the other commands ---------------------------------------------------------------------------------------------


def test_inspect_lists_layers_and_reasons(folder):
    result = run("inspect", "m.onnx", "--groups", "--json", "i.json")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "i.json").read_text())
    assert [(x["node"], x["filters"], x["prunable"]) for x in found["layers"]] == [
        ("conv1", 6, 6),
        ("conv2", 5, 5),
        ("fc", 4, 0),
    ]
    assert sum(x["macs"] for x in found["layers"]) == found["model"]["macs"]
    assert sum(x["params"] for x in found["layers"]) == found["model"]["params"] == 467
    assert found["protected"][0]["layer"] == "fc"
    assert len(found["groups"]) == 11
    for text in (
        "conv1",
        "11 of 11 filters (100.0%) and 0 of 4 units of dense layers can go, in 11 groups.",
        "output of the network",
        "conv2_w[4]",
    ):
        assert text in result.stdout


def test_evaluate_counts_what_onnxruntime_counts(folder):
    result = run("evaluate", "m.onnx", "--data", "val.npz", "--json", "e.json", "--per-class")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "e.json").read_text())
    with np.load(folder / "val.npz") as data:
        x, y = data["images"], data["labels"]
    session = onnxruntime.InferenceSession(folder / "m.onnx")
    right = session.run(None, {"x": x})[0].argmax(1) == y
    assert 40 < right.sum() < 60
    assert found["correct"] == right.sum()
    assert found["scores"]["top1"]["interval"][0] < found["value"] < found["scores"]["top1"]["interval"][1]
    assert {c["class"]: c["correct"] for c in found["per_class"]} == {
        str(k): int(right[y == k].sum()) for k in set(y.tolist())
    }
    assert f"{right.sum()}/60" in result.stdout


def test_score_ranks_and_states_its_reliability(folder):
    result = run("score", "m.onnx", "--data", "val.npz", "--by-class", "--json", "s.json")
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "s.json").read_text())
    base = found["base"]["correct"]
    assert len(found["groups"]) == 11
    for group in found["groups"]:
        assert group["importance"] == pytest.approx((base - group["correct"]) / 60, abs=1e-12)
    assert len({group["importance"] for group in found["groups"]}) > 3
    assert found["groups"][0]["per_class"]
    assert 0 < found["reliability"]["stderr"] < 0.2
    assert "rank correlation between two halves" in result.stderr
    shown = [line.split()[0] for line in result.stdout.splitlines() if line.strip().startswith("conv")]
    order = sorted(found["groups"], key=lambda g: g["importance"])
    assert shown == [group["group"] for group in order]


def test_score_of_a_few_samples_warns_that_it_is_noise(folder):
    result = run("score", "m.onnx", "--data", "val.npz", "--limit", "8")
    assert "Warning" in result.stderr
    assert "near noise" in result.stderr


def test_score_without_data_by_weights(folder):
    result = run("score", "m.onnx", "--criterion", "l1", "--layers", "conv2", "--json", "s.csv")
    assert result.exit_code == 0, result.output
    lines = (folder / "s.csv").read_text().splitlines()
    assert lines[0] == "group,importance,stderr,correct,macs,params,filters"
    assert len(lines) == 6
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "m.onnx").graph.initializer}
    expected = np.abs(weights["conv2_w"]).reshape(5, -1).sum(1)
    assert [float(line.split(",")[1]) for line in lines[1:]] == pytest.approx(expected.tolist(), rel=1e-5)


def test_doctor_says_what_works(folder):
    result = run("doctor", "--json", "d.json")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "d.json").read_text())["ok"] is True
    assert "--provider cpu" in result.stdout


# --- compare --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(folder: Path) -> Path:
    assert run("prune", "m.onnx", "--data", "val.npz", "--ratio", "0.6", "-o", "p.onnx", "-q").exit_code == 0
    return folder


def test_compare_shows_everything_side_by_side(pair):
    args = ["--data", "test.npz", "--runs", "15", "--threads", "1", "--json", "c.json"]
    result = run("compare", "m.onnx", "p.onnx", *args)
    assert result.exit_code == 0, result.output
    found = json.loads((pair / "c.json").read_text())
    assert found["models"][1]["macs"] < found["models"][0]["macs"]
    d = found["differences"][0]
    top1 = d["scores"]["top1"]
    counts = [m["scores"]["top1"]["correct"] for m in found["models"]]
    assert top1["only_candidate"] - top1["only_base"] == counts[1] - counts[0] != 0
    assert sum(c["candidate"] - c["base"] for c in d["per_class"]) == counts[1] - counts[0]
    assert found["models"][0]["latency"]["runs"] == 15
    for text in ("params", "MACs", "latency", "McNemar", "same answer"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("gate", "met"),
    [
        (["--max-drop", "1"], True),
        (["--max-drop", "0"], False),
        (["--min-score", "0.01"], True),
        (["--min-score", "0.999"], False),
        (["--max-latency-ratio", "900"], True),
        (["--max-latency-ratio", "0.001"], False),
    ],
)
def test_gates_decide_the_exit_code_and_are_named(pair, gate, met):
    result = run("compare", "m.onnx", "p.onnx", "--data", "test.npz", "--runs", "15", *gate)
    assert result.exit_code == (0 if met else 3), result.output
    assert ("Gate not met" in result.stderr) is not met
    assert met or gate[0] in result.stderr
    assert gate[0].lstrip("-") in result.stdout


def test_numbers_are_reported_on_test_data_where_there_are_any(pair):
    (pair / "onnxcar.toml").write_text('[data]\ndata = "val.npz"\ntest_data = "test.npz"\nlimit = 20\n')
    for command in (["evaluate", "m.onnx"], ["compare", "m.onnx", "p.onnx", "--runs", "0"]):
        found = json.loads(run(*command, "--json", "-").stdout)
        assert (found["data"]["samples"], found["optimistic"]) == (40, False)
        limited = json.loads(run(*command, "--json", "-", "--limit", "12").stdout)
        assert limited["data"]["samples"] == 12
    (pair / "onnxcar.toml").unlink()
    result = run("compare", "m.onnx", "p.onnx", "--runs", "0", "--data", "val.npz", "--json", "c.json")
    assert json.loads((pair / "c.json").read_text())["optimistic"] is True
    assert "optimistic" in result.stderr


def test_a_plan_that_costs_more_than_max_drop_is_exit_3(pair):
    args = ["prune", "m.onnx", "--plan", "p.json", "-o", "q.onnx", "--data", "val.npz"]
    assert run(*args, "--max-drop", "1").exit_code == 0
    result = run(*args, "--max-drop", "0.01", "--force")
    assert result.exit_code == 3, result.output
    assert "Gate not met: top1 on --data is" in result.stderr


def test_compare_without_data_compares_size_and_latency(pair):
    result = run("compare", "m.onnx", "p.onnx", "--runs", "15", "--json", "-")
    found = json.loads(result.stdout)
    assert found["models"][0]["scores"] == {}
    assert found["differences"][0]["latency_ratio"]["median"] > 0
    assert found["differences"][0]["agreement"] is None


# --- interruption ---------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_journal_and_the_run_goes_on_to_the_same_bytes(folder, shared):
    model, data = shared / "models" / "cifar10_resnet20.onnx", shared / "data" / "cifar10" / "test.npz"
    args = ["prune", str(model), "--data", str(data), "--preprocess", "imagenet", "--limit", "400", "--threads", "1"]
    # Steps enough, on images enough, that a fast machine is not done before the signal is there.
    args += ["--layers", "*layer3.1/conv1*", "--ratio", "0.5"]
    whole = shell(*args, "-o", "whole.onnx", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    assert not (folder / "whole.journal.jsonl").exists()

    command = [sys.executable, "-m", "onnxcar", *args, "-o", "p.onnx"]
    process = subprocess.Popen(
        command, cwd=folder, env=QUIET, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    journal = folder / "p.journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Start the same command again to go on from p.journal.jsonl" in err
    assert "Traceback" not in err
    assert not (folder / "p.onnx").exists()
    assert journal.exists()

    again = shell(*args, "-o", "p.onnx", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "Going on from p.journal.jsonl" in again.stderr
    assert (folder / "p.onnx").read_bytes() == (folder / "whole.onnx").read_bytes()


@pytest.mark.skipif(vector_width("cpu") < 8, reason="a processor whose vectors take four channels")
def test_counts_below_the_width_of_the_processor_are_told_with_the_reason(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input(), 16, 3))
    x = net.op("Relu", net.conv(net.op("Relu", net.conv(x, 16, 1)), 8, 1))
    onnx.save(net.proto(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 5)), tmp_path / "m.onnx")
    command = ["prune", str(tmp_path / "m.onnx"), "--criterion", "l2", "--scope", "global", "--provider", "cpu"]

    def told(target: str) -> tuple[str, dict[str, object]]:
        done = CliRunner().invoke(app, [*command, "--target-macs", target, "--force", "-o", str(tmp_path / "out.onnx")])
        assert done.exit_code == 0, done.output
        return done.stderr, json.loads((tmp_path / "out.json").read_text())

    said, record = told("0.3")
    assert "Counts are multiples of 4, less than the" in said
    assert "as the target cannot be met otherwise" in said
    assert (record["width"], record["widths"]) == (4, {})
    said, record = told("0.97")
    assert "Counts are multiples" not in said
    assert record["width"] == vector_width("cpu")
