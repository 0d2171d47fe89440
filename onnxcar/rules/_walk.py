"""The state of one walk over a graph, and the verbs that rules are written in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar.channels import Classes, Edit, Labels, Reason
from onnxcar.facts import Facts, Shape, attribute, uses


class Refused(Exception):
    """Raised by a rule that does not fit a node; the channels that enter it are protected for this reason."""


@dataclass(frozen=True)
class RawSite:
    """A site before groups are known: tensor axis -> (label array, its axis)."""

    node: int
    input: int
    axes: dict[int, tuple[Labels, int]]
    blocks: int = 1
    rows: int = 0


@dataclass(frozen=True)
class RawRead:
    node: int
    input: int
    labels: Labels


@dataclass(frozen=True)
class RawTerm:
    node: int
    scale: float
    reads: Labels
    writes: Labels
    blocks: int = 1


@dataclass(frozen=True)
class RawLayer:
    node: int
    input: int
    axis: int
    kind: str
    labels: Labels  # (filters,)


@dataclass(frozen=True)
class EqualCounts:
    """Each part must keep the same number of channels (the blocks of a grouped Conv)."""

    node: int
    parts: tuple[Labels, ...]


class Walk:
    """Labels of every value met so far, and what the rules noted."""

    def __init__(self, facts: Facts, *, norms: str = "protect") -> None:
        self.facts = facts
        self.norms = norms
        self.graph = facts.model.proto.graph
        self.classes = Classes()
        self.labels: dict[str, Labels] = {}
        self.sites: list[RawSite] = []
        self.reads: list[RawRead] = []
        self.edits: list[Edit] = []
        self.terms: list[RawTerm] = []
        self.layers: list[RawLayer] = []
        self.equal: list[EqualCounts] = []
        self.unsupported: dict[str, int] = {}
        self.crossing: dict[str, Labels] = {}  # second label array of a product with channels on rows and columns
        self.shared: dict[str, tuple[Labels, Labels]] = {}
        self.index = 0
        self._outputs = {o.name for o in self.graph.output}
        self.users = uses(self.graph)

    # --- what a rule sees -----------------------------------------------------------------------------------------

    @property
    def node(self) -> onnx.NodeProto:
        """The node at hand."""
        node: onnx.NodeProto = self.graph.node[self.index]
        return node

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.facts.opset

    def attr(self, name: str, default: Any = None) -> Any:
        """Attribute of the node at hand."""
        return attribute(self.node, name, default)

    def has(self, k: int) -> bool:
        """Whether input `k` is given."""
        return len(self.node.input) > k and bool(self.node.input[k])

    def shape(self, k: int) -> Shape:
        """Shape of input `k`; refuses where it is unknown."""
        shape = self.facts.shape(self.node.input[k])
        if shape is None:
            raise Refused(f"the size of its input '{self.node.input[k]}' is not known before running")
        return shape

    def out_shape(self, k: int = 0) -> Shape:
        """Shape of output `k`; refuses where it is unknown."""
        shape = self.facts.shape(self.node.output[k])
        if shape is None:
            raise Refused(f"the size of its output '{self.node.output[k]}' is not known before running")
        return shape

    def value(self, k: int) -> npt.NDArray[Any] | None:
        """Small known value of input `k`, None where it is not given, not known, or depends on the batch size."""
        return self.facts.steady(self.node.input[k]) if self.has(k) else None

    def constant(self, k: int) -> bool:
        """Whether input `k` depends on weights only."""
        return self.has(k) and self.facts.constant(self.node.input[k])

    def lab(self, k: int) -> Labels:
        """Labels of input `k`, one zero of the right rank where it has none."""
        found = self.labels.get(self.node.input[k])
        return found if found is not None else np.zeros((1,) * len(self.shape(k)), np.int64)

    def lab_raw(self, k: int) -> Labels:
        """Labels of an input that is known to carry some."""
        return self.labels[self.node.input[k]]

    def labelled(self) -> list[int]:
        """Inputs that carry labels."""
        return [k for k, x in enumerate(self.node.input) if x in self.labels]

    def why(self, text: str) -> Reason:
        """A reason at the node at hand."""
        return Reason(self.name(), self.node.op_type, text)

    def name(self, index: int | None = None) -> str:
        """Name of a node, operator and index where it has none."""
        i = self.index if index is None else index
        return self.graph.node[i].name or f"{self.graph.node[i].op_type}_{i}"

    # --- verbs ----------------------------------------------------------------------------------------------------

    def fresh(self, n: int) -> Labels:
        """`n` new labels (n,)."""
        return self.classes.fresh(n)

    def tie(self, a: Labels, b: Labels, text: str) -> None:
        """`a` and `b` leave together, element by element."""
        self.classes.tie(a, b, self.why(text))

    def protect(self, labels: Labels, text: str) -> None:
        """`labels` never leave."""
        self.classes.protect(labels, self.why(text))

    def protect_axis(self, labels: Labels, axes: Iterable[int], text: str) -> Labels:
        """Labels that live along `axes` cannot leave; what remains along the others."""
        out = labels
        for axis in axes:
            if out.shape[axis] > 1:
                out = self.same_along(out, axis, text)
        return out

    def same_along(self, labels: Labels, axis: int, text: str) -> Labels:
        """Positions along `axis` leave together: a tie along it; protection where no other axis carries labels."""
        if labels.shape[axis] == 1:
            return labels
        first = np.take(labels, [0], axis=axis)
        if first.size == 1:
            self.protect(labels, text)
            return np.zeros_like(first)
        self.tie(np.broadcast_to(first, labels.shape), labels, text)
        return first

    def freedom(self, labels: Labels) -> int:
        """How many classes among `labels` may still go."""
        return sum(r != 0 and self.classes.reason(r) is None for r in np.unique(self.classes.roots(labels)).tolist())

    def site(self, k: int, axes: dict[int, tuple[Labels, int]], *, blocks: int = 1, rows: int = 0) -> None:
        """Constant input `k` is indexed by labels along `axes`: axis -> (label array, its axis)."""
        used = {a: v for a, v in axes.items() if v[0].any()}
        if used and blocks > 1:
            used = axes  # columns are indexed block by block, so both axes are needed
        if used:
            self.sites.append(RawSite(self.index, k, used, blocks, rows))

    def read(self, k: int, labels: Labels | None = None) -> None:
        """Input `k` is read here: masking its channels multiplies in front of this input."""
        found = self.lab(k) if labels is None else labels
        if found.any():
            self.reads.append(RawRead(self.index, k, found))

    def edit(self, kind: str, **args: Any) -> None:
        """The node needs a structural change once some of the labels in `args` are gone."""
        self.edits.append(Edit(self.index, kind, args))

    def filled(self, k: int) -> bool:
        """Whether input `k` is one number everywhere, as large as a computed shape says, and nothing else uses it."""
        name = self.node.input[k]
        maker = self.facts.producers.get(name)
        if maker is None or self.facts.constant(name) or name in self.labels or name in self._outputs:
            return False
        node = self.graph.node[maker]
        shape = self.facts.shape(node.input[0]) if node.op_type == "Expand" else None
        single = node.op_type == "ConstantOfShape" or (
            shape is not None and math.prod(shape) == 1 and self.facts.constant(node.input[0])
        )
        return single and len(self.users.get(name, [])) == 1

    def fill(self, k: int, labels: Labels) -> None:
        """A `filled` input takes on `labels`: the shape it is made from follows."""
        maker = self.facts.producers[self.node.input[k]]
        sizes = 1 if self.graph.node[maker].op_type == "Expand" else 0
        self.edits.append(Edit(maker, "target", {"input": sizes, "labels": labels, "axes": None}))
        self.labels[self.node.input[k]] = labels

    def emit(self, labels: Labels, k: int = 0) -> None:
        """Output `k` carries `labels`; axes along which nothing differs lose theirs."""
        if len(self.node.output) <= k or not self.node.output[k]:
            return
        name = self.node.output[k]
        shape = self.out_shape(k)
        labels = self.settle(labels, shape)
        if labels.any():
            self.labels[name] = labels
            if name in self._outputs:
                self.classes.protect(labels, Reason(name, "output", "is an output of the network"))

    def settle(self, labels: Labels, shape: Sequence[int]) -> Labels:
        """`labels` with size 1 along every axis that tells no positions apart; refuses a wrong shape."""
        if labels.ndim != len(shape) or any(n not in (1, s) for n, s in zip(labels.shape, shape, strict=True)):
            raise Refused(f"its channels {labels.shape} do not fit its output of shape {tuple(shape)}")
        if labels.size > 1:
            roots = self.classes.roots(labels)
            for axis in range(labels.ndim):
                if roots.shape[axis] > 1 and (roots == np.take(roots, [0], axis=axis)).all():
                    rest = np.take(roots, [0], axis=axis)
                    if rest.size > 1:
                        roots, labels = rest, np.take(labels, [0], axis=axis)
        if labels.size == 1 and labels.any():
            self.protect(labels, "its result has a single channel")
            return np.zeros_like(labels)
        return labels


def axes_of(labels: Labels) -> list[int]:
    """Axes that carry labels."""
    return [a for a, n in enumerate(labels.shape) if n > 1]


def aligned(labels: Labels, rank: int) -> Labels:
    """`labels` with leading axes of size 1 up to `rank`, as broadcasting does."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def segments(a: Sequence[int], b: Sequence[int]) -> list[tuple[range, range]]:
    """The finest split of two shapes of equal size into runs of axes with equal products.

    Raises:
        Refused: The shapes have different sizes or a zero.
    """
    out: list[tuple[range, range]] = []
    i = j = 0
    if any(n <= 0 for n in (*a, *b)):
        raise Refused(f"it reshapes an empty value {tuple(a)}")
    while i < len(a) or j < len(b):
        i0, j0, x, y = i, j, 1, 1
        if i < len(a):
            x, i = a[i], i + 1
        if j < len(b):
            y, j = b[j], j + 1
        while x != y:
            if x < y and i < len(a):
                x, i = x * a[i], i + 1
            elif y < x and j < len(b):
                y, j = y * b[j], j + 1
            else:
                raise Refused(f"it reshapes {tuple(a)} to {tuple(b)}")
        out.append((range(i0, i), range(j0, j)))
    return out


def reshaped(labels: Labels, a: Sequence[int], b: Sequence[int]) -> Labels:
    """Labels of a value of shape `a` after a Reshape to `b`; only runs of axes that carry labels are expanded."""
    full, target = [], []
    for ins, outs in segments(a, b):
        carries = any(labels.shape[k] > 1 for k in ins)
        full += [a[k] if carries else 1 for k in ins]
        target += [b[k] if carries else 1 for k in outs]
    return np.ascontiguousarray(np.broadcast_to(labels, full)).reshape(target)
