"""From the labels of a finished walk to a `ChannelSpace`: shuffles, boxes, equal counts, groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar.channels import (
    ChannelSpace,
    Edit,
    Group,
    Labels,
    Layer,
    Protected,
    Read,
    Reason,
    Site,
    Term,
    unique_sets,
)
from onnxcar.facts import uses
from onnxcar.model import count_params
from onnxcar.rules._bundles import bundles
from onnxcar.rules._walk import RawLayer, Walk, axes_of

_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_MAX_SHUFFLE = 4_000_000  # positions of a value that are traced through a suspected shuffle


def finish(walk: Walk) -> ChannelSpace:
    """Groups, sites and reads in terms of groups."""
    _protect_borders(walk)
    inside = _shuffles(walk)
    _boxes(walk, inside)
    _balance(walk)
    _boxes(walk, inside)  # bundles may have tied channels that lie joint somewhere
    walk.classes.settle()
    _lone(walk, inside)
    return _space(walk, inside)


def _protect_borders(walk: Walk) -> None:
    for o in walk.graph.output:
        if o.name in walk.labels:
            walk.classes.protect(walk.labels[o.name], Reason(o.name, "output", "is an output of the network"))


def _shuffles(walk: Walk) -> set[str]:
    """Names of values inside Reshape-Transpose-Reshape runs that are one permutation of channels.

    Where such a run is cut it becomes a Gather, so that the joint channels inside tie nothing.
    """
    users = uses(walk.graph)
    outputs = {o.name for o in walk.graph.output}
    inside: set[str] = set()
    for first, node in enumerate(walk.graph.node):
        if node.op_type not in _MOVES or node.output[0] in inside:
            continue
        start = walk.labels.get(node.input[0])
        if start is None or len(axes_of(start)) != 1:
            continue
        run, value = [first], node.output[0]
        while value not in outputs and len(users.get(value, [])) == 1 and len(run) < 8:
            labels = walk.labels.get(value)
            if labels is None or (len(axes_of(labels)) == 1 and len(run) > 1):
                break
            follower = users[value][0][0]
            if walk.graph.node[follower].op_type not in _MOVES or users[value][0][1] != 0:
                break
            run.append(follower)
            value = walk.graph.node[follower].output[0]
        end = walk.labels.get(value)
        if len(run) < 3 or end is None or len(axes_of(end)) != 1:
            continue
        axis = axes_of(start)[0]
        if axes_of(end)[0] != axis or walk.facts.shape(value) != walk.facts.shape(node.input[0]):
            continue
        if not all(len(axes_of(walk.labels[walk.graph.node[i].output[0]])) > 1 for i in run[:-1]):
            continue
        order = _permutation(walk, run, axis)
        if order is None:
            continue
        inside.update(walk.graph.node[i].output[0] for i in run[:-1])
        walk.edits = [x for x in walk.edits if x.node not in run]
        walk.edits.append(
            Edit(
                run[-1], "shuffle", {"start": node.input[0], "axis": axis, "labels": start.reshape(-1), "index": order}
            )
        )
    return inside


def _permutation(walk: Walk, run: Sequence[int], axis: int) -> npt.NDArray[np.int64] | None:
    """The permutation of `axis` that a run of moves makes, None if it moves anything else."""
    shape = walk.facts.shape(walk.graph.node[run[0]].input[0])
    if shape is None or int(np.prod(shape)) > _MAX_SHUFFLE:
        return None
    ids = np.arange(int(np.prod(shape))).reshape(shape)
    x = ids
    for i in run:
        node = walk.graph.node[i]
        to = walk.facts.shape(node.output[0])
        if to is None:
            return None
        if node.op_type == "Transpose":
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            x = x.transpose(perm)
        else:
            x = x.reshape(to)
    stride = int(np.prod(shape[axis + 1 :]))
    order = np.moveaxis(x, axis, 0).reshape(shape[axis], -1)[:, 0] // stride % shape[axis]
    return order.astype(np.int64) if np.array_equal(x, np.take(ids, order, axis=axis)) else None


def _boxes(walk: Walk, inside: set[str]) -> None:
    """Joint channels (labels on several axes) can only be cut as a box: the largest axis stays free.

    Ties along the other axes may make new ones, hence to a fixpoint.
    """
    joint = [n for n, x in walk.labels.items() if n not in inside and len(axes_of(x)) > 1]
    changed = True
    while changed:
        changed = False
        walk.classes.settle()
        for name in joint:
            roots = walk.classes.roots(walk.labels[name])
            varying = _varying(roots)
            if len(varying) < 2:
                continue
            free = max(varying, key=lambda a: roots.shape[a])
            for axis in varying:
                if axis != free:
                    first = np.broadcast_to(np.take(roots, [0], axis=axis), roots.shape)
                    walk.classes.tie(first, roots, Reason(name, "", "joint channels are cut as a box"))
            changed = True


def _varying(roots: Labels) -> list[int]:
    """Axes along which the classes differ."""
    return [a for a in axes_of(roots) if not (roots == np.take(roots, [0], axis=a)).all()]


def _balance(walk: Walk) -> None:
    """Blocks of grouped Convs keep equal counts: classes are bundled so that every bundle does."""
    constraints: list[list[Labels]] = []
    for e in walk.equal:
        parts = []
        for part in e.parts:
            roots = walk.classes.roots(part)
            parts.append(
                np.asarray([r if walk.classes.reason(int(r)) is None else 0 for r in roots.tolist()], np.int64)
            )
        constraints.append(parts)
    found, alone = bundles(constraints)
    for bundle in found:
        first = np.asarray(bundle[:1], np.int64)
        walk.classes.tie(first, np.asarray(bundle, np.int64), Reason("", "", "blocks keep equal counts"))
    for label, k in alone.items():
        node = walk.equal[k].node
        text = "has no partner in the other blocks of this grouped Conv, which must keep equal counts"
        walk.classes.protect(np.asarray([label]), Reason(walk.name(node), walk.graph.node[node].op_type, text))


def _lone(walk: Walk, inside: set[str]) -> None:
    """A class that is a whole axis of some value cannot go: the value would be empty."""
    for name, labels in walk.labels.items():
        for ids in _axis_sets(walk.classes.roots(labels), name in inside):
            roots = np.unique(ids)
            if len(roots) == 1 and roots[0] and walk.classes.reason(int(roots[0])) is None:
                text = "all channels of this value leave together, and it would be empty"
                maker = walk.facts.producers.get(name)
                op = walk.graph.node[maker].op_type if maker is not None else ""
                node = walk.name(maker) if maker is not None else name
                walk.classes.protect(roots, Reason(node, op, text))


def _axis_sets(classes: Labels, joint: bool) -> Iterable[Labels]:
    """The classes along the axis that tells channels apart; of joint channels inside a shuffle nothing."""
    if joint or classes.size == 1:
        return
    axes = _varying(classes) or [max(axes_of(classes), key=lambda a: classes.shape[a])]
    for axis in axes:
        yield _line(classes, axis)


def _line(classes: Labels, axis: int) -> Labels:
    moved = np.moveaxis(classes, axis, 0)
    return moved.reshape(moved.shape[0], -1)[:, 0]


def _space(walk: Walk, inside: set[str]) -> ChannelSpace:
    roots = walk.classes.roots
    ids: dict[int, int] = {}
    layers, members = _layers(walk, ids)
    table = np.full(len(walk.classes), -1, np.int64)
    for label, g in ids.items():
        table[label] = g

    def to_ids(labels: Labels) -> Labels:
        return np.asarray(table[roots(np.asarray(labels))])

    def along(labels: Labels, axis: int) -> Labels:
        classes = to_ids(labels)
        varying = _varying(classes)
        if varying and axis not in varying:
            return np.full(classes.shape[axis], -1, np.int64)  # cut along another axis: here all positions stay
        return _line(classes, axis)

    groups = _groups(layers, members)
    sites = []
    for s in walk.sites:
        axes = {a: along(x, k) for a, (x, k) in s.axes.items()}
        if any((v >= 0).any() for v in axes.values()):
            sites.append(Site(s.node, s.input, axes, s.blocks, s.rows))
    labels = {n: to_ids(x) for n, x in walk.labels.items()}
    sets = []
    for name, x in labels.items():
        for part in _axis_sets(x, name in inside):
            if len(part) and (part >= 0).all():
                sets.append((name, np.unique(part)))
    for site in sites:
        if site.blocks > 1:
            for a, v in site.axes.items():
                if (v >= 0).all():
                    sets.append((walk.graph.node[site.node].input[site.input] + f" axis {a}", np.unique(v)))
    edits = tuple(Edit(x.node, x.kind, {k: _converted(v, to_ids, k) for k, v in x.args.items()}) for x in walk.edits)
    terms = tuple(Term(t.node, t.scale, to_ids(t.reads), to_ids(t.writes), t.blocks) for t in walk.terms)
    return ChannelSpace(
        model=walk.facts.model,
        facts=walk.facts,
        layers=tuple(layers),
        groups=groups,
        reads=_reads(walk, to_ids),
        protected=_protected(walk, layers),
        sites=tuple(sites),
        edits=edits,
        terms=terms,
        labels=labels,
        crossing={n: to_ids(x) for n, x in walk.crossing.items()},
        keep_one=unique_sets(sets),
        unsupported=walk.unsupported,
        norms=walk.norms,
        base_params=count_params(walk.facts.model),
    )


_PLAIN = (
    "index",
    "axes",
    "pads",
    "axis",
    "blocks",
    "input",
    "start",
    "channels",
    "total",
    "param_axis",
)  # arguments that hold no labels


def _converted(value: Any, to_ids: Callable[[Labels], Labels], key: str) -> Any:
    """Edit arguments with labels replaced by group ids, at any depth; indices and numbers stay."""
    if key in _PLAIN:
        return value
    if isinstance(value, np.ndarray):
        return to_ids(value)
    if isinstance(value, list | tuple):
        return type(value)(_converted(v, to_ids, key) for v in value)
    if isinstance(value, dict):
        return {k: _converted(v, to_ids, key) for k, v in value.items()}
    return value


def weight_name(walk: Walk, raw: RawLayer) -> str:
    """Name of the stored tensor behind a layer's weight."""
    name = str(walk.graph.node[raw.node].input[raw.input])
    while name not in walk.facts.initializers and name in walk.facts.producers:
        node = walk.graph.node[walk.facts.producers[name]]
        if not node.input or not node.input[0]:
            break
        if node.op_type not in ("Identity", "Cast", "Transpose", "DequantizeLinear", "QuantizeLinear"):
            break
        name = str(node.input[0])
    return name


