"""What can go wrong, and the words for it.

The tree::

    OnnxcarError
      ModelError           unreadable, fails the checker, dynamic shape where a static one is needed
      UnsupportedError     an op or layout we refuse (node, op_type)
      PlanError            plan does not fit this model, or empties a layer (node, kept)
      DataError            missing file, bad target, wrong input shape (sample)
      MetricError          user's function raised or returned no finite number
      JournalError         header differs (field, ours, theirs), corrupt line (line)
      WorkerError          a job failed after its retries (job, cause)
      OutputError          the file to write exists, or cannot be written (path)
      RuntimeMissingError  no ONNX Runtime, or a provider that does not load (provider)
      ConfigError          unknown key or bad value in onnxcar.toml (path, key)
    InternalError          not an OnnxcarError: a broken invariant, a bug of ours

    OnnxcarWarning         a result that is valid but doubtful

A message says what is wrong with which values, where, and what to do; the facts in it are attributes too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "ConfigError",
    "DataError",
    "InternalError",
    "JournalError",
    "MetricError",
    "ModelError",
    "OnnxcarError",
    "OnnxcarWarning",
    "OutputError",
    "PlanError",
    "RuntimeMissingError",
    "UnsupportedError",
    "WorkerError",
]


class OnnxcarError(Exception):
    """Root of what a caller can handle; the command line prints the message and exits 1.

    Args:
        message: What is wrong, where, what to do.
        **facts: The values in the message; each becomes an attribute, so ``exc.node`` needs no parsing.

    >>> PlanError("Plan removes all 64 filters of 'conv1'. Keep at least one.", node="conv1", kept=0).node
    'conv1'
    """

    facts: dict[str, Any]

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        # OSError would rewrite the text once ``filename`` is among the facts.
        return str(self.args[0])

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class ModelError(OnnxcarError, ValueError):
    """The model is unreadable, fails the checker, or has a dynamic shape where a static one is needed."""


class UnsupportedError(OnnxcarError, ValueError):
    """An op or layout that is refused; facts: ``node``, ``op_type``."""


class PlanError(OnnxcarError, ValueError):
    """The plan does not fit this model or empties a layer; facts: ``node``, ``kept``."""


class DataError(OnnxcarError, ValueError):
    """A missing file, a bad target or an input of the wrong shape; fact: ``sample``."""


class MetricError(OnnxcarError, ValueError):
    """The user's metric raised, or returned no finite number."""


class JournalError(OnnxcarError, ValueError):
    """The journal is of another run (``field``, ``ours``, ``theirs``) or has a corrupt line (``line``)."""


class WorkerError(OnnxcarError, RuntimeError):
    """A job failed after its retries; facts: ``job``, ``cause``."""


class OutputError(OnnxcarError, OSError):
    """The file to write exists already, or its folder cannot be written; fact: ``path``."""


class RuntimeMissingError(OnnxcarError, RuntimeError):
    """ONNX Runtime is not installed, or the provider asked for does not load; fact: ``provider``."""


class ConfigError(OnnxcarError, ValueError):
    """An unknown key or a bad value in ``onnxcar.toml``; facts: ``path``, ``key``."""


class InternalError(AssertionError):
    """A broken invariant: a bug of onnxcar, not of its input. Please report it with the traceback."""


class OnnxcarWarning(UserWarning):
    """A result that is valid but doubtful; the text ends in advice. Root of all warnings of onnxcar."""
