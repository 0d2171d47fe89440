"""Execution providers of ONNX Runtime: which are asked for, and whether they really load."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from onnx import helper

from onnxcar.errors import RuntimeMissingError

__all__ = ["Provider", "load_failure", "onnx_runtime", "resolve_provider"]

INSTALL = (
    "Install one of the two builds:\n"
    '  pip install "onnxcar[cpu]"    runs on every machine\n'
    '  pip install "onnxcar[gpu]"    for NVIDIA GPUs (CUDA libraries included)'
)
# Name on the command line -> providers of ONNX Runtime, most wanted first.
_ORT_NAMES = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


@dataclass(frozen=True)
class Provider:
    """An execution provider that has been seen to load.

    Attributes:
        name: "cpu", "cuda" or "tensorrt".
        ort_names: What ONNX Runtime is asked for, in order.
        note: One line for people when `auto` had to decide; else empty.
        buffers: Whether values stay in the device's memory from run to run. Always so on a GPU; the CPU can do the
            same, which is how it is tested.
    """

    name: str
    ort_names: tuple[str, ...]
    note: str = ""
    buffers: bool = False

    @property
    def on_device(self) -> bool:
        """Whether values stay in the device's memory."""
        return self.buffers or self.name != "cpu"

    @property
    def device(self) -> str:
        """ONNX Runtime's name of the memory."""
        return "cpu" if self.name == "cpu" else "cuda"


def onnx_runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        RuntimeMissingError: It is not installed, or left empty by an uninstall.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise RuntimeMissingError(f"ONNX Runtime is not installed. {INSTALL}", provider=None) from exc
    if not hasattr(onnxruntime, "InferenceSession"):
        # Both wheels fill one folder: uninstalling either leaves an empty package behind.
        raise RuntimeMissingError(
            "The package onnxruntime is there but empty (one of its two builds was uninstalled over the other). "
            f"Uninstall onnxruntime and onnxruntime-gpu both, then install one. {INSTALL}",
            provider=None,
        )
    return onnxruntime


def resolve_provider(name: str | Provider = "auto") -> Provider:
    """The provider of that name, after it has run a one-node network.

    Args:
        name: "auto" (CUDA if it really loads, else CPU), "cpu", "cuda" or "tensorrt".

    Raises:
        RuntimeMissingError: No ONNX Runtime, or the provider asked for does not load (fact `provider`).
    """
    if isinstance(name, Provider):
        return name
    if name == "auto":
        if "CUDAExecutionProvider" in onnx_runtime().get_available_providers() and load_failure("cuda") is None:
            return Provider("cuda", _ORT_NAMES["cuda"], "Running on the GPU (CUDA).")
        return Provider("cpu", _ORT_NAMES["cpu"], "Running on the CPU; no working CUDA was found.")
    if name not in _ORT_NAMES:
        raise RuntimeMissingError(
            f"There is no provider {name!r}. Take one of auto, {', '.join(_ORT_NAMES)}.", provider=name
        )
    failure = load_failure(name)
    if failure is not None:
        raise RuntimeMissingError(failure, provider=name)
    return Provider(name, _ORT_NAMES[name])


def load_failure(name: str) -> str | None:
    """Why a provider does not load, None if it does."""
    ort = onnx_runtime()
    wanted = _ORT_NAMES[name][0]
    if wanted not in ort.get_available_providers():
        return (
            f"Provider {name!r} is not in this build of ONNX Runtime ({ort.__version__} has "
            f"{', '.join(ort.get_available_providers())}). Uninstall onnxruntime, then pip install "
            '"onnxcar[gpu]"; or take --provider cpu.'
        )
    if wanted != "CPUExecutionProvider" and hasattr(ort, "preload_dlls"):
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "probe", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the message below says it
    reason = ""
    try:
        made = ort.InferenceSession(probe.SerializeToString(), options, providers=[wanted])
        # Without working CUDA libraries ONNX Runtime falls back to the CPU and says nothing.
        if made.get_providers()[0] == wanted:
            return None
    except Exception as exc:
        reason = f" ({str(exc).splitlines()[0][:200]})"
    return (
        f"Provider {name!r} is in this build of ONNX Runtime {ort.__version__} but does not load{reason}: a driver or "
        "a CUDA library is missing or of another version. `onnxcar doctor` says which; or take --provider cpu."
    )
