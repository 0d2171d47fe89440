"""What a network's outputs are worth: whole-numbered costs per sample, which add up in any order to the same bits.

A metric that is a sum over samples (top1, top5, balanced, loss, mse, mae, r2) becomes a non-negative integer cost of
each sample, so a search may stop counting once a candidate's cost exceeds the best one's. `pearson` and functions of
the user's need all outputs at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar._graphs import constants, uses
from onnxcar.errors import DataError, MetricError

__all__ = ["METRICS", "Judge", "Metric", "Outcomes", "Rows", "Score", "Tally", "gives_probabilities", "metric"]

Array = npt.NDArray[Any]
LOSS_ONE = 1 << 30  # a loss of one nat as an integer; 1e-9 nats is the finest difference
LOSS_CAP = 1 << 20  # nats; also what a NaN costs
SUM_CAP = 1 << 62  # sums over all samples must stay inside 64 bits
TOP = 5


@dataclass(frozen=True)
class Metric:
    """How a model is judged.

    Attributes:
        name: As typed; a function's is its qualified name.
        larger_is_better: Whether a larger value means a better model.
        classes: Whether it needs class labels.
        additive: Whether it is a sum of non-negative costs of samples.
        function: For the others: (outputs, targets) -> one number, or one per sample (their mean counts).
    """

    name: str
    larger_is_better: bool = True
    classes: bool = True
    additive: bool = True
    function: Callable[[Array, Array], Any] | None = None


def pearson(outputs: Array, targets: Array) -> float:
    """Correlation of outputs and targets (n, k), the mean over columns; 0 for a column that does not vary."""
    x, y = outputs - outputs.mean(0), targets - targets.mean(0)
    spread = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return float(np.mean(np.divide((x * y).sum(0), spread, out=np.zeros(x.shape[1]), where=spread > 0)))


METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric("top1"),
        Metric("top5"),
        Metric("balanced"),  # mean over classes of each one's accuracy; classes without samples do not count
        Metric("loss", larger_is_better=False),  # mean cross-entropy, nats
        Metric("r2", classes=False),  # mean over columns, as scikit-learn's default
        Metric("mse", larger_is_better=False, classes=False),
        Metric("mae", larger_is_better=False, classes=False),
        Metric("pearson", classes=False, additive=False, function=pearson),
    )
}


def metric(name: str | Metric | Callable[[Array, Array], Any]) -> Metric:
    """The metric of that name, or one made of a function; "module:function" and "file.py:function" name one.

    Raises:
        MetricError: There is none of that name, or the function cannot be imported.
    """
    if isinstance(name, Metric):
        return name
    if callable(name):
        return _custom(getattr(name, "__qualname__", type(name).__name__), name)
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise MetricError(
            f"There is no metric {name!r}. Take one of {', '.join(METRICS)}, or module:function for your own.",
            metric=name,
        )
    return _custom(name, _load(name))


def _custom(name: str, function: Callable[[Array, Array], Any]) -> Metric:
    return Metric(name, classes=False, additive=False, function=function)


def _load(name: str) -> Callable[[Array, Array], Any]:
    where, _, attribute = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None:
                raise ImportError(where)
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, attribute)
    except Exception as exc:
        raise MetricError(
            f"Metric {name!r} cannot be imported ({type(exc).__name__}: {exc}). It must be module:function with the "
            "module on the path, or file.py:function.",
            metric=name,
        ) from exc
    if not callable(found):
        raise MetricError(f"Metric {name!r} is a {type(found).__name__}, not a function of (outputs, targets).")
    return found  # type: ignore[no-any-return]


def gives_probabilities(proto: onnx.ModelProto) -> bool:
    """Whether the first output comes out of a Softmax, perhaps reshaped or cast."""
    known = constants(proto)
    producer = {name: node for node in proto.graph.node for name in node.output}
    name = proto.graph.output[0].name
    while name in producer:
        node = producer[name]
        if node.op_type == "Softmax":
            return True
        inputs = [x for x in uses(node) if x not in known]
        if node.op_type not in {"Identity", "Reshape", "Flatten", "Squeeze", "Cast", "Unsqueeze"} or not inputs:
            return False
        name = inputs[0]
    return False


# --- per sample -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Results of some samples, in the order they were run.

    Attributes:
        cost: The metric's cost, (k,) int64; zeros where the metric is no sum.
        loss: Cross-entropy in units of 2^-30 nats, (k,) int64; zeros without class labels.
        top1: Whether the label has the largest output, (k,) bool.
        top5: Whether it is among the five largest.
        margin: Output of the label minus the largest other one, (k,) float32.
        outputs: (k, n_outputs), as the network gave them.
    """

    cost: npt.NDArray[np.int64]
    loss: npt.NDArray[np.int64]
    top1: npt.NDArray[np.bool_]
    top5: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float32]
    outputs: Array


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a model said of each sample, in the order of the data set.

    Attributes:
        pred: Index of the largest output, the lowest of equals, (n,) int64.
        correct: Whether that is the label, (n,) bool.
        top5: Whether the label is among the five largest, (n,) bool.
        loss: Cross-entropy in nats, (n,) float64.
        labels: (n,) int64.
    """

    pred: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    top5: npt.NDArray[np.bool_]
    loss: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]

    def confusion(self, n_classes: int) -> npt.NDArray[np.int64]:
        """Counts, (true class, predicted class)."""
        flat = np.bincount(self.labels * n_classes + self.pred, minlength=n_classes * n_classes)
        return flat[: n_classes * n_classes].reshape(n_classes, n_classes)


@dataclass(eq=False)
class Tally:
    """Sums over samples; adding two of them is exact in any order."""

    samples: int = 0
    cost: int = 0
    loss: int = 0
    top1: int = 0
    top5: int = 0
    per_class: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, other: Tally) -> None:
        """Take in the sums of other samples."""
        self.samples += other.samples
        self.cost += other.cost
        self.loss += other.loss
        self.top1 += other.top1
        self.top5 += other.top5
        if len(self.per_class) < len(other.per_class):
            self.per_class = np.pad(self.per_class, (0, len(other.per_class) - len(self.per_class)))
        self.per_class[: len(other.per_class)] += other.per_class


@dataclass(frozen=True, eq=False)
class Score:
    """A model's result on a data set; fractions, never percent.

    Attributes:
        metric: Name of the metric.
        value: The metric.
        correct: Number of correct samples (by top5 for the metric top5, else top1); None without class labels.
        samples: How many samples.
        loss: Mean cross-entropy in nats; None without class labels.
        top1: Number of samples whose label has the largest output; None without class labels.
        top5: Number with the label among the five largest; None likewise.
        per_class: Correct samples of each class, (n_classes,); None likewise.
        class_samples: Samples of each class, (n_classes,); None likewise.
        cost: The metric as a whole-numbered cost, smaller = better; None where it is no sum over samples.
        larger_is_better: The metric's direction.
        outcomes: Results by sample where they were asked for.
    """

    metric: str
    value: float
    correct: int | None
    samples: int
    loss: float | None = None
    top1: int | None = None
    top5: int | None = None
    per_class: npt.NDArray[np.int64] | None = None
    class_samples: npt.NDArray[np.int64] | None = None
    cost: int | None = None
    loss_units: int = 0
    larger_is_better: bool = True
    outcomes: Outcomes | None = None

    def reduction(self, other: Score) -> float:
        """How much worse `other` is than this: positive = a loss. Counts are subtracted before dividing."""
        if self.metric in ("top1", "top5") and self.correct is not None and other.correct is not None:
            return (self.correct - other.correct) / self.samples
        return self.value - other.value if self.larger_is_better else other.value - self.value

    def class_reductions(self, other: Score) -> npt.NDArray[np.float64] | None:
        """`reduction` of each class's accuracy, (n_classes,), NaN for a class without samples; None without labels."""
        if self.per_class is None or other.per_class is None or self.class_samples is None:
            return None
        known = self.class_samples > 0
        fall = (self.per_class - other.per_class) / np.maximum(self.class_samples, 1)
        return np.where(known, fall, np.nan)


