"""Networks for some of their classes: which, in whose numbering, and how data meet a model whose rows were dropped.

A model that was specialised says so in its metadata: the original output index of every class that counts, its name if
known, and whether the other rows are gone. So `evaluate` and `compare` know what row k of it means.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcar.errors import DataError, ModelError
from onnxcar.model import Model

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["KEY", "Kept", "common", "fitted", "kept_by", "resolve"]

KEY = "onnxcar.classes"


@dataclass(frozen=True)
class Kept:
    """Classes of a network that count.

    Attributes:
        outputs: Their output indices in the original network, ascending; row k of a network whose other rows were
            dropped is `outputs[k]`.
        names: Of each; None if unknown.
        dropped: Whether the other rows are gone.
    """

    outputs: tuple[int, ...]
    names: tuple[str, ...] | None
    dropped: bool

    @classmethod
    def of(cls, data: Dataset, *, dropped: bool) -> Kept | None:
        """Of data that were restricted to some classes; None of others."""
        if data.outputs is None:
            return None
        return cls(tuple(int(i) for i in data.outputs), data.classes, dropped)

    def to_json(self) -> dict[str, Any]:
        """As in the record; `map` is original output index -> row."""
        return {
            "outputs": list(self.outputs),
            "names": None if self.names is None else list(self.names),
            "dropped": self.dropped,
            "map": {str(old): new for new, old in enumerate(self.outputs)} if self.dropped else None,
        }


def kept_by(model: Model) -> Kept | None:
    """What a model's metadata say; None where it was never specialised.

    Raises:
        ModelError: The entry is there and is not what this tool writes.
    """
    text = next((entry.value for entry in model.proto.metadata_props if entry.key == KEY), None)
    if text is None:
        return None
    try:
        found = json.loads(text)
        outputs = tuple(int(i) for i in found["outputs"])
        names = None if found["names"] is None else tuple(str(name) for name in found["names"])
        if list(outputs) != sorted(set(outputs)) or (names is not None and len(names) != len(outputs)):
            raise ValueError("its classes do not ascend, or have another number of names")
        return Kept(outputs, names, bool(found["dropped"]))
    except (ValueError, KeyError, TypeError) as exc:
        raise ModelError(
            f"The metadata entry '{KEY}' of {model.path} cannot be read ({exc}). Remove it, or prune the model again."
        ) from exc


def resolve(wanted: str | Iterable[str | int], data: Dataset, label_offset: int = 0) -> list[int]:
    """Output indices of classes.

    Args:
        wanted: Names, or labels as they stand in the data; a text is split at commas, `@FILE` holds one a line.
        data: Whose class names count, and whose labels.
        label_offset: A label L is output index L + label_offset.

    Raises:
        DataError: An entry is neither a name nor a label of the data, or the file cannot be read.
    """
    names = {name: i for i, name in enumerate(data.classes or ())}
    found = []
    for entry in _entries(wanted):
        if entry in names:
            found.append(names[entry])
        elif entry.lstrip("-").isdigit():
            found.append(int(entry) + label_offset)
        else:
            near = difflib.get_close_matches(entry, list(names), 1, 0.5)
            hint = f"Did you mean '{near[0]}'?" if near else "Give names of the data, or labels as numbers."
            raise DataError(f"'{data.path}' has no class '{entry}'. {hint}", path=data.path)
    return found


def _entries(wanted: str | Iterable[str | int]) -> list[str]:
    if not isinstance(wanted, str):
        return [str(entry) for entry in wanted]
    if wanted.startswith("@"):
        try:
            lines = Path(wanted[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"The list of classes {wanted[1:]} cannot be read ({exc}). Correct --classes.") from exc
        return [line.strip() for line in lines if line.strip()]
    return [part.strip() for part in wanted.split(",") if part.strip()]


def fitted(model: Model, data: Dataset) -> Dataset:
    """The data as this model's outputs have them; the model's rows may have been dropped.

    Raises:
        DataError: The data ask for a class whose row is gone.
    """
    kept = kept_by(model)
    if kept is None or not kept.dropped:
        return data
    if data.outputs is None:
        data = data.only([i for i in kept.outputs if (data.labels == i).any()])
    assert data.outputs is not None
    gone = sorted(set(data.outputs.tolist()) - set(kept.outputs))
    if gone:
        raise DataError(
            f"{model.path} has no row for class {gone[0]} any more; it keeps {len(kept.outputs)} classes "
            f"({', '.join(map(str, kept.outputs[:8]))}{', ...' if len(kept.outputs) > 8 else ''}). Correct --classes."
        )
    rows = np.searchsorted(np.asarray(kept.outputs), data.outputs)
    return data.among(None if len(rows) == len(kept.outputs) else rows.tolist())


def common(models: Mapping[str, Model] | Sequence[Model], data: Dataset) -> Dataset:
    """The data restricted to the classes that every model still has a row for, so that all answer the same question."""
    if data.outputs is not None:
        return data
    every = list(models.values()) if isinstance(models, Mapping) else list(models)
    sets = [set(kept.outputs) for model in every if (kept := kept_by(model)) is not None and kept.dropped]
    if not sets:
        return data
    return data.only(sorted(i for i in set.intersection(*sets) if (data.labels == i).any()))