def _layers(walk: Walk, ids: dict[int, int]) -> tuple[list[Layer], dict[int, list[tuple[int, int]]]]:
    """Layers in graph order; `ids` gets a dense id for each class that may go, in the order of first filters."""
    layers: list[Layer] = []
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for raw in walk.layers:
        roots = walk.classes.roots(raw.labels)
        index = len(layers)
        groups = np.full(len(roots), -1, np.int32)
        for i, root in enumerate(roots.tolist()):
            if root and walk.classes.reason(root) is None:
                g = ids.setdefault(root, len(ids))
                groups[i] = g
                members[g].append((index, i))
        node = walk.graph.node[raw.node]
        layers.append(
            Layer(
                index,
                walk.name(raw.node),
                node.op_type,
                weight_name(walk, raw),
                len(roots),
                raw.kind,
                groups,
                raw.axis,
                raw.node,
            )
        )
    return layers, members


def _groups(layers: list[Layer], members: dict[int, list[tuple[int, int]]]) -> tuple[Group, ...]:
    out = []
    for g in range(len(members)):
        seen = dict.fromkeys((layers[k].weight, i) for k, i in members[g])
        first, index = members[g][0]
        out.append(Group(g, f"{layers[first].node}:{index}", first, tuple(seen)))
    return tuple(out)


