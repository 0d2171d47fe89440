"""Intervals and tests for counts on the same samples; nothing here knows of models.

All are the textbook forms, chosen because they hold at the few hundred images a pruning run really has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median, quantiles

__all__ = [
    "Interval",
    "Spread",
    "mcnemar",
    "mean_interval",
    "median_interval",
    "paired_interval",
    "spread",
    "wilson",
]


@dataclass(frozen=True)
class Interval:
    """Where the true value lies with ``confidence``; ends included."""

    low: float
    high: float
    confidence: float = 0.95

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in their unit."""

    median: float
    q1: float
    q3: float
    n_runs: int

    @property
    def iqr(self) -> float:
        """Distance between the quartiles."""
        return self.q3 - self.q1


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(correct: int, n_samples: int, confidence: float = 0.95) -> Interval:
    """Interval of a proportion from ``correct`` of ``n_samples`` (Wilson 1927); stays inside [0, 1].

    >>> wilson(10, 10).high
    1.0
    >>> round(wilson(10, 10).low, 3)
    0.722
    """
    if n_samples <= 0:
        return Interval(0.0, 1.0, confidence)
    z2 = _z(confidence) ** 2
    p = correct / n_samples
    centre = (p + z2 / (2 * n_samples)) / (1 + z2 / n_samples)
    half = math.sqrt(z2 * (p * (1 - p) / n_samples + z2 / (4 * n_samples**2))) / (1 + z2 / n_samples)
    # The ends are exactly 0 and 1 for none and all; rounding would leave them an ulp off.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n_samples else min(1.0, centre + half)
    return Interval(low, high, confidence)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test: are the two equally often the only one that is right?

    Samples on which both are right or both are wrong tell nothing about the difference and do not enter.
    Source: the binomial form, min(1, 2 P[Bin(b + c, 1/2) <= min(b, c)]).

    >>> mcnemar(0, 0), mcnemar(1, 5)
    (1.0, 0.21875)
    """
    n = only_first + only_second
    term = total = 1  # term is C(n, i), in integers: exact for any n
    for i in range(min(only_first, only_second)):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / (1 << n))


def paired_interval(only_first: int, only_second: int, n_samples: int, confidence: float = 0.95) -> Interval:
    """Interval of second minus first proportion, both counted on the same samples.

    Source: the adjusted Wald interval for paired proportions (Bonett and Price 2012: one added to both
    discordant counts, two to the samples), which holds its level where the plain one fails, at few flips.
    """
    if n_samples <= 0:
        return Interval(-1.0, 1.0, confidence)
    n = n_samples + 2
    p1, p2 = (only_first + 1) / n, (only_second + 1) / n
    half = _z(confidence) * math.sqrt(max(0.0, p1 + p2 - (p2 - p1) ** 2) / n)
    return Interval(max(-1.0, p2 - p1 - half), min(1.0, p2 - p1 + half), confidence)


def mean_interval(mean: float, std: float, n_samples: int, confidence: float = 0.95) -> Interval:
    """Normal interval of a mean of ``n_samples`` values with sample standard deviation ``std``."""
    half = _z(confidence) * std / math.sqrt(n_samples) if n_samples > 0 else math.inf
    return Interval(mean - half, mean + half, confidence)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Distribution-free interval of a median, from order statistics; the whole range where values are few.

    >>> median_interval([1.0, 2.0, 3.0])
    Interval(low=1.0, high=3.0, confidence=0.95)
    """
    ordered = sorted(values)
    n = len(ordered)
    tail, k = 0, 0  # the largest k with P[Bin(n, 1/2) < k] <= (1 - confidence) / 2
    term = 1
    while k < n // 2:
        tail += term
        if tail / (1 << n) > (1 - confidence) / 2:
            break
        term = term * (n - k) // (k + 1)
        k += 1
    k = max(k - 1, 0)
    return Interval(ordered[k], ordered[n - 1 - k], confidence)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    q1, _, q3 = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), q1, q3, len(values))
