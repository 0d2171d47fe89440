"""Where a search may remove: selected layers, the fields whose groups compete, and what every layer must keep."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from onnxcar.channels import ChannelSpace, Layer
from onnxcar.errors import PlanError

__all__ = ["Field", "Keep", "fields", "select_layers", "vector_width"]

NARROWEST = 4  # counts that are no multiple of 4 leave the blocked layout of ONNX Runtime's CPU kernels
GPU_MULTIPLE = 8  # tensor cores take channels in eights


def select_layers(
    space: ChannelSpace, layers: Sequence[str] = (), exclude: Sequence[str] = (), *, dense: bool = False
) -> tuple[Layer, ...]:
    """The layers whose filters may go, in graph order.

    Without `layers` these are all convolutions (transposed ones too), and with `dense` the dense layers. A depthwise
    layer has no filters of its own to choose, they follow its input; it is taken only when named.

    Args:
        space: Structure of the model.
        layers: Patterns over node and weight names (`*`, `?`, `[...]`, case counts); one match is enough.
        exclude: Patterns of layers that keep every filter; groups that reach into them stay as a whole.
        dense: Select dense layers as well where `layers` names none.

    Raises:
        PlanError: A pattern matches nothing (`pattern`), or nothing that is selected can go.
    """
    named = [_matching(space, pattern, "--layers") for pattern in layers]
    kept = {layer.index for pattern in exclude for layer in _matching(space, pattern, "--exclude")}
    if layers:
        chosen = {layer.index for match in named for layer in match}
    else:
        kinds = {"conv", "dense"} if dense else {"conv"}
        chosen = {layer.index for layer in space.layers if layer.kind in kinds}
    selected = tuple(layer for layer in space.layers if layer.index in chosen - kept)
    if not any((layer.groups >= 0).any() for layer in selected):
        raise PlanError(_nothing_to_remove(space, selected, bool(layers or exclude)))
    return selected


def _matching(space: ChannelSpace, pattern: str, flag: str) -> list[Layer]:
    found = [
        layer
        for layer in space.layers
        if pattern in (layer.node, layer.weight)
        or fnmatchcase(layer.node, pattern)
        or fnmatchcase(layer.weight, pattern)
    ]
    if not found:
        names = sorted({name for layer in space.layers for name in (layer.node, layer.weight)})
        bare = pattern.strip("*?")
        near = difflib.get_close_matches(bare, names, n=3, cutoff=0.4) or names[:3]
        raise PlanError(
            f"{flag} {pattern!r} matches no layer of the {len(space.layers)} there are. "
            f"Near: {', '.join(map(repr, near))}. `onnxcar inspect` lists all of them.",
            pattern=pattern,
            near=near,
        )
    return found


def _nothing_to_remove(space: ChannelSpace, selected: Sequence[Layer], asked: bool) -> str:
    if not space.layers:
        return "The model has no layer with filters (no Conv, Gemm or MatMul with constant weights): nothing to prune."
    if not selected and asked:
        return "--layers and --exclude leave no layer to prune. Take a pattern out."
    if not selected:
        dense = [layer.node for layer in space.layers if layer.kind == "dense"]
        return (
            f"The model has no convolution to prune, only dense layers ({', '.join(map(repr, dense[:3]))}). "
            "Name those to prune with --layers."
        )
    indices = {layer.node for layer in selected}
    reasons = [f"{p.layer!r}: {p.reason}" for p in space.protected if p.layer in indices][:3]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"No filter of the {len(selected)} selected layers can go{why}. "
        "`onnxcar inspect` tells the reason of every layer; --norms rewrite frees channels under normalisations."
    )


@dataclass(frozen=True, eq=False)
class Field:
    """Groups that compete with each other: those of one layer, or of all selected layers at global scope.

    Attributes:
        name: Node name of the layer, or "global".
        groups: Their ids, ascending.
        filters: How many filters its layers have, protected ones too: what a pruning ratio is a fraction of.
        counts: Group id -> how many of those filters it takes; groups that count for an earlier layer, too.
        layers: Indices of its layers.
    """

    name: str
    groups: tuple[int, ...]
    filters: int
    counts: dict[int, int]
    layers: tuple[int, ...]

    @cached_property
    def touching(self) -> frozenset[int]:
        """Groups that take filters of its layers, whether or not they compete here."""
        return frozenset(self.counts)

    def wanted(self, ratio: float) -> int:
        """Smallest number of filters that is at least `ratio` of all; 1e-9 absorbs the rounding of the product."""
        return int(np.ceil(ratio * self.filters - 1e-9))


def fields(space: ChannelSpace, selected: Sequence[Layer], exclude: Sequence[str], scope: str) -> tuple[Field, ...]:
    """What competes with what.

    A group that spans several layers counts for the first selected one; groups without a selected layer, and those that
    reach into an excluded layer, are in no field.
    """
    kept = {layer.index for pattern in exclude for layer in _matching(space, pattern, "--exclude")}
    held = {int(g) for layer in space.layers if layer.index in kept for g in layer.groups}
    owner: dict[int, int] = {}
    counts: dict[int, dict[int, int]] = {}
    for layer in selected:
        ids, numbers = np.unique(layer.groups[layer.groups >= 0], return_counts=True)
        for group, number in zip(ids.tolist(), numbers.tolist(), strict=True):
            if group not in held:
                owner.setdefault(group, layer.index)
                counts.setdefault(group, {})[layer.index] = number
    if scope == "global":
        filters = sum(layer.filters for layer in selected)
        all_counts = {group: sum(per_layer.values()) for group, per_layer in counts.items()}
        indices = tuple(layer.index for layer in selected)
        return (Field("global", tuple(sorted(owner)), filters, all_counts, indices),)
    out = []
    for layer in selected:
        own = tuple(sorted(group for group, index in owner.items() if index == layer.index))
        if own:
            here = {group: found[layer.index] for group, found in counts.items() if layer.index in found}
            out.append(Field(layer.node, own, layer.filters, here, (layer.index,)))
    return tuple(out)


def whole_layers(space: ChannelSpace, selected: Sequence[Layer], exclude: Sequence[str]) -> tuple[Field, ...]:
    """For each selected layer all groups that take filters of it, those that count for an earlier layer too.

    What a pruning ratio means for a layer: `fields` says where a group competes, this says whom it touches. A depthwise
    layer all of whose filters follow searched groups is held to the ratio as well.
    """
    searched = {g for field in fields(space, selected, exclude, "layer") for g in field.groups}
    chosen = {layer.index for layer in selected}
    out = []
    for layer in space.layers:
        ids, numbers = np.unique(layer.groups[layer.groups >= 0], return_counts=True)
        counts = {g: n for g, n in zip(ids.tolist(), numbers.tolist(), strict=True) if g in searched}
        follows = layer.kind == "depthwise" and len(counts) == len(ids)
        if counts and (layer.index in chosen or follows):
            out.append(Field(layer.node, tuple(counts), layer.filters, counts, (layer.index,)))
    return tuple(out)


@dataclass(frozen=True, eq=False)
class Keep:
    """What every layer keeps: at least `min_filters`, and a count that suits `multiple_of`, see `suits`.

    `multiple_of` is a number, or for "auto" the provider's vector width.
    """

    space: ChannelSpace
    min_filters: int = 1
    multiple_of: int = 1
    by_width: bool = False
    widths: Mapping[int, int] = field(default_factory=dict)  # of single layers, instead of `multiple_of`

    @cached_property
    def _counts(self) -> list[dict[int, int]]:
        """Group id -> layer index -> how many of that layer's filters it takes."""
        out: list[dict[int, int]] = [{} for _ in self.space.groups]
        for layer in self.space.layers:
            ids, numbers = np.unique(layer.groups[layer.groups >= 0], return_counts=True)
            for group, number in zip(ids.tolist(), numbers.tolist(), strict=True):
                out[group][layer.index] = number
        return out

    def filters(self, removed: Iterable[int]) -> list[int]:
        """How many filters each layer keeps without the groups `removed`."""
        alive = self.space.alive(list(removed))
        return [int(alive[layer.groups].sum()) for layer in self.space.layers]

    def allowed(self, candidates: Iterable[int], removed: Collection[int]) -> list[int]:
        """Those candidates that can go after `removed`: no axis is emptied, every layer keeps `min_filters`."""
        blocked = self.space.blocked(removed)
        free = [group for group in candidates if group not in removed and group not in blocked]
        if self.min_filters == 1:
            return free  # no layer is emptied: its filters are an axis
        left = self.filters(removed)
        return [
            group
            for group in free
            if all(left[layer] - number >= self.min_filters for layer, number in self._counts[group].items())
        ]

    def suits(self, layer: int, count: int) -> bool:
        """Whether a layer may keep so many filters: all it had, or a multiple of `multiple_of`.

        By width it may go below one width, too, by halves and never below 4, where every Conv that reads it has a
        kernel larger than 1x1. ONNX Runtime's blocked kernels pad outputs to the width, so that a count in between
        saves no time, and read fewer channels than one width only out of the plain layout: what that reordering costs
        pays off where each value is read many times (docs/benchmarks.md, "Latency against MACs").
        """
        width = self.widths.get(layer, self.multiple_of)
        if count == self.space.layers[layer].filters or count % width == 0:
            return True
        narrow = {width // part for part in (2, 4) if width // part >= NARROWEST} if self.by_width else set()
        return count in narrow and layer not in self._pointwise

    @cached_property
    def _pointwise(self) -> frozenset[int]:
        """Layers with channels that a 1x1 Conv reads."""
        found = self.space.taps == 1
        return frozenset(x.index for x in self.space.layers if found[x.groups[x.groups >= 0]].any())

    def given_back(self, path: Sequence[int], layers: Iterable[int]) -> set[int]:
        """Which groups of a path go back so that every layer keeps a count that suits it.

        Of each layer the last removals go back; a layer from which nothing is removed is as it should be. Where groups
        tie layers together, giving back for one may unsettle another, so it goes on until all fit: at worst everything
        is given back.

        Args:
            path: Removed groups, in the order of their removal.
            layers: Indices of the layers to settle.
        """
        back: set[int] = set()
        watched = list(layers) if self.multiple_of > 1 else []
        left = self.filters(path)
        settled = False
        while not settled:
            settled = True
            for layer in watched:
                while not self.suits(layer, left[layer]):
                    group = next(g for g in reversed(path) if g not in back and layer in self._counts[g])
                    back.add(group)
                    settled = False
                    for index, number in self._counts[group].items():
                        left[index] += number
        return back

    def holding(self, path: Sequence[int], layers: Collection[int]) -> Keep:
        """The same with the widest width for some layers at which half of what a path saves there can stay.

        Half of the MACs that it saves at the narrowest width, 4: a search that may cost so much accuracy and no more
        is not to come back with nothing because no layer had lost a whole width.

        Args:
            path: Removed groups, in the order of their removal.
            layers: Those that may take another width.
        """
        if not self.by_width:
            return self
        untouched = frozenset(g for g in path if not self._counts[g].keys() & set(layers))
        others = {layer: width for layer, width in self.widths.items() if layer not in layers}
        whole, width = self.space.cost(untouched).macs, self.multiple_of
        tried, saved = [replace(self, widths=others)], list[int]()
        while width > NARROWEST:
            width //= 2
            tried.append(replace(self, widths={**others, **dict.fromkeys(layers, width)}))
        for keep in tried:
            saved.append(whole - self.space.cost(frozenset(path) - keep.given_back(path, layers)).macs)
        return next(keep for keep, macs in zip(tried, saved, strict=True) if 2 * macs >= saved[-1])

    def touched(self, groups: Iterable[int]) -> set[int]:
        """Layers that have filters in these groups."""
        return {layer for group in groups for layer in self._counts[group]}

    def reaching(self, groups: Collection[int], macs: float | None, params: float | None) -> Keep:
        """The same at the widest width, of this one and its halves down to 4, that lets the targets be met at all.

        Args:
            groups: Those that may go.
            macs: Fraction of the original's MACs that is to be left; None: no such target.
            params: Fraction of the params, likewise.
        """
        keep, whole = self, self.space.cost()
        while keep.by_width and keep.multiple_of > NARROWEST:
            left = self.space.cost(keep._least(groups))
            if left.macs <= (macs or 1) * whole.macs and left.params <= (params or 1) * whole.params:
                break
            keep = replace(keep, multiple_of=keep.multiple_of // 2)
        return keep

    def _least(self, groups: Collection[int]) -> frozenset[int]:
        """What of `groups` is gone when every layer keeps as few filters as suit it; which ones they are is chance."""
        gone = set(groups)
        for layer in (self.space.layers[index] for index in self.all_layers()):
            left = layer.filters - sum(self._counts[group][layer.index] for group in gone & set(layer.groups.tolist()))
            counts = range(max(1, self.min_filters), layer.filters)
            least = next((n for n in counts if self.suits(layer.index, n)), layer.filters)
            for group in dict.fromkeys(layer.groups.tolist()):
                if left >= least:
                    break
                if group in gone:
                    gone.discard(group)
                    left += self._counts[group][layer.index]
        path = sorted(gone)
        return frozenset(path) - self.given_back(path, self.all_layers())

    def all_layers(self) -> list[int]:
        """Layers with a count of their own to keep; depthwise ones follow."""
        return [layer.index for layer in self.space.layers if layer.kind != "depthwise"]


def vector_width(provider: str) -> int:
    """Channels that the provider handles at once: 16 with AVX-512, 8 with AVX2 or unknown, 8 on a GPU."""
    if provider != "cpu":
        return GPU_MULTIPLE
    if platform.machine().lower() in ("arm64", "aarch64"):
        return NARROWEST  # NEON: four floats
    config: Any = np.show_config(mode="dicts")
    features = config.get("SIMD Extensions", {})
    there = {*features.get("baseline", ()), *features.get("found", ())}
    return 16 if there & {"AVX512F", "AVX512_SKX", "X86_V4"} else 8  # numpy renamed its groups in 2.4
