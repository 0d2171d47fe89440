"""Intervals of metrics on numbers (r2, mse, mae, pearson), which are no proportions: by the bootstrap.

Samples are drawn with replacement; for a difference of two networks the same ones for both, so that what a sample is
worth to both cancels. Ends are bias-corrected and accelerated (BCa: Efron 1987, Better bootstrap confidence intervals,
10.1080/01621459.1987.10478410), the acceleration from the jackknife: percentiles alone are off for r2, whose
distribution leans.

All four are functions of sums over samples, so a resample is a row of weights times these sums.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from onnxcar.metrics import Answers
from onnxcar.stats import Interval

__all__ = ["RESAMPLES", "SEED", "difference", "known", "method", "score"]

RESAMPLES, SEED = 2000, 0
_AT_ONCE = 1 << 22  # weights held at once

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats, Floats], Floats]  # sums (r, columns), weight of each row (r,) -> values (r,)


def known(name: str) -> bool:
    """Whether a metric has an interval of this kind."""
    return name in _STATISTICS


def method(n_samples: int) -> str:
    """How the intervals come about, in words."""
    return f"BCa bootstrap, {RESAMPLES:,} resamples of {n_samples:,} samples, seed {SEED}, 95 %"


def score(name: str, answers: Answers, confidence: float = 0.95) -> Interval | None:
    """Interval of a metric; None for fewer than two samples, or where a resample has no value."""
    sums, of = _STATISTICS[name](answers)
    return _bca(sums, of, confidence)


def difference(name: str, first: Answers, second: Answers, confidence: float = 0.95) -> Interval | None:
    """Interval of second minus first, both on the same samples; None as for `score`."""
    (a, of_a), (b, of_b) = _STATISTICS[name](first), _STATISTICS[name](second)
    k = a.shape[1]
    return _bca(np.hstack([a, b]), lambda s, n: of_b(s[:, k:], n) - of_a(s[:, :k], n), confidence)


def _bca(rows: Floats, statistic: Statistic, confidence: float) -> Interval | None:
    n = len(rows)
    if n < 2:
        return None
    total = rows.sum(0)
    value = float(statistic(total[None], np.full(1, float(n)))[0])
    rng = np.random.default_rng(SEED)
    found = []
    step = max(1, _AT_ONCE // n)
    for start in range(0, RESAMPLES, step):
        r = min(step, RESAMPLES - start)
        drawn = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)
        found.append(statistic(weights @ rows, np.full(r, float(n))))
    values = np.sort(np.concatenate(found))
    if not np.isfinite(values).all():
        return None
    if values[0] == values[-1]:
        return Interval(value, value, confidence)
    left_out = statistic(total - rows, np.full(n, n - 1.0))
    lean = left_out.mean() - left_out
    spread = float(np.square(lean).sum()) ** 1.5
    acceleration = float((lean**3).sum()) / (6 * spread) if spread > 0 else 0.0
    normal = NormalDist()
    # half of what ties counts as below; never none or all, which has no quantile
    below = (np.searchsorted(values, value) + np.searchsorted(values, value, side="right")) / 2
    shift = normal.inv_cdf(float(np.clip(below, 1, RESAMPLES - 1)) / RESAMPLES)
    ends = []
    for z in (normal.inv_cdf((1 - confidence) / 2), normal.inv_cdf((1 + confidence) / 2)):
        share = normal.cdf(shift + (shift + z) / max(1 - acceleration * (shift + z), 1e-9))
        ends.append(float(np.quantile(values, share)))
    return Interval(min(ends), max(ends), confidence)


# --- metrics as functions of sums over samples ----------------------------------------------------------------------


def _mean_of(per_sample: Floats) -> tuple[Floats, Statistic]:
    return per_sample[:, None], lambda s, n: np.asarray(s[:, 0] / n, np.float64)


def _mse(answers: Answers) -> tuple[Floats, Statistic]:
    return _mean_of(np.square(answers.outputs - answers.targets).mean(1))


def _mae(answers: Answers) -> tuple[Floats, Statistic]:
    return _mean_of(np.abs(answers.outputs - answers.targets).mean(1))


def _r2(answers: Answers) -> tuple[Floats, Statistic]:
    t = answers.targets - answers.targets.mean(0)  # small numbers: sums of squares lose nothing
    k = t.shape[1]

    def of(s: Floats, n: Floats) -> Floats:
        error, first, second = s[:, :k], s[:, k : 2 * k], s[:, 2 * k :]
        around = second - np.square(first) / n[:, None]
        varies = around > 1e-12 * np.maximum(second, 1e-300)
        share = np.divide(error, around, out=np.zeros_like(error), where=varies)
        counted = varies.sum(1)
        return np.where(counted > 0, 1 - share.sum(1) / np.maximum(counted, 1), np.nan)

    return np.hstack([np.square(answers.outputs - answers.targets), t, np.square(t)]), of


def _pearson(answers: Answers) -> tuple[Floats, Statistic]:
    x, y = (v - v.mean(0) for v in (answers.outputs, answers.targets))
    k = x.shape[1]

    def of(s: Floats, n: Floats) -> Floats:
        sx, sy, xx, yy, xy = (s[:, i * k : (i + 1) * k] for i in range(5))
        each = n[:, None]
        spread = np.sqrt(np.maximum(xx - sx * sx / each, 0) * np.maximum(yy - sy * sy / each, 0))
        return np.asarray(
            np.divide(xy - sx * sy / each, spread, out=np.zeros_like(spread), where=spread > 0).mean(1), np.float64
        )

    return np.hstack([x, y, x * x, y * y, x * y]), of


_STATISTICS: dict[str, Callable[[Answers], tuple[Floats, Statistic]]] = {
    "r2": _r2,
    "mse": _mse,
    "mae": _mae,
    "pearson": _pearson,
}
