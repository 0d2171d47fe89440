"""Running a network forward piece by piece while its weights change: every node once, values of all samples held.

Samples are divided into chunks once. Between two layers the values that are still alive are kept for every chunk, if
they fit; else the run starts again from the last place where they did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from onnxcar.model import Model
from onnxcar.recovery._patches import Array
from onnxcar.runtime import Network, Session, constants, extract, graph_inputs, session, uses, value_types

Inputs = Callable[[int], dict[str, Array]]  # network inputs of a chunk


class Stream:
    """A network on all chunks.

    Attributes:
        proto: The network; weights of nodes that have not run yet may change between two calls of `run`.
    """

    def __init__(
        self, network: Network, model: Model, inputs: Inputs, n_chunks: int, memory_bytes: int, provider: str
    ) -> None:
        """Start at the inputs."""
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(network.proto)
        self._model, self._provider, self._threads = model, provider, network.session.threads
        self._inputs, self._n, self._memory = inputs, n_chunks, memory_bytes
        self._types = value_types(self.proto)
        self._constants = constants(self.proto)
        self._names = [i.name for i in graph_inputs(self.proto)]
        self._start = list(self._names)
        self._held: list[dict[str, Array]] | None = None

    def run(self, wanted: Sequence[str], output: str) -> Iterator[dict[str, Array]]:
        """Values of each chunk just before the node that makes `output` runs.

        Args:
            wanted: Names of values; what needs that node itself may be among them.
            output: An output of the node.
        """
        alive = self._alive(output)
        names = list(dict.fromkeys([*wanted, *alive]))
        made = [name for name in names if name not in self._start]
        runner = self._session(made) if made else None
        keep: list[dict[str, Array]] | None = []
        for c in range(self._n):
            given = self._held[c] if self._held is not None else self._inputs(c)
            values = dict(given)
            if runner is not None:
                feeds = {i.name: given[i.name] for i in runner.inputs}
                values.update(zip(made, runner.run(feeds, made), strict=True))
            if keep is not None:
                keep.append({name: values[name] for name in alive})
                # the first chunk is the largest: once it fits, all of them do
                if c == 0 and sum(v.nbytes for v in keep[0].values()) * self._n > self._memory:
                    keep = None
            if keep is not None and self._held is not None:
                self._held[c] = {}  # its successors are in `keep`
            yield {name: values[name] for name in wanted}
        if keep is not None:
            self._held, self._start = keep, alive

    def outputs(self, proto: onnx.ModelProto, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Values `names` of each chunk in another network, which is the same up to where this one stands."""
        runner = self._session(names, proto)
        for c in range(self._n):
            given = self._held[c] if self._held is not None else self._inputs(c)
            feeds = {i.name: given[i.name] for i in runner.inputs}
            yield dict(zip(names, runner.run(feeds, names), strict=True))

    def _session(self, made: Sequence[str], proto: onnx.ModelProto | None = None) -> Session:
        part = extract(self.proto if proto is None else proto, self._start, made, self._types)
        used = {x for node in part.graph.node for x in uses(node)}
        kept = [i for i in part.graph.input if i.name in used]
        del part.graph.input[:]
        part.graph.input.extend(kept)
        path = self._model.path
        return session(Model(part, "", path), provider=self._provider, threads=self._threads)

    def _alive(self, output: str) -> list[str]:
        """Values made before the node (inputs included) that it or a later one uses."""
        before: set[str] = set(self._names)
        after: dict[str, None] = {}
        there = True
        for node in self.proto.graph.node:
            there = there and output not in node.output
            if there:
                before.update(o for o in node.output if o)
            else:
                after.update(dict.fromkeys(uses(node)))
        after.update(dict.fromkeys(o.name for o in self.proto.graph.output))
        return [name for name in after if name in before and name not in self._constants]


def fetch(
    network: Network, model: Model, names: Sequence[str], provider: str
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function from network inputs to the values `names`, all from one run."""
    types = value_types(network.proto)
    start = [i.name for i in graph_inputs(network.proto)]
    made = [name for name in dict.fromkeys(names) if name not in start]
    part = extract(network.proto, start, made, types)
    runner = session(Model(part, "", model.path), provider=provider, threads=network.session.threads)

    def values(inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {i.name: inputs[i.name] for i in runner.inputs}
        out = dict(inputs)
        out.update(zip(made, runner.run(feeds, made), strict=True))
        return {name: np.asarray(out[name]) for name in names}

    return values
