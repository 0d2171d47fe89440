"""What README says can be typed, and comes out as it says."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxcar.cli import COMMANDS
from onnxcar.cli.later import LATER, LATER_VALUES
from onnxcar.criteria import CRITERIA

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "models" / "README.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `onnxcar` command of the shell blocks, in order."""
    parts = [part.strip() for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    return [part for part in parts if part.startswith("onnxcar ")]


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def workplace(tmp_path: Path, make_model: Callable[..., onnx.ModelProto]) -> Path:
    """A folder with what the README's commands name: the digits, and a small stand-in for `resnet18.onnx`."""
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.pruned.*"))
    net = make_model(
        """
        [conv1] a = Conv <strides = [16, 16]> (x, conv1_w, conv1_b)
        [relu1] b = Relu (a)
        [pool] c = GlobalAveragePool (b)
        [flat] d = Flatten (c)
        [fc] y = Gemm <transB = 1> (d, fc_w, fc_b)
        """,
        inputs="float[N,3,224,224] x",
        outputs="float[N,2] y",
        weights={"conv1_w": (6, 3, 16, 16), "conv1_b": (6,), "fc_w": (2, 6), "fc_b": (2,)},
    )
    onnx.save(net, tmp_path / "resnet18.onnx")
    rng = np.random.default_rng(0)
    for part in ("val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_commands_run_in_order(workplace: Path) -> None:
    lines = commands()
    assert len(lines) >= 8
    for line in lines:
        done = run("-m", "onnxcar", *shlex.split(line)[1:], cwd=workplace)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_main_job_removes_half_of_both_convs_within_one_point(workplace: Path) -> None:
    assert commands()[0] == "onnxcar prune models/digits/model.onnx"
    done = run("-m", "onnxcar", *shlex.split(commands()[0])[1:], cwd=workplace)
    assert done.returncode == 0, done.stderr
    record = json.loads((workplace / "models/digits/model.pruned.json").read_text(encoding="utf-8"))
    assert len(record["removed"]["conv1.weight"]) >= 10
    assert len(record["removed"]["conv2.weight"]) >= 25
    assert record["test_base"]["value"] - record["test_final"]["value"] <= 0.01
    assert record["optimistic"] is False
    original, pruned = (onnx.load(workplace / "models/digits" / name) for name in ("model.onnx", "model.pruned.onnx"))
    assert [value.name for value in pruned.graph.input] == [value.name for value in original.graph.input]
    assert {tensor.name: tensor.dims[0] for tensor in pruned.graph.initializer}["conv1.weight"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs(workplace: Path, number: int) -> None:
    done = run("-W", "error", "-c", blocks("python")[number], cwd=workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_table_is_what_the_script_prints(tmp_path: Path) -> None:
    done = run(str(ROOT / "scripts" / "criteria_table.py"), "--criteria", "car", "l1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    table = README.splitlines()
    assert [line for line in lines if line not in table] == []


def test_set_up_is_two_commands() -> None:
    installs = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pip install")]
    assert installs == [
        'pip install -e ".[cpu]" && onnxcar prune models/digits/model.onnx',
        'pip install -e ".[cpu,dev]" && pytest -n 2',
    ]


def test_criteria_of_the_table_are_all_there_are() -> None:
    named = set(re.findall(r"^\| `([\w-]+)", README, flags=re.MULTILINE))
    assert named == set(CRITERIA)


def test_flags_exist() -> None:
    commands = [importlib.import_module(f"onnxcar.cli.{name}").command for name in COMMANDS]
    known = {flag for command in commands for param in command.params for flag in param.opts}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"scripts/\S+ --\S+", "", README)))
    assert len(flags) >= 10
    assert flags <= known | {"--help"}


def test_what_is_not_built_is_named() -> None:
    limits = README[README.index("Not in this version") :]
    flags = {flag for flags in LATER.values() for flag in flags}
    flags |= {f"--{name}" for name, values in LATER_VALUES.items() if values and name != "criterion"}
    assert flags
    assert [flag for flag in flags if f"`{flag}" not in limits] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_pages_hold_no_blanks_to_fill() -> None:
    assert [page.name for page in DOCS if "@@" in page.read_text(encoding="utf-8")] == []