def _reads(walk: Walk, to_ids: Callable[[Labels], Labels]) -> tuple[Read, ...]:
    found: dict[tuple[str, bytes, tuple[int, ...]], tuple[npt.NDArray[np.int32], list[tuple[int, int]]]] = {}
    for r in walk.reads:
        ids = to_ids(r.labels).astype(np.int32)
        if (ids >= 0).any():
            value = walk.graph.node[r.node].input[r.input]
            found.setdefault((value, ids.tobytes(), ids.shape), (ids, []))[1].append((r.node, r.input))
    return tuple(Read(key[0], tuple(dict.fromkeys(users)), ids) for key, (ids, users) in found.items())


def _protected(walk: Walk, layers: list[Layer]) -> tuple[Protected, ...]:
    out = []
    for raw, layer in zip(walk.layers, layers, strict=True):
        by_reason: dict[Reason, list[int]] = defaultdict(list)
        for i, label in enumerate(raw.labels.tolist()):
            if layer.groups[i] < 0:
                reason = walk.classes.reason(label) if label else None
                by_reason[reason or Reason(layer.node, layer.op_type, "its input channels cannot go")].append(i)
        out += [Protected(layer.node, layer.weight, tuple(v), r.node, r.op_type, r.text) for r, v in by_reason.items()]
    return tuple(out)
