"""Recovery without training: what a compact model's layers can make up for the channels that are gone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from onnxcar.channels import ChannelSpace
from onnxcar.errors import PlanError
from onnxcar.model import Model
from onnxcar.progress import Report
from onnxcar.recovery._layers import Graph, Linear, Norm, inverse, linear_layers, norms
from onnxcar.recovery._measures import Distance, Moments
from onnxcar.recovery._patches import Array, sampled, windows
from onnxcar.recovery._release import release
from onnxcar.recovery._result import LayerFit, Recovered
from onnxcar.recovery._samples import Samples, deal
from onnxcar.recovery._solve import Normal, best
from onnxcar.recovery._stream import Stream, fetch
from onnxcar.recovery._write import Names, Patch, apply, put_bias, refit
from onnxcar.runtime import Network, open_network
from onnxcar.surgery import Plan

if TYPE_CHECKING:
    from onnxcar.data import Dataset

METHODS = ("bias", "bn", "least-squares")
MEMORY_BYTES = 1 << 30
CHUNK = 64  # samples of one run, if memory allows
ROWS = 60  # rows of the normal equations for each input of a layer, if the samples have so many positions
JUDGED = 64  # positions of each held-back sample that a norm is judged by
LEAST_POSITIONS = 16  # of each sample, if there are so many
_AGREE = {2: 2e-2, 4: 1e-3, 8: 1e-6}  # bytes of a float -> how far a layer's own output may be from its reproduction


def recover(
    space: ChannelSpace,
    plan: Plan,
    compact: Model,
    data: Dataset,
    *,
    method: str = "least-squares",
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> Recovered:
    """The compact model repaired without training, from unlabelled samples.

    Layer by layer in graph order, each on what the layers before it give by then. "bias": what the removed channels
    gave on average goes into the bias of who read them. "bn": mean and variance of the BatchNormalizations behind
    removed channels are measured anew; without any, as "bias". "least-squares": the weights and bias of every layer
    whose inputs changed are refitted by ridge regression toward the original weights, so that its output is that of the
    original network; where it is added to another value, so that the sum is. A layer that is not better on held-back
    samples stays as it is, and so does the whole model.

    Args:
        space: Structure of the original.
        plan: What was removed.
        compact: `surgery.remove(space, plan)`.
        data: Calibration samples; labels are not used.
        method: One of `METHODS`.
        provider: Execution provider of ONNX Runtime.
        threads: Of a session, None = all cores.
        batch_size: Samples of one run, None: chosen.
        memory_bytes: Bound on the activations held between layers, default 1 GiB; with less, layers are run again.
        seed: Of the samples held back and the positions looked at.
        progress: Told after every layer.

    Raises:
        PlanError: There is no such method.
        DataError: Too few samples, or they do not fit the network.
        ModelError: ONNX Runtime does not run a network.
    """
    if method not in METHODS:
        raise PlanError(f"There is no recovery {method!r}. Take one of {', '.join(METHODS)}.")
    release()  # what the choice of filters took
    # threads of a linear algebra library that spin beside another busy process cost more than they give
    with threadpool_limits(limits=threads, user_api="blas"):
        work = _Work(space, plan, compact, data, method, provider, threads, batch_size, memory_bytes, seed, progress)
        return work.run()


class _Work:
    """State of one recovery."""

    def __init__(
        self,
        space: ChannelSpace,
        plan: Plan,
        compact: Model,
        data: Dataset,
        method: str,
        provider: str,
        threads: int | None,
        batch_size: int | None,
        memory_bytes: int | None,
        seed: int,
        progress: Report | None,
    ) -> None:
        self.space, self.compact, self.method, self.progress = space, compact, method, progress
        self.provider = provider
        self.memory = memory_bytes or MEMORY_BYTES
        self.table = space.alive(plan.groups)
        self.graph = Graph(space, plan, compact)
        few = data.inputs(np.arange(min(3, len(data))))
        sample = few if len(data) > 1 else None
        self.old = open_network(space.model, provider=provider, threads=threads, sample=sample)
        self.new = open_network(compact, provider=provider, threads=threads, sample=sample)
        self.layers, skipped = linear_layers(self.graph)
        self.fits: list[LayerFit] = [LayerFit(s.node, s.weight, "kept", s.reason) for s in skipped]
        self.norms = norms(self.graph) if method == "bn" else []
        if method == "bn" and not self.norms:
            self.method = "bias"
        if self.method == "bias":
            self.layers = [layer for layer in self.layers if layer.direct]
        elif self.method == "bn":
            self.layers = []
        self.share = 1.0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._probe(few)
        fixed = self.old.fixed or self.new.fixed
        size = fixed or min(batch_size or CHUNK, self._chunk())
        self.samples: Samples = deal(data, seed, size, whole=fixed is not None)
        # what is aimed at waits in memory until its layer comes
        each = [4 * x.filters * min(self._wanted(x), x.positions(self.shapes[x.output])) for x in self.layers]
        waiting = sum(each) * len(data)
        self.share = min(1.0, self.memory / 2 / max(waiting, 1))
        self.names = Names(compact.proto)
        self.final = onnx.ModelProto()
        self.final.CopyFrom(compact.proto)
        self.outputs = [o.name for o in self.new.proto.graph.output]

    # --- what is looked at ------------------------------------------------------------------------------------------

    def _probe(self, few: Mapping[str, Array]) -> None:
        """Shapes of all values that matter, and whether each layer can be reproduced: the others keep their weights."""
        wanted = self._values()
        if not wanted:
            return
        old = fetch(self.old, self.space.model, wanted, self.provider)
        extra = [layer.input for layer in self.layers]
        new = fetch(self.new, self.compact, [*wanted, *extra], self.provider)
        fixed = self.old.fixed or self.new.fixed
        feeds = {k: v[:fixed] for k, v in few.items()} if fixed else few
        a, b = old(self._bound(self.old, feeds)), new(self._bound(self.new, feeds))
        n = len(next(iter(feeds.values())))
        good: list[Linear] = []
        for layer in self.layers:
            reason = self._unfit(layer, a, b, n)
            if reason:
                self.fits.append(LayerFit(layer.node, layer.weight, "kept", reason))
            else:
                good.append(layer)
        self.layers = good
        self.norms = [x for x in self.norms if self._kept(x.output, a[x.output]).shape == b[x.output].shape]
        self.shapes = {name: value.shape for name, value in b.items()}
        self.sample_bytes = sum(v.nbytes for v in (*a.values(), *b.values())) // max(n, 1)

    def _unfit(self, layer: Linear, old: Mapping[str, Array], new: Mapping[str, Array], n: int) -> str:
        y = new[layer.output]
        if self._kept(layer.output, old[layer.output]).shape != y.shape:
            return "its output is cut in a way that is not followed"
        if layer.other is not None and new[layer.other].shape != y.shape:
            return "what it is added to has another shape"
        if y.shape[0] != n or new[layer.input].shape[0] != n:
            return "its samples do not lie on the first axis"
        need = 3 * 8 * (layer.inputs + 1) ** 2 * layer.blocks
        if self.method == "least-squares" and need > self.memory:
            return f"its {layer.inputs:,} inputs take normal equations of {need / 2**30:.1f} GiB, more than --memory"
        positions = np.arange(min(layer.positions(y.shape), 64))
        x = self._rows(layer, new[layer.input], y.shape, positions)
        weights = self.graph.floats(layer.weight)
        assert weights is not None
        again = (x.astype(np.float64) @ layer.matrix(weights)).swapaxes(0, 1).reshape(-1, layer.filters)
        if layer.bias.inside:
            again = again + layer.bias.values
        want = sampled(y, layer.axis, positions).astype(np.float64)
        off = np.abs(again - want).max(initial=0.0) / (np.abs(want).max(initial=0.0) + 1e-30)
        if not off <= _AGREE[layer.dtype.itemsize]:
            return "its arithmetic could not be reproduced"
        return ""

    def _values(self) -> list[str]:
        """Names of the values whose originals are aimed at."""
        names = [layer.output for layer in self.layers]
        names += [layer.other for layer in self.layers if layer.other is not None]
        return list(dict.fromkeys([*names, *(x.output for x in self.norms)]))

    def _bound(self, network: Network, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return network.session.bind(feeds)

    def _kept(self, name: str, value: Array) -> Array:
        """The channels of an original's value that the compact model has."""
        labels = self.space.labels.get(name)
        if labels is None:
            return value
        alive = self.table[labels]
        for axis in range(alive.ndim):
            if alive.shape[axis] > 1:
                along = np.asarray(np.moveaxis(alive, axis, 0).reshape(alive.shape[axis], -1).any(axis=1))
                if len(along) == value.shape[axis] and not along.all():
                    value = np.compress(along, value, axis=axis)
        return value

    def _chunk(self) -> int:
        return max(1, self.memory // 4 // max(getattr(self, "sample_bytes", 1), 1))

    def _rows(self, layer: Linear, x: Array, outer: tuple[int, ...], positions: Array) -> Array:
        if layer.window is None:
            return sampled(x, -1, positions)[None]
        return windows(x, layer.window, outer[2:], positions, layer.blocks)

    # --- the work ---------------------------------------------------------------------------------------------------

    def run(self) -> Recovered:
        targets, logits, before = self._aims()
        del self.old  # it has said all there is to say
        release()
        stream = Stream(self.new, self.compact, self._inputs, len(self.samples.chunks), self.memory, self.provider)
        jobs = self._jobs()
        changed = False
        for i, job in enumerate(jobs):
            if self.progress is not None:
                self.progress.update(i, len(jobs), f"recovery, {job.node}", "layers")
            if isinstance(job, Norm):
                fit, patch = self._norm(job, i, stream, targets[i])
            elif self.method == "bias":
                fit, patch = self._shift(job, i, stream, targets[i])
            else:
                fit, patch = self._squares(job, i, stream, targets[i])
            self.fits.append(fit)
            if fit.method != "kept":
                changed = True
                apply(self.final, patch)
                apply(stream.proto, patch)
        after = self._distance(stream.proto, logits) if changed else before
        kept = not after <= before
        held = sum(len(c) for c in self.samples.chunks) - self.samples.fitted
        model = self.compact if kept or not changed else self._model()
        fits = tuple(sorted(self.fits, key=lambda f: self._order(f.node)))
        return Recovered(
            model, fits, self.method, before, min(after, before) if kept else after, self.samples.fitted, held, kept
        )

    def _jobs(self) -> list[Linear | Norm]:
        """What is fitted, in graph order."""
        jobs: list[Linear | Norm] = [*self.layers, *self.norms]
        return sorted(jobs, key=lambda x: x.index)

    def _order(self, node: str) -> int:
        if not hasattr(self, "_places"):
            self._places = {n.name or n.output[0]: i for i, n in enumerate(self.compact.proto.graph.node)}
        return self._places.get(node, -1)

    def _model(self) -> Model:
        made = self.compact.with_proto(self.final)
        weakref.finalize(made, _let_go, self.compact)  # external weights may lie in a folder that lives as long
        return made

    def _inputs(self, chunk: int) -> dict[str, Array]:
        return self._bound(self.new, self.samples.inputs(chunk))

    def _wanted(self, layer: Linear) -> int:
        rows = ROWS * (layer.inputs + 1)
        wanted = max(LEAST_POSITIONS, -(-rows // max(self.samples.fitted, 1)))
        return max(1, int(wanted * self.share))

    def _aims(self) -> tuple[list[list[Any]], list[dict[str, Array]], float]:
        """What each job aims at, chunk by chunk; outputs of the original on held-back chunks; distance to them now."""
        jobs = self._jobs()
        names = self._values()
        old = fetch(self.old, self.space.model, [*names, *self.outputs], self.provider)
        new = fetch(self.new, self.compact, self.outputs, self.provider)
        aims: list[list[Any]] = [[] for _ in jobs]
        logits: list[dict[str, Array]] = []
        distance = Distance()
        for c in range(len(self.samples.chunks)):
            feeds = self.samples.inputs(c)
            values = old(self._bound(self.old, feeds))
            for i, job in enumerate(jobs):
                aims[i].append(self._aim(job, i, c, values))
            if self.samples.held(c):
                logits.append({name: values[name] for name in self.outputs})
                distance.add(logits[-1], new(self._bound(self.new, feeds)))
        return aims, logits, distance.value

    def _aim(self, job: Linear | Norm, i: int, c: int, values: Mapping[str, Array]) -> Any:
        y = self._kept(job.output, values[job.output])
        if isinstance(job, Norm):  # statistics are of the inputs; outputs are only looked at to judge
            at = self.samples.positions(i, c, math.prod(y.shape[2:]), JUDGED)
            return sampled(y, 1, at) if self.samples.held(c) else None
        at = self._at(job, i, c, y.shape)
        aim = sampled(y, job.axis, at).astype(np.float64)
        if job.other is not None:
            aim += sampled(self._kept(job.other, values[job.other]), job.axis, at) * inverse(job.scale)
        if not job.bias.inside:
            aim += job.bias.values
        if self.method == "bias" and not self.samples.held(c):
            return aim.mean(0)
        return aim.astype(np.float32)

    def _at(self, layer: Linear, i: int, c: int, shape: tuple[int, ...]) -> Array:
        if self.method == "bias" and not self.samples.held(c):
            return np.arange(layer.positions(shape))  # a mean needs no memory
        return self.samples.positions(i, c, layer.positions(shape), self._wanted(layer))

    def _outer(self, layer: Linear, n: int) -> tuple[int, ...]:
        return (n, *self.shapes[layer.output][1:])

    def _squares(self, layer: Linear, i: int, stream: Stream, aims: list[Array]) -> tuple[LayerFit, Patch]:
        blocks, m = layer.blocks, layer.filters // layer.blocks
        fit, held = Normal(blocks, layer.inputs, m), Normal(blocks, layer.inputs, m)
        others = [layer.other] if layer.other is not None else []
        for c, values in enumerate(stream.run([layer.input, *others], layer.output)):
            x = values[layer.input]
            outer = self._outer(layer, len(x))
            at = self._at(layer, i, c, outer)
            aim = aims[c].astype(np.float64)
            aims[c] = aim[:0]
            if layer.other is not None:
                aim = aim - sampled(values[layer.other], layer.axis, at) * inverse(layer.scale)
            t = aim.reshape(len(aim), blocks, m).swapaxes(0, 1)
            (held if self.samples.held(c) else fit).add(self._rows(layer, x, outer, at), t)
        weights = self.graph.floats(layer.weight)
        assert weights is not None
        old, bias = layer.matrix(weights), layer.bias.values.reshape(blocks, m)
        found = best(fit, held, old, bias, layer.dtype)
        if found.ridge is None:
            reason = "no fit is better on held-back samples"
            return LayerFit(layer.node, layer.weight, "kept", reason, found.before, found.after, None, fit.n), Patch()
        patch = refit(layer, self.graph, self.names, found.weights, found.bias.ravel())
        ridge = None if np.isinf(found.ridge) else found.ridge
        method = "bias" if ridge is None else "least-squares"
        return LayerFit(layer.node, layer.weight, method, "", found.before, found.after, ridge, fit.n), patch

    def _shift(self, layer: Linear, i: int, stream: Stream, aims: list[Array]) -> tuple[LayerFit, Patch]:
        others = [layer.other] if layer.other is not None else []
        total, n_total, held, n_held = np.zeros(layer.filters), 0, np.zeros((2, layer.filters)), 0
        spread = Distance()
        for c, values in enumerate(stream.run([layer.output, *others], layer.output)):
            y = values[layer.output]
            at = self._at(layer, i, c, y.shape)
            now = sampled(y, layer.axis, at).astype(np.float64)
            if layer.other is not None:
                now += sampled(values[layer.other], layer.axis, at) * inverse(layer.scale)
            if not layer.bias.inside:
                now += layer.bias.values
            if self.samples.held(c):
                gap = aims[c].astype(np.float64) - now
                spread.add({"": aims[c]}, {"": aims[c]})
                held += np.stack([gap.sum(0), np.square(gap).sum(0)])
                n_held += len(gap)
            else:
                total += len(now) * aims[c] - now.sum(0)
                n_total += len(now)
        move = total / n_total
        bias = (layer.bias.values + move).astype(layer.bias.dtype).astype(np.float64)
        move = bias - layer.bias.values
        scale = spread.spread * layer.filters or 1.0
        before = float(held[1].sum()) / n_held / scale
        after = before + float((n_held * move**2 - 2 * move * held[0]).sum()) / n_held / scale
        if not after < before:
            reason = "no bias is better on held-back samples"
            return LayerFit(layer.node, layer.weight, "kept", reason, before, before, None, n_total), Patch()
        patch = Patch()
        put_bias(patch, layer.bias, self.graph, self.names, layer, bias)
        return LayerFit(layer.node, layer.weight, "bias", "", before, after, None, n_total), patch

    def _norm(self, norm: Norm, i: int, stream: Stream, aims: list[Array]) -> tuple[LayerFit, Patch]:
        fit, held = Moments(len(norm.scale)), Moments(len(norm.scale))
        for c, values in enumerate(stream.run([norm.input], norm.output)):
            x = values[norm.input]
            if self.samples.held(c):
                at = self.samples.positions(i, c, math.prod(x.shape[2:]), JUDGED)
                held.add(sampled(x, 1, at).astype(np.float64), aims[c].astype(np.float64))
            else:
                rows = sampled(x, 1, np.arange(math.prod(x.shape[2:]))).astype(np.float64)
                fit.add(rows, rows)
        mean, variance = fit.x / fit.n, np.maximum(fit.xx / fit.n - np.square(fit.x / fit.n), 0)
        dtype = self.graph.dtype(norm.names[0])
        mean, variance = mean.astype(dtype).astype(np.float64), variance.astype(dtype).astype(np.float64)
        spread = float(np.maximum(held.yy / held.n - np.square(held.y / held.n), 0).sum()) or 1.0
        before = held.error(norm, norm.mean, norm.variance) / spread
        after = held.error(norm, mean, variance) / spread
        if not after < before:
            reason = "its statistics are no better on held-back samples"
            return LayerFit(norm.node, norm.names[0], "kept", reason, before, before, None, fit.n), Patch()
        patch = Patch(tensors={norm.names[0]: mean.astype(dtype), norm.names[1]: variance.astype(dtype)})
        return LayerFit(norm.node, norm.names[0], "bn", "", before, after, None, fit.n), patch

    def _distance(self, proto: onnx.ModelProto, logits: list[dict[str, Array]]) -> float:
        network = Network(self.new.session, proto, self.new.fixed, self.new.freed)
        new = fetch(network, self.compact, self.outputs, self.provider)
        distance = Distance()
        for k, want in enumerate(logits):
            distance.add(want, new(self._inputs(self.samples.n_fit + k)))
        return distance.value


def _let_go(_: Callable[..., Any] | Model) -> None:
    """Hold something until a finalizer is called."""
