"""Images made to excite a filter: gradient ascent on the network's input; needs the extra ``[torch]``.

Erhan, Bengio, Courville and Vincent 2009, Visualizing higher-layer features of a deep network. What keeps the images
from being noise: they are drawn by their Fourier coefficients, scaled so that all frequencies move alike, in colours
decorrelated as those of the data are correlated (Olah, Mordvintsev and Schubert 2017, Feature visualization,
10.23915/distill.00007), and moved about at every step (Mordvintsev, Olah and Tyka 2015, Inceptionism). Values stay
in the range of pixels.

The layers in front of a filter are run by PyTorch, converted by onnx2fx, and believed only where they agree with ONNX
Runtime on images of the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar import runtime
from onnxcar.channels import ChannelSpace
from onnxcar.errors import DataError, RuntimeMissingError
from onnxcar.interpret._pictures import Look
from onnxcar.interpret._similar import correlation
from onnxcar.model import Model

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.interpret._responses import LayerResponses, Responses
    from onnxcar.progress import Report

__all__ = ["Made", "maximise", "need_torch"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
STEPS = 64
RATE = 0.12  # of Adam, on Fourier coefficients
LARGEST = 96  # side of an image that is made, pixels: of a larger field the middle, which weighs most
MOST = 32  # filters at a time
LOOKED_AT = 64  # images of the data that colours and range are taken from
AGREES = 1e-3  # largest difference from ONNX Runtime, in parts of the largest response
# Rising functions: what excites their argument excites them, and in front of them the gradient does not vanish.
_RISING = ("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "Tanh", "Softplus")


@dataclass(frozen=True, eq=False)
class Made:
    """Images made for the filters of a layer.

    Attributes:
        pictures: (filters, h, w, 3), red first; the part that the filter sees.
        responses: Response of each filter to its own image, in front of its activation function, (filters,); NaN where
            time did not suffice.
        answers: Largest response of every filter to every image, (images, filters); NaN rows where there is none.
    """

    pictures: npt.NDArray[np.uint8]
    responses: Floats
    answers: Floats

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """Filters that have an image, (filters,)."""
        return np.asarray(np.isfinite(self.responses))

    def correlation(self) -> Floats | None:
        """Correlation of the filters' responses to all images made, (filters, filters); None if some are missing.

        Two filters are alike if the same images excite both, wherever in them.
        """
        if not self.done.all():
            return None
        x = np.maximum(self.answers, 0)
        return correlation(x.T @ x, x.sum(0), len(x))


def need_torch() -> None:
    """See that the extra is there, before anything takes long.

    Raises:
        RuntimeMissingError: It is not.
    """
    try:
        import onnx2fx
        import torch

        assert onnx2fx
        assert torch
    except ImportError as exc:
        raise RuntimeMissingError(
            f'Images cannot be made for filters: {exc}. Install them: pip install "onnxcar[torch]", or leave out '
            "--maximise.",
            provider=None,
        ) from exc


def maximise(
    space: ChannelSpace,
    found: Responses,
    data: Dataset,
    *,
    seconds: float,
    seed: int = 0,
    steps: int = STEPS,
    threads: int | None = None,
    batch_bytes: int = 256 << 20,
    progress: Report | None = None,
) -> tuple[dict[int, Made], dict[int, str]]:
    """Make an image for every filter, as far as time suffices: each layer gets an equal share of what is left.

    An image depends on the filter, the data's colours and the seed alone, not on the other filters or the time.

    Args:
        space: Structure of the model.
        found: Responses: which value of a layer to excite, its receptive field, how inputs look.
        data: Images: their colours, and what the conversion is checked on.
        seconds: Time for all.
        seed: Of the noise that images start from.
        steps: Of the ascent.
        threads: Of PyTorch, default as it is.
        batch_bytes: Bound on the activations held at once, roughly.
        progress: Told how far the work is, in filters.

    Returns:
        By layer index, what was made; and for the layers that have nothing or not all, the reason.

    Raises:
        RuntimeMissingError: The extra is not installed.
        DataError: The data are no images.
    """
    need_torch()
    if found.look is None:
        raise DataError("Images can only be made for networks that read images. Leave out --maximise.")
    palette = _Palette.of(found.look, data)
    made: dict[int, Made] = {}
    left: dict[int, str] = {}
    end = time.monotonic() + seconds
    total, before = sum(state.layer.filters for state in found.layers), 0
    with _threads(threads):
        for k, state in enumerate(found.layers):
            share = (end - time.monotonic()) / (len(found.layers) - k)
            try:
                ascent = _Ascent(space, state, found.look, palette, data, batch_bytes)
                one = ascent.run(time.monotonic() + share, seed, steps, before, total, progress)
            except _NotConvertedError as exc:
                left[state.layer.index] = str(exc)
            else:
                if one.done.any():
                    made[state.layer.index] = one
                if not one.done.all():
                    left[state.layer.index] = f"time for {int(one.done.sum())} of {state.layer.filters} filters"
            before += state.layer.filters
    return made, left


class _NotConvertedError(Exception):
    """PyTorch does not run a layer as ONNX Runtime does; the reason in words."""


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class _Palette:
    """Range of inputs, and colours as the data have them.

    Attributes:
        low: Smallest input of each channel, (channels,).
        high: Largest.
        mix: Decorrelated colours -> channels, (channels, channels).
    """

    low: Array
    high: Array
    mix: Array

    @classmethod
    def of(cls, look: Look, data: Dataset) -> _Palette:
        at = np.unique(np.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).astype(np.int64))
        x = np.moveaxis(np.asarray(data.inputs(at)[""], np.float32), look.axis, -1)
        flat = x.reshape(-1, x.shape[-1])
        mean, std = np.asarray(look.mean, np.float32), np.asarray(look.std, np.float32)
        low, high = ((0 - mean) / std, (255 - mean) / std) if look.known else (flat.min(0), flat.max(0))
        unit = (flat - low) / np.maximum(high - low, 1e-9)
        values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(unit.T.astype(np.float64))))
        mix = vectors * np.sqrt(np.maximum(values, 0) + 1e-10)
        mix /= max(np.linalg.norm(mix, axis=0).max(), 1e-9)
        return cls(*(x.astype(np.float32) for x in (low, high, mix)))


class _Ascent:
    """One layer: the part of the network in front of it in PyTorch, and the size of the images."""

    def __init__(
        self,
        space: ChannelSpace,
        state: LayerResponses,
        look: Look,
        palette: _Palette,
        data: Dataset,
        batch_bytes: int,
    ) -> None:
        self._state, self._look, self._palette = state, look, palette
        few = np.asarray(data.inputs(np.arange(min(2, len(data))))[""])
        if few.dtype != np.float32:
            raise _NotConvertedError(f"its input is {few.dtype}, not float32")
        proto = _part(space, state)
        self._network = _converted(proto, few, space.model)
        self._full = few.shape[2:4] if look.axis == 1 else few.shape[1:3]
        self._shape, self._at = self._canvas()
        elements = sum(
            math.prod(space.facts.shape(name) or (1,)) // max(1, (space.facts.shape(name) or (1,))[0])
            for node in proto.graph.node
            for name in node.output
        )
        each = 12 * elements * math.prod(self._shape) // max(1, math.prod(self._full))
        self._most = max(1, min(MOST, batch_bytes // max(each, 1)))

    def _canvas(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size of the images, and the position of the response that is raised: the middle."""
        import torch

        field = self._state.field
        wanted = self._full
        if field is not None:
            pairs = zip(self._full, field.size, field.jump, strict=True)
            wanted = tuple(min(most, LARGEST, math.ceil(size + 2 * jump)) for most, size, jump in pairs)
        for shape in (wanted, self._full):  # a Reshape behind the image may take no other size than the full one
            try:
                with torch.no_grad():
                    maps = self._maps(torch.zeros((1, len(self._palette.low), *shape)))
                if maps.shape[1] == self._state.layer.filters and maps.shape[2] and maps.shape[3]:
                    return (shape[0], shape[1]), (maps.shape[2] // 2, maps.shape[3] // 2)
            except Exception:  # whatever PyTorch has against a size, the full one is tried
                continue
        raise _NotConvertedError("PyTorch runs it on no image, not even one of full size")

    def _maps(self, images: Any) -> Any:
        """Responses (k, filters, rows, columns) to inputs (k, channels, h, w)."""
        import torch

        x = images if self._look.axis == 1 else images.permute(0, 2, 3, 1)
        y = self._network(x)
        y = y[0] if isinstance(y, tuple | list) else y
        if self._state.layer.kind == "dense":
            y = torch.movedim(y, -1, 1)
        return y if y.ndim == 4 else y.reshape(*y.shape[:2], -1, 1)

    def run(self, end: float, seed: int, steps: int, before: int, total: int, progress: Report | None) -> Made:
        """Images for the filters, in order, until it is `end` on the monotonic clock."""
        import torch

        n = self._state.layer.filters
        top, left, bottom, right = self._box()
        pictures = np.zeros((n, bottom - top, right - left, 3), np.uint8)
        responses, answers = np.full(n, np.nan), np.full((n, n), np.nan)
        for start in range(0, n, self._most):
            if time.monotonic() >= end:
                break
            ids = list(range(start, min(start + self._most, n)))
            images = self._made(ids, seed, steps)
            with torch.no_grad():
                maps = self._maps(self._inputs(images)).double().numpy()
            responses[ids] = maps[np.arange(len(ids)), ids, self._at[0], self._at[1]]
            answers[ids] = maps.max(axis=(2, 3))
            shown = np.rint(255 * images.permute(0, 2, 3, 1).numpy()).astype(np.uint8)
            pictures[ids] = shown[:, top:bottom, left:right][..., list(self._look.order)]
            if progress is not None:
                progress.update(before + ids[-1] + 1, total, self._state.layer.node)
        return Made(pictures, responses, answers)

    def _box(self) -> tuple[int, int, int, int]:
        field = self._state.field
        if field is None:
            return 0, 0, *self._shape
        return field.box(*self._at, *self._shape)

    def _made(self, ids: Sequence[int], seed: int, steps: int) -> Any:
        """Images (k, channels, h, w) in 0..1 that excite these filters."""
        import torch

        h, w = self._shape
        channels = len(self._palette.low)
        frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
        scale = torch.from_numpy((math.sqrt(h * w) / np.maximum(frequency, 1 / max(h, w))).astype(np.float32))
        mix = torch.from_numpy(self._palette.mix)
        noise = [
            np.random.default_rng([seed, self._state.layer.index, i]).normal(0, 0.01, (channels, h, w // 2 + 1, 2))
            for i in ids
        ]
        spectrum = torch.from_numpy(np.stack(noise).astype(np.float32)).requires_grad_()
        optimiser = torch.optim.Adam([spectrum], lr=RATE)
        moves = np.random.default_rng([seed, self._state.layer.index])
        reach = min(h, w) // 16
        at = torch.arange(len(ids)), torch.tensor(ids)

        def drawn() -> Any:
            plain = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(h, w)) / 4
            return torch.sigmoid(torch.einsum("dc,nchw->ndhw", mix, plain))

        for _ in range(steps):
            dy, dx = (int(x) for x in moves.integers(-reach, reach + 1, 2))
            optimiser.zero_grad()
            maps = self._maps(self._inputs(torch.roll(drawn(), (dy, dx), (2, 3))))
            (-maps[at[0], at[1], self._at[0], self._at[1]].sum()).backward()
            optimiser.step()
        return drawn().detach()

    def _inputs(self, images: Any) -> Any:
        """Images in 0..1 as the network reads them."""
        import torch

        low, high = (torch.from_numpy(x)[:, None, None] for x in (self._palette.low, self._palette.high))
        return low + (high - low) * images


def _part(space: ChannelSpace, state: LayerResponses) -> onnx.ModelProto:
    """The network up to a layer's response, in front of rising activation functions."""
    proto = runtime.plain(space.model.held().proto)
    made_by = {name: node for node in proto.graph.node for name in node.output}
    start = proto.graph.node[state.layer.position].output[0]
    target = state.value
    while target != start and made_by[target].op_type in _RISING:
        target = made_by[target].input[0]
    types = {target: space.facts.dtype(target) or onnx.TensorProto.FLOAT}
    inputs = runtime.graph_inputs(proto)
    if len(inputs) != 1:
        raise _NotConvertedError(f"the network has {len(inputs)} inputs")
    return runtime.extract(proto, [inputs[0].name], [target], types)


def _converted(proto: onnx.ModelProto, few: Array, model: Model) -> Any:
    """The graph as a PyTorch module that answers as ONNX Runtime does.

    Raises:
        _NotConvertedError: It cannot be converted or run, or answers otherwise.
    """
    import onnx2fx
    import torch

    name = proto.graph.output[0].name
    session = runtime.session(Model(proto, "", model.path), provider="cpu")
    try:
        want = session.run({proto.graph.input[0].name: few}, [name])[0]
        network = onnx2fx.convert(proto).eval()
        with torch.no_grad():
            got = network(torch.from_numpy(np.ascontiguousarray(few)))
    except Exception as exc:
        raise _NotConvertedError(f"PyTorch cannot run it: {type(exc).__name__}: {str(exc)[:200]}") from exc
    values = (got[0] if isinstance(got, tuple | list) else got).numpy()
    worst = float(np.abs(values - want).max()) if values.shape == want.shape else math.inf
    if not worst <= AGREES * max(float(np.abs(want).max()), 1e-6):
        raise _NotConvertedError(f"PyTorch answers otherwise than ONNX Runtime (difference {worst:.2g})")
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network
