"""What every filter responds to: one pass over the images, and one over their gray versions.

Nothing that grows with the number of images is kept but the pooled means of a batch: sums of products for the
correlations, sums by class, and the strongest responses of each filter with their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar import runtime
from onnxcar.channels import ChannelSpace, Layer
from onnxcar.interpret._fields import Field, receptive_fields
from onnxcar.interpret._kernels import image_kernels
from onnxcar.interpret._maximise import Made
from onnxcar.interpret._pictures import Look, look
from onnxcar.interpret._similar import correlation
from onnxcar.model import Model

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

__all__ = ["LayerResponses", "Responses", "contribution", "response_values", "responses"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
CELLS = 7  # a map is averaged to at most 7 x 7 cells before responses are correlated
TOP = 100  # strongest responses that colour selectivity is taken over, as in Rafegas and Vanrell
LEAST_TOP, SHARE = 9, 10  # of few images a tenth of them, at least nine


@dataclass(eq=False)
class LayerResponses:
    """Responses of one layer's filters, read behind its activation function where one follows.

    Attributes:
        layer: The layer.
        value: The value that is read.
        field: What a position sees of the image, None = all of it.
        low: Least response over images and positions, (filters,).
        high: Largest.
        mean: Mean.
        size: Mean absolute response.
        class_mean: Mean over each class's images and all positions, (n_classes, filters); empty without labels.
        top: Strongest responses, one an image, falling, (k, filters); -inf where there are fewer images.
        top_images: Their images, (k, filters).
        top_places: Their positions, flat, (k, filters).
        width: Positions in a row, to unfold `top_places`.
        gray: Responses at the same places of the same images without colour, (k, filters); None if that was not asked.
        products: Sums of products of pooled responses, (filters, filters).
        sums: Sums of pooled responses.
        n: How many pooled values were summed.
        kernels: The filters as pixels (filters, h, w, 3), red first, where they read the image itself; else None.
        made: Images made to excite the filters, if that was asked and succeeded.
    """

    layer: Layer
    value: str
    field: Field | None
    low: Array
    high: Array
    mean: Floats
    size: Floats
    class_mean: Floats
    top: Array
    top_images: npt.NDArray[np.int32]
    top_places: npt.NDArray[np.int32]
    width: int = 1
    gray: Array | None = None
    products: Floats | None = None
    sums: Floats | None = None
    n: int = 0
    kernels: Floats | None = None
    made: Made | None = None

    @property
    def dead(self) -> npt.NDArray[np.bool_]:
        """Filters whose response is the same everywhere, (filters,)."""
        return np.asarray(self.low == self.high)

    def correlation(self) -> Floats:
        """Correlation of the filters' pooled responses, (filters, filters), NaN for dead ones."""
        assert self.products is not None
        assert self.sums is not None
        found = correlation(self.products, self.sums, self.n)
        found[self.dead] = found[:, self.dead] = np.nan
        return found

    def colour_selectivity(self) -> Floats | None:
        """1 - sum of the responses to gray versions / sum of the responses, over each filter's strongest, (filters,).

        0: colour does not matter to it; 1: without colour it is silent. NaN for filters that never respond. Source:
        Rafegas and Vanrell 2018, Color encoding in biologically-inspired convolutional neural networks,
        10.1016/j.visres.2018.03.010; they turn patches gray by their first principal component, here it is luma.
        """
        if self.gray is None:
            return None
        known = np.isfinite(self.top)
        strong = np.where(known, np.maximum(self.top, 0), 0).sum(0, dtype=np.float64)
        left = np.where(known, np.maximum(self.gray, 0), 0).sum(0, dtype=np.float64)
        return np.asarray(1 - np.divide(left, strong, out=np.full(len(strong), np.nan), where=strong > 1e-12))


