"""How long a network takes without some groups, from a table of its layers measured here at a few widths.

Time does not follow MACs: small layers cost what a call costs, wide ones what memory costs. So each layer is timed on
its own in the network pruned evenly to some widths, and its time at any other size is read off between them. What the
layers leave open (the other nodes, what they share or pay when they run one after the other) is read off whole networks
of the same widths: the sum of the layers -> seconds of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar import surgery
from onnxcar._graphs import plain
from onnxcar.channels import ChannelSpace
from onnxcar.errors import OnnxcarError
from onnxcar.greedy import walk
from onnxcar.latency import feeds_of, interleave, measure, ratio
from onnxcar.model import Model
from onnxcar.runtime import Provider, cut, resolve_provider, session
from onnxcar.scope import Keep, fields, select_layers, whole_layers
from onnxcar.steps import Choice, Mark, Stop
from onnxcar.surgery import Plan

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["Pace", "Table", "measure_table", "monotone"]

Floats = npt.NDArray[np.float64]
WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.1)  # of the network, in filters of each layer
ROUNDS = 15  # of one layer
WHOLE_ROUNDS = 40


@dataclass(frozen=True)
class Table:
    """Seconds of layers at some widths.

    Attributes:
        layers: For each term of the space its (MACs, seconds), MACs ascending, seconds never falling; empty where the
            layer could not be run on its own.
        whole: (sum of the layers, measured) seconds of the networks that were timed as a whole, both ascending.
    """

    layers: tuple[tuple[tuple[float, float], ...], ...]
    whole: tuple[tuple[float, float], ...]

    def seconds(self, macs: Floats) -> float:
        """Predicted seconds of a network whose terms have these MACs, (n_terms,)."""
        total = self.total(macs)
        sums, took = np.asarray(self.whole, np.float64).T
        if total < sums[0]:
            return float(took[0] * total / sums[0])
        return float(np.interp(total, sums, took))

    def total(self, macs: Floats) -> float:
        """Sum of the layers on their own."""
        return float(
            sum(
                np.interp(m, *np.asarray(points, np.float64).T)
                for m, points in zip(macs.tolist(), self.layers, strict=True)
                if points
            )
        )

    def prices(self, macs: Floats) -> Floats:
        """Seconds that a MAC of each term costs, from its MACs now down to the narrowest that was timed, (n_terms,).

        Over that whole stretch, as single steps mostly show which counts suit the processor.
        """
        found = np.zeros(len(macs))
        for i, (m, points) in enumerate(zip(macs.tolist(), self.layers, strict=True)):
            if points and m > points[0][0]:
                sizes, seconds = np.asarray(points, np.float64).T
                found[i] = max(0.0, float(np.interp(m, sizes, seconds)) - points[0][1]) / (m - points[0][0])
        return found

    def to_json(self) -> dict[str, Any]:
        """As in the journal and the record."""
        return {
            "layers": [[list(point) for point in points] for points in self.layers],
            "whole": [list(pair) for pair in self.whole],
        }

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> Table:
        """Read back."""
        layers = tuple(tuple((float(m), float(s)) for m, s in points) for points in obj["layers"])
        return cls(layers, tuple((float(a), float(b)) for a, b in obj["whole"]))

    @classmethod
    def of(cls, layers: Sequence[Sequence[tuple[float, float]]], networks: Sequence[tuple[Floats, float]]) -> Table:
        """A table of raw measurements.

        Args:
            layers: (MACs, seconds) of each term, in any order.
            networks: (MACs of the terms, seconds) of whole networks, the original among them.
        """
        raw = cls(tuple(monotone(points) for points in layers), ())
        return cls(raw.layers, monotone([(raw.total(macs), seconds) for macs, seconds in networks]))


def monotone(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points by rising size, seconds never falling: each is the least of its own and all larger ones.

    A narrower layer that was slower was disturbed, or has a count that does not fit the processor; the wider one is
    there to be had instead.

    >>> monotone([(4, 2.0), (1, 1.0), (2, 3.0)])
    ((1, 1.0), (2, 2.0), (4, 2.0))
    """
    found: dict[float, float] = {}
    for size, seconds in points:
        found[size] = min(seconds, found.get(size, seconds))
    least, out = float("inf"), []
    for size in sorted(found, reverse=True):
        least = min(least, found[size])
        out.append((size, least))
    return tuple(reversed(out))


@dataclass(frozen=True, eq=False)
class Pace:
    """What a search asks about time: a prediction of any network, and a measurement of one.

    Attributes:
        space: Structure of the original.
        table: Of its layers.
        data: Whose first sample is run; None: noise.
        provider: Where.
        threads: Of a run.
    """

    space: ChannelSpace
    table: Table
    data: Dataset | None
    provider: str
    threads: int | None

    def predict(self, removed: Collection[int]) -> float:
        """Predicted latency without the groups `removed`, over the original's."""
        whole = self.table.seconds(self.space.term_macs(()))
        return self.table.seconds(self.space.term_macs(removed)) / whole

    def saved(self, candidates: Sequence[int], removed: Collection[int]) -> dict[int, int]:
        """Candidate -> picoseconds that its removal is expected to save in the network without `removed`."""
        prices = self.table.prices(self.space.term_macs(removed))
        return {
            group: max(1, round(1e12 * sum(m * prices[i] for i, m in self.space.saved_by_term(group, removed).items())))
            for group in candidates
        }

    def check(self, removed: Collection[int]) -> float:
        """Measured latency without the groups `removed`, over the original's, runs interleaved."""
        return self.compare(surgery.remove(self.space, Plan(removed)))[0]

    def compare(self, model: Model) -> tuple[float, tuple[float, float]]:
        """Median of a model's latency over the original's, and its 95 % interval."""
        models = [self.space.model, model]
        base, found = measure(models, self.data, provider=self.provider, threads=self.threads, runs=None)
        median, interval = ratio(base, found)
        return median, (interval.low, interval.high)


