"""The greedy loop: remove the least important group, look again, until a stop rule bites.

Deterministic: what it does follows from the answers of its journal alone, so a resumed run walks the same path.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxcar.channels import ChannelSpace
from onnxcar.journal import Journal
from onnxcar.progress import Report
from onnxcar.scope import Field, Keep
from onnxcar.steps import TINY, Check, Choice, Chooser, Clock, Mark, Path, Remaining, Step, Stop

TARGETS = ("target_macs", "target_params", "target_latency")
CHECKS = 6  # measurements of a network on the way to a target latency
FURTHER = 0.98  # after one that missed, the prediction has to fall at least so far

__all__ = ["Choice", "Chooser", "Mark", "Path", "Step", "Stop", "prefixes", "retreat", "shorten", "walk"]


def walk(
    space: ChannelSpace,
    search_fields: Sequence[Field],
    chooser: Chooser,
    *,
    stop: Stop,
    keep: Keep,
    whole: Sequence[Field] = (),
    per_step: int = 1,
    journal: Journal | None = None,
    progress: Report | None = None,
    started: float | None = None,
    clock: Clock | None = None,
    renew: Callable[[frozenset[int]], bool] | None = None,
) -> Path:
    """Remove groups field by field; see `Stop` for when it ends.

    Args:
        space: Structure of the original.
        search_fields: What competes with what, in the order they are worked on.
        chooser: Ranks and scores.
        stop: When to end; at least one rule.
        keep: What layers keep.
        whole: For a pruning ratio per layer: every selected layer with all groups that touch it. While one layer is
            worked on, no group is taken that would push another one past its ratio, as long as there are others; in
            the end every layer that is still short of the ratio, its groups counting for earlier ones, is filled up.
        per_step: Groups removed before the candidates are scored again, at most.
        journal: Answers of an interrupted run, and where new ones go.
        progress: Told after every step.
        started: `time.monotonic()` from which the time limit counts, default now.
        clock: Tells latencies; a rule on latency needs one.
        renew: Has the network without some groups recovered before a drop ends the search, since what is shipped is
            recovered, too; False where nothing is.
    """
    loop = _Loop(space, search_fields, chooser, stop, keep, per_step, journal or Journal(None, {}), progress)
    loop.whole = tuple(whole) if stop.ratio is not None else ()
    loop.clock = clock
    loop.renew = renew
    return loop.run(time.monotonic() if started is None else started)


def retreat(space: ChannelSpace, path: Path, keep: Keep) -> Path:
    """The path without its last removal, and without what then is no multiple any more; its last score is unknown."""
    groups = [step.group for step in path.steps[:-1]]
    keep = replace(keep, widths=path.widths)
    return shorten(space, path, frozenset(groups) - keep.given_back(groups, keep.all_layers()))


def shorten(space: ChannelSpace, path: Path, groups: frozenset[int]) -> Path:
    """The path with only these of its removals standing; the others were given back, its last score is unknown."""
    if groups == path.groups:
        return path
    steps = tuple(step for step in path.steps if step.group in groups)
    if steps:
        steps = (*steps[:-1], replace(steps[-1], cost=space.cost(groups), mark=None))
    gone = [*path.given_back, *(step for step in path.steps if step.group not in groups)]
    return replace(path, steps=steps, given_back=_sorted(gone))


def prefixes(path: Path, keep: Keep) -> list[frozenset[int]]:
    """What could be shipped after each step, in order, counts made the multiples asked for; the last is `path.groups`.

    Sets that repeat, and the empty one, are left out.
    """
    found: list[frozenset[int]] = []
    gone: list[int] = []
    keep = replace(keep, widths=path.widths)
    layers = keep.all_layers()
    for i, step in enumerate(path.steps):
        gone.append(step.group)
        last = i + 1 == len(path.steps)
        if not last and path.steps[i + 1].step == step.step:
            continue  # groups of one step leave together
        left = path.groups if last else frozenset(gone) - keep.given_back(gone, layers)
        if left and (not found or left != found[-1]):
            found.append(left)
    return found


def _sorted(steps: Iterable[Step]) -> tuple[Step, ...]:
    return tuple(sorted(steps, key=lambda step: (step.step, step.group)))


class _Loop:
    """State of one walk: the path so far, and what is known of the networks on it."""

    def __init__(
        self,
        space: ChannelSpace,
        search_fields: Sequence[Field],
        chooser: Chooser,
        stop: Stop,
        keep: Keep,
        per_step: int,
        journal: Journal,
        progress: Report | None,
    ) -> None:
        self.space, self.fields, self.chooser, self.stop, self.keep = space, search_fields, chooser, stop, keep
        self.per_step, self.journal, self.progress = per_step, journal, progress
        self.whole: tuple[Field, ...] = ()
        self.clock: Clock | None = None
        self.renew: Callable[[frozenset[int]], bool] | None = None
        self.checks: list[Check] = []
        self.timed: frozenset[int] = frozenset()  # what was last looked at for its latency
        self.aim = stop.target_latency or 0.0  # predicted latency at which it is time to measure
        self.sharing: dict[tuple[int, ...], list[Field]] = {}  # of `whole`, those with groups of a field
        self.original = space.cost(())
        self.settled = (frozenset[int](), self.original)  # what would be shipped when last looked at, and its cost
        self.steps: list[Step] = []
        self.back: list[Step] = []
        self.removed: frozenset[int] = frozenset()  # groups of `steps`
        self.n_steps = 0
        self.marks: dict[frozenset[int], Mark | None] = {}
        self.done = 0
        self.deadline = float("inf")
        self.longest_s = 0.0
        self.spent_s, self.spent = 0.0, 0  # of answers that were no replay: seconds, and candidates looked at
        self.remaining: Remaining | None = None

    def run(self, started: float) -> Path:
        if self.stop.time_limit is not None:
            self.deadline = started + self.stop.time_limit
        base = self.mark(frozenset())
        stopped = "nothing left"
        dropped: set[tuple[int, ...]] = set()  # layers that max_drop ended: filling them up would break it again
        for number, field in enumerate((*self.fields, *self.whole)):
            if number >= len(self.fields) and (field.layers in dropped or self.short(field) <= 0):
                continue
            stopped = self.exhaust(field, sum(self.estimate(later) for later in self.fields[number + 1 :]))
            if self.stop.max_drop is not None and stopped not in TARGETS:
                self.keep = self.keep.holding([step.group for step in self.steps], self.keep.touched(field.groups))
            self.settle(field.layers)
            self.close()
            if stopped == "max_drop":
                dropped.add(field.layers)
            if stopped in (*TARGETS, "steps", "time_limit"):
                break
        self.settle(self.keep.all_layers())
        if self.stop.max_drop is not None:
            self.keep_promise(self.stop.max_drop)
        self.close()
        self.report(self.done, stopped)
        back, checks = _sorted(self.back), tuple(self.checks)
        return Path(tuple(self.steps), back, base, stopped, checks, self.remaining, dict(self.keep.widths))

    def exhaust(self, field: Field, later: int) -> str:
        """Remove groups of one field until a rule bites; its name.

        A step of several groups that breaks the promise on the drop is tried again with half as many.
        """
        size = self.per_step
        while True:
            if (rule := self.bitten()) is not None:
                if rule == "time_limit":
                    self.remaining = self.rest(field, later)
                return rule
            removed = self.removed
            missing = None if self.stop.ratio is None else self.short(field)
            if missing is not None and missing <= 0:
                return "ratio"
            given_back = {step.group for step in self.back}
            candidates = [g for g in self.keep.allowed(field.groups, removed) if g not in given_back]
            if not candidates:
                return "nothing left"
            candidates = self.within(field, candidates) or candidates
            self.tell(field, later, len(candidates), missing)
            k = size if missing is None else min(size, missing)
            choices = self.lowest(removed, candidates, min(k, len(candidates)))
            taken = self.compatible(choices, removed, field, missing)
            after = removed | {choice.group for choice in taken}
            mark = self.mark_after(taken, after)
            if self.stop.max_drop is not None and (mark is None or mark.drop > self.stop.max_drop + TINY):
                mark = self.recovered(after)
            if self.stop.max_drop is not None and (mark is None or mark.drop > self.stop.max_drop + TINY):
                if len(taken) == 1:
                    return "max_drop"
                size = len(taken) // 2
                continue
            self.n_steps += 1
            cost = self.space.cost(after)
            self.steps += [Step(self.n_steps, c.group, c.importance, mark, cost) for c in taken]
            self.removed = after
            self.chooser.step(after)
            self.done += self.chooser.work(len(candidates))

    def recovered(self, after: frozenset[int]) -> Mark | None:
        """Score of the network without `after` as it would be shipped, recovered; None where nothing is recovered."""
        if self.renew is None or not self.renew(after):
            return None
        self.marks = {groups: mark for groups, mark in self.marks.items() if not after <= groups}
        mark = self.mark(after)
        if mark is not None and self.stop.max_drop is not None and mark.drop > self.stop.max_drop + TINY:
            self.chooser.step(self.removed)  # the step is not made: back to the network before it
        return mark

    def short(self, field: Field) -> int:
        """Filters of a field that are still to go for the ratio; what was given back is not asked for again."""
        assert self.stop.ratio is not None
        gone = (field.touching & self.removed) | (field.touching & {step.group for step in self.back})
        return field.wanted(self.stop.ratio) - sum(field.counts[group] for group in gone)

    def within(self, field: Field, candidates: Sequence[int]) -> list[int]:
        """Candidates that push no other layer past its ratio."""
        if field.layers not in self.sharing:
            own = frozenset(field.groups)
            others = [other for other in self.whole if other.layers != field.layers and other.touching & own]
            self.sharing[field.layers] = others
        full: set[int] = set()
        for other in self.sharing[field.layers]:
            room = self.short(other)
            full.update(group for group in candidates if other.counts.get(group, 0) > room)
        return [group for group in candidates if group not in full]

    def bitten(self) -> str | None:
        """The rule that ends the whole search here, if any; targets are held against what would be shipped."""
        if self.stop.steps is not None and self.n_steps >= self.stop.steps:
            return "steps"
        for rule in ("target_macs", "target_params"):
            if self.meets(rule):
                return rule
        if self.fast():
            return "target_latency"
        # Answers from the journal take no time: a run that goes on has the whole limit for what is left.
        if not self.journal.replaying and time.monotonic() + self.longest_s > self.deadline:
            return "time_limit"
        return None

    def meets(self, rule: str) -> bool:
        """Whether a cost target is met, by what is left when counts are made the multiples asked for."""
        share: float | None = getattr(self.stop, rule)
        if share is None:
            return False
        name = rule.removeprefix("target_")
        goal = share * getattr(self.original, name)
        if getattr(self.steps[-1].cost if self.steps else self.original, name) > goal:
            return False  # giving back only adds
        left = self.left()
        if left != self.settled[0]:
            self.settled = (left, self.space.cost(left))
        return bool(getattr(self.settled[1], name) <= goal)

    def left(self) -> frozenset[int]:
        """The groups that would be gone if it ended here: counts made the multiples asked for."""
        return self.removed - self.keep.given_back([step.group for step in self.steps], self.keep.all_layers())

    def fast(self) -> bool:
        """Whether the target latency is met: predicted first, then measured.

        Where the measurement misses, the prediction is held to be wrong by as much further on. After `CHECKS`
        measurements the search ends; the last one tells how far off it is.
        """
        goal = self.stop.target_latency
        if goal is None or self.clock is None or not self.removed:
            return False
        left = self.left()
        if left == self.timed or not left:
            return False
        self.timed = left
        predicted = self.clock.predict(left)
        if predicted > self.aim:
            return False
        clock = self.clock
        measured = self.journal.ask({"latency": len(left), "crc": _crc(left)}, lambda: clock.check(left))
        self.checks.append(Check(len(left), predicted, measured))
        self.aim = min(self.aim, predicted) * min(goal / measured, FURTHER)
        return bool(measured <= goal) or len(self.checks) >= CHECKS

    def compatible(
        self, choices: Sequence[Choice], removed: frozenset[int], field: Field, room: int | None
    ) -> list[Choice]:
        """The choices that can go together, in order: each alone could, two may empty a layer; no more than asked."""
        taken: list[Choice] = []
        filters = 0
        for choice in choices:
            if room is not None and filters >= room:
                break
            if not taken or self.keep.allowed([choice.group], removed | {c.group for c in taken}):
                taken.append(choice)
                filters += field.counts[choice.group]
        return taken

    def settle(self, layers: Collection[int]) -> None:
        """Give back the last removals of layers whose count is not the multiple asked for."""
        self.give_back(self.keep.given_back([step.group for step in self.steps], layers))

    def keep_promise(self, max_drop: float) -> None:
        """Give back from the end until the drop is within bounds: giving back for a multiple may have raised it."""
        while self.steps and (mark := self.mark(self.removed)) is not None and mark.drop > max_drop + TINY:
            self.give_back({self.steps[-1].group})
            self.settle(self.keep.all_layers())

    def give_back(self, groups: Collection[int]) -> None:
        self.back += [step for step in self.steps if step.group in groups]
        self.steps = [step for step in self.steps if step.group not in groups]
        self.removed = self.removed.difference(groups)
        if groups:
            self.chooser.step(self.removed)

    def close(self) -> None:
        """Score and cost where a field ends; giving back may have torn a step apart, and not every step is scored."""
        if self.steps:
            mark, cost = self.mark(self.removed), self.space.cost(self.removed)
            self.steps[-1] = replace(self.steps[-1], mark=mark, cost=cost)

    # --- the two questions ----------------------------------------------------------------------------------------

    def lowest(self, removed: frozenset[int], candidates: Sequence[int], k: int) -> list[Choice]:
        begun, live = time.monotonic(), not self.journal.replaying
        answer = self.journal.ask(
            {"lowest": k, "of": len(candidates), "after": len(removed), "crc": _crc(removed)},
            lambda: [_choice_to_json(choice) for choice in self.chooser.lowest(removed, candidates, k)],
        )
        took = time.monotonic() - begun
        self.longest_s = max(self.longest_s, took)
        if live:
            self.spent_s, self.spent = self.spent_s + took, self.spent + self.chooser.work(len(candidates))
        return [_choice_from_json(choice) for choice in answer]

    def mark(self, removed: frozenset[int]) -> Mark | None:
        if removed not in self.marks:
            answer = self.journal.ask(
                {"score": len(removed), "crc": _crc(removed)}, lambda: _mark_to_json(self.chooser.mark(removed))
            )
            self.marks[removed] = _mark_from_json(answer)
        return self.marks[removed]

    def mark_after(self, taken: Sequence[Choice], after: frozenset[int]) -> Mark | None:
        """Score after a step: a lone choice brings its own, others are asked for where a rule needs them."""
        if len(taken) == 1 and taken[0].mark is not None:
            self.marks[after] = taken[0].mark
            return taken[0].mark
        if self.stop.max_drop is not None or taken[0].mark is not None:
            return self.mark(after)
        return None

    # --- progress -------------------------------------------------------------------------------------------------

    def estimate(self, field: Field, n_candidates: int | None = None, filters: int | None = None) -> int:
        """Candidate evaluations that a field still takes at most."""
        n = len(field.groups) if n_candidates is None else n_candidates
        if filters is None:
            filters = field.filters if self.stop.ratio is None else field.wanted(self.stop.ratio)
        rounds = -(-min(n, filters) // self.per_step)
        if self.stop.steps is not None:
            rounds = min(rounds, self.stop.steps - self.n_steps)
        return sum(self.chooser.work(n - i * self.per_step) for i in range(rounds))

    def ahead(self, field: Field, n_candidates: int, filters: int | None, later: int) -> int:
        """Candidate evaluations still to make: of this field and later ones, or in proportion to a target of size."""
        evaluations = self.estimate(field, n_candidates, filters) + later
        cost = self.steps[-1].cost if self.steps else self.original
        for name in ("macs", "params"):
            share: float | None = getattr(self.stop, f"target_{name}")
            if share is None:
                continue
            whole, now = getattr(self.original, name), getattr(cost, name)
            if now <= share * whole:
                now = getattr(self.settled[1], name)  # what is given back for multiples is what is still missing
            if now < whole:
                evaluations = min(evaluations, round(self.done * max(0.0, now - share * whole) / (whole - now)))
        return evaluations

    def rest(self, field: Field, later: int) -> Remaining:
        """What is still to do from here: of this field, and of those after it."""
        n = len(self.keep.allowed(field.groups, self.removed))
        filters = None if self.stop.ratio is None else max(0, self.short(field))
        evaluations = self.ahead(field, n, n if filters is None else filters, later)
        pace = self.spent_s / self.spent if self.spent else None
        return Remaining(evaluations, None if pace is None else round(pace * evaluations, 3))

    def tell(self, field: Field, later: int, n_candidates: int, filters: int | None) -> None:
        if self.progress is not None:
            self.report(self.done + self.ahead(field, n_candidates, filters, later), field.name)

    def report(self, total: int, where: str) -> None:
        if self.progress is not None:
            drop = self.steps[-1].mark.drop if self.steps and self.steps[-1].mark is not None else None
            lost = "" if drop is None else f", drop {drop:.4f}"
            self.progress.update(self.done, total, f"{where}: {len(self.steps)} groups removed{lost}")


def _crc(removed: Collection[int]) -> int:
    """Fingerprint of a set of groups, so that a journal cannot answer for another."""
    return zlib.crc32(np.sort(np.fromiter(removed, "<i8", len(removed))).tobytes())


def _mark_to_json(mark: Mark | None) -> list[Any] | None:
    return None if mark is None else [mark.value, mark.correct, mark.samples, mark.drop]


def _mark_from_json(value: list[Any] | None) -> Mark | None:
    return None if value is None else Mark(*value)


def _choice_to_json(choice: Choice) -> list[Any]:
    return [choice.group, choice.importance, _mark_to_json(choice.mark)]


def _choice_from_json(value: list[Any]) -> Choice:
    return Choice(value[0], value[1], _mark_from_json(value[2]))
