"""A sequential test with a stated error probability: is a candidate's cost above a limit, from images drawn at random?

Each image's change of cost against what is expected without the candidate is a bet against "the sum over all images is
at most so much". Images are drawn without replacement, those more often that are likelier to tell something, and a
change counts the more the less likely its image was to be drawn. While the claim holds, the capital is a non-negative
supermartingale, so it ever reaches 1/a with probability a at most (Ville). It may be looked at after every image, and
is valid for any number of them, whatever the weights and expectations are: these decide only how soon it grows.
Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024,
arXiv:2010.09686, section on sampling without replacement; Shekhar, Xu, Lipton, Liang and Ramdas, Risk-limiting
financial audits via weighted sampling without replacement, UAI 2023, arXiv:2305.06884.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["Bet", "draw", "forecast", "risk_of", "weights"]

Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
STAKES = np.asarray([[0.25], [0.5], [0.95]])  # parts of the largest stake that cannot ruin; a third of the capital each
COULD = 0.5  # part of the draws that goes to images that could make up for the others, by what they could gain
EVERY = 1e-4  # chance of a change that is expected of an image at least


def risk_of(total: float, removed: int, k: int) -> float:
    """Error probability of one candidate in one step, so that all steps of a search together stay below `total`.

    A pick is wrong only if one of the k that should win is dropped, so a step takes k of these. Steps differ in how
    many groups are removed: 1/((r + 2) ln(r + 2)^2) sums to 2.11 over r. Where a step is asked for again with fewer
    groups, k, k/2, k/4, ..., the parts 1/2, 1/4, 1/8, ... (from 1 group up) sum to less than 1.

    Args:
        total: For the whole search, in (0, 1).
        removed: Groups removed so far, r.
        k: Groups asked for.
    """
    part = 2.12 * (removed + 2) * math.log(removed + 2) ** 2
    return total / part / (k << k.bit_length())


def weights(before: Numbers, chances: Numbers) -> Numbers:
    """How often images should be drawn, (n,), adding up to 1.

    Args:
        before: About each image's cost without the candidate, (n,): what it could gain.
        chances: About the chance of each to cost something with the candidate, (n,).
    """
    wrong = before > 0
    change: Numbers = np.maximum(np.where(wrong, 1.0 - chances, chances), EVERY)
    change /= change.sum()
    if wrong.any():
        change = COULD * before / before.sum() + (1.0 - COULD) * change
    return change


def draw(each: Numbers, rng: np.random.Generator) -> Indices:
    """All images in a random order: the next one is always drawn in proportion to its weight.

    Args:
        each: Weights, (n,), all positive.
        rng: Where chance comes from.
    """
    return np.argsort(rng.exponential(size=len(each)) / each, kind="stable")


def forecast(before: Numbers, gap: float, risk: float) -> float:
    """About how many images it takes to be sure, infinite if it will never be.

    Args:
        before: About each image's cost without the candidate, (n,).
        gap: What the candidate is expected to cost beyond the limit.
        risk: Error probability.
    """
    if gap <= 0:
        return math.inf
    # Images that could gain must be seen not to: all but one part in e^(goal / gap) of them, were they drawn alone.
    largest = max(float(before.max(initial=0.0)), 1e-300)
    goal = math.log(len(STAKES) / risk)
    return 1.15 / COULD * float(before.sum()) / largest * -math.expm1(-goal * largest / gap)


class Bet:
    """One candidate's capital against the claim that it costs no more than a limit.

    Attributes:
        sure: Whether the claim is refuted at the error probability.
    """

    def __init__(
        self, before: npt.NDArray[np.int64], each: Numbers, known: int, limit: int, risk: float, expected: float
    ) -> None:
        """Begin with a capital of 1.

        Args:
            before: About each image's cost without the candidate, (n,), in the order of `draw`. Costs are 0 or more.
            each: Weights by which they were drawn, (n,), in that order.
            known: Cost of the images besides those.
            limit: The claim: all images together cost at most that. Chosen without a look at what will be run.
            risk: Error probability.
            expected: About how many images it will take (`forecast`).
        """
        self._before = before.astype(np.float64)
        self._total = limit - float(self._before.sum()) - known  # claimed: the changes add up to at most that
        ahead = np.cumsum(each[::-1])[::-1]
        self._factor = ahead / each  # a change seen counts so often
        # What one image could bring at worst, of those not seen yet; and all of them.
        self._worst = np.maximum.accumulate((self._before / each)[::-1])[::-1] * ahead
        self._could = np.append(np.cumsum(self._before[::-1])[::-1], 0.0)
        self._goal = -math.log(risk)
        self._capitals = np.full((len(STAKES), 1), -math.log(len(STAKES)))  # logarithms
        self._seen, self._sum = 0, 0.0
        self._expected = expected
        self.sure = False

    def see(self, costs: npt.NDArray[np.int64]) -> None:
        """Costs of the next images, in their order."""
        n = len(costs)
        if not n or self.sure:
            return
        at = slice(self._seen, self._seen + n)
        changes = costs - self._before[at]
        sums = self._sum + np.cumsum(changes)
        left = self._total - np.concatenate([[self._sum], sums[:-1]])  # claimed of those not seen yet
        self._seen, self._sum = self._seen + n, float(sums[-1])
        if (left < -self._could[at]).any() or self._total - self._sum < -self._could[self._seen]:
            self.sure = True  # not even gaining all that is left would do
            return
        room = left + self._worst[at]
        stakes = np.divide(1.0, room, out=np.zeros(n), where=room > 1e-9 * (1.0 + np.abs(left)))
        won = np.cumsum(np.log1p(STAKES * (stakes * (changes * self._factor[at] - left))), axis=1)
        capitals = self._capitals + won
        self._capitals = capitals[:, -1:]
        self.sure = bool(np.logaddexp.reduce(capitals, axis=0).max() >= self._goal)

    def wanted(self) -> int:
        """About how many images to run next: about half of those that it will still take."""
        capital = float(np.logaddexp.reduce(self._capitals, axis=0)[0])
        half = 0.5 * self._expected
        if self._seen > 0:
            half = 0.5 * self._seen * min(1.0, (self._goal - capital) / max(capital, 0.1 * self._goal))
        return max(8, int(half))

    @property
    def hopeless(self) -> bool:
        """Whether the capital grows so much slower than was expected that counting is the better way."""
        capital = float(np.logaddexp.reduce(self._capitals, axis=0)[0])
        return not self.sure and self._seen > 2.0 * self._expected and capital < 0.5 * self._goal