class _InOrder:
    """The lowest ids go first: which filters are gone does not matter for time."""

    def lowest(self, removed: frozenset[int], candidates: Sequence[int], k: int) -> list[Choice]:
        return [Choice(group, 0.0) for group in sorted(candidates)[:k]]

    def mark(self, removed: frozenset[int]) -> Mark | None:
        return None

    def step(self, removed: frozenset[int]) -> None:
        pass

    def work(self, n_candidates: int) -> int:
        return 0


def measure_table(
    space: ChannelSpace,
    data: Dataset | None,
    keep: Keep,
    *,
    provider: str,
    threads: int | None,
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dense: bool = False,
) -> Table:
    """Time the layers of a network at `WIDTHS`, and the networks themselves; some seconds.

    Args:
        space: Structure of the original.
        data: Whose first sample is run; None: noise.
        keep: Counts are made the multiples that the search will keep.
        provider: Where.
        threads: Of a run.
        layers: Of `select_layers`: what the search prunes.
        exclude: As above.
        dense: As above.
    """
    where = resolve_provider(provider)
    selected = select_layers(space, layers, exclude, dense=dense)
    searched, whole = fields(space, selected, exclude, "layer"), whole_layers(space, selected, exclude)
    models, macs = [space.model], [space.term_macs(())]
    for width in WIDTHS[1:]:
        path = walk(space, searched, _InOrder(), stop=Stop(ratio=1 - width), keep=keep, whole=whole, per_step=1 << 20)
        if path.groups and all(len(m) and not np.array_equal(m, space.term_macs(path.groups)) for m in macs):
            models.append(surgery.remove(space, Plan(path.groups)))
            macs.append(space.term_macs(path.groups))
    timer = _Timer(where, threads)
    found: list[list[tuple[float, float]]] = [[] for _ in space.terms]
    nodes = space.model.proto.graph.node
    for model, sizes in zip(models, macs, strict=True):
        times = timer.layers(model, data, [nodes[term.node].output[0] for term in space.terms])
        for i, seconds in enumerate(times):
            if seconds is not None:
                found[i].append((float(sizes[i]), seconds))
    opened = [session(model, provider=where, threads=threads) for model in models]
    runs: list[Callable[[], Any]] = [partial(one.run, feeds_of(one, data)) for one in opened]
    took = [
        latency.spread.q1 for latency in interleave(runs, WHOLE_ROUNDS)
    ]  # what disturbs a run only ever makes it longer
    return Table.of(found, list(zip(macs, took, strict=True)))


class _Timer:
    """Times single nodes; those that do the same work on the same shapes are timed once."""

    def __init__(self, where: Provider, threads: int | None) -> None:
        self.where, self.threads = where, threads
        self.known: dict[tuple[Any, ...], float | None] = {}

    def layers(self, model: Model, data: Dataset | None, outputs: Sequence[str]) -> list[float | None]:
        """Seconds (lower quartile) of the nodes that make these values; None for one that cannot be run alone."""
        proto = plain(model.proto)
        constant = {t.name: tuple(t.dims) for t in proto.graph.initializer}
        producer = {name: node for node in proto.graph.node for name in node.output}
        made = [name for name in outputs if name in producer]
        inputs = {name: [x for x in producer[name].input if x and x not in constant] for name in made}
        values = self._values(proto, model, data, [x for name in made for x in inputs[name]])
        found: list[float | None] = []
        for name in outputs:
            if name not in inputs or not all(x in values for x in inputs[name]):
                found.append(None)
                continue
            node = producer[name]
            key = (
                node.op_type,
                tuple(sorted(a.SerializeToString() for a in node.attribute)),
                tuple(constant.get(x) for x in node.input),
                tuple((values[x].shape, str(values[x].dtype)) for x in inputs[name]),
            )
            if key not in self.known:
                self.known[key] = self._seconds(model, name, {x: values[x] for x in inputs[name]})
            found.append(self.known[key])
        return found

    def _values(
        self, proto: onnx.ModelProto, model: Model, data: Dataset | None, names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """What these values are on the first sample."""
        inner = session(model, provider=self.where, threads=self.threads)
        given = feeds_of(inner, data)
        wanted = list(dict.fromkeys(name for name in names if name not in given))
        watched = onnx.ModelProto()
        watched.CopyFrom(proto)
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        if wanted:
            opened = session(Model(watched, "", model.path), provider=self.where, threads=self.threads)
            given = given | dict(zip(wanted, opened.run(given, wanted), strict=True))
        return given

    def _seconds(self, model: Model, output: str, given: dict[str, npt.NDArray[Any]]) -> float | None:
        try:
            part = cut(model, list(given), [output])
            opened = session(Model(part, "", model.path), provider=self.where, threads=self.threads)
            bound = opened.bind(given)
            return interleave([partial(opened.run, bound)], ROUNDS)[0].spread.q1
        except OnnxcarError:
            return None  # the rest takes it in
