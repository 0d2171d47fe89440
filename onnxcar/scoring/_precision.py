"""Whether a network says the same in another precision: looked at on a sample before anything is chosen by it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcar.errors import ModelError
from onnxcar.model import Model
from onnxcar.runtime import open_network, resolve_provider

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["Agreement", "check_precision"]

SAMPLES = 256
BATCH = 32
DIFFER = 0.01  # samples whose largest output may be another one, beyond a single one
FAR = 0.05  # largest difference of two outputs, relative to the largest output


@dataclass(frozen=True)
class Agreement:
    """How near a precision comes to FP32 on some samples.

    Attributes:
        precision: Its name.
        samples: How many were run in both.
        top1: Fraction of them whose largest output is the same; None where outputs are no classes.
        max_rel_difference: Largest difference of two outputs over the largest output.
    """

    precision: str
    samples: int
    top1: float | None
    max_rel_difference: float

    def to_json(self) -> dict[str, Any]:
        """For records."""
        return asdict(self)

    def __str__(self) -> str:
        same = "" if self.top1 is None else f"the same class for {self.top1:.1%} of them, "
        return (
            f"Scored in {self.precision}: on {self.samples} samples {same}outputs off by {self.max_rel_difference:.2g} "
            "of the largest at most, against fp32."
        )


def check_precision(
    model: Model, data: Dataset, precision: str, *, provider: str = "auto", threads: int | None = None
) -> Agreement | None:
    """The network in this precision against itself in single precision, on samples spread over the data.

    Args:
        model: The network.
        data: Samples; labels are not needed.
        precision: "fp32", for which there is nothing to compare (None), "tf32" or "fp16".
        provider: Where it runs.
        threads: Of a run.

    Raises:
        ModelError: More than 1 % of the samples (and more than one) get another class, or outputs differ by more than
            5 % of the largest.
        RuntimeMissingError: The provider does not load, or has no such precision.
    """
    if precision == "fp32":
        return None
    where = resolve_provider(provider, precision)
    at = np.unique(np.linspace(0, len(data) - 1, min(SAMPLES, len(data))).round().astype(np.int64))
    few = data.inputs(at[:4])
    tried = few if all(len(value) > 1 for value in few.values()) else None
    networks = [open_network(model, provider=w, threads=threads, sample=tried) for w in (where.exact, where)]
    differ, gap, largest = 0, 0.0, 0.0
    classes = True
    for start in range(0, len(at), BATCH):
        feeds = data.inputs(at[start : start + BATCH])
        want, got = (network.run(network.session.bind(feeds))[0].astype(np.float64) for network in networks)
        classes = classes and want.ndim >= 2 and want.shape[1] > 1 and all(size == 1 for size in want.shape[2:])
        if classes:
            differ += int((want.argmax(1) != got.argmax(1)).sum())
        finite = np.isfinite(want)
        largest = max(largest, float(np.abs(want[finite]).max(initial=0)))
        with np.errstate(invalid="ignore"):
            off = np.where(finite, np.abs(want - got), 0.0)
        gap = max(gap, float(np.where(np.isnan(off), np.inf, off).max(initial=0)))
    found = Agreement(precision, len(at), 1 - differ / len(at) if classes else None, gap / max(largest, 1e-30))
    if (classes and differ > max(1, DIFFER * len(at))) or not found.max_rel_difference <= FAR:
        said = f"{differ} of {len(at)} samples get another class, " if classes else ""
        raise ModelError(
            f"In {precision} the network is another one: {said}outputs differ by {found.max_rel_difference:.2g} of the "
            f"largest (allowed: {DIFFER:.0%} of the samples, {FAR:.0%}). Take --precision fp32."
        )
    return found
