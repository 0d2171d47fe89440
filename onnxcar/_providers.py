"""Execution providers of ONNX Runtime: which are asked for, and whether they really load."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from onnxcar._libraries import CUDNN, missing_libraries, needed_libraries, provider_file, remedy
from onnxcar.errors import RuntimeMissingError

__all__ = ["PRECISIONS", "Provider", "cuda_libraries", "load_failure", "onnx_runtime", "resolve_provider"]

INSTALL = (
    "Install one of the two builds:\n"
    '  pip install "onnxcar[cpu]"    runs on every machine\n'
    '  pip install "onnxcar[gpu]"    for NVIDIA GPUs (CUDA libraries included)'
)
PRECISIONS = ("fp32", "tf32", "fp16")
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
        precision: What networks that are scored compute in: "fp32", "tf32" (inside matrix products of NVIDIA GPUs) or
            "fp16".
        buffers: Whether values stay in the device's memory from run to run. Always so on a GPU; the CPU can do the
            same, which is how it is tested.
    """

    name: str
    ort_names: tuple[str, ...]
    note: str = ""
    precision: str = "fp32"
    buffers: bool = False

    @property
    def exact(self) -> Provider:
        """The same in single precision: for what is no network."""
        return replace(self, precision="fp32")

    @property
    def ort_providers(self) -> list[tuple[str, dict[str, str]]]:
        """What ONNX Runtime is asked for, in order, with its options."""
        return [(name, _ort_options(name, self.precision)) for name in self.ort_names]

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


def resolve_provider(name: str | Provider = "auto", precision: str | None = None) -> Provider:
    """The provider of that name, after it has run a small network.

    Args:
        name: "auto" (CUDA if it really loads, else CPU), "cpu", "cuda" or "tensorrt".
        precision: One of `PRECISIONS`; None: as it is, which is "fp32" for a name.

    Raises:
        RuntimeMissingError: No ONNX Runtime, the provider asked for does not load, or it has no such precision (fact
            `provider`).
    """
    if precision is not None:
        found = resolve_provider(name)
        if precision not in PRECISIONS:
            raise RuntimeMissingError(
                f"There is no precision {precision!r}. Take one of {', '.join(PRECISIONS)}.", provider=found.name
            )
        if precision == "tf32" and found.name == "tensorrt":
            raise RuntimeMissingError(
                "Precision tf32 cannot be chosen for TensorRT. Take --provider cuda, or --precision fp16.",
                provider=found.name,
            )
        if precision == "tf32" and found.name == "cpu":
            raise RuntimeMissingError(
                "Precision tf32 is a mode of NVIDIA GPUs, and networks run on the CPU here. Take --precision fp32, "
                "or a machine with a GPU and --provider cuda.",
                provider=found.name,
            )
        return replace(found, precision=precision)
    if isinstance(name, Provider):
        return name
    if name == "auto":
        if "CUDAExecutionProvider" not in onnx_runtime().get_available_providers():
            return Provider("cpu", _ORT_NAMES["cpu"], "Running on the CPU; no working CUDA was found.")
        with contextlib.suppress(RuntimeMissingError):
            _see_it_load("cuda")
            return Provider("cuda", _ORT_NAMES["cuda"], "Running on the GPU (CUDA).")
        lacking = ", ".join(_missing(onnx_runtime(), "cuda"))
        why = f"for CUDA, this machine lacks {lacking}" if lacking else "CUDA does not load"
        return Provider("cpu", _ORT_NAMES["cpu"], f"Running on the CPU: {why} (`onnxcar doctor` says what to do).")
    if name not in _ORT_NAMES:
        raise RuntimeMissingError(
            f"There is no provider {name!r}. Take one of auto, {', '.join(_ORT_NAMES)}.", provider=name
        )
    if name == "tensorrt":
        # Nothing else turns TF32 off there (github.com/microsoft/onnxruntime/issues/26029).
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if name == "cpu":
        onnx_runtime()  # there is nothing to see but that it is installed
    else:
        _see_it_load(name)
    return Provider(name, _ORT_NAMES[name])


@functools.cache
def _see_it_load(name: str) -> None:
    """Raise what `load_failure` says; what has loaded once is not tried again in this process."""
    failure = load_failure(name)
    if failure is not None:
        raise RuntimeMissingError(failure, provider=name)


