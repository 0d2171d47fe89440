"""A data set that tells how much of it has been read: progress for work that is one pass over the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcar.data import Dataset
from onnxcar.progress import Report

__all__ = ["Watched"]


class Watched(Dataset):
    """The same samples; every read is reported.

    Args:
        data: The samples.
        report: Who is told, in samples.
        passes: How often all samples will be read.
    """

    def __init__(self, data: Dataset, report: Report, passes: int = 1) -> None:
        # No data set is built anew: this one is the other in all but `inputs`.
        self.__dict__.update(data.__dict__)
        self._report, self._passes, self._done = report, passes, 0

    def inputs(self, indices: ArrayLike) -> dict[str, NDArray[Any]]:
        """As `Dataset.inputs`."""
        found = super().inputs(indices)
        total = self._passes * len(self)
        self._done = min(self._done + np.size(indices), total)  # a few samples are looked at twice
        self._report.update(self._done, total)
        return found
