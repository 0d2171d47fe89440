"""Models side by side on the same samples: scores with intervals, paired tests, size, latency, gates.

The first model is the base. Every difference is candidate minus base, counted on the same samples in the same order,
so its interval is far narrower than those of the two scores.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar import bootstrap, stats
from onnxcar.classes import common, fitted
from onnxcar.errors import ConfigError, DataError
from onnxcar.latency import Latency, measure, ratio
from onnxcar.metrics import Outcomes, Score
from onnxcar.model import Model
from onnxcar.rules import analyze
from onnxcar.stats import Interval

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["ClassChange", "Comparison", "Difference", "Entry", "Gate", "Gates", "Row", "ScoreChange", "compare", "rows"]

TINY = 1e-9  # scores are ratios of counts; this absorbs the rounding of a difference
TOP = 5
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gates:
    """What a candidate must keep for a pipeline to go on; None asks nothing.

    Attributes:
        max_drop: The metric may be worse than the base's by that much.
        min_score: The metric must be at least that good (for a loss: at most).
        max_latency_ratio: Median of candidate over base.
    """

    max_drop: float | None = None
    min_score: float | None = None
    max_latency_ratio: float | None = None

    @property
    def need_data(self) -> bool:
        """Whether a gate asks for a score."""
        return self.max_drop is not None or self.min_score is not None


@dataclass(frozen=True)
class Gate:
    """One gate's verdict on one candidate."""

    gate: str
    candidate: str
    limit: float
    measured: float
    met: bool


@dataclass(frozen=True)
class Row:
    """One number about a model's answers.

    Attributes:
        value: The metric; fractions, nats for the loss.
        interval: 95 %, None for metrics that are functions of the user's.
        correct: What the value counts, None where it counts nothing.
        method: Of the interval, where it is a bootstrap's.
    """

    value: float
    interval: Interval | None = None
    correct: int | None = None
    method: str | None = None

    def to_dict(self, n_samples: int) -> dict[str, Any]:
        """As JSON types."""
        found = {"value": self.value, "interval": _pair(self.interval), "correct": self.correct, "samples": n_samples}
        return found if self.method is None else {**found, "interval_method": self.method}


@dataclass(frozen=True)
class Entry:
    """One model: what it is, how good, how large, how fast."""

    name: str
    model: Model
    params: int
    macs: int
    score: Score | None = None
    latency: Latency | None = None

    @property
    def rows(self) -> dict[str, Row]:
        """Metric name -> value, the asked metric first."""
        return {} if self.score is None else rows(self.score)


@dataclass(frozen=True)
class ScoreChange:
    """Candidate minus base in one metric.

    Attributes:
        difference: Negative is a lower value (for a loss: better).
        interval: Of the difference, paired; None for metrics that are functions of the user's.
        p: Of the exact McNemar test; None where the metric counts nothing.
        only_base: Samples that only the base gets right.
        only_candidate: Samples that only the candidate gets right.
    """

    difference: float
    interval: Interval | None = None
    p: float | None = None
    only_base: int | None = None
    only_candidate: int | None = None


@dataclass(frozen=True)
class ClassChange:
    """Correct answers in one true class, of ``samples``."""

    label: int
    name: str
    base: int
    candidate: int
    samples: int


@dataclass(frozen=True)
class Difference:
    """One candidate against the base.

    Attributes:
        scores: Metric name -> change.
        agreement: Fraction of samples on which both give the same answer, right or wrong.
        per_class: Every class that occurs, by label.
        latency_ratio: Median over the rounds of candidate's time over base's.
        latency_interval: 95 % interval of that median.
    """

    candidate: str
    scores: Mapping[str, ScoreChange]
    agreement: float | None
    per_class: tuple[ClassChange, ...]
    latency_ratio: float | None
    latency_interval: Interval | None

    @property
    def slower(self) -> bool:
        """Whether the candidate is slower than the base, by more than the noise of the measurement."""
        return self.latency_interval is not None and self.latency_interval.low > 1.0


