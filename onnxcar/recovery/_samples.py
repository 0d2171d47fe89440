"""Calibration samples in chunks: most to fit on, some held back to judge by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar.errors import DataError

if TYPE_CHECKING:
    from onnxcar.data import Dataset

HELD = 0.1  # share of the samples that is held back

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a data set, dealt into chunks of one kind each.

    Attributes:
        data: Where they come from.
        chunks: Positions in it, those to fit on first.
        n_fit: How many chunks are to fit on; the rest is held back.
        seed: Of everything drawn.
    """

    data: Dataset
    chunks: tuple[Indices, ...]
    n_fit: int
    seed: int

    def held(self, chunk: int) -> bool:
        """Whether a chunk is held back."""
        return chunk >= self.n_fit

    @property
    def fitted(self) -> int:
        """Samples to fit on."""
        return sum(len(c) for c in self.chunks[: self.n_fit])

    def inputs(self, chunk: int) -> dict[str, npt.NDArray[Any]]:
        """Network inputs of a chunk, as the data set gives them."""
        return self.data.inputs(self.chunks[chunk])

    def positions(self, layer: int, chunk: int, total: int, wanted: int) -> Indices:
        """Which positions of a layer's output are looked at in a chunk, ascending: drawn by seed, layer and chunk."""
        return draw(self.seed, layer, chunk, total, wanted)


def draw(seed: int, layer: int, chunk: int, total: int, wanted: int) -> Indices:
    """`wanted` of `total` positions, ascending; all where there are no more."""
    if wanted >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(np.random.default_rng([seed, layer, chunk]).choice(total, wanted, replace=False)).astype(np.int64)


def deal(data: Dataset, seed: int, size: int, *, whole: bool = False) -> Samples:
    """Chunks of at most `size` samples; a tenth of the samples is held back.

    Args:
        data: Calibration samples; labels are not looked at.
        seed: Of the choice.
        size: Samples of a chunk.
        whole: Chunks of exactly that size only, for networks with a fixed batch; what is over is left out.

    Raises:
        DataError: Too few samples to hold any back.
    """
    order = np.random.default_rng(seed).permutation(len(data)).astype(np.int64)
    n_held = max(1, round(HELD * len(data)))
    n_held = -(-n_held // size) * size if whole else n_held
    held, fit = np.sort(order[:n_held]), np.sort(order[n_held:])
    parts = []
    for part in (fit, held):
        found = [part[i : i + size] for i in range(0, len(part), size)]
        parts.append([c for c in found if len(c) == size] if whole else found)
    if not parts[0] or not parts[1]:
        raise DataError(
            f"'{data.path}' has {len(data)} sample{'s' * (len(data) != 1)}, too few to recover on: some are held back "
            f"to judge by. Give at least {2 * size if whole else 2} of them; a few hundred do better."
        )
    return Samples(data, (*parts[0], *parts[1]), len(parts[0]), seed)
