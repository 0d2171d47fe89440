"""ONNX Runtime itself: is it there, is it whole, and which of its providers really load."""

from __future__ import annotations

import contextlib
import importlib
import io
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxcar.errors import RuntimeMissingError

__all__ = ["INSTALL", "PROVIDERS", "import_runtime", "installed_wheels", "probe_provider"]

# Our names -> ONNX Runtime's.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# The two lines to choose from.
INSTALL = {"cpu": 'pip install "onnxcar[cpu]"', "gpu": 'pip install "onnxcar[gpu]"'}
_QUIET, _WARNINGS = 4, 2  # severities of ONNX Runtime's own log; it starts at warnings


def import_runtime() -> ModuleType:
    """The ``onnxruntime`` module.

    Raises:
        RuntimeMissingError: Not installed, or emptied: its wheels share one folder, and uninstalling either takes
            the other's files.
    """
    choose = f"Install one of the two: {INSTALL['cpu']}, or {INSTALL['gpu']} for NVIDIA GPUs."
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as exc:
        if installed_wheels():
            raise RuntimeMissingError(
                f"ONNX Runtime is installed but does not load: {exc}. Reinstall it: {_reinstall_line()}"
            ) from exc
        raise RuntimeMissingError(f"ONNX Runtime is not installed. {choose}") from exc
    if not hasattr(module, "InferenceSession"):
        wheels = installed_wheels()
        if not wheels:
            raise RuntimeMissingError(f"ONNX Runtime is not installed; only an empty folder of it is left. {choose}")
        raise RuntimeMissingError(
            f"ONNX Runtime is installed ({' and '.join(wheels)}) but its folder is empty, as after uninstalling its "
            f"other wheel. Reinstall it: {_reinstall_line()}"
        )
    return module


def installed_wheels() -> tuple[str, ...]:
    """Names of the installed distributions that fill the ``onnxruntime`` folder, sorted; more than one is a fault."""
    names = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in metadata.distributions()}
    others = ("onnxruntime-extensions", "onnxruntime-tools", "onnxruntime-genai")  # folders of their own
    return tuple(sorted(name for name in names if name.startswith("onnxruntime") and not name.startswith(others)))


def _reinstall_line() -> str:
    wheels = installed_wheels()
    gpu = any("gpu" in wheel for wheel in wheels)
    return f"pip uninstall -y {' '.join(wheels)} && {INSTALL['gpu' if gpu else 'cpu']}"


def probe_provider(ort_name: str) -> str | None:
    """Why a provider does not work, or None: it built a session and computed the right numbers.

    ``get_available_providers`` lists what a wheel was compiled with. A GPU wheel without its CUDA libraries lists
    CUDA too and computes on the CPU without an exception, so only a session's own list tells.

    Args:
        ort_name: ONNX Runtime's name, such as ``CUDAExecutionProvider``.

    Raises:
        RuntimeMissingError: No ONNX Runtime at all.
    """
    ort = import_runtime()
    if ort_name not in ort.get_available_providers():
        return f"the installed ONNX Runtime {ort.__version__} was built without it"
    if ort_name != PROVIDERS["cpu"] and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses
            ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = 1
    ort.set_default_logger_severity(_QUIET)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # so is every fall-back
            session = ort.InferenceSession(_probe_model(), options, providers=[ort_name])
            found = session.get_providers()
            if ort_name not in found:
                return f"it does not load: a session that asked for it got {', '.join(found)}"
            return _wrong_numbers(session)
    except Exception as exc:  # ONNX Runtime's exceptions have no common base but this
        return " ".join(str(exc).split())[:300] or type(exc).__name__
    finally:
        ort.set_default_logger_severity(_WARNINGS)


def _probe_model() -> bytes:
    """A Conv with a Relu: loads cuDNN and cuBLAS where an Identity would not."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 1])],
        [helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)],
    )
    # Old versions on purpose: every ONNX Runtime reads them.
    return bytes(
        helper.make_model(graph, ir_version=7, opset_imports=[helper.make_opsetid("", 13)]).SerializeToString()
    )


def _wrong_numbers(session: Any) -> str | None:
    total = float(session.run(None, {"x": np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)})[0].item())
    return None if abs(total - 36.0) < 0.1 else f"it computes {total} where 36 is right"  # TF32 keeps 10 bits
