"""A plan: a set of groups to remove, order-free, and its JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxcar.channels import ChannelSpace
from onnxcar.errors import PlanError


@dataclass(frozen=True)
class Plan:
    """Groups of one `ChannelSpace` that leave.

    Attributes:
        groups: Their ids.
    """

    groups: frozenset[int]

    def __init__(self, groups: Iterable[int] = ()) -> None:
        object.__setattr__(self, "groups", frozenset(int(g) for g in groups))

    def __or__(self, other: Plan) -> Plan:
        return Plan(self.groups | other.groups)

    def removed(self, space: ChannelSpace) -> dict[str, list[int]]:
        """Weight name -> original indices of the filters that go, ascending; weights in graph order."""
        return removed_filters(space, self.groups)

    def to_json(self, space: ChannelSpace) -> dict[str, Any]:
        """The plan file of the interface."""
        return {"schema": 1, "model_sha256": space.model.sha256, "removed": self.removed(space)}

    @classmethod
    def from_json(cls, space: ChannelSpace, obj: Mapping[str, Any]) -> Plan:
        """A plan or record read back; it must name whole groups of this very model.

        Raises:
            PlanError: Another model's plan, an unknown or protected filter, or part of a group.
        """
        obj = _header(obj, space)
        wanted = {(name, i) for name, indices in obj.items() for i in indices}
        owner = {f: g.id for g in space.groups for f in g.filters}
        sizes = {x.weight: x.filters for x in space.layers}
        for name, i in sorted(wanted - owner.keys()):
            if name not in sizes:
                raise PlanError(f"The plan names weight '{name}', which no layer of this model has. Run inspect.")
            if not 0 <= i < sizes[name]:
                raise PlanError(f"The plan removes filter {i} of '{name}', which has {sizes[name]}. Correct the index.")
            reason = next((p for p in space.protected if p.weight == name and i in p.filters), None)
            why = f": {reason.reason} (node '{reason.node}')" if reason else ""
            raise PlanError(
                f"The plan removes filter {i} of '{name}', which is protected{why}. Take it out of the plan."
            )
        plan = cls(owner[f] for f in wanted)
        for g in plan.groups:
            for name, i in space.groups[g].filters:
                if (name, i) not in wanted:
                    first = next(f for f in space.groups[g].filters if f in wanted)
                    raise PlanError(
                        f"The plan removes filter {first[1]} of '{first[0]}' but not filter {i} of '{name}', which "
                        "leaves together with it. Add the one or take out the other.",
                        kept=(name, i),
                    )
        return plan


def removed_filters(space: ChannelSpace, groups: Collection[int]) -> dict[str, list[int]]:
    """Weight name -> original indices of the filters of `groups`, ascending; weights in graph order."""
    found: dict[str, set[int]] = defaultdict(set)
    for g in groups:
        for name, i in space.groups[g].filters:
            found[name].add(i)
    return {x.weight: sorted(found[x.weight]) for x in space.layers if x.weight in found}


def _header(obj: Mapping[str, Any], space: ChannelSpace) -> dict[str, list[int]]:
    if not isinstance(obj, Mapping) or not isinstance(obj.get("removed"), Mapping):
        raise PlanError("The plan has no table 'removed'. Write one with prune --dry-run.")
    if obj.get("schema") != 1:
        raise PlanError(f"The plan has schema {obj.get('schema')!r}; this version reads schema 1.")
    theirs = obj.get("model_sha256") or (obj.get("model") or {}).get("sha256")
    if theirs and theirs != space.model.sha256:
        raise PlanError(
            f"The plan was made for a model with sha256 {str(theirs)[:12]}..., this one has "
            f"{space.model.sha256[:12]}.... Use it with its own model.",
            theirs=theirs,
            ours=space.model.sha256,
        )
    out: dict[str, list[int]] = {}
    for name, indices in obj["removed"].items():
        if not isinstance(indices, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
            raise PlanError(f"The plan's entry for '{name}' is no list of filter indices. Correct it.")
        out[str(name)] = indices
    return out


def checked(space: ChannelSpace, plan: Plan) -> Collection[int]:
    """The plan's groups.

    Raises:
        PlanError: Ids out of range, or the plan would leave a value without channels.
    """
    wrong = [g for g in plan.groups if not 0 <= g < len(space.groups)]
    if wrong:
        raise PlanError(f"The plan names group {wrong[0]}; this model has groups 0 to {len(space.groups) - 1}.")
    empty = space.empties(plan.groups)
    if empty is not None:
        raise PlanError(f"The plan removes all channels of '{empty}'. Take at least one group out of it.", node=empty)
    return plan.groups
