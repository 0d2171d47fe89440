"""What the greedy loop asks: CAR by exact elimination, or the ranking of any other criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxcar.channels import ChannelSpace
from onnxcar.criteria import Context, Criterion, Importances, per_layer_unit
from onnxcar.greedy import Choice, Chooser, Mark
from onnxcar.scoring import Score, Scorer

__all__ = ["CarChooser", "RankChooser", "chooser"]


Saved = Callable[[Sequence[int], frozenset[int]], Mapping[int, int]]  # (candidates, removed) -> what each would save


def chooser(
    space: ChannelSpace, criterion: Criterion, context: Context, scope: str, saved: Saved | None = None
) -> Chooser:
    """Who ranks and scores for a criterion: elimination for CAR, else the criterion's own numbers.

    At global scope scores lost are taken per MAC saved, or per what `saved` counts instead; all other importances in
    units of their layer's norm.
    """
    if criterion.name == "car" and context.scorer is not None:
        return CarChooser(context.scorer, per_mac=scope == "global", saved=saved)
    return RankChooser(space, criterion, context, scope, saved)


class _Marks:
    """Scores of networks on the validation samples, with their drop below the original's."""

    def __init__(self, scorer: Scorer | None) -> None:
        self._scorer = scorer
        self._original: Score | None = None

    def mark(self, removed: frozenset[int]) -> Mark | None:
        """Score of the network without `removed`; None without data."""
        return None if self._scorer is None else self.of(self._scorer.base(removed))

    def of(self, score: Score) -> Mark:
        """A score as a mark."""
        assert self._scorer is not None
        if self._original is None:
            self._original = self._scorer.base(frozenset())
        return Mark(score.value, score.correct, score.samples, self._original.reduction(score))


class CarChooser:
    """Exact CAR: a candidate is out as soon as it has lost more than the best one loses at the end."""

    def __init__(self, scorer: Scorer, *, per_mac: bool = False, saved: Saved | None = None) -> None:
        self._scorer, self._per_mac, self._saved = scorer, per_mac, saved if per_mac else None
        scorer.all_sites = per_mac
        self._marks = _Marks(scorer)

    def lowest(self, removed: frozenset[int], candidates: Sequence[int], k: int) -> list[Choice]:
        """The k candidates of lowest CAR (per MAC saved, if so asked), each with the score without it."""
        base = self._scorer.base(removed)
        saved = None if self._saved is None else self._saved(candidates, removed)
        picks = self._scorer.lowest(removed, candidates, k=k, per_mac=self._per_mac, saved=saved)
        return [Choice(pick.group, base.reduction(pick.score), self._marks.of(pick.score)) for pick in picks]

    def mark(self, removed: frozenset[int]) -> Mark | None:
        """Score of the network without `removed`."""
        return self._marks.mark(removed)

    def step(self, removed: frozenset[int]) -> None:
        """Told where the search stands."""
        self._scorer.step(removed)

    def work(self, n_candidates: int) -> int:
        """Every candidate is looked at, if not to the end."""
        return n_candidates


class RankChooser:
    """The ranking of a criterion: of the original network once, or, where the criterion is greedy, anew every step."""

    def __init__(
        self, space: ChannelSpace, criterion: Criterion, context: Context, scope: str, saved: Saved | None = None
    ) -> None:
        self._space, self._criterion, self._context, self._scope = space, criterion, context, scope
        self._saved = saved
        self._marks = _Marks(context.scorer)
        self._table: Importances | None = None

    def lowest(self, removed: frozenset[int], candidates: Sequence[int], k: int) -> list[Choice]:
        """The k candidates of lowest importance; of equals the one that saves most MACs goes, then the lowest index."""
        importances = self._importances(removed, candidates)
        keys = self._keys(importances, removed, candidates)
        bound = np.partition(keys, k - 1)[k - 1]
        low = [(key, group) for key, group in zip(keys.tolist(), candidates, strict=True) if key <= bound]
        order = sorted(low)
        if len(low) > k or len({key for key, _ in low}) < len(low):
            order = sorted(low, key=lambda at: (at[0], -self._space.saved_macs(at[1], removed), at[1]))
        return [Choice(group, float(importances[group])) for _, group in order[:k]]

    def mark(self, removed: frozenset[int]) -> Mark | None:
        """Score of the network without `removed`; None without data."""
        return self._marks.mark(removed)

    def step(self, removed: frozenset[int]) -> None:
        """Told where the search stands."""
        if self._context.scorer is not None:
            self._context.scorer.step(removed)

    def work(self, n_candidates: int) -> int:
        """One evaluation a step at most, except where the criterion looks at every candidate again."""
        return n_candidates if self._criterion.greedy else 1

    def _importances(self, removed: frozenset[int], candidates: Sequence[int]) -> Importances:
        if self._criterion.greedy:
            return self._criterion(self._space, replace(self._context, removed=removed, candidates=candidates))
        if self._table is None:
            self._table = self._criterion(self._space, self._context)
        return self._table

    def _keys(self, importances: Importances, removed: frozenset[int], candidates: Sequence[int]) -> Importances:
        """What is compared: importances, at global scope made comparable over layers."""
        if self._scope == "global" and self._criterion.greedy:
            if self._saved is not None:
                worth = self._saved(candidates, removed)
            else:
                worth = {group: self._space.saved_macs(group, removed) for group in candidates}
            saved = np.asarray([worth[group] for group in candidates], np.float64)
            return per_mac(importances[list(candidates)], saved)
        if self._scope == "global":
            importances = per_layer_unit(self._space, importances)
        return importances[list(candidates)]


def per_mac(lost: Importances, saved: Importances) -> Importances:
    """Score lost per MAC saved; what saves nothing is worth removing only if it costs nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(saved > 0, lost / saved, np.where(lost == 0, 0.0, np.sign(lost) * np.inf))
