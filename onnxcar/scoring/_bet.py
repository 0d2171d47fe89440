"""A sequential test with a stated error probability: is a candidate's cost above a limit, from images drawn at random?

Each image's change of cost against the network without any candidate is a bet against "the sum over all images is at
most so much". The images come in random order without replacement; while the claim holds, the capital is a
non-negative supermartingale, so it ever reaches 1/a with probability a at most (Ville). It may be looked at after every
image, and is valid for any number of them. Source: Waudby-Smith and Ramdas, Estimating means of bounded random
variables by betting, JRSS B 2024, arXiv:2010.09686, section on sampling without replacement.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["Bet", "risk_of"]

Numbers = npt.NDArray[np.float64]
CAUTION = 0.75  # part of the largest stake that cannot ruin


def risk_of(total: float, removed: int, k: int) -> float:
    """Error probability of one candidate in one step, so that all steps of a search together stay below `total`.

    A pick is wrong only if one of the k that should win is dropped, so a step takes k of these. Steps differ in how
    many groups are removed: 1/((r + 1)(r + 2)) sums to 1 over r. Where a step is asked for again with fewer groups,
    k, k/2, k/4, ..., the terms 1/(k + 1) sum to less than 2.

    Args:
        total: For the whole search, in (0, 1).
        removed: Groups removed so far, r.
        k: Groups asked for.
    """
    return total / ((removed + 1) * (removed + 2)) / (2 * k * (k + 1))


class Bet:
    """One candidate's capital against the claim that it costs no more than a limit.

    Attributes:
        sure: Whether the claim is refuted at the error probability.
    """

    def __init__(self, before: npt.NDArray[np.int64], known: int, limit: int, largest: int, risk: float) -> None:
        """Begin with a capital of 1.

        Args:
            before: Cost of each image without the candidate, (n,), in the random order in which they will be run.
            known: Cost of the images besides those.
            limit: The claim: all images together cost at most that. Chosen without a look at what will be run.
            largest: What one image costs at most.
            risk: Error probability.
        """
        self._before = before.astype(np.float64)
        self._total = limit - float(self._before.sum()) - known  # claimed: the changes add up to at most that
        self._largest = float(largest)
        self._low = float(self._before.max(initial=0.0))  # no image can gain more
        self._goal = -math.log(risk)
        self._log_capital = 0.0
        self._seen, self._sum, self._squares = 0, 0.0, 0.0
        self.sure = False

    def see(self, costs: npt.NDArray[np.int64]) -> None:
        """Costs of the next images, in their order."""
        if len(costs):
            self._stake(costs - self._before[self._seen : self._seen + len(costs)])

    def _stake(self, changes: Numbers) -> None:
        n_all = len(self._before)
        if not self.sure:
            total = self._total
            sums = self._sum + np.concatenate([[0.0], np.cumsum(changes)])[:-1]
            means = (total - sums) / (n_all - self._seen - np.arange(len(changes)))
            if (means < -self._low).any():
                self.sure = True  # not even gaining all that is left would do
            else:
                # The same stake for all of them, from what was seen before; never so much that one loss ruins.
                seen = self._seen + 1.0
                mean, spread = self._sum / seen, (self._squares + 0.05 * self._largest**2) / seen
                gap = mean - float(means[0])
                share = np.clip(gap / (spread + gap * gap) if gap > 0 else 0.0, 0.0, None)
                stakes = np.minimum(share, CAUTION / (means + self._low + 1e-300))
                self._log_capital += float(np.log1p(stakes * (changes - means)).sum())
                self.sure = self._log_capital >= self._goal
        self._seen += len(changes)
        self._sum += float(changes.sum())
        self._squares += float(np.square(changes).sum())
