"""A promise on unseen data: the most pruned model of a path whose drop is below a limit with a given confidence.

The data are split once. The search sees one part; models of its path are then tested on the part it never saw, from
the least pruned to the most, and the first that cannot be told from a broken promise ends it: fixed-sequence testing
(Learn then Test, Angelopoulos et al. 2021, arXiv 2110.01052, section 3). Each test may spend the whole risk, because a
false certificate needs the first model of the sequence that breaks the promise to pass, and that one test passes with
probability 1 - confidence at most: looking at many models costs no validity. The sequence has to be fixed before the
held part is looked at; it is, as it follows from the search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar.errors import DataError, PlanError

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.metrics import Score

__all__ = ["METRICS", "Certificate", "Held", "flips", "images_needed", "p_value", "split"]

METRICS = ("top1", "top5")  # losses of 0 or 1 per image, of which the test is exact
NUISANCE = 0.1  # of the risk, spent on bounding how many images the pruned model alone gets right
SHARE = 0.5  # of the data is held back, more where the promise needs more
MOST_HELD = 0.75
LARGEST = 0.5  # drop that can be promised; near 1 the closed form does not hold
METHOD = "fixed sequence, exact paired test (trinomial, Berger-Boos)"


def p_value(lost: int, won: int, n_samples: int, drop: float, risk: float) -> float:
    """How likely flips like these are, or fewer losses, if the true drop were ``drop`` or more; at most 1.

    Each image gives d = 1 (only the original is right, probability q1), -1 (only the pruned model is, q0) or 0, and the
    drop is E[d] = q1 - q0. The statistic is S = lost - won, the sum of n values d. q0 is a nuisance: it is bounded by
    its Clopper-Pearson limit at level NUISANCE * risk, and that level is added to the p-value (Berger and Boos 1994,
    JASA 89:1012), so P(p <= risk) <= risk for every q0 and every drop of at least ``drop``, at any n.

    Below that limit the largest probability is known in closed form. More loss makes S larger, so the drop is exactly
    ``drop``. With q1 = q0 + drop and 4 q0 <= (1 - drop)^2, the generating polynomial of d + 1 has real roots: S + n is
    Bin(n, a) + Bin(n, b) with a + b = 1 + drop and a b = q0 + drop. Its derivative in q0 is n (P[S' = s + 1] -
    P[S' = s]), S' of n - 1 images, and such sums have one mode, within 1 of their mean (Darroch 1964): for
    s <= (n - 1) drop - 2 it is not negative, so the limit itself is the worst case. Elsewhere the p-value is 1.

    This is McNemar's setting with a margin. Hoeffding-Bentkus bounds for values in [-1, 1] know nothing of how few
    images flip: they need some twenty times the images where 4 % do.

    Args:
        lost: Images that only the original gets right.
        won: Images that only the pruned model gets right.
        n_samples: All images.
        drop: The limit, in (0, 1).
        risk: 1 - confidence; it only says how the nuisance is bounded.

    >>> round(p_value(0, 0, 756, 0.01, 0.05), 3)
    0.05
    >>> p_value(10, 0, 756, 0.01, 0.05)
    1.0
    """
    from scipy import stats  # slow to import, needed by promises only

    s = lost - won
    level = NUISANCE * risk
    most = 1.0 if won >= n_samples else float(stats.beta.ppf(1 - level, won + 1, n_samples - won))
    if 4 * most > (1 - drop) ** 2 or s > (n_samples - 1) * drop - 2:
        return 1.0
    middle = (1 + drop) / 2
    half = math.sqrt(max(0.0, middle**2 - (most + drop)))
    k = np.arange(n_samples + 1)
    low = stats.binom.pmf(k, n_samples, middle - half)
    tail = float((low * stats.binom.cdf(s + n_samples - k, n_samples, min(1.0, middle + half))).sum())
    return min(1.0, tail + level)


def images_needed(drop: float, confidence: float) -> int:
    """How many held images the promise takes at least: with fewer, not even a model without any flip passes.

    >>> images_needed(0.01, 0.95)
    756
    """
    risk = 1 - confidence
    low, high = 1, 2
    while p_value(0, 0, high, drop, risk) > risk:
        low, high = high, 2 * high
    while high - low > 1:  # the p-value without flips falls with n
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(0, 0, middle, drop, risk) <= risk else (middle, high)
    return high


def check(metric: str, max_drop: float | None, confidence: float) -> None:
    """Refuse a promise that no test here can give.

    Raises:
        PlanError: Confidence or drop out of range, or the metric is none of `METRICS`; fact `field`.
    """
    if not 0 < confidence < 1:
        raise PlanError(
            f"guarantee is {confidence}, and must be a confidence between 0 and 1: 0.95.", field="guarantee"
        )
    if max_drop is None or not 0 < max_drop <= LARGEST:
        given = "none is given" if max_drop is None else f"the limit is {max_drop:g}"
        raise PlanError(
            f"A guarantee promises a drop below a limit, and {given}. Give a fraction above 0, at most {LARGEST:g}: "
            "--max-drop 0.01.",
            field="max_drop",
        )
    if metric not in METRICS:
        raise PlanError(
            f"A guarantee counts images that change sides, and the metric {metric!r} counts none. Take "
            f"--metric {' or '.join(METRICS)}, or leave --guarantee out.",
            field="metric",
        )


@dataclass(frozen=True, eq=False)
class Held:
    """The data in two parts that share no sample.

    Attributes:
        choosing: What the search sees.
        held: What it never sees.
        seed: Of the split.
    """

    choosing: Dataset
    held: Dataset
    seed: int


def split(data: Dataset, max_drop: float, confidence: float, seed: int = 0) -> Held:
    """The data in two parts, the shares of the classes alike in both; at least half is held back.

    Samples are sorted by class, at random within each, and every so-and-so-many-th one is held back. That takes
    variance away from what independent draws would have, never adds any.

    Raises:
        DataError: Three quarters of the samples are too few for the promise; facts `needed`, `there`.
    """
    needed, n = images_needed(max_drop, confidence), len(data)
    if int(MOST_HELD * n) < needed:
        in_all = math.ceil(needed / MOST_HELD)
        raise DataError(
            f"Too few images for this promise: a drop below {max_drop:g} with confidence {confidence:g} takes "
            f"at least {needed} images that the search never sees, {in_all} in all, and there are {n}. Add images, or "
            f"promise less: {_affordable(n, confidence)}.",
            needed=in_all,
            there=n,
        )
    # Exactly as many as needed would pass a model without any flip and no other.
    share = min(MOST_HELD, max(SHARE, 1.5 * needed / n))
    rng = np.random.default_rng([seed, 0x5EED])
    order = rng.permutation(n)
    if data.labels.ndim == 1:
        order = order[np.argsort(data.labels[order], kind="stable")]
    steps = np.floor((np.arange(n + 1) + rng.random()) * share)
    chosen = np.zeros(n, bool)
    chosen[order[np.diff(steps) > 0]] = True
    return Held(data.subset(~chosen), data.subset(chosen), seed)


def _affordable(n: int, confidence: float) -> str:
    for drop in (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3):
        if images_needed(drop, confidence) <= MOST_HELD * n:
            return f"--max-drop {drop:g} is possible with these"
    return "these are too few for any"


def flips(base: Score, other: Score) -> tuple[int, int]:
    """Images that only the base gets right, and those that only the other does; by top-5 where that is the metric."""
    a, b = _right(base), _right(other)
    return int((a & ~b).sum()), int((b & ~a).sum())


def _right(score: Score) -> npt.NDArray[np.bool_]:
    assert score.outcomes is not None
    return score.outcomes.top5 if score.metric == "top5" else score.outcomes.correct


@dataclass(frozen=True)
class Certificate:
    """One model on the held part.

    Attributes:
        removed: Number of groups that are gone.
        macs: Of the model.
        lost: Images that only the original gets right.
        won: Images that only this model gets right.
        samples: All held images.
        p: Of the hypothesis that the promise is broken.
        passed: Whether that is refuted.
    """

    removed: int
    macs: int
    lost: int
    won: int
    samples: int
    p: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """As in the record."""
        return vars(self) | {"drop": (self.lost - self.won) / self.samples}
