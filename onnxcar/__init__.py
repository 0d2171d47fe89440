"""Structural compression of CNNs stored as ONNX by classification accuracy reduction (CAR)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Imported on first use, so that `import onnxcar` costs nothing.
_EXPORTS = {
    "ConfigError": "errors",
    "DataError": "errors",
    "InternalError": "errors",
    "JournalError": "errors",
    "MetricError": "errors",
    "Model": "model",
    "ModelError": "errors",
    "OnnxcarError": "errors",
    "OnnxcarWarning": "errors",
    "OutputError": "errors",
    "PlanError": "errors",
    "RuntimeMissingError": "errors",
    "UnsupportedError": "errors",
    "WorkerError": "errors",
    "diagnose": "doctor",
    "from_proto": "model",
    "load": "model",
    "save": "model",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'onnxcar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onnxcar.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