@dataclass(frozen=True, eq=False)
class Responses:
    """Responses of all layers, and how the images look.

    Attributes:
        layers: In graph order.
        look: How inputs become pictures again, None where they are no images.
        fields: Receptive field of every value.
        classes: Output indices of the rows of `LayerResponses.class_mean`.
    """

    layers: tuple[LayerResponses, ...]
    look: Look | None
    fields: dict[str, Field | None]
    classes: tuple[int, ...]


# --- where to look ---------------------------------------------------------------------------------------------------


def response_values(space: ChannelSpace) -> dict[int, str]:
    """Index of each layer -> the value to read its responses from.

    From the layer's output on, nodes that work on it alone (normalisation, bias, activation function, also one made of
    several nodes) are followed as long as shapes stay the same; where something else joins in, it stops.
    """
    graph = space.model.proto.graph
    users: dict[str, list[int]] = {}
    for i, node in enumerate(graph.node):
        for name in node.input:
            if name:
                users.setdefault(name, []).append(i)
    outputs = {info.name for info in graph.output}
    found = {}
    for layer in space.layers:
        start = graph.node[layer.position].output[0]
        if space.facts.shape(start) is not None:
            found[layer.index] = _behind(space, start, users, outputs)
    return found


def _behind(space: ChannelSpace, start: str, users: dict[str, list[int]], outputs: set[str]) -> str:
    graph, facts = space.model.proto.graph, space.facts
    shape = facts.shape(start)
    inside, best, absorbed = {start}, start, set[int]()
    waiting = set(users.get(start, ()))
    while waiting:
        i = min(waiting)
        waiting.remove(i)
        node = graph.node[i]
        alone = all(not x or x in inside or facts.constant(x) for x in node.input)
        if not alone or len(node.output) != 1 or facts.shape(node.output[0]) != shape or _mixes(space, node):
            break
        absorbed.add(i)
        inside.add(node.output[0])
        waiting |= set(users.get(node.output[0], ()))
        open_values = [x for x in inside if x in outputs or not set(users.get(x, ())) <= absorbed]
        if open_values == [node.output[0]]:
            best = node.output[0]
    return best


def _mixes(space: ChannelSpace, node: onnx.NodeProto) -> bool:
    """Whether a node has weights of its own that mix channels (another layer), or could."""
    layers = {space.model.proto.graph.node[layer.position].output[0] for layer in space.layers}
    return node.output[0] in layers or node.op_type in _MIXERS


_MIXERS = ("Softmax", "LogSoftmax", "LRN", "LayerNormalization", "GroupNormalization", "Transpose", "MaxPool")


# --- the passes ------------------------------------------------------------------------------------------------------