class Judge:
    """One metric on one data set's labels.

    Attributes:
        metric: The metric.
        targets: Labels of all samples.
        labelled: Whether they are classes.
        n_classes: Width of the outputs (0 without class labels).
        probabilities: Whether the outputs are probabilities rather than logits.
    """

    def __init__(self, how: Metric, targets: Array, outputs: Array, *, softmax: bool = False) -> None:
        """Bind a metric to labels.

        Args:
            how: The metric.
            targets: (n,) int class labels, or (n, k) float.
            outputs: First output of the network on a few samples: decides its width and whether it is probabilities.
            softmax: Whether the network ends in one (`gives_probabilities`).

        Raises:
            MetricError: The metric does not fit the labels or the outputs.
            DataError: A label lies outside the classes.
        """
        self.metric = how
        self.targets = np.asarray(targets)
        self.labelled = self.targets.dtype.kind in "iu" and self.targets.ndim == 1
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
        self.probabilities = softmax and self.labelled and _sum_to_one(sample)
        self._loss_cap = min(LOSS_CAP * LOSS_ONE, SUM_CAP // max(1, len(self.targets)))
        self._weights = self._class_weights() if how.name == "balanced" else None
        self._column: Array = np.ones(1)
        self._unit = 1.0
        if how.name in ("r2", "mse", "mae"):
            self._bind_numbers(sample)

    @property
    def largest_cost(self) -> int:
        """What one sample costs at most."""
        if self.metric.name == "loss":
            return self._loss_cap
        if self._weights is not None:
            return max(1, int(self._weights.max()))
        return 1 if self.metric.classes else SUM_CAP // max(1, len(self.targets))

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

    @staticmethod
    def _squeeze(outputs: Array) -> Array:
        """(n, C, 1, 1) -> (n, C)."""
        out = np.asarray(outputs)
        while out.ndim > 2 and out.shape[-1] == 1:
            out = out[..., 0]
        return out

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
        name = self.metric.name
        if name == "loss":
            cost = loss
        elif name == "top5":
            cost = (~top5).astype(np.int64)
        elif self._weights is not None:
            cost = np.where(top1, 0, self._weights[targets])
        elif self.metric.additive and self.metric.classes:
            cost = (~top1).astype(np.int64)
        else:
            cost = none if not self.metric.additive else self._number_cost(out, targets)
        return Rows(cost, loss, top1, top5, margin, out)

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
                loss = -np.log(np.maximum(own, 1e-45))
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
        return ahead == 0, ahead < TOP, margin, _whole(loss * LOSS_ONE, self._loss_cap)

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
