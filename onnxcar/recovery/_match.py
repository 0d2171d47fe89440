"""Which channels of a model are gone in another: from a record, from the model's own metadata, or from its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar.channels import ChannelSpace, Layer
from onnxcar.errors import PlanError
from onnxcar.facts import attribute
from onnxcar.model import Model
from onnxcar.surgery import Plan, remove

Array = npt.NDArray[Any]


def plan_of(space: ChannelSpace, pruned: Model, plan: Mapping[str, Any] | None = None) -> tuple[Plan, str]:
    """The groups that are gone in `pruned`, and where that is known from: "plan", "metadata" or "weights".

    Args:
        space: Structure of the original.
        pruned: What it became.
        plan: A plan or record, where there is one.

    Raises:
        PlanError: The plan, or what the model says of itself, is of another original; or without either the
            surviving weights are not those of the original, bit for bit.
    """
    held = {p.key: p.value for p in pruned.proto.metadata_props}
    if plan is not None:
        found, origin = Plan.from_json(space, plan), "plan"
    elif held.get("onnxcar.source_sha256") == space.model.sha256 and "onnxcar.removed_filters" in held:
        removed = json.loads(held["onnxcar.removed_filters"])
        found, origin = Plan.from_json(space, {"schema": 1, "removed": removed}), "metadata"
    else:
        found, origin = _by_weights(space, pruned), "weights"
    _check(space, found, pruned)
    return found, origin


def _check(space: ChannelSpace, plan: Plan, pruned: Model) -> None:
    """Refuse a model that is not the original without the plan's channels; its weights may be others."""
    want = remove(space, plan).proto.graph
    there = {t.name: tuple(t.dims) for t in pruned.proto.graph.initializer}
    for t in want.initializer:
        if there.get(t.name) != tuple(t.dims):
            shown = "is missing" if t.name not in there else f"has shape {there[t.name]}"
            raise PlanError(
                f"Without the channels of the plan weight '{t.name}' has shape {tuple(t.dims)}; in the pruned model it "
                f"{shown}. Give the original that it was pruned from, and its own plan.",
                node=t.name,
            )
    outputs = {o for n in pruned.proto.graph.node for o in n.output}
    for node in want.node:
        if not set(node.output) <= outputs:
            raise PlanError(
                f"The pruned model has no value '{node.output[0]}'. Recovery needs a model that onnxcar wrote, not one "
                "that was optimised or exported again since.",
                node=node.name,
            )


def _by_weights(space: ChannelSpace, pruned: Model) -> Plan:
    """Layer by layer in graph order: the inputs that are left are known, filters are found by their values.

    Raises:
        PlanError: A filter of the pruned model is none of the original's.
    """
    held = _tensors(pruned)
    gone: set[int] = set()
    for layer in space.layers:
        new = held.get(layer.weight)
        old = _weights(space, layer)
        if new is None or new.ndim != old.ndim or new.dtype != old.dtype:
            raise PlanError(
                f"The pruned model has no weight '{layer.weight}' of {old.ndim} axes. Give the original that it was "
                "pruned from.",
                node=layer.node,
            )
        sites = [s for s in space.sites if s.node == layer.position and layer.axis in s.axes]
        groups = next((s.axes[layer.axis] for s in sites if len(s.axes[layer.axis]) == old.shape[layer.axis]), None)
        if groups is None:
            continue  # no site of its own: its filters follow others
        old, wanted = _cut(sites[0].axes, old, layer, gone, new)
        rows = np.moveaxis(old, layer.axis, 0).reshape(old.shape[layer.axis], -1)
        left = np.moveaxis(new, layer.axis, 0).reshape(new.shape[layer.axis], -1)
        if rows.shape[1] != left.shape[1] or not wanted:
            raise PlanError(_differs(layer))
        kept, at = [], 0
        for row in left:
            while at < len(rows) and not np.array_equal(rows[at], row):
                at += 1
            if at == len(rows):
                raise PlanError(_differs(layer))
            kept.append(at)
            at += 1
        missing = set(groups[np.setdiff1d(np.arange(len(rows)), kept)].tolist())
        if missing & set(groups[kept].tolist()) or -1 in missing:
            raise PlanError(_differs(layer))
        gone |= missing
    plan = Plan(gone)
    compact = remove(space, plan)
    same = {t.name: compact.array(t) for t in compact.proto.graph.initializer}
    for name, values in same.items():
        if name in held and not np.array_equal(values, held[name]):
            raise PlanError(
                f"Weight '{name}' of the pruned model differs from the original's, so which channels are gone cannot "
                "be found from the weights. Give the plan or record with --plan.",
                node=name,
            )
    return plan


def _cut(
    axes: Mapping[int, npt.NDArray[np.int64]], old: Array, layer: Layer, gone: set[int], new: Array
) -> tuple[Array, bool]:
    """The weights without the inputs that are gone, and whether their shape then fits but for the filters."""
    for axis, ids in axes.items():
        if axis != layer.axis and len(ids) == old.shape[axis]:
            old = np.compress([g not in gone for g in ids.tolist()], old, axis=axis)
    fits = all(a == layer.axis or old.shape[a] == new.shape[a] for a in range(old.ndim))
    return old, fits


def _differs(layer: Layer) -> str:
    return (
        f"The filters of '{layer.node}' in the pruned model are not those of the original, bit for bit, so which are "
        "gone cannot be found from the weights. Give the plan or record with --plan."
    )


def _weights(space: ChannelSpace, layer: Layer) -> Array:
    return np.asarray(space.facts.array(layer.weight))


def _tensors(model: Model) -> dict[str, Array]:
    held = {t.name: model.array(t) for t in model.proto.graph.initializer}
    for node in model.proto.graph.node:
        value = attribute(node, "value") if not node.input else None
        if isinstance(value, onnx.TensorProto):
            held[node.output[0]] = onnx.numpy_helper.to_array(value)
    return held