def responses(
    space: ChannelSpace,
    data: Dataset,
    *,
    layers: Sequence[int] | None = None,
    top: bool = True,
    provider: str = "cpu",
    threads: int | None = None,
    batch_bytes: int = 256 << 20,
    progress: Report | None = None,
) -> Responses:
    """What the filters of some layers respond to.

    Args:
        space: Structure of the model.
        data: The images; labels are used where there are any.
        layers: Indices of the layers, default all.
        top: Whether to look for the strongest responses and, for colour images, their gray versions.
        provider: Execution provider.
        threads: Of a run, default all cores.
        batch_bytes: Bound on the responses held at once.
        progress: Told how far the work is, in images.
    """
    values = response_values(space)
    chosen = [x for x in space.layers if x.index in values and (layers is None or x.index in layers)]
    seen = look(data)
    fields = receptive_fields(space, nhwc=seen is not None and seen.axis == 3)
    labelled = data.has_labels and data.labels.ndim == 1 and data.labels.dtype.kind in "iu"
    classes, rows = np.unique(data.labels, return_inverse=True) if labelled else (np.zeros(0, np.int64), None)
    k = min(len(data), max(LEAST_TOP, min(TOP, len(data) // SHARE))) if top else 0
    watch = _Watch(space, data, [values[x.index] for x in chosen], provider, threads, batch_bytes)
    found = [_empty(x, values[x.index], fields.get(values[x.index]), k, len(classes)) for x in chosen]
    twice = top and seen is not None and seen.colour
    total = len(data) * (2 if twice else 1)
    for at, batch in watch.run():
        for state, maps in zip(found, batch, strict=True):
            _add(state, _maps(state.layer, maps), at, None if rows is None else rows[at])
        if progress is not None:
            progress.update(int(at[-1]) + 1, total)
    for state in found:
        n_images = len(data)
        state.kernels = image_kernels(space, state.layer, seen, fields)
        state.mean, state.size = state.mean / n_images, state.size / n_images
        if len(classes):
            state.class_mean /= np.bincount(np.asarray(rows), minlength=len(classes))[:, None]
    if twice:
        assert seen is not None
        for state in found:
            state.gray = np.zeros_like(state.top)
        for at, batch in watch.run(seen):
            for state, maps in zip(found, batch, strict=True):
                _compare(state, _maps(state.layer, maps), at)
            if progress is not None:
                progress.update(len(data) + int(at[-1]) + 1, total)
    return Responses(tuple(found), seen, fields, tuple(int(c) for c in classes))


class _Watch:
    """The network with more outputs; batches of what they give."""

    def __init__(
        self,
        space: ChannelSpace,
        data: Dataset,
        values: Sequence[str],
        provider: str,
        threads: int | None,
        batch_bytes: int,
    ) -> None:
        few = data.inputs(np.arange(min(4, len(data))))
        sample = few if len(data) > 1 else None  # whether a fixed batch can be freed shows on more than one
        network = runtime.open_network(space.model, provider=provider, threads=threads, sample=sample)
        types = {name: space.facts.dtype(name) or onnx.TensorProto.FLOAT for name in values}
        inputs = [info.name for info in runtime.graph_inputs(network.proto)]
        types |= {info.name: info.type.tensor_type.elem_type for info in runtime.graph_inputs(network.proto)}
        proto = runtime.extract(network.proto, inputs, list(dict.fromkeys(values)), types)
        for info, given in zip(proto.graph.input, runtime.graph_inputs(network.proto), strict=True):
            info.CopyFrom(given)
        self._session = runtime.session(Model(proto, "", space.model.path), provider=provider, threads=threads)
        self._values, self._data, self._fixed = list(values), data, network.fixed
        # Shapes are known at batch 2; four bytes an element, and as much again for what is made of them.
        each = sum(4 * int(np.prod(space.facts.shape(name) or (1,))) for name in values)
        self._size = network.fixed or max(1, min(128, batch_bytes // max(each, 1)))

    def run(self, gray: Look | None = None) -> Iterator[tuple[npt.NDArray[np.int64], list[Array]]]:
        """Positions of a batch's images and the values; of the images without colour if `gray` says how they look."""
        n = len(self._data)
        names = list(dict.fromkeys(self._values))
        for start in range(0, n, self._size):
            at = np.arange(start, min(start + self._size, n))
            where = np.minimum(np.arange(start, start + (self._fixed or len(at))), n - 1)
            inputs = self._data.inputs(where)
            if gray is not None:
                inputs = {name: gray.gray(value) for name, value in inputs.items()}
            found = dict(zip(names, self._session.run(inputs, names), strict=True))
            yield at, [found[name][: len(at)] for name in self._values]


def _empty(layer: Layer, value: str, field: Field | None, k: int, n_classes: int) -> LayerResponses:
    c = layer.filters
    return LayerResponses(
        layer,
        value,
        field,
        np.full(c, np.inf, np.float32),
        np.full(c, -np.inf, np.float32),
        np.zeros(c),
        np.zeros(c),
        np.zeros((n_classes, c)),
        np.full((k, c), -np.inf, np.float32),
        np.zeros((k, c), np.int32),
        np.zeros((k, c), np.int32),
        products=np.zeros((c, c)),
        sums=np.zeros(c),
    )


def _maps(layer: Layer, values: Array) -> Array:
    """Responses as (k, filters, rows, columns), float32."""
    x = np.asarray(values, np.float32)
    if layer.kind == "dense":
        x = np.moveaxis(x, -1, 1)
    x = x.reshape(*x.shape[:2], -1, 1) if x.ndim != 4 else x
    return np.ascontiguousarray(x)


def _add(state: LayerResponses, maps: Array, at: npt.NDArray[np.int64], rows: npt.NDArray[np.int64] | None) -> None:
    """Take in the responses of a batch."""
    n, c = maps.shape[:2]
    state.width = maps.shape[3]
    flat = maps.reshape(n, c, -1)
    place = flat.argmax(2)
    strongest = np.take_along_axis(flat, place[..., None], 2)[..., 0]
    state.high = np.maximum(state.high, strongest.max(0))
    state.low = np.minimum(state.low, flat.min(axis=(0, 2)))
    mean = flat.mean(2, dtype=np.float32)
    size = mean if (state.low >= 0).all() else np.abs(flat).mean(2, dtype=np.float32)
    state.mean += mean.sum(0, dtype=np.float64)
    state.size += size.sum(0, dtype=np.float64)
    if rows is not None:
        np.add.at(state.class_mean, rows, mean)
    cells = _pooled(maps).transpose(1, 0, 2, 3).reshape(c, -1).astype(np.float64)
    assert state.products is not None
    assert state.sums is not None
    state.products += cells @ cells.T
    state.sums += cells.sum(1)
    state.n += cells.shape[1]
    k = len(state.top)
    if k:
        values = np.concatenate([state.top, strongest])
        images = np.concatenate([state.top_images, np.repeat(at[:, None], c, 1).astype(np.int32)])
        places = np.concatenate([state.top_places, place.astype(np.int32)])
        # Stable: of equals the earlier image, so that the batch size changes nothing.
        order = np.argsort(-values, axis=0, kind="stable")[:k]
        state.top, state.top_images, state.top_places = (
            np.take_along_axis(x, order, 0) for x in (values, images, places)
        )


def _compare(state: LayerResponses, maps: Array, at: npt.NDArray[np.int64]) -> None:
    """Note the responses of a batch of gray images at the places of the strongest ones."""
    assert state.gray is not None
    flat = maps.reshape(*maps.shape[:2], -1)
    hit = (state.top_images >= at[0]) & (state.top_images <= at[-1]) & np.isfinite(state.top)
    k, c = np.nonzero(hit)
    state.gray[k, c] = flat[state.top_images[k, c] - at[0], c, state.top_places[k, c]]


def _pooled(maps: Array) -> Array:
    """Maps averaged to at most `CELLS` cells along both axes; two products of matrices, so it costs little."""
    return np.asarray(_averages(maps.shape[2]) @ maps @ _averages(maps.shape[3]).T)


def _averages(n: int) -> Array:
    """(cells, n): row i averages the i-th stretch of n positions."""
    cells = min(n, CELLS)
    owner = np.arange(n) * cells // n
    out = (owner == np.arange(cells)[:, None]).astype(np.float32)
    return np.asarray(out / out.sum(1, keepdims=True), np.float32)


def contribution(space: ChannelSpace, found: LayerResponses) -> Floats:
    """How much each filter feeds to its readers, as a share of its layer, (filters,); NaN for protected ones.

    Mean absolute response x sum of the absolute weights that read the filter's group: the largest mean change that its
    removal can make in what is computed next. Not the contribution index of Qin et al. 2018, arXiv:1810.07322:
    this one needs no backward pass, which ONNX Runtime's inference does not have.
    """
    weights = space.outgoing_sizes()
    groups = found.layer.groups
    out = np.where(groups >= 0, found.size * weights[groups], np.nan) if len(weights) else np.full(len(groups), np.nan)
    total = np.nansum(out)
    return np.asarray(out / total if total > 0 else out)
