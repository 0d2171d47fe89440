"""Channel labels and what follows from them: layers, groups that leave together, sites, reads, protection.

Every channel of every value carries an integer label. The rules (`onnxcar.rules`) make labels, tie them and note
where they index a weight or are read; this module holds the algebra, `ChannelSpace` the result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar.facts import Facts
from onnxcar.ledger import Ledger
from onnxcar.model import Model

Labels = npt.NDArray[np.int64]  # rank of the value, size 1 along axes without channels; 0 = never removed


@dataclass(frozen=True)
class Reason:
    """Why channels cannot go: the node that keeps them, in words, and whether it is a tie or the root cause."""

    node: str
    op_type: str
    text: str


class Classes:
    """Union-find over labels; a class is protected once any of its labels is."""

    def __init__(self) -> None:
        self._parent: list[int] = [0]
        self._reason: dict[int, Reason] = {0: Reason("", "", "is not a channel of any filter")}
        self._table: Labels | None = None  # roots of all labels, until the next tie

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, n: int) -> Labels:
        """`n` new labels, each a class of its own."""
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        return np.arange(start, start + n, dtype=np.int64)

    def find(self, label: int) -> int:
        """Representative of a label's class: its smallest label."""
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def roots(self, labels: Labels) -> Labels:
        """`find` of every element, same shape."""
        if labels.size == 1:
            return np.full(labels.shape, self.find(int(labels.ravel()[0])), np.int64)
        if self._table is not None and len(self._table) == len(self._parent):
            return np.asarray(self._table[labels])
        unique, inverse = np.unique(labels, return_inverse=True)
        return np.asarray([self.find(int(x)) for x in unique], np.int64)[inverse].reshape(labels.shape)

    def settle(self) -> None:
        """Compute all roots at once; worth it when many lookups follow without a tie between them."""
        table = np.asarray(self._parent, np.int64)
        while True:
            above = table[table]
            if np.array_equal(above, table):
                break
            table = above
        self._table = table

    def tie(self, a: Labels, b: Labels, reason: Reason) -> None:
        """Element by element, `a` and `b` (broadcast together) leave together; tied to 0 is protection."""
        x, y = np.broadcast_arrays(a, b)
        pairs = np.unique(np.stack([x.ravel(), y.ravel()]), axis=1)
        for i, j in pairs.T.tolist():
            if i == j:
                continue
            if i == 0 or j == 0:
                self._protect(i or j, reason)
            else:
                self._union(i, j)

    def protect(self, labels: Labels, reason: Reason) -> None:
        """None of these labels can be removed."""
        for label in np.unique(labels).tolist():
            if label:
                self._protect(label, reason)

    def _protect(self, label: int, reason: Reason) -> None:
        self._reason.setdefault(self.find(label), reason)

    def _union(self, i: int, j: int) -> None:
        i, j = self.find(i), self.find(j)
        if i == j:
            return
        low, high = min(i, j), max(i, j)
        self._parent[high] = low
        self._table = None
        held = self._reason.pop(high, None)
        if held is not None:
            self._reason.setdefault(low, held)

    def reason(self, label: int) -> Reason | None:
        """Root cause of a label's protection, None if it may go."""
        return self._reason.get(self.find(label)) if label else self._reason[0]


@dataclass(frozen=True)
class Site:
    """A constant input of a node, indexed by channels along some axes.

    Attributes:
        node: Index of the node in the main graph.
        input: Index of its input.
        axes: Axis of the tensor -> label of each position (1-D, as long as the axis).
        blocks: For a grouped Conv: number of `conv_groups`. Axis `rows` then holds the blocks one after the other,
            and the labels of the other axis are `blocks` x its length, block by block.
        rows: The axis that holds the blocks.
    """

    node: int
    input: int
    axes: dict[int, Labels]
    blocks: int = 1
    rows: int = 0


@dataclass(frozen=True)
class Edit:
    """A structural change of one node, described by labels; `surgery` knows how to make it.

    `kind` names a function of `surgery`, `args` are its label arrays and numbers.
    """

    node: int
    kind: str
    args: dict[str, Any]


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of one node for one sample: `scale` x sum over blocks of |in| x |out| kept."""

    node: int
    scale: float
    reads: Labels  # (n_in,)
    writes: Labels  # (n_out,)
    blocks: int = 1


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with filters.

    Attributes:
        index: Position among the layers, in graph order.
        node: Name of the node.
        op_type: Its operator.
        weight: Name of the weight tensor.
        filters: How many it has.
        kind: "conv" (Conv, ConvTranspose), "depthwise" (its filters follow its input), "dense" (Gemm, MatMul).
        groups: For each filter its group's id, -1 = protected.
        axis: Axis of the weight that holds the filters.
        position: Index of the node in the main graph; names need not be unique.
    """

    index: int
    node: str
    op_type: str
    weight: str
    filters: int
    kind: str
    groups: npt.NDArray[np.int32]
    axis: int = 0
    position: int = -1


