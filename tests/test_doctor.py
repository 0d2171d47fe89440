import dataclasses
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import onnxcar.doctor as doctor
from onnxcar.doctor import ProviderState, diagnose, installed_wheels


def fake_wheel(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def fake_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_the_diagnosis_tells_this_machine() -> None:
    found = diagnose()
    assert found.python.startswith(platform.python_version())
    assert found.packages["onnx"] == metadata.version("onnx")
    assert [state.name for state in found.providers] == ["cpu", "cuda", "tensorrt"]
    assert all(state.loads != bool(state.reason) for state in found.providers)
    assert not any(state.loads and not state.listed for state in found.providers)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["system"] == found.system


def test_cpu_loads_where_onnxruntime_runs() -> None:
    ort = pytest.importorskip("onnxruntime")
    found = diagnose()
    assert found.ok
    assert found.runtime == ort.__version__
    assert found.providers[0].loads


def test_two_wheels_in_one_folder_are_the_first_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wheel(tmp_path, "onnxruntime", "1.31.1")
    fake_wheel(tmp_path, "onnxruntime-gpu", "1.31.1")
    fake_wheel(tmp_path, "onnxruntime-extensions", "0.14.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_wheels() == ("onnxruntime", "onnxruntime-gpu")
    advice = diagnose().advice[0]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in advice


def test_an_emptied_onnxruntime_is_told_not_raised(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("")  # or the real one, later in the path, would win
    fake_wheel(tmp_path, "onnxruntime", "1.31.1")
    code = "from onnxcar.doctor import diagnose; d = diagnose(); print(d.ok, d.runtime, d.providers[0].reason)"
    root = str(Path(doctor.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); " + code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    assert run.stdout.startswith("False None ")
    assert "pip install" in run.stdout


@pytest.mark.skipif(os.name != "posix", reason="shell scripts as tools")
def test_the_driver_is_asked_and_its_silence_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_tool(tmp_path, "nvidia-smi", "echo 'NVIDIA H200, 580.65.06'; echo 'NVIDIA H200, 580.65.06'")
    assert doctor._gpus() == (("NVIDIA H200", "NVIDIA H200"), "580.65.06")
    fake_tool(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML, sorry'; exit 9")
    assert doctor._gpus() == ((), None)
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    fake_tool(tmp_path, "nvidia-smi", "exec sleep 30")
    assert doctor._gpus() == ((), None)


@pytest.mark.skipif(os.name != "posix", reason="shell scripts as tools")
def test_libraries_are_found_by_path_and_by_the_loaders_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libcudnn.so.9").write_bytes(b"")
    fake_tool(tmp_path, "ldconfig", "echo '\tlibcudart.so.13 (libc6,x86-64) => /opt/cuda/libcudart.so.13'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = doctor._find_libraries(["libcudnn.so.9", "libcudart.so.13", "libcufft.so.99"])
    assert found == {
        "libcudnn.so.9": str(tmp_path / "libcudnn.so.9"),
        "libcudart.so.13": "/opt/cuda/libcudart.so.13",
        "libcufft.so.99": None,
    }


def test_the_wheel_decides_the_cuda_version() -> None:
    assert [doctor._cuda_major(v) for v in ("1.26.0", "1.27.0", "1.31.1", "2.0", None)] == [12, 13, 13, 13, 13]
    assert "libcufft.so.11" in doctor._cuda_libraries(12)
    assert "libcublasLt.so.13" in doctor._cuda_libraries(13)


def states(*, cpu: bool = True, cuda: bool = False, listed: bool = True) -> list[ProviderState]:
    return [
        ProviderState("cpu", "CPUExecutionProvider", listed=cpu, loads=cpu, reason="" if cpu else "broken"),
        ProviderState("cuda", "CUDAExecutionProvider", listed=listed, loads=cuda, reason="" if cuda else "no cuBLAS"),
    ]


GPU = ("onnxruntime-gpu",)
CPU = ("onnxruntime",)


@pytest.mark.parametrize(
    ("wheels", "providers", "cuda", "libraries", "driver", "expected"),
    [
        ((), states(cpu=False), 13, {}, None, 'No ONNX Runtime, so no model can be run: pip install "onnxcar[cpu]"'),
        ((), states(cpu=False), 13, {}, "580.1", 'pip install "onnxcar[gpu]"'),
        (CPU, states(cpu=False), 13, {}, None, "broken"),
        (GPU, states(cuda=True), 13, {"libcudnn.so.9": None}, "580.1", None),
        (CPU, states(listed=False), 13, {}, None, "No NVIDIA driver"),
        (GPU, states(), 13, {"libcuda.so.1": None}, "580.1", "--force-reinstall"),
        (CPU, states(listed=False), 13, {}, "580.1", 'onnxruntime && pip install "onnxcar[gpu]"'),
        (GPU, states(), 13, {"libcudnn.so.9": None}, "580.1", "libcudnn.so.9 are missing"),
        (GPU, states(), 13, {"libcudnn.so.9": None}, "580.1", '"onnxruntime-gpu[cuda,cudnn]>=1.27"'),
        (GPU, states(), 12, {"libcudnn.so.9": None}, "535.1", '"onnxruntime-gpu[cuda,cudnn]<1.27"'),
        (GPU, states(), 13, {"libcudnn.so.9": "/x"}, "550.1", "Driver 550.1 is too old for CUDA 13"),
        (GPU, states(), 13, {"libcudnn.so.9": "/x"}, "580.1", "--force-reinstall"),
    ],
)
def test_advice_is_one_command_that_fits(
    wheels: tuple[str, ...],
    providers: list[ProviderState],
    cuda: int,
    libraries: dict[str, str | None],
    driver: str | None,
    expected: str | None,
) -> None:
    advice = doctor._advise(wheels, providers, cuda, libraries, driver)
    if expected is None:
        assert advice == []
    else:
        assert len(advice) == 1
        assert expected in advice[0]
        assert "pip install" in advice[0]


def test_a_gpu_wheel_without_a_gpu_is_told_both_things_that_lack() -> None:
    advice = doctor._advise(GPU, states(), 13, {"libcudnn.so.9": None, "libcuda.so.1": None}, None, "1.31.1")
    assert len(advice) == 2
    assert "docker run --gpus all" in advice[0]
    assert "580 or newer" in advice[0]
    assert advice[1].endswith('libcudnn.so.9 are missing: pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"')
    assert len(doctor._advise(GPU, states(), 13, {"libcuda.so.1": None}, None)) == 1
