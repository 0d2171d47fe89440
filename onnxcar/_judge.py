"""One metric on one data set's labels: outputs of some samples in, whole-numbered costs and counts out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar.errors import DataError, MetricError
from onnxcar.metrics import LOSS_CAP, LOSS_ONE, SUM_CAP, TOP, Answers, Metric, Outcomes, Rows, Score, Tally, pearson

__all__ = ["Judge"]

Array = npt.NDArray[Any]


class Judge:
    """One metric on one data set's labels.

    Attributes:
        metric: The metric.
        targets: Labels of all samples.
        labelled: Whether they are classes.
        n_classes: Width of the outputs (0 without class labels).
        probabilities: Whether the outputs are probabilities rather than logits.
        columns: Outputs that count, None: all.
        loss_cap: What one sample loses at most, in units of 2^-30 nats.
    """

    def __init__(
        self, how: Metric, targets: Array, outputs: Array, *, softmax: bool = False, columns: Array | None = None
    ) -> None:
        """Bind a metric to labels.

        Args:
            how: The metric.
            targets: (n,) int class labels, or (n, k) float.
            outputs: First output of the network on a few samples: decides its width and whether it is probabilities.
            softmax: Whether the network ends in one (`gives_probabilities`).
            columns: Outputs that count, ascending; labels are positions among them. None: all.

        Raises:
            MetricError: The metric does not fit the labels or the outputs.
            DataError: A label lies outside the classes.
        """
        self.metric = how
        self.targets = np.asarray(targets)
        self.labelled = self.targets.dtype.kind in "iu" and self.targets.ndim == 1
        self.columns: Array | None = None
        whole = self._squeeze(outputs)
        if columns is not None and (whole.ndim != 2 or int(columns[-1]) >= whole.shape[1]):
            raise DataError(
                f"Class {int(columns[-1])} was asked for, and the network's first output has shape {whole.shape}. "
                "Correct --classes, or --label-offset."
            )
        self.columns = columns
        sample = self._squeeze(outputs)
        self.n_classes = 0
        if how.classes and not self.labelled:
            raise MetricError(
                f"Metric {how.name!r} needs class labels, and the data has numbers of shape {self.targets.shape}. "
                "Take one of r2, mse, mae, pearson, or a function of your own.",
                metric=how.name,
            )
        if self.labelled and sample.ndim == 2 and sample.shape[1] > 1 and (how.classes or how.function is not pearson):
            self._bind_classes(sample, how)
        else:
            self.labelled = False
        if how.classes and not self.labelled:
            raise MetricError(
                f"Metric {how.name!r} takes an output of shape (n, classes), the network's first has "
                f"{tuple(np.shape(outputs))}. Take a function of your own: --metric module:function.",
                metric=how.name,
            )
        self.probabilities = softmax and self.labelled and _sum_to_one(whole)
        self.loss_cap = min(LOSS_CAP * LOSS_ONE, SUM_CAP // max(1, len(self.targets)))
        self._weights = self._class_weights() if how.name == "balanced" else None
        self._column: Array = np.ones(1)
        self._unit = 1.0
        if how.name in ("r2", "mse", "mae"):
            self._bind_numbers(sample)

    @property
    def largest_cost(self) -> int:
        """What one sample costs at most."""
        if self.metric.name == "loss":
            return self.loss_cap
        if self._weights is not None:
            return max(1, int(self._weights.max()))
        return 1 if self.metric.classes else SUM_CAP // max(1, len(self.targets))

    @property
    def typical_cost(self) -> float:
        """What a sample costs about that is wrong; only guesses are made of it."""
        if self.metric.name == "loss":
            return 3.0 * LOSS_ONE
        if self._weights is not None:
            return float(self._weights[self.targets].mean())
        return 1.0

    def _bind_classes(self, sample: Array, how: Metric) -> None:
        outside = np.flatnonzero((self.targets < 0) | (self.targets >= sample.shape[1]))
        if outside.size and how.classes:
            i = int(outside[0])
            raise DataError(
                f"Sample {i} has label {int(self.targets[i])}, and the network has {sample.shape[1]} outputs (0 to "
                f"{sample.shape[1] - 1}); {outside.size} of {len(self.targets)} labels lie outside. Correct the "
                "labels, or shift them with --label-offset.",
                sample=i,
            )
        if outside.size:
            self.labelled = False
            return
        self.n_classes = int(sample.shape[1])
        self.class_samples = np.bincount(self.targets, minlength=self.n_classes)

    def _class_weights(self) -> npt.NDArray[np.int64]:
        """Cost of one error in each class: proportional to 1 / samples of the class, exact where that fits."""
        counts = [int(c) for c in self.class_samples if c]
        whole = math.lcm(*counts) if counts else 1
        if whole * max(1, len(counts)) > 1 << 60:
            whole = 1 << 48
        self._whole = whole * max(1, len(counts))
        return np.asarray([round(whole / c) if c else 0 for c in self.class_samples.tolist()], np.int64)

    def _bind_numbers(self, sample: Array) -> None:
        y = self._numbers(self.targets)
        if sample.ndim == 1:
            sample = sample[:, None]
        if sample.shape[1:] != y.shape[1:]:
            raise MetricError(
                f"Metric {self.metric.name!r} compares outputs {sample.shape[1:]} with targets {y.shape[1:]} of each "
                "sample. Give targets of the output's shape.",
                metric=self.metric.name,
            )
        spread = ((y - y.mean(0)) ** 2).sum(0)
        if self.metric.name == "r2":
            if not (spread > 0).any():
                raise MetricError("Metric 'r2' needs targets that vary. Take mse or mae.", metric="r2")
            # A column that does not vary has no R2; it is left out.
            self._column = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0) / (spread > 0).sum()
            self._unit = 2.0**50
        else:
            self._column = np.full(y.shape[1], 1.0 / y.shape[1])
            scale = float(spread.mean() / len(y)) or 1.0
            if self.metric.name == "mae":
                scale = math.sqrt(scale)
            # A power of two, so that going to integers and back is exact; from the labels alone.
            self._unit = 2.0 ** (30 - round(math.log2(scale)))

    @staticmethod
    def _numbers(values: Array) -> npt.NDArray[np.float64]:
        wide = np.asarray(values, np.float64)
        return wide.reshape(len(wide), -1)

    def _squeeze(self, outputs: Array) -> Array:
        """(n, C, 1, 1) -> (n, C), only the columns that count."""
        out = np.asarray(outputs)
        while out.ndim > 2 and out.shape[-1] == 1:
            out = out[..., 0]
        return out if self.columns is None else out[:, self.columns]

    def rows(self, outputs: Array, indices: npt.NDArray[np.int64]) -> Rows:
        """Results of the samples at `indices`, (k,), from the network's first output, (k, ...)."""
        out = self._squeeze(outputs)
        k = len(indices)
        if len(out) != k:
            raise MetricError(f"The network gives {len(out)} results for {k} samples; a metric needs one for each.")
        targets = self.targets[indices]
        none = np.zeros(k, np.int64)
        if not self.labelled:
            no = np.zeros(k, bool)
            cost = none if not self.metric.additive else self._number_cost(out, targets)
            return Rows(cost, none, no, no, np.zeros(k, np.float32), out)
        top1, top5, margin, loss = self._classify(out, targets)
        if self.metric.additive and self.metric.classes:
            return self.counted(top1, top5, margin, loss, indices, out)
        cost = none if not self.metric.additive else self._number_cost(out, targets)
        return Rows(cost, loss, top1, top5, margin, out)

    def counted(
        self,
        top1: npt.NDArray[np.bool_],
        top5: npt.NDArray[np.bool_],
        margin: npt.NDArray[np.float32],
        loss: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int64],
        outputs: Array | None = None,
    ) -> Rows:
        """Results of samples whose ranks are known already, for metrics that count classes; see `Rows`."""
        name = self.metric.name
        if name == "loss":
            cost = loss
        elif name == "top5":
            cost = (~top5).astype(np.int64)
        elif self._weights is not None:
            cost = np.where(top1, 0, self._weights[self.targets[indices]])
        else:
            cost = (~top1).astype(np.int64)
        return Rows(cost, loss, top1, top5, margin, margin if outputs is None else outputs)

    def doubtful(self, outputs: Array, indices: npt.NDArray[np.int64], distance: float) -> npt.NDArray[np.bool_]:
        """Samples whose being right or wrong hangs on outputs nearer to one another than `distance`, (k,)."""
        x = self._squeeze(outputs)
        own = x[np.arange(len(x)), self.targets[indices]][:, None]
        above = (x > own + distance).sum(1)
        near = (x >= own - distance).sum(1) - above - 1
        top = TOP if self.metric.name == "top5" else 1
        return np.asarray((above < top) & (above + near >= top))

    def _number_cost(self, out: Array, targets: Array) -> npt.NDArray[np.int64]:
        gap = self._numbers(out) - self._numbers(targets)
        each = (np.abs(gap) if self.metric.name == "mae" else gap * gap) @ self._column
        return _whole(each * self._unit, SUM_CAP // max(1, len(self.targets)))

    def _classify(self, out: Array, targets: Array) -> tuple[Array, Array, npt.NDArray[np.float32], Array]:
        k = np.arange(len(targets))
        x = out.astype(np.float64)
        own = x[k, targets]
        broken = ~np.isfinite(x.sum(1))
        # Rank of the label: outputs above it, and equal ones of lower index (the rule of argmax).
        above = x > own[:, None]
        equal = x == own[:, None]
        ahead = above.sum(1) + (equal & (np.arange(x.shape[1]) < targets[:, None])).sum(1)
        others = x.copy()
        others[k, targets] = -np.inf
        best = others.max(1)
        if self.probabilities:
            with np.errstate(divide="ignore"):
                # Of some classes only, a probability is what it is among them.
                share = own if self.columns is None else own / np.maximum(x.sum(1), 1e-45)
                loss = -np.log(np.maximum(share, 1e-45))
        else:
            high = np.maximum(best, own)
            with np.errstate(invalid="ignore", over="ignore"):
                loss = np.log(np.exp(x - high[:, None]).sum(1)) - (own - high)
        with np.errstate(invalid="ignore", over="ignore"):
            margin = (own - best).astype(np.float32)
        if broken.any():
            # Infinities are ordered as they are; a NaN anywhere makes the sample wrong.
            nan = np.isnan(x).any(1)
            ahead = np.where(nan, x.shape[1], ahead)
            margin = np.where(np.isnan(margin), np.float32(-np.inf), margin)
        return ahead == 0, ahead < TOP, margin, _whole(loss * LOSS_ONE, self.loss_cap)

    def tally(self, rows: Rows, indices: npt.NDArray[np.int64]) -> Tally:
        """Sums of these rows."""
        per_class = np.bincount(self.targets[indices][rows.top1], minlength=self.n_classes) if self.labelled else None
        return Tally(
            len(indices),
            int(rows.cost.sum()),
            int(rows.loss.sum()),
            int(rows.top1.sum()),
            int(rows.top5.sum()),
            np.zeros(0, np.int64) if per_class is None else per_class.astype(np.int64),
        )

    def answers(self, parts: Sequence[Rows]) -> Answers | None:
        """Outputs and targets of all samples in order; None where these are no numbers of the same shape."""
        if self.labelled or not parts:
            return None
        found, wanted = self._numbers(np.concatenate([rows.outputs for rows in parts])), self._numbers(self.targets)
        return Answers(found, wanted) if found.shape == wanted.shape else None

    def score(self, tally: Tally, outputs: Array | None = None, outcomes: Outcomes | None = None) -> Score:
        """The metric of all samples.

        Args:
            tally: Sums over all of them.
            outputs: All outputs in the data set's order; needed where the metric is no sum.
            outcomes: Passed on.

        Raises:
            MetricError: The user's function raised, or gave no finite number.
        """
        value, correct = self._value(tally, outputs)
        named = self.labelled
        return Score(
            metric=self.metric.name,
            value=value,
            correct=correct,
            samples=tally.samples,
            loss=tally.loss / LOSS_ONE / tally.samples if named else None,
            top1=tally.top1 if named else None,
            top5=tally.top5 if named else None,
            per_class=tally.per_class if named else None,
            class_samples=self.class_samples if named else None,
            cost=tally.cost if self.metric.additive else None,
            loss_units=tally.loss,
            larger_is_better=self.metric.larger_is_better,
            outcomes=outcomes,
        )

    def _value(self, tally: Tally, outputs: Array | None) -> tuple[float, int | None]:
        name, n = self.metric.name, max(1, tally.samples)
        correct = None if not self.labelled else tally.top5 if name == "top5" else tally.top1
        if self.metric.function is not None:
            return self._call(outputs), correct
        if name == "balanced":
            known = self.class_samples > 0
            return float(np.mean(tally.per_class[known] / self.class_samples[known])), correct
        if name == "loss":
            return tally.loss / LOSS_ONE / n, correct
        if name in ("mse", "mae"):
            return tally.cost / self._unit / n, correct
        if name == "r2":
            return 1.0 - tally.cost / self._unit, correct
        assert correct is not None
        return correct / n, correct

    def _call(self, outputs: Array | None) -> float:
        assert self.metric.function is not None
        assert outputs is not None
        given, targets = outputs, self.targets
        if self.metric.function is pearson:
            given, targets = self._numbers(outputs), self._numbers(self.targets)
            if given.shape != targets.shape:
                raise MetricError(
                    f"Metric 'pearson' compares outputs {given.shape} with targets {targets.shape}. Give targets of "
                    "the output's shape."
                )
        try:
            value = float(np.mean(np.asarray(self.metric.function(given, targets), np.float64)))
        except Exception as exc:
            raise MetricError(
                f"Metric {self.metric.name!r} failed on outputs {given.shape} and targets {targets.shape}: "
                f"{type(exc).__name__}: {exc}. Correct the function.",
                metric=self.metric.name,
            ) from exc
        if not math.isfinite(value):
            raise MetricError(
                f"Metric {self.metric.name!r} gave {value} on outputs {given.shape}. It must return a finite number, "
                "or one for each sample.",
                metric=self.metric.name,
            )
        return value


def _sum_to_one(rows: Array) -> bool:
    wide = rows.astype(np.float64)
    return bool((wide >= 0).all() and np.abs(wide.sum(1) - 1).max(initial=0) <= 1e-3)


def _whole(values: Array, cap: int) -> npt.NDArray[np.int64]:
    """Rounded to integers in [0, cap]; NaN becomes the cap."""
    limited = np.where(np.isnan(values), float(cap), np.clip(values, 0, float(cap)))
    return np.rint(limited).astype(np.int64)
