"""The GPU's benchmark runs from end to end on the CPU provider, the way a GPU goes; nobody asks how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcar import runtime
from onnxcar.errors import RuntimeMissingError

ROOT = Path(__file__).parent.parent


def bench(tmp_path, *flags):
    out = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "gpu.py"), "--tiny", "--json", str(out), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == [out]  # no profile is left behind
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


def check(found, precisions):
    for part in ("steps", "one_shot", "in_kernels"):
        assert [row["precision"] for row in found[part]] == precisions
    assert found["steps"][0]["counts_differ"] == 0  # in fp32
    assert all(row["rows"] > 0 for row in found["steps"])
    assert found["one_shot"][0]["agreement"] is None
    assert found["one_shot"][-1]["agreement"]["precision"] == precisions[-1]
    assert all(0 < row["share"] <= 1.5 for row in found["in_kernels"])


def test_the_bench_runs_on_the_cpu(tmp_path):
    said, found = bench(tmp_path, "--provider", "cpu")
    check(found, ["fp32", "fp16"])
    assert found["in_kernels"][0]["what"] == "operators"
    assert "candidate_images_per_s" in said


@pytest.mark.gpu
def test_the_bench_runs_on_a_gpu(tmp_path):
    try:
        runtime.resolve_provider("cuda")
    except RuntimeMissingError as exc:
        pytest.skip(f"no GPU: {exc}")
    check(bench(tmp_path, "--provider", "cuda")[1], ["fp32", "tf32", "fp16"])


def test_steps_of_a_model_of_ones_own(tmp_path):
    digits = ROOT / "models" / "digits"
    said, found = bench(
        tmp_path, "--provider", "cpu", "--precisions", "fp32", "--images", "60",
        "--model", str(digits / "model.onnx"), "--data", str(digits / "select.npz"), "--channels", "gray",
    )  # fmt: skip
    assert "Greedy steps, 60 images" in said
    assert found["steps"][0]["counts_differ"] == 0
