"""What a recovery did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxcar.model import Model


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer.

    Attributes:
        node: Its name.
        weight: Its weights (for a norm its mean).
        method: "least-squares", "bias" (only that was refitted), "bn", or "kept" where nothing changed.
        reason: Why it is kept, "" if it is not.
        before: Squared distance to the original's outputs on held-back samples over their variance, as it was; None
            where it was not measured.
        after: The same with what was found.
        ridge: Strength of the pull toward the original weights, as a fraction of the mean variance of the inputs.
        rows: Number of equations.
    """

    node: str
    weight: str
    method: str
    reason: str = ""
    before: float | None = None
    after: float | None = None
    ridge: float | None = None
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return dict(self.__dict__)


@dataclass(frozen=True, eq=False)
class Recovered:
    """A repaired model.

    Attributes:
        model: The compact model with new weights and biases; the compact model itself where that is no better.
        layers: What became of each layer.
        method: What was asked for.
        before: Squared distance of the outputs to the original's on held-back samples over their variance, unrepaired.
        after: The same of `model`.
        samples: Samples fitted on.
        held: Samples held back.
        kept: Whether the repaired model was no better, so that the compact one stands.
    """

    model: Model
    layers: tuple[LayerFit, ...]
    method: str
    before: float
    after: float
    samples: int
    held: int
    kept: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON types, for the record."""
        return {
            "method": self.method,
            "before": self.before,
            "after": self.after,
            "samples": self.samples,
            "held": self.held,
            "kept": self.kept,
            "layers": [layer.to_json() for layer in self.layers],
        }
