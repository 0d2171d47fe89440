"""Structural compression of CNNs stored as ONNX by classification accuracy reduction (CAR)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Imported on first use, so that `import onnxcar` costs nothing.
_EXPORTS = {
    "ChannelSpace": "channels",
    "Comparison": "comparison",
    "ConfigError": "errors",
    "DataError": "errors",
    "FromCallable": "data",
    "Gates": "comparison",
    "Group": "channels",
    "ImageFolder": "data",
    "InternalError": "errors",
    "JournalError": "errors",
    "Layer": "channels",
    "ListFile": "data",
    "MetricError": "errors",
    "Model": "model",
    "ModelError": "errors",
    "Npz": "data",
    "OnnxcarError": "errors",
    "OnnxcarWarning": "errors",
    "OutputError": "errors",
    "Plan": "surgery",
    "PlanError": "errors",
    "Preprocess": "data",
    "Protected": "channels",
    "Run": "search",
    "RuntimeMissingError": "errors",
    "Score": "scoring",
    "Stop": "steps",
    "UnsupportedError": "errors",
    "Verified": "surgery",
    "WorkerError": "errors",
    "analyze": "rules",
    "compare": "comparison",
    "diagnose": "doctor",
    "evaluate": "scoring",
    "explain": "explanation",
    "from_proto": "model",
    "importance": "importances",
    "keep_outputs": "surgery",
    "load": "model",
    "mask": "surgery",
    "open_dataset": "data",
    "overlap": "data",
    "prune": "search",
    "remove": "surgery",
    "save": "model",
    "sensitivity": "sensitivity",
    "sweep": "sweep",
    "verify": "surgery",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'onnxcar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onnxcar.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
