"""What is installed, what really works, and what would make the GPU work."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from onnxcar._libraries import DRIVER
from onnxcar._providers import cuda_libraries, load_failure, onnx_runtime
from onnxcar.errors import RuntimeMissingError

__all__ = ["Diagnosis", "ProviderState", "diagnose", "installed_wheels"]

# The two lines to choose from.
_INSTALL = {"cpu": 'pip install "onnxcar[cpu]"', "gpu": 'pip install "onnxcar[gpu]"'}
# What --provider names -> ONNX Runtime's name.
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_PACKAGES = (
    "onnxcar",
    "onnx",
    "onnx-graphsurgeon",
    "protobuf",
    "numpy",
    "pillow",
    "click",
    "rich",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "ray",
)
# CUDA major version -> version of cuFFT in it; the other libraries carry the same number, cuRAND always 10.
_CUFFT = {12: 11, 13: 12}
# Oldest Linux driver of each CUDA major version, from NVIDIA's CUDA release notes.
_OLDEST_DRIVER = {12: 525, 13: 580}
_TIMEOUT_S = 20


@dataclass(frozen=True)
class ProviderState:
    """One provider of ONNX Runtime.

    Attributes:
        name: Ours (``--provider``).
        ort_name: ONNX Runtime's.
        listed: The installed wheel was built with it.
        loads: A session on it really runs there.
        reason: Why it does not load; empty if it does.
    """

    name: str
    ort_name: str
    listed: bool
    loads: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Plain data on this machine; `dataclasses.asdict` makes it JSON.

    Attributes:
        python: Version and path.
        system: Operating system and machine.
        packages: Distribution -> version, None if absent.
        runtime_wheels: Distributions that fill the ``onnxruntime`` folder; more than one is a fault.
        runtime: Version of the ONNX Runtime that loads, or None.
        providers: State of each provider that ``--provider`` names.
        cuda_major: CUDA version the GPU wheel needs.
        cuda_libraries: Library -> where it was found, None if missing. Empty where there is nothing to look for.
        gpus: One line a GPU.
        driver: NVIDIA driver version, or None.
        advice: What to do, most urgent first, each with a command; empty if all is well.
    """

    python: str
    system: str
    packages: Mapping[str, str | None]
    runtime_wheels: tuple[str, ...]
    runtime: str | None
    providers: tuple[ProviderState, ...]
    cuda_major: int
    cuda_libraries: Mapping[str, str | None]
    gpus: tuple[str, ...]
    driver: str | None
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether models can be run at all."""
        return any(state.loads for state in self.providers)


def diagnose() -> Diagnosis:
    """The state of this machine; takes a second or two, changes nothing, never raises."""
    packages = {name: _version(name) for name in _PACKAGES}
    wheels = installed_wheels()
    runtime, listed = _runtime()
    providers = tuple(_state(name, ort_name, listed) for name, ort_name in _PROVIDERS.items())
    cuda_major = _cuda_major(packages["onnxruntime-gpu"])
    libraries = _find_libraries(_wanted() or _cuda_libraries(cuda_major)) if sys.platform == "linux" else {}
    gpus, driver = _gpus()
    advice = _advise(wheels, providers, cuda_major, libraries, driver, runtime)
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
        runtime_wheels=wheels,
        runtime=runtime,
        providers=providers,
        cuda_major=cuda_major,
        cuda_libraries=libraries,
        gpus=gpus,
        driver=driver,
        advice=tuple(advice),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_wheels() -> tuple[str, ...]:
    """Distributions that fill the ``onnxruntime`` folder, sorted; more than one is a fault."""
    names = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in metadata.distributions()}
    others = ("onnxruntime-extensions", "onnxruntime-tools", "onnxruntime-genai")  # folders of their own
    return tuple(sorted(name for name in names if name.startswith("onnxruntime") and not name.startswith(others)))


def _runtime() -> tuple[str | None, Collection[str]]:
    """Version of the ONNX Runtime that loads, and the providers it was built with."""
    try:
        ort = importlib.import_module("onnxruntime")
        return str(ort.__version__), list(ort.get_available_providers())
    except (ImportError, AttributeError):  # absent; or emptied by the uninstallation of its other wheel
        return None, ()


def _state(name: str, ort_name: str, listed: Collection[str]) -> ProviderState:
    """What a session finds: a GPU wheel without its libraries lists CUDA all the same."""
    try:
        reason = load_failure(name) or ""
    except RuntimeMissingError as exc:
        reason = " ".join(str(exc).split())
    return ProviderState(name, ort_name, listed=ort_name in listed, loads=not reason, reason=reason)


def _wanted() -> tuple[str, ...]:
    """What the installed wheel's CUDA provider was linked to; empty if it has none."""
    try:
        return cuda_libraries(onnx_runtime(), "cuda")
    except RuntimeMissingError:
        return ()


