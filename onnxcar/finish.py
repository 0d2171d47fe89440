"""What a set of groups becomes: removed, verified against the masked original, recovered, scored; always in that order.

Verification comes before recovery: it proves that removing is masking, which holds of unchanged weights. What is scored
is what is shipped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from onnxcar import surgery
from onnxcar.channels import ChannelSpace
from onnxcar.model import Model
from onnxcar.recovery import Recovered, recover
from onnxcar.scoring import Score, evaluate
from onnxcar.surgery import Plan, Verified

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

__all__ = ["Finished", "Finisher", "RunOn"]


@dataclass(frozen=True)
class RunOn:
    """How networks are run. Nothing here is meant to change a result."""

    provider: str
    threads: int | None
    batch_size: int | None
    memory_bytes: int | None

    def evaluate(self, model: Model, data: Dataset | None, metric: str) -> Score | None:
        """Score of a whole model; None without data."""
        return None if data is None else evaluate(model, data, metric=metric, **asdict(self))


@dataclass(frozen=True, eq=False)
class Finished:
    """One model that could be shipped.

    Attributes:
        plan: The groups that are gone.
        model: The compact model, recovered where that was asked for.
        score: On the data that filters were chosen on; None without data.
        verified: How far it was from the masked original before recovery; None where that was not asked.
        recovered: What recovery did; None without.
    """

    plan: Plan
    model: Model
    score: Score | None
    verified: Verified | None = None
    recovered: Recovered | None = None


@dataclass(frozen=True, eq=False)
class Finisher:
    """Makes models of groups.

    Attributes:
        space: Structure of the original.
        on: How models are run.
        data: What they are scored on.
        metric: In what.
        check: Whether they are verified.
        recover: Method of recovery, "none" for none.
        calibration: What recovery fits on.
        seed: Of recovery.
        drop: Whether output rows go that the data say do not count.
    """

    space: ChannelSpace
    on: RunOn
    data: Dataset | None
    metric: str
    check: bool = True
    recover: str = "none"
    calibration: Dataset | None = None
    seed: int = 0
    drop: bool = False

    def repaired(self, plan: Plan, compact: Model, progress: Report | None = None) -> Recovered | None:
        """The compact model recovered; None where that was not asked or nothing is gone."""
        if self.recover == "none" or self.calibration is None or not plan.groups:
            return None
        return recover(
            self.space,
            plan,
            compact,
            self.calibration,
            method=self.recover,
            seed=self.seed,
            progress=progress,
            **asdict(self.on),
        )

    def rebuilt(self, removed: frozenset[int]) -> Model:
        """The model without these groups, recovered, neither verified nor scored: what a search goes on with."""
        plan = Plan(removed)
        compact = surgery.remove(self.space, plan)
        recovered = self.repaired(plan, compact)
        return compact if recovered is None else recovered.model

    def make(self, groups: Collection[int], *, progress: Report | None = None) -> Finished:
        """The model without these groups, verified, recovered and scored.

        Raises:
            InternalError: It differs from the masked original.
        """
        plan = Plan(groups)
        compact = surgery.remove(self.space, plan)
        verified = surgery.verify(self.space, plan, compact) if self.check else None
        recovered = self.repaired(plan, compact, progress)
        model = compact if recovered is None else recovered.model
        if self.drop:
            assert self.data is not None
            assert self.data.outputs is not None
            model = surgery.keep_outputs(model, self.data.outputs.tolist(), norms=self.space.norms)
        return Finished(plan, model, self.evaluate(model, self.data), verified, recovered)

    def evaluate(self, model: Model, data: Dataset | None) -> Score | None:
        """Score of a model that `make` made; None without data."""
        return self.on.evaluate(model, data.among(None) if self.drop and data is not None else data, self.metric)
