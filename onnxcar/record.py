"""The record of a pruning run: what was removed, why, and what it cost, as the JSON of the interface.

Keys are stable and always there; what a run did not have (test data, a step's score) is null. Numbers that JSON has no
word for (an infinite loss) are null, too. A record is a plan as well: ``onnxcar prune --plan record.json``.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcar.channels import ChannelSpace, Cost
from onnxcar.errors import OutputError

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.greedy import Path
    from onnxcar.scoring import Score
    from onnxcar.surgery import Verified

__all__ = [
    "SCHEMA",
    "data_entry",
    "dumps",
    "metadata",
    "model_entry",
    "path_entries",
    "protected_entries",
    "score_entry",
    "verify_entry",
    "write",
]

SCHEMA = 1


def model_entry(path: pathlib.Path | None, sha256: str | None, cost: Cost, n_bytes: int | None) -> dict[str, Any]:
    """What a record says of one model file; path, hash and size of a result are null until it is written."""
    return {
        "path": None if path is None else str(path),
        "sha256": sha256,
        "params": cost.params,
        "macs": cost.macs,
        "bytes": n_bytes,
    }


def data_entry(data: Dataset | None) -> dict[str, Any] | None:
    """What a record says of a data set; `classes` is their number, null for regression targets."""
    if data is None:
        return None
    labelled = data.labels.ndim == 1 and data.labels.dtype.kind in "iu"
    named = None if data.classes is None else len(data.classes)
    classes = named if named is not None or not labelled else len(np.unique(data.labels))
    return {"path": data.path, "sha256": data.sha256, "samples": len(data), "classes": classes}


def score_entry(score: Score | None) -> dict[str, Any] | None:
    """What a record says of one score."""
    if score is None:
        return None
    return {"value": score.value, "correct": score.correct, "samples": score.samples}


def path_entries(space: ChannelSpace, path: Path | None) -> dict[str, Any]:
    """How the search went: the removals that stand, those that were given back, what ended it, what was left to do.

    `given_back` holds removals that were undone for a multiple or a promise; at global scope the scores of the steps
    after one were counted without it. `widths` are the vector widths that layers took instead of the provider's.
    """
    return {
        "stopped": "plan" if path is None else path.stopped,
        "steps": [] if path is None else [step.to_json(space) for step in path.steps],
        "given_back": [] if path is None else [step.to_json(space) for step in path.given_back],
        "widths": {} if path is None else {space.layers[i].node: n for i, n in sorted(path.widths.items())},
        "remaining": None if path is None or path.remaining is None else asdict(path.remaining),
    }


def protected_entries(space: ChannelSpace) -> list[dict[str, Any]]:
    """What cannot go, layer by layer, and the root cause of each."""
    return [{"node": p.layer, "filters": len(p.filters), "reason": p.reason} for p in space.protected]


def verify_entry(verified: Verified | None) -> dict[str, Any] | None:
    """How far the compact model is from the masked original; null where that was not asked."""
    if verified is None:
        return None
    return {
        "max_abs_error": verified.max_abs_error,
        "max_rel_error": verified.max_rel_error,
        "samples": verified.samples,
    }


def metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """What the compact model itself says of its origin, for ``metadata_props``; the same bytes for the same run."""
    specialised = {} if record.get("classes") is None else {"onnxcar.classes": _compact(record["classes"])}
    return {
        **specialised,
        "onnxcar.version": str(record["onnxcar"]),
        "onnxcar.source_sha256": str(record["model"]["sha256"]),
        "onnxcar.removed_filters": _compact(record["removed"]),
        "onnxcar.base": _compact(record["base"]),
        "onnxcar.final": _compact(record["final"]),
    }


def dumps(record: Mapping[str, Any]) -> str:
    """The record as strict JSON text, two blanks a level, lists of plain values on one line."""
    return _layout(_finite(record), 0) + "\n"


def write(record: Mapping[str, Any], path: str | pathlib.Path, *, force: bool = False) -> None:
    """Write the record, whole or not at all.

    Raises:
        OutputError: The file exists and ``force`` is not set, or it cannot be written.
    """
    target = pathlib.Path(path)
    if target.exists() and not force:
        raise OutputError(f"{target} exists. Name another file, or give --force to replace it.", path=target)
    text = dumps(record)
    temporary: pathlib.Path | None = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = pathlib.Path(file.name)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # a temporary file is private, a result is not
        temporary.replace(target)
    except OSError as exc:
        raise OutputError(
            f"Cannot write {target}: {exc.strerror or exc}. Name a file in a folder that exists and can be written.",
            path=target,
        ) from exc
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    """The value with JSON's types only; what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _compact(value: Any) -> str:
    return json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=False)


def _layout(value: Any, level: int) -> str:
    """JSON with one line per entry of an object, and per entry of a list that holds objects.

    ``indent=2`` would give every filter index a line of its own.
    """
    inner, outer = "  " * (level + 1), "  " * level
    if isinstance(value, dict) and value and level < 2:
        entries = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {_layout(item, level + 1)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(entries) + f"\n{outer}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"{inner}{_layout(item, level + 2)}" for item in value) + f"\n{outer}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
