"""What a search is made of: when it stops, what it removed in which order, and who ranks and scores for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from onnxcar.channels import ChannelSpace, Cost
from onnxcar.errors import PlanError

__all__ = ["TINY", "Check", "Choice", "Chooser", "Clock", "Mark", "Path", "Remaining", "Step", "Stop"]

TINY = 1e-9  # a drop is a ratio of counts; this absorbs its rounding


@dataclass(frozen=True)
class Stop:
    """When a search ends; of several rules the first that bites. None at all means `max_drop=0.01`.

    Attributes:
        ratio: Fraction of the filters of each selected layer (at global scope of all together) to remove, in (0, 1).
        max_drop: A fraction: the step that would take the metric further below the original's is not made. At layer
            scope the search goes on with the next layer.
        target_macs: Fraction of the original's multiply-accumulates to come down to, in (0, 1).
        target_params: The same of its params.
        target_latency: The same of its latency, measured here.
        steps: At most that many greedy steps.
        time_limit: Seconds after which no further step is begun.

    Raises:
        PlanError: A value is out of its range.
    """

    ratio: float | None = None
    max_drop: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    steps: int | None = None
    time_limit: float | None = None
    target_latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("ratio", "target_macs", "target_params", "target_latency"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise PlanError(
                    f"{name} is {value}, and must be a fraction between 0 and 1, both excluded: 0.5 is half.",
                    field=name,
                )
        if self.max_drop is not None and not 0 <= self.max_drop < float("inf"):
            raise PlanError(
                f"max_drop is {self.max_drop}, and must be a fraction of at least 0: 0.01 is one point.",
                field="max_drop",
            )
        if self.steps is not None and self.steps < 1:
            raise PlanError(f"steps is {self.steps}, and must be at least 1.", field="steps")
        if self.time_limit is not None and not self.time_limit > 0:
            raise PlanError(f"time_limit is {self.time_limit} s, and must be above 0.", field="time_limit")

    @property
    def any(self) -> bool:
        """Whether there is any rule at all."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    @property
    def budget(self) -> bool:
        """Whether it says what the result may cost rather than how much exactly to remove."""
        exact = self.ratio is not None or self.steps is not None
        return not exact and self != Stop(time_limit=self.time_limit)


@dataclass(frozen=True)
class Mark:
    """Score of a network at some point of the path.

    Attributes:
        value: The metric, a fraction for accuracies.
        correct: Number of correct samples, None where the metric counts none.
        samples: Number of samples.
        drop: How far the metric is worse than the original's; negative is better.
    """

    value: float
    correct: int | None
    samples: int
    drop: float


@dataclass(frozen=True)
class Choice:
    """A group to remove next: its importance, and the score without it where that is known already."""

    group: int
    importance: float
    mark: Mark | None = None


class Chooser(Protocol):
    """Ranks candidates and scores networks; the two questions of the loop that cost time."""

    def lowest(self, removed: frozenset[int], candidates: Sequence[int], k: int) -> list[Choice]:
        """The k least important candidates, lowest first, ties broken as the interface says."""

    def mark(self, removed: frozenset[int]) -> Mark | None:
        """Score of the network without `removed`; None where there is no data."""

    def work(self, n_candidates: int) -> int:
        """How many candidate evaluations one call of `lowest` amounts to."""

    def step(self, removed: frozenset[int]) -> None:
        """Told after every step, those answered by a journal included, where the search stands."""


@dataclass(frozen=True)
class Step:
    """One removed group. Groups that left together share the step's number, and the score and cost after it.

    Attributes:
        step: Number of the greedy step, from 1.
        group: Id of the group.
        importance: What the criterion gave it then.
        mark: Score after the step; None where it was not asked for.
        cost: Params and MACs after the step.
    """

    step: int
    group: int
    importance: float
    mark: Mark | None
    cost: Cost

    def to_json(self, space: ChannelSpace) -> dict[str, Any]:
        """The step as in the record."""
        group = space.groups[self.group]
        return {
            "step": self.step,
            "group": group.name,
            "filters": [[weight, index] for weight, index in group.filters],
            "importance": self.importance,
            "value": None if self.mark is None else self.mark.value,
            "correct": None if self.mark is None else self.mark.correct,
            "macs": self.cost.macs,
            "params": self.cost.params,
        }


@dataclass(frozen=True)
class Check:
    """Latency of one network on the path, as a fraction of the original's.

    Attributes:
        groups: How many were gone.
        predicted: From the table of layers.
        measured: Of the compact network, interleaved with the original.
    """

    groups: int
    predicted: float
    measured: float


class Clock(Protocol):
    """Tells the latency of networks, as a fraction of the original's."""

    def predict(self, removed: Collection[int]) -> float:
        """From what is known of the layers; at once."""

    def check(self, removed: Collection[int]) -> float:
        """By running it."""


@dataclass(frozen=True)
class Remaining:
    """What a search that ran out of time would still have cost.

    Attributes:
        evaluations: Candidates still to look at, about: every layer to the end, or in proportion to how far a target
            of size was.
        seconds: For them, at the pace so far; None where nothing was measured.
    """

    evaluations: int
    seconds: float | None


@dataclass(frozen=True)
class Path:
    """What the loop removed.

    Attributes:
        steps: Removals that stand, in order.
        given_back: Removals that were taken back so that counts are the multiples asked for, or the drop stays within
            bounds.
        base: Score of the original, None without data.
        stopped: The rule that ended it: "ratio", "max_drop", "steps", "target_macs", "target_params",
            "target_latency", "time_limit", "guarantee", or "nothing left" where no further group may go.
        checks: Latencies that were measured on the way, over the original's.
        remaining: Where the time limit ended it, what the rest would have cost.
        widths: Vector widths that layers took instead of the one asked for, see `scope.Keep.holding`.
    """

    steps: tuple[Step, ...]
    given_back: tuple[Step, ...]
    base: Mark | None
    stopped: str
    checks: tuple[Check, ...] = ()
    remaining: Remaining | None = None
    widths: Mapping[int, int] = field(default_factory=dict)

    @property
    def groups(self) -> frozenset[int]:
        """Ids of the removed groups."""
        return frozenset(step.group for step in self.steps)
