"""The benchmark scripts run, and what they check holds; times are nobody's business here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL, IMAGES = "models/digits/model.onnx", "models/digits/select.npz"

RUNS = [
    pytest.param(("car_speed.py", "--ratio=0.2", "--loops=1", "--check=1"), "0 counts or picks wrong", id="car_speed"),
    pytest.param(("engine.py", "global", "--steps=1"), "picks equal: True", id="global"),
    pytest.param(("engine.py", "memory", "--counts", "20", "40"), "largest over smallest", id="memory"),
    pytest.param(("limit.py", "--ratio=0.1"), "conv2", id="limit"),
]


def run(script: str, *flags: str) -> str:
    what = [flags[0]] if flags and not flags[0].startswith("-") else []
    rest = flags[len(what) :]
    command = [sys.executable, str(ROOT / "scripts" / "bench" / script), *what, MODEL, IMAGES, "--limit=60", *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("call", "words"), RUNS)
def test_a_bench_runs_and_its_checks_hold(call, words):
    assert words in run(*call)


def test_latencies_are_told_for_each_ratio():
    script = str(ROOT / "scripts" / "bench" / "latency_macs.py")
    done = subprocess.run(
        [sys.executable, script, MODEL, "--runs=3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("| model |")]
    assert rows == ["0.25", "0.25", "0.5", "0.5", "0.75", "0.75"]


@pytest.mark.slow
def test_scores_in_full_are_those_of_the_loops():
    pytest.importorskip("torch")
    told = run("engine.py", "score", "--groups=8", "--loops=1")
    assert told.count("0 of 1 counts differ") == 2


def test_the_accuracy_table_goes_on_where_it_stopped_and_says_what_is_not_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- accuracy_table: begin --><!-- accuracy_table: end -->\nafter\n")
    net = ("--net", "again", MODEL, "models/digits/onnxcar.toml", "--limit", "again=60", "--right", "again")
    where = ("--cache", str(tmp_path / "cells.json"), "--page", str(page), "--places", "first")
    command = [sys.executable, str(ROOT / "scripts" / "accuracy_table.py"), *net, "--only", "again", *where]

    def told(*flags: str) -> str:
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert (
        told("--criteria", "l1", "car", "--ratios", "0.5", "--unrepaired", "--per-step", "again=4").count("again,") == 2
    )
    assert told("--criteria", "l1", "car", "--ratios", "0.5", "--per-step", "again=4").count("least-squares") == 2
    assert told("--criteria", "l1", "car", "--ratios", "0.5").count("again,") == 0  # all known
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "filters chosen on 60 images that it gets right" in text
    assert "Groups removed before candidates are looked at again: car 4." in text
    assert "Not run: car, l1 at 25%, 75%; class-car, l2" in text
    assert "### digits\n\nNot run." in text


def test_exchanges_never_lose_a_right_answer_and_end():
    script = str(ROOT / "scripts" / "exchange.py")
    command = [
        sys.executable,
        script,
        MODEL,
        "models/digits/onnxcar.toml",
        "--limit=60",
        "--criterion=l1",
        "--threads=1",
    ]
    done = subprocess.run([*command, "--ratio=0.4"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith(("| l1", "| an exchange"))]
    right = [int(n) for _, n in rows]
    assert rows[0][0].strip() == "l1"
    assert len(right) > 1  # the norm's choice can be bettered
    assert right == sorted(right)
