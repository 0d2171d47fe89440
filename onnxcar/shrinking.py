"""A scorer whose model shrinks as groups leave: every so often it goes on with the compact model.

Ids outside are those of the original's groups throughout. What is masked on the compact model is what left since, so
scores are those of the masked original, up to the rounding of sums with fewer terms; with `rebuild` it may be a
recovered model, and scores are then that model's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from onnxcar import surgery
from onnxcar.channels import ChannelSpace, Layer
from onnxcar.errors import UnsupportedError
from onnxcar.model import Model
from onnxcar.rules import analyze
from onnxcar.scoring import Pick, Score, Scorer
from onnxcar.surgery import Plan

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["Shrinking", "every_groups", "every_macs", "follow"]

Due = Callable[[frozenset[int], frozenset[int]], bool]
SHARE = 0.92  # the model is made anew when its MACs have come down to this share of what they were


def every_groups(number: int) -> Due:
    """Rebuild whenever so many groups have left since the last time."""
    return lambda last, removed: len(removed) - len(last) >= number


def every_macs(space: ChannelSpace, share: float = SHARE) -> Due:
    """Rebuild whenever the MACs have come down to a share of what they were the last time."""
    goals: dict[frozenset[int], float] = {}  # costs are counted from step to step: looking back costs a count anew

    def due(last: frozenset[int], removed: frozenset[int]) -> bool:
        if last not in goals:
            goals[last] = share * space.cost(last).macs
        return space.cost(removed).macs <= goals[last]

    return due


def follow(space: ChannelSpace, removed: frozenset[int], compact: ChannelSpace) -> dict[int, int] | None:
    """Group of the original -> the same group of the compact model.

    Layers are found by the names of their nodes, filters by their place among those that are left. A group that cannot
    go from the compact model (the last of its axis) is missing.

    Args:
        space: Structure of the original.
        removed: What left.
        compact: Structure of the network without `removed`.

    Returns:
        None where the two do not agree: a layer is missing or has another size, or groups tie otherwise.
    """
    alive = space.alive(removed)
    theirs = _by_name(compact)
    found: dict[int, int] = {}
    back: dict[int, int] = {}
    for name, layer in _by_name(space).items():
        left = layer.groups[alive[layer.groups]]
        if name not in theirs and len(left) == 1:
            continue  # one filter is no choice: `analyze` does not count it as a layer
        if name not in theirs or len(theirs[name].groups) != len(left):
            return None
        for old, new in zip(left.tolist(), theirs[name].groups.tolist(), strict=True):
            if old < 0 or new < 0:
                continue
            if found.setdefault(old, new) != new or back.setdefault(new, old) != old:
                return None
    ids = [found[old] for old in sorted(found)]
    return found if ids == sorted(ids) else None  # ties go to the lower id: their order must be the same


def _by_name(space: ChannelSpace) -> dict[tuple[str, int], Layer]:
    """Layers by the name of their node, and which of that name."""
    seen: dict[str, int] = {}
    out = {}
    for layer in space.layers:
        seen[layer.node] = seen.get(layer.node, -1) + 1
        out[layer.node, seen[layer.node]] = layer
    return out


@dataclass(frozen=True, eq=False)
class _Stage:
    """A compact model at work.

    Attributes:
        removed: Groups that are physically gone.
        scorer: Scores it.
        names: Original group -> its own.
    """

    removed: frozenset[int]
    scorer: Scorer
    names: dict[int, int]


class Shrinking(Scorer):
    """A `Scorer` over a model that shrinks; `step` tells it how far the search is.

    Which model answers follows from the steps it was told of alone, never from time or from what was asked, so a
    search that is resumed gets the same answers.

    Attributes:
        rebuilds: How often a model was made.
    """

    def __init__(
        self,
        space: ChannelSpace,
        data: Dataset,
        *,
        rebuild: Callable[[frozenset[int]], Model] | None = None,
        due: Due | None = None,
        **options: Any,
    ) -> None:
        """Begin with the original.

        Args:
            space: Structure of the original.
            data: Labelled samples.
            rebuild: The model without some groups, default `surgery.remove`; its weights may be others.
            due: Whether to rebuild, from the groups removed when it was done last and now; default `every_macs`.
            options: As `Scorer`.
        """
        super().__init__(space, data, **options)
        self._options = options
        self._rebuild, self._due = rebuild, due or every_macs(space)
        self.rebuilds = 0
        self._points: list[frozenset[int]] = []  # where the model is made anew, each a part of the next
        self._stage: _Stage | None = None
        self._useless: set[frozenset[int]] = set()

    def step(self, removed: frozenset[int]) -> None:
        """The search stands at these groups. To be told after every step, those answered by a journal included."""
        while self._points and not self._points[-1] <= removed:
            self._points.pop()
        last = self._points[-1] if self._points else frozenset()
        if removed != last and self._due(last, removed):
            self._points.append(removed)

    def renew(self, removed: frozenset[int]) -> bool:
        """Go on with the model recovered at these groups, due or not; whether that changes anything."""
        if self._rebuild is None or not removed or (self._points and self._points[-1] == removed):
            return False
        self._points.append(removed)
        return True

    # --- as a Scorer ----------------------------------------------------------------------------------------------

    def base(self, removed: Collection[int] = ()) -> Score:
        """As `Scorer.base`."""
        gone = frozenset(removed)
        stage = self._for(gone, ())
        return super().base(gone) if stage is None else stage.scorer.base(_renamed(gone - stage.removed, stage))

    def score(self, removed: Collection[int], candidates: Sequence[int]) -> list[Score]:
        """As `Scorer.score`."""
        gone = frozenset(removed)
        stage = self._for(gone, candidates)
        if stage is None:
            return super().score(gone, candidates)
        ours, names = stage.scorer, stage.names
        found = ours.score(_renamed(gone - stage.removed, stage), [names[g] for g in candidates])
        self.flips = {g: ours.flips[names[g]] for g in candidates if names[g] in ours.flips}
        self.losses = {g: ours.losses[names[g]] for g in candidates if names[g] in ours.losses}
        self.base_correct = ours.base_correct
        return found

    def lowest(
        self,
        removed: Collection[int],
        candidates: Sequence[int],
        order_hint: Sequence[int] | None = None,
        k: int = 1,
        *,
        per_mac: bool = False,
        saved: Mapping[int, int] | None = None,
    ) -> list[Pick]:
        """As `Scorer.lowest`."""
        gone = frozenset(removed)
        stage = self._for(gone, candidates)
        if stage is None:
            return super().lowest(gone, candidates, order_hint, k, per_mac=per_mac, saved=saved)
        # Sizes are those of the original without these groups: what a rebuild adds (a bias) must not move a pick.
        if saved is None:
            saved = {group: self.space.saved_macs(group, gone) for group in candidates}
        names = stage.names
        picks = stage.scorer.lowest(
            _renamed(gone - stage.removed, stage),
            [names[group] for group in candidates],
            [names[group] for group in order_hint or () if group in names],
            k,
            per_mac=per_mac,
            saved={names[group]: macs for group, macs in saved.items() if group in names},
        )
        back = {new: old for old, new in names.items()}
        return [replace(pick, group=back[pick.group]) for pick in picks]

    # --- models ---------------------------------------------------------------------------------------------------

    def _for(self, removed: frozenset[int], candidates: Sequence[int]) -> _Stage | None:
        """The smallest model that can answer, None for the original."""
        point = next((p for p in reversed(self._points) if p <= removed and p not in self._useless), None)
        if point is None:
            return None
        if self._stage is None or self._stage.removed != point:
            made = self._open(point)
            if made is None:
                self._useless.add(point)
                return self._for(removed, candidates)
            self._stage = made
        self._stage.scorer.all_sites, self._stage.scorer.keep_losses = self.all_sites, self.keep_losses
        names = self._stage.names
        if all(group in names for group in (*candidates, *(removed - point))):
            return self._stage
        self._refused(point)
        return None

    def _refused(self, point: frozenset[int]) -> None:
        """The original answers; but where models are recovered it cannot speak for them."""
        if self._rebuild is not None:
            raise UnsupportedError(
                f"After {len(point)} groups the recovered model's filters no longer match the original's, so the "
                "search cannot go on with it. Recover once, at the end: leave out --recover-every."
            )

    def _open(self, point: frozenset[int]) -> _Stage | None:
        if self.space.norms == "rewrite" and self._rebuild is None:
            return None  # rewritten twice is not rewritten once
        model = surgery.remove(self.space, Plan(point)) if self._rebuild is None else self._rebuild(point)
        compact = analyze(model, norms=self.space.norms)
        names = follow(self.space, point, compact)
        if names is None:
            self._refused(point)
            return None
        before = self._stage
        self._stage = None  # its memory is needed
        scorer = Scorer(compact, self.data, **self._options)
        if before is None:
            scorer.learn(self, names)
        else:
            ours = {before.names[old]: new for old, new in names.items() if old in before.names}
            scorer.learn(before.scorer, ours)
        scorer.work = self.work
        self.release()
        self.rebuilds += 1
        return _Stage(point, scorer, names)


def _renamed(groups: frozenset[int], stage: _Stage) -> frozenset[int]:
    return frozenset(stage.names[group] for group in groups)