@dataclass(frozen=True)
class Comparison:
    """The base first, then the candidates, and what became of the gates."""

    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]
    gates: tuple[Gate, ...]
    metric: str
    data: Dataset | None

    @property
    def passed(self) -> bool:
        """Whether all gates are met."""
        return all(gate.met for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types, keys stable."""
        return {
            "metric": self.metric,
            "models": [_entry_dict(entry) for entry in self.entries],
            "differences": [_difference_dict(difference) for difference in self.differences],
            "gates": [vars(gate) for gate in self.gates],
            "passed": self.passed,
        }

    def to_html(
        self,
        path: str | pathlib.Path,
        *,
        record: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        command: str | None = None,
    ) -> pathlib.Path:
        """Write the comparison as one self-contained page, pictures of the samples that changed included.

        Args:
            path: Of the file; replaced where it exists.
            record: Of the pruning that made the candidate: adds the path of the search.
            context: Provenance to show besides names and hashes: ``provider``, ``threads``, ``optimistic``.
            command: That makes the page again.

        Raises:
            OutputError: It cannot be written.
        """
        from onnxcar import pages
        from onnxcar.record import data_entry

        known = {"data": data_entry(self.data), "optimistic": False, **(context or {})}
        return pages.write(pages.comparison(self, record=record, context=known, command=command), path)


def compare(
    models: Mapping[str, Model],
    data: Dataset | None = None,
    *,
    metric: str = "top1",
    gates: Gates | None = None,
    provider: str = "auto",
    threads: int | None = None,
    runs: int | None = None,
    **options: Any,
) -> Comparison:
    """Models side by side; the first is the base.

    Without data only size and latency are compared.

    Args:
        models: Name -> model, at least two.
        data: What all are scored on; never data that chose filters, or the result is optimistic.
        metric: What the gates are about; top-1 and top-5 are reported beside it for classifiers.
        gates: Limits; see `Comparison.gates` for the verdicts.
        provider: Where all run.
        threads: Of inference, default all cores.
        runs: Timed rounds, each runs every model once at batch 1; default as many as fit into some seconds, 0 none.
        **options: ``memory_bytes`` and ``batch_size``, as `onnxcar.scoring.evaluate`.

    Raises:
        DataError: A gate needs data and there is none.
        ConfigError: Less than two models.
    """
    from onnxcar.scoring import evaluate

    gates = gates or Gates()
    if len(models) < 2:
        raise ConfigError(f"A comparison needs at least two models, there is {len(models)}. Add a candidate.")
    if gates.need_data and data is None:
        raise DataError("The gates --max-drop and --min-score are about scores. Give --data to measure them on.")
    if gates.max_latency_ratio is not None and runs == 0:
        raise ConfigError("--max-latency-ratio needs timed runs. Leave out --runs 0.")
    entries = []
    data = None if data is None else common(models, data)
    for name, model in models.items():
        score = (
            None
            if data is None
            else evaluate(model, fitted(model, data), metric=metric, provider=provider, threads=threads, **options)
        )
        cost = analyze(model).cost()
        entries.append(Entry(name, model, cost.params, cost.macs, score))
    if runs != 0:
        times = measure(list(models.values()), data, provider=provider, threads=threads, runs=runs)
        entries = [replace(entry, latency=latency) for entry, latency in zip(entries, times, strict=True)]
    base = entries[0]
    differences = tuple(_difference(base, entry, data) for entry in entries[1:])
    verdicts = [v for d, e in zip(differences, entries[1:], strict=True) for v in _verdicts(gates, base, e, d)]
    return Comparison(tuple(entries), differences, tuple(verdicts), metric, data)


# --- one model ------------------------------------------------------------------------------------------------------


def rows(score: Score) -> dict[str, Row]:
    """All that a score says, by metric name, the asked metric first."""
    found = {score.metric: Row(score.value)}
    if score.top1 is not None and score.top5 is not None and score.per_class is not None:
        found["top1"] = _proportion(score.top1, score.samples)
        if len(score.per_class) > TOP:  # of fewer outputs the label is always among the five largest
            found["top5"] = _proportion(score.top5, score.samples)
        if score.loss is not None:
            out = score.outcomes
            known = None if out is None else _mean_interval(out.loss)
            if known is not None and known.low < 0:
                known = replace(known, low=0.0)  # no loss is
            found["loss"] = Row(score.loss, known)
    if score.metric == "balanced" and score.per_class is not None and score.class_samples is not None:
        found["balanced"] = Row(score.value, _balanced_interval(score.per_class, score.class_samples))
    if score.answers is not None and bootstrap.known(score.metric):
        interval = bootstrap.score(score.metric, score.answers)
        found[score.metric] = Row(score.value, interval, method=bootstrap.method(score.samples))
    return found


def _proportion(correct: int, n_samples: int) -> Row:
    return Row(correct / n_samples, stats.wilson(correct, n_samples), correct)


def _mean_interval(values: Floats) -> Interval:
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return stats.mean_interval(float(values.mean()), std, len(values))


def _balanced_interval(correct: Ints, samples: Ints) -> Interval:
    """Normal interval of a mean of proportions.

    Each class gets a success and a failure more, or one without errors would count as sure.
    """
    n = samples[samples > 0].astype(float)
    hits = correct[samples > 0]
    p = (hits + 1) / (n + 2)
    std = float(np.sqrt((p * (1 - p) / (n + 2)).sum())) / len(n)
    found = stats.mean_interval(float((hits / n).mean()), std, 1)
    return Interval(max(0.0, found.low), min(1.0, found.high))


# --- base and candidate ---------------------------------------------------------------------------------------------


def _difference(base: Entry, candidate: Entry, data: Dataset | None) -> Difference:
    a, b = base.score, candidate.score
    changes: dict[str, ScoreChange] = {}
    agreement = None
    classes: tuple[ClassChange, ...] = ()
    if a is not None and b is not None:
        old, new = base.rows, candidate.rows
        changes = {name: ScoreChange(new[name].value - old[name].value) for name in old if name in new}
        if a.outcomes is not None and b.outcomes is not None and a.per_class is not None and b.per_class is not None:
            agreement = float((a.outcomes.pred == b.outcomes.pred).mean())
            changes |= {name: _paired(name, a.outcomes, b.outcomes, changes[name].difference) for name in changes}
            classes = _class_changes(a, b, data)
        if a.answers is not None and b.answers is not None and bootstrap.known(a.metric):
            interval = bootstrap.difference(a.metric, a.answers, b.answers)
            changes[a.metric] = ScoreChange(changes[a.metric].difference, interval)
    times = None
    if base.latency is not None and candidate.latency is not None:
        times = ratio(base.latency, candidate.latency)
    return Difference(
        candidate.name,
        changes,
        agreement,
        classes,
        None if times is None else times[0],
        None if times is None else times[1],
    )


def _paired(name: str, a: Outcomes, b: Outcomes, difference: float) -> ScoreChange:
    """What the same samples say of a difference."""
    if name in ("top1", "top5"):
        first, second = (a.correct, b.correct) if name == "top1" else (a.top5, b.top5)
        lost, won = int((first & ~second).sum()), int((second & ~first).sum())
        interval = stats.paired_interval(lost, won, len(first))
        return ScoreChange(difference, interval, stats.mcnemar(lost, won), lost, won)
    if name == "loss":
        return ScoreChange(difference, _mean_interval(b.loss - a.loss))
    if name == "balanced":
        change = b.correct.astype(float) - a.correct
        variances = [change[a.labels == c].var() / (a.labels == c).sum() for c in np.unique(a.labels)]
        std = float(np.sqrt(np.sum(variances))) / len(variances)
        return ScoreChange(difference, stats.mean_interval(difference, std, 1))
    return ScoreChange(difference)


def _class_changes(a: Score, b: Score, data: Dataset | None) -> tuple[ClassChange, ...]:
    names = None if data is None else data.classes
    assert a.per_class is not None
    assert b.per_class is not None
    assert a.class_samples is not None
    n = min(len(a.per_class), len(b.per_class))
    return tuple(
        ClassChange(
            label,
            names[label] if names is not None and label < len(names) else str(label),
            int(a.per_class[label]),
            int(b.per_class[label]),
            int(a.class_samples[label]),
        )
        for label in range(n)
        if a.class_samples[label]
    )


def _verdicts(gates: Gates, base: Entry, candidate: Entry, difference: Difference) -> list[Gate]:
    found = []
    a, b = base.score, candidate.score
    if gates.max_drop is not None and a is not None and b is not None:
        drop = a.reduction(b)
        found.append(Gate("max-drop", candidate.name, gates.max_drop, drop, drop <= gates.max_drop + TINY))
    if gates.min_score is not None and b is not None:
        good = b.value >= gates.min_score - TINY if b.larger_is_better else b.value <= gates.min_score + TINY
        found.append(Gate("min-score", candidate.name, gates.min_score, b.value, good))
    if gates.max_latency_ratio is not None and difference.latency_ratio is not None:
        limit, measured = gates.max_latency_ratio, difference.latency_ratio
        found.append(Gate("max-latency-ratio", candidate.name, limit, measured, measured <= limit))
    return found


# --- as JSON --------------------------------------------------------------------------------------------------------


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _entry_dict(entry: Entry) -> dict[str, Any]:
    latency = None
    if entry.latency is not None:
        s = entry.latency.spread
        latency = {"median_ms": s.median * 1e3, "q1_ms": s.q1 * 1e3, "q3_ms": s.q3 * 1e3, "runs": s.n_runs}
    n = 0 if entry.score is None else entry.score.samples
    return {
        "name": entry.name,
        "path": None if entry.model.path is None else str(entry.model.path),
        "sha256": entry.model.sha256,
        "params": entry.params,
        "macs": entry.macs,
        "bytes": entry.model.n_bytes,
        "scores": {name: row.to_dict(n) for name, row in entry.rows.items()},
        "latency": latency,
    }


def _difference_dict(d: Difference) -> dict[str, Any]:
    return {
        "candidate": d.candidate,
        "scores": {
            name: {
                "difference": c.difference,
                "interval": _pair(c.interval),
                "p": c.p,
                "only_base": c.only_base,
                "only_candidate": c.only_candidate,
            }
            for name, c in d.scores.items()
        },
        "agreement": d.agreement,
        "per_class": [
            {"class": c.name, "label": c.label, "base": c.base, "candidate": c.candidate, "samples": c.samples}
            for c in d.per_class
        ],
        "latency_ratio": None
        if d.latency_ratio is None
        else {"median": d.latency_ratio, "interval": _pair(d.latency_interval)},
    }