def _ort_options(name: str, precision: str) -> dict[str, str]:
    """Options of a provider of ONNX Runtime."""
    if name != "CUDAExecutionProvider":
        # The TensorRT provider has none for TF32 (github.com/microsoft/onnxruntime/issues/26029).
        return {}
    return {
        # On by default, and off by a thousandth of a value.
        "use_tf32": "1" if precision == "tf32" else "0",
        # The default times all algorithms for every new number of rows, and may take another one in the next run.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Each session has memory of its own: no more of it than a run needs, as there are some for each site.
        "arena_extend_strategy": "kSameAsRequested",
    }


def load_failure(name: str) -> str | None:
    """Why a provider does not load, None if it does; names each library that is missing, and what brings it."""
    ort = onnx_runtime()
    wanted = _ORT_NAMES[name][0]
    if wanted not in ort.get_available_providers():
        return (
            f"Provider {name!r} is not in this build of ONNX Runtime ({ort.__version__} has "
            f"{', '.join(ort.get_available_providers())}). Uninstall onnxruntime, then pip install "
            '"onnxcar[gpu]"; or take --provider cpu.'
        )
    if wanted == "CPUExecutionProvider":
        return _probe(ort, wanted)
    start = f"Provider {name!r} of ONNX Runtime {ort.__version__} does not load. "
    missing = _missing(ort, name)
    if missing:
        return f"{start}{remedy(missing, ort.__version__, name)} `onnxcar doctor` shows all; or take --provider cpu."
    reason = _probe(ort, wanted)
    if reason is None:
        return None
    return (
        f"{start}Its libraries are all there, so the driver or the GPU is not what it wants: {reason} `onnxcar doctor` "
        "shows versions; update the driver, or take --provider cpu."
    )


def _missing(ort: Any, name: str) -> dict[str, str]:
    """Libraries of a provider that cannot be opened -> the loader's words."""
    if hasattr(ort, "preload_dlls"):  # finds those of NVIDIA's wheels
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return missing_libraries(cuda_libraries(ort, name))


def cuda_libraries(ort: Any, name: str) -> tuple[str, ...]:
    """Libraries that the provider of an installed ONNX Runtime needs: those it was linked to, and cuDNN."""
    path = provider_file(Path(ort.__file__).parent, name)
    linked = needed_libraries(path) if path is not None else ()
    return tuple(dict.fromkeys([*linked, CUDNN])) if linked else ()


def _probe(ort: Any, wanted: str) -> str | None:
    """Run a Conv on the provider; None if that works, else what ONNX Runtime said, a sentence."""
    value, node = helper.make_tensor_value_info, helper.make_node
    graph = helper.make_graph(
        # Not an elementwise operator: without cuDNN these work, and no network does.
        [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["y"])],
        "probe",
        [value("x", 1, [1, 1, 2, 2])],
        [value("y", 1, [1, 1, 2, 2])],
        [helper.make_tensor("w", 1, [1, 1, 1, 1], [2.0])],
    )
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    options = ort.SessionOptions()
    reason = ""
    # What went wrong stands in the log of ONNX Runtime and nowhere else.
    with _heard() as log:
        try:
            made = ort.InferenceSession(probe.SerializeToString(), options, providers=[wanted], enable_fallback=False)
            out = made.run(None, {"x": np.full((1, 1, 2, 2), 3, np.float32)})[0]
            # Without working CUDA libraries ONNX Runtime falls back to the CPU and says nothing.
            if made.get_providers()[0] == wanted and (out == 6).all():
                return None
        except Exception as exc:
            reason = str(exc)
        reason = reason or log()
    return _sentence(reason)


def _sentence(text: str) -> str:
    """What matters of a log or an exception of ONNX Runtime."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found = re.search(r"CUDA(?:NN)? failure \d+: [^;\n]*", plain) or re.search(r"\[ONNXRuntimeError\][^\n]*", plain)
    said = found[0] if found else next((line.strip() for line in plain.splitlines() if line.strip()), "no reason given")
    said = said.split(" : ", 3)[-1].strip()[:300]
    return said if said.endswith(".") else said + "."


@contextlib.contextmanager
def _heard() -> Iterator[Callable[[], str]]:
    """Keep what native code writes to the standard error stream from the terminal; gives a function to read it."""
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield read
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