@dataclass(frozen=True)
class Group:
    """The smallest set of channels that leave together.

    Attributes:
        id: Dense number in graph order of the first layer.
        name: First layer's node name, a colon, the filter's index there.
        layer: Index of the first layer.
        filters: (weight name, original filter index), the first layer's first.
    """

    id: int
    name: str
    layer: int
    filters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Read:
    """A value whose channels some nodes read: masking multiplies here, never at the producer.

    Attributes:
        value: Name of the value.
        consumers: (node index, input index) of the readers.
        groups: Group id of each position, -1 = stays; rank of the value, size 1 along axes without channels.
    """

    value: str
    consumers: tuple[tuple[int, int], ...]
    groups: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Protected:
    """Filters of one layer that cannot go for one reason."""

    layer: str
    weight: str
    filters: tuple[int, ...]
    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """Size of a network: weight elements, and multiply-accumulates for one sample."""

    params: int
    macs: int


@dataclass(frozen=True, eq=False)
class ChannelSpace:
    """What can be removed from a model, and what goes with it.

    All arrays hold group ids (-1 = stays), so that a set of ids says of every axis which positions survive.

    Attributes:
        labels: Group ids of every value that has channels.
        crossing: Further group ids of products that have channels on their columns as well as on their rows.
        keep_one: Sets of group ids of which at least one must stay: each is a whole axis of some value.
    """

    model: Model
    facts: Facts
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    reads: tuple[Read, ...]
    protected: tuple[Protected, ...]
    sites: tuple[Site, ...]
    edits: tuple[Edit, ...]
    terms: tuple[Term, ...]
    labels: dict[str, Labels]
    crossing: dict[str, Labels]
    keep_one: tuple[tuple[str, npt.NDArray[np.int64]], ...]
    unsupported: dict[str, int] = field(default_factory=dict)
    norms: str = "protect"
    base_params: int = 0

    def alive(self, removed: Collection[int]) -> npt.NDArray[np.bool_]:
        """Lookup table of length n_groups + 1: index it with an array of ids (-1 is the last element, True)."""
        table = np.ones(len(self.groups) + 1, bool)
        table[list(removed)] = False
        table[-1] = True
        return table

    # --- size -----------------------------------------------------------------------------------------------------

    def cost(self, removed: Collection[int] = ()) -> Cost:
        """Params and MACs of the network without the groups `removed`."""
        ledger = self._ledger(removed)
        return Cost(ledger.params, round(ledger.macs))

    def term_macs(self, removed: Collection[int] = ()) -> npt.NDArray[np.float64]:
        """MACs of each of `terms` in the network without the groups `removed`, (n_terms,)."""
        return self._ledger(removed).by_term()

    def _ledger(self, removed: Collection[int]) -> Ledger:
        """A ledger for `removed`; the last one goes on where it can, as a search removes more and more."""
        gone = removed if isinstance(removed, set | frozenset) else set(removed)
        first, last = self._ledgers
        if not last.removed <= gone:
            last = first.copy()
        last.remove(gone - last.removed)
        self._ledgers[1] = last
        return last

    @cached_property
    def _ledgers(self) -> list[Ledger]:
        """The untouched network's, and the last one asked for."""
        first = Ledger(self)
        return [first, first.copy()]

    @cached_property
    def tensors(self) -> list[tuple[tuple[int, ...], Site]]:
        """Distinct weight tensors that sites cut, with their shapes; a tensor cut alike at many uses counts once."""
        found: dict[tuple[Any, ...], tuple[tuple[int, ...], Site]] = {}
        for site in self.sites:
            name = self.model.proto.graph.node[site.node].input[site.input]
            shape = self.facts.shape(name)
            if shape is not None and any((a >= 0).any() for a in site.axes.values()):
                key = (name, *((k, a.tobytes()) for k, a in sorted(site.axes.items())))
                found.setdefault(key, (shape, site))
        return list(found.values())

    def saved_macs(self, group: int, removed: Collection[int] = ()) -> int:
        """MACs that go when `group` is removed from the network without `removed`."""
        return round(self._ledger(removed).saved_macs(group))

    def saved_by_term(self, group: int, removed: Collection[int] = ()) -> dict[int, float]:
        """`saved_macs` by position among `terms`."""
        return self._ledger(removed).saved_by_term(group)

    def saved_params(self, group: int, removed: Collection[int] = ()) -> int:
        """Weight elements that go when `group` is removed from the network without `removed`."""
        return self._ledger(removed).saved_params(group)

    # --- what may go ----------------------------------------------------------------------------------------------

    def allows(self, group: int, removed: Collection[int]) -> bool:
        """Whether `group` can go after `removed` without emptying an axis of some value."""
        return group not in self._ledger(removed).blocked

    def blocked(self, removed: Collection[int]) -> set[int]:
        """Groups that would empty an axis if they went after `removed`."""
        return set(self._ledger(removed).blocked)

    def empties(self, removed: Collection[int]) -> str | None:
        """Name of a value that `removed` would leave without channels, None if every axis keeps one."""
        table = self.alive(removed)
        return next((name for name, ids in self.keep_one if not table[ids].any()), None)

    # --- weights --------------------------------------------------------------------------------------------------

    @cached_property
    def by_weight(self) -> dict[str, Layer]:
        """First layer of each weight tensor."""
        out: dict[str, Layer] = {}
        for layer in self.layers:
            out.setdefault(layer.weight, layer)
        return out

    def _weight_input(self, node: int) -> int:
        inputs = self.model.proto.graph.node[node].input
        return 1 if self.facts.constant(inputs[1]) else 0

    def weight(self, layer: Layer) -> npt.NDArray[Any]:
        """Weights of a layer with the filters on axis 0: (filters, ...), in the order of the original file."""
        node = self.model.proto.graph.node[layer.position]
        values = self.facts.array(node.input[self._weight_input(layer.position)])
        moved = np.moveaxis(values, layer.axis, 0)
        if moved.shape[0] != layer.filters:  # ConvTranspose with conv_groups: filters are (blocks, per block)
            moved = values.reshape(layer.filters // values.shape[1], -1, *values.shape[1:]).swapaxes(1, 2)
            moved = moved.reshape(layer.filters, -1, *values.shape[2:])
        return moved

    def outgoing(self, group: int) -> list[npt.NDArray[Any]]:
        """Slices of the weights that read the channels of `group`, one array for each reading weight."""
        out = []
        for site, axis in self._readers.get(group, []):
            values = self.facts.array(self.model.proto.graph.node[site.node].input[site.input])
            hit = site.axes[axis] == group
            if site.blocks > 1:
                values = values.reshape(site.blocks, -1, *values.shape[1:])
                per = hit.reshape(site.blocks, -1)
                out.append(np.concatenate([values[b][:, per[b]].ravel() for b in range(site.blocks)]))
            else:
                out.append(np.compress(hit, values, axis=axis))
        return out

    def outgoing_sizes(self) -> npt.NDArray[np.float64]:
        """Sum of the absolute weights of `outgoing` for every group, (n_groups,); every weight is read once."""
        total = np.zeros(len(self.groups))
        for site, axis in self._reading:
            values = np.abs(np.asarray(self.facts.array(self.model.proto.graph.node[site.node].input[site.input])))
            ids = site.axes[axis]
            if site.blocks > 1:  # the other axis holds the blocks: block b reads the b-th stretch of the ids
                blocks = values.reshape(site.blocks, -1, *values.shape[1:])
                sums = blocks.sum(axis=(1, *range(3, blocks.ndim)), dtype=np.float64).ravel()
            else:
                sums = values.sum(axis=tuple(k for k in range(values.ndim) if k != axis), dtype=np.float64)
            np.add.at(total, ids[ids >= 0], sums[ids >= 0])
        return total

    @cached_property
    def taps(self) -> npt.NDArray[np.int64]:
        """Fewest taps of a kernel that reads the group's channels, (n_groups,): 1 of a 1x1 Conv, 9 of a 3x3 one.

        Of all Convs that read them; 0 where none does.
        """
        most = np.iinfo(np.int64).max
        found = np.full(len(self.groups), most)
        for site, axis in self._reading:
            shape = self.facts.shape(self.model.proto.graph.node[site.node].input[site.input]) or ()
            if len(shape) > 2:
                read = np.unique(site.axes[axis])
                read = read[read >= 0]
                found[read] = np.minimum(found[read], int(np.prod(shape[2:])))
        found[found == most] = 0
        return found

    @property
    def _reading(self) -> list[tuple[Site, int]]:
        """Every weight axis that reads channels, once."""
        return list({(id(site), axis): (site, axis) for own in self._readers.values() for site, axis in own}.values())

    @cached_property
    def _readers(self) -> dict[int, list[tuple[Site, int]]]:
        out: dict[int, list[tuple[Site, int]]] = {}
        writers = {(x.position, self._weight_input(x.position), x.axis) for x in self.layers}
        terms = {t.node for t in self.terms}
        for site in self.sites:
            name = self.model.proto.graph.node[site.node].input[site.input]
            if site.node not in terms or len(self.facts.shape(name) or ()) < 2:
                continue
            for axis, ids in site.axes.items():
                if (site.node, site.input, axis) in writers:
                    continue
                for g in np.unique(ids).tolist():
                    if g >= 0:
                        out.setdefault(g, []).append((site, axis))
        return out


def unique_sets(sets: Iterable[tuple[str, npt.NDArray[np.int64]]]) -> tuple[tuple[str, npt.NDArray[np.int64]], ...]:
    """The sets without repeats, the first name kept."""
    found: dict[bytes, tuple[str, npt.NDArray[np.int64]]] = {}
    for name, ids in sets:
        found.setdefault(ids.tobytes(), (name, ids))
    return tuple(found.values())