def _cuda_libraries(major: int) -> tuple[str, ...]:
    """What onnxruntime-gpu opens."""
    same = tuple(f"lib{name}.so.{major}" for name in ("cudart", "cublas", "cublasLt", "nvrtc"))
    return (*same, f"libcufft.so.{_CUFFT[major]}", "libcurand.so.10", "libcudnn.so.9")


def _cuda_major(gpu_wheel: str | None) -> int:
    """CUDA version of the GPU wheel on PyPI: 13 from 1.27 on."""
    match = re.match(r"(\d+)\.(\d+)", gpu_wheel or "")
    return 12 if match and (int(match[1]), int(match[2])) < (1, 27) else 13


def _find_libraries(names: Sequence[str]) -> dict[str, str | None]:
    """Where each library lies: NVIDIA's wheels first, as ONNX Runtime looks there first. Nothing is opened."""
    found: dict[str, str | None] = dict.fromkeys(names)
    site = Path(sysconfig.get_paths()["purelib"])
    folders = sorted((site / "nvidia").glob("**/lib"))
    folders += [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    cached = _ldconfig()
    for name in names:
        at = next((str(folder / name) for folder in folders if (folder / name).exists()), None)
        found[name] = at or cached.get(name)
    return found


def _ldconfig() -> dict[str, str]:
    """The loader's cache: library -> path."""
    tool = shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin:/usr/sbin")
    lines = _output([tool, "-p"]) if tool else ""
    return {match[1]: match[2] for match in re.finditer(r"^\s*(\S+) \(.*\) => (\S+)$", lines, re.MULTILINE)}


def _gpus() -> tuple[tuple[str, ...], str | None]:
    """Names of the GPUs and the driver's version."""
    tool = shutil.which("nvidia-smi")
    lines = _output([tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines() if tool else []
    rows = [line.rsplit(",", 1) for line in lines if "," in line]
    if rows:
        return tuple(name.strip() for name, _ in rows), rows[0][1].strip()
    return (), None


def _output(command: Sequence[str]) -> str:
    """Standard output of a system tool, empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _advise(
    wheels: Sequence[str],
    providers: Iterable[ProviderState],
    cuda_major: int,
    libraries: Mapping[str, str | None],
    driver: str | None,
    runtime: str | None = None,
) -> list[str]:
    """What to do, most urgent first; see `Diagnosis.advice`."""
    states = {state.name: state for state in providers}
    gpu = driver is not None
    want = _INSTALL["gpu" if gpu else "cpu"]
    if len(wheels) > 1:
        return [f"{' and '.join(wheels)} fill the same folder. Keep one: pip uninstall -y {' '.join(wheels)} && {want}"]
    if not wheels:
        return [f"No ONNX Runtime, so no model can be run: {want}"]
    if not states["cpu"].loads:
        return [f"ONNX Runtime does not work ({states['cpu'].reason}): pip uninstall -y {wheels[0]} && {want}"]
    if states["cuda"].loads:
        return []
    if not gpu and not states["cuda"].listed:
        return [
            "No NVIDIA driver answers (nvidia-smi), so models run on the CPU. With a GPU: install its driver, then "
            f"pip uninstall -y {wheels[0]} && {_INSTALL['gpu']}"
        ]
    if not states["cuda"].listed:
        return [f"{wheels[0]} has no CUDA: pip uninstall -y {wheels[0]} && {_INSTALL['gpu']}"]
    missing = [name for name, at in libraries.items() if at is None and name != DRIVER]
    bound = f"=={runtime}" if runtime else ">=1.27" if cuda_major > 12 else "<1.27"
    line = f'pip install "onnxruntime-gpu[cuda,cudnn]{bound}"'
    lacks = f"CUDA does not load because {', '.join(missing)} are missing: {line}"
    if not gpu:
        return [
            "No NVIDIA driver answers (nvidia-smi), so models run on the CPU. With a GPU: install its driver "
            f"({_OLDEST_DRIVER[cuda_major]} or newer for CUDA {cuda_major}); in a container, start it with the GPU "
            "(docker run --gpus all).",
            *([lacks] if missing else []),
        ]
    version = re.match(r"\d+", driver or "")
    if version and int(version[0]) < _OLDEST_DRIVER[cuda_major]:
        older = ', or stay with CUDA 12: pip install "onnxruntime-gpu[cuda,cudnn]<1.27"' if cuda_major > 12 else ""
        return [f"Driver {driver} is too old for CUDA {cuda_major}: update it to {_OLDEST_DRIVER[cuda_major]}{older}"]
    if missing:
        return [lacks]
    return [
        f"CUDA does not load ({states['cuda'].reason}) though its libraries are there. Bring them to one version: "
        f"{line} --force-reinstall"
    ]
