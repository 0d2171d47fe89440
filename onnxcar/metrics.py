"""What a network's outputs are worth: whole-numbered costs per sample, which add up in any order to the same bits.

A metric that is a sum over samples (top1, top5, balanced, loss, mse, mae, r2) becomes a non-negative integer cost of
each sample, so a search may stop counting once a candidate's cost exceeds the best one's. `pearson` and functions of
the user's need all outputs at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar._graphs import constants, uses
from onnxcar.errors import MetricError

__all__ = ["METRICS", "Metric", "Outcomes", "Rows", "Score", "Tally", "gives_probabilities", "metric"]

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


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network of numbers said of each sample, and what it should have said.

    Attributes:
        outputs: (n, k) float64.
        targets: (n, k) float64.
    """

    outputs: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]


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
        answers: Outputs and targets where these are numbers.
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
    answers: Answers | None = None

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
