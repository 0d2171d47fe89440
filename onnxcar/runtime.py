"""ONNX Runtime, held at one border: providers, sessions, cutting a graph at values, batches.

Everything that runs a model goes through `Session`; what ONNX Runtime throws leaves here as an error of ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxcar._device import Buffer, bind_inputs, bind_outputs
from onnxcar._graphs import constants, cut, extract, free_batch, graph_inputs, plain, uses, value_types
from onnxcar._half import half
from onnxcar._providers import Provider, onnx_runtime, resolve_provider
from onnxcar.errors import DataError, ModelError, RuntimeMissingError
from onnxcar.model import Model

__all__ = [
    "Input",
    "Network",
    "Provider",
    "Session",
    "batch_inputs",
    "constants",
    "cut",
    "extract",
    "free_batch",
    "graph_inputs",
    "n_cores",
    "open_network",
    "plain",
    "resolve_provider",
    "session",
    "uses",
    "value_types",
]

Array = npt.NDArray[Any]

MAX_PROTO_BYTES = 2**31 - 1
_AGREE = 1e-3  # two ways of batching the same network: largest difference, relative to the largest output
_AGREE_HALF = 2e-2


@dataclass(frozen=True)
class Input:
    """A graph input that must be fed.

    Attributes:
        name: Its name.
        dtype: What it takes.
        shape: Sizes, None where dynamic.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @property
    def batch(self) -> int | None:
        """Fixed size of the batch axis, None if dynamic (or if there is no axis)."""
        return self.shape[0] if self.shape else None


def n_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


# --- sessions -------------------------------------------------------------------------------------------------------


class Session:
    """A loaded network. `run` may be called from several threads."""

    def __init__(self, inner: Any, provider: Provider, threads: int) -> None:
        """Wrap a session of ONNX Runtime; `session` makes them."""
        self._inner = inner
        self.provider = provider
        self.threads = threads
        self.on_device = provider.on_device
        self.inputs: tuple[Input, ...] = tuple(
            Input(i.name, _numpy_type(i.type), _sizes(i.shape)) for i in inner.get_inputs()
        )
        self.outputs: tuple[str, ...] = tuple(o.name for o in inner.get_outputs())
        self._kinds = {o.name: _numpy_type(o.type) for o in inner.get_outputs()}
        self._rows: dict[str, tuple[int, ...]] = {}

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> list[Array]:
        """Values of the outputs.

        Args:
            feeds: Input name -> array. The key "" stands for the only input.
            outputs: Names, default all in graph order.

        Raises:
            DataError: An input is missing, or its shape is not the network's.
            ModelError: ONNX Runtime cannot run the network.
        """
        bound = self.bind(feeds)
        wanted = self.outputs if outputs is None else outputs
        if self.on_device:
            return self._bound(bound, given=wanted)
        try:
            return list(self._inner.run(list(wanted), bound))
        except Exception as exc:
            raise ModelError(f"ONNX Runtime failed to run the model: {_first_line(exc)}") from exc

    def hold(self, value: Array) -> Any:
        """The array where the session runs, to be fed again and again without a copy."""
        return Buffer.of(self.provider.device, value) if self.on_device else value

    def run_held(self, feeds: Mapping[str, Any], output: str | None = None) -> Buffer:
        """One output, by default the first, left on the device.

        Raises:
            ModelError: ONNX Runtime cannot run the network.
        """
        name = self.outputs[0] if output is None else output
        return Buffer.taken(self.provider.device, self._bound(self.bind(feeds), kept=[name])[0], self._kinds[name])

    def run_into(
        self, feeds: Mapping[str, Any], into: Mapping[str, Buffer], outputs: Sequence[str] = ()
    ) -> list[Array]:
        """Write outputs to buffers that have their shape.

        Args:
            feeds: As of `run`.
            into: Output -> where it goes.
            outputs: Others, which come back to the host.

        Raises:
            ModelError: ONNX Runtime cannot run the network, or an output has another shape.
        """
        return self._bound(self.bind(feeds), into=into, given=outputs)

    def room(self, names: Sequence[str], n: int, few: Mapping[str, Any]) -> dict[str, Buffer]:
        """Buffers for the outputs `names` of n samples.

        Args:
            names: Outputs with a row for each sample.
            n: Samples.
            few: Feeds of a few samples, run once to see how large a row is.
        """
        unknown = [name for name in names if name not in self._rows]
        if unknown:
            for name, value in zip(unknown, self.run(few, unknown), strict=True):
                self._rows[name] = value.shape[1:]
        return {name: Buffer.empty(self.provider.device, (n, *self._rows[name]), self._kinds[name]) for name in names}

    def _bound(
        self,
        feeds: Mapping[str, Any],
        *,
        into: Mapping[str, Buffer] | None = None,
        kept: Sequence[str] = (),
        given: Sequence[str] = (),
    ) -> list[Any]:
        """A run through a binding: values of `kept` and `given`, in this order. It is over when this returns."""
        wanted = list(dict.fromkeys(given))  # a name can be bound once
        try:
            binding = self._inner.io_binding()
            lent = bind_inputs(binding, feeds)
            bind_outputs(binding, into or {}, kept, wanted, self.provider.device)
            self._inner.run_with_iobinding(binding)
            made = binding.get_outputs()[len(into or {}) :]
            del lent
            back = {name: value.numpy() for name, value in zip(wanted, made[len(kept) :], strict=True)}
            return [*made[: len(kept)], *(back[name] for name in given)]
        except Exception as exc:
            raise ModelError(f"ONNX Runtime failed to run the model: {_first_line(exc)}") from exc

    def bind(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The feeds by the graph's own names, checked against its shapes and cast to its types."""
        if set(feeds) == {""}:
            if len(self.inputs) != 1:
                names = ", ".join(repr(i.name) for i in self.inputs)
                raise DataError(
                    f"The model has {len(self.inputs)} inputs ({names}), the data gives one array. Give data with one "
                    "array for each, keyed by these names."
                )
            feeds = {self.inputs[0].name: feeds[""]}
        out = {}
        for want in self.inputs:
            if want.name not in feeds:
                raise DataError(
                    f"The data gives no array for input {want.name!r} (it gives {sorted(feeds)}). Add it under "
                    "that name."
                )
            out[want.name] = _fit(feeds[want.name], want)
        return out


def session(
    model: Model | onnx.ModelProto,
    *,
    provider: str | Provider = "cpu",
    threads: int | None = None,
    wide: Collection[str] | None = None,
) -> Session:
    """The model, loaded.

    Args:
        model: What to run; weights listed among the inputs (IR < 4) count as weights.
        provider: Name or resolved provider.
        threads: Of one call of `run`; None = all cores. Set explicitly: threads that spin beside another busy process
            cost a factor of 4.
        wide: In half precision: inputs and outputs that stay in single precision. None: all.

    Raises:
        ModelError: ONNX Runtime does not load it.
        RuntimeMissingError: As `resolve_provider`.
    """
    ort = onnx_runtime()
    where = resolve_provider(provider)
    count = n_cores() if threads is None else max(1, threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = count
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if isinstance(model, Model):
        model = model.held()
    proto = model.proto if isinstance(model, Model) else model
    if isinstance(model, Model) and model.folder is not None:
        with contextlib.suppress(Exception):  # before ONNX Runtime 1.20 there was no such entry
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.folder))
    options.use_deterministic_compute = where.name != "cpu"  # on the CPU there is no choice
    try:
        ready = half(plain(proto), wide) if where.precision == "fp16" else plain(proto)
        # ONNX Runtime's own fall-back prints to the standard output and goes on on the CPU.
        inner = ort.InferenceSession(_serialized(ready), options, providers=where.ort_providers, enable_fallback=False)
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(
            f"ONNX Runtime {ort.__version__} does not load the model: {_first_line(exc)} A newer version may know "
            "what this one does not (pip install -U onnxruntime)."
        ) from exc
    if where.name != "cpu" and inner.get_providers()[0] != where.ort_names[0]:
        raise RuntimeMissingError(
            f"Provider {where.name!r} was asked for, but the session runs on {inner.get_providers()[0]}. "
            "`onnxcar doctor` says what is missing; or take --provider cpu.",
            provider=where.name,
        )
    return Session(inner, where, count)


def _serialized(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString())
    except Exception as exc:  # protobuf's EncodeError or ValueError, by version
        raise ModelError(
            f"The model has more than {MAX_PROTO_BYTES} bytes of weights in memory. Save it with external data and "
            "load that file."
        ) from exc


def _numpy_type(text: str) -> np.dtype[Any]:
    """Element type from ONNX Runtime's "tensor(float16)"."""
    name = text[text.find("(") + 1 : text.rfind(")")]
    table = {"float": "float32", "double": "float64", "string": "object"}
    try:
        return np.dtype(table.get(name, name))
    except TypeError:
        return np.dtype(np.float32)


def _sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) and d > 0 else None for d in shape)


def _fit(value: Any, want: Input) -> Any:
    if isinstance(value, Buffer):
        return value  # on the device, from a run or from `hold`
    if value.dtype != want.dtype:
        if value.dtype.kind == "f" and want.dtype.kind in "iu":
            limits = np.iinfo(want.dtype)
            value = np.clip(np.rint(value), limits.min, limits.max)
        value = value.astype(want.dtype)
    sizes = want.shape
    if not sizes:  # a scalar, or of unknown rank
        return value
    if len(value.shape) != len(sizes) or any(
        s is not None and s != n for s, n in zip(sizes[1:], value.shape[1:], strict=True)
    ):
        shown = "(" + ", ".join("any" if s is None else str(s) for s in sizes) + ")"
        raise DataError(
            f"Input {want.name!r} takes shape {shown}, the data has {value.shape}. Set size, layout and channels of "
            "the preprocessing (--size, --layout, --channels) to what the network takes.",
            shape=value.shape,
            expected=sizes,
        )
    return value


def _first_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    text = lines[0][:300] if lines else type(exc).__name__
    return text if text.endswith((".", "!")) else text + "."


def batch_inputs(model: Model | onnx.ModelProto) -> tuple[Input, ...]:
    """The inputs that must be fed, from the file alone: names, types, sizes (None where dynamic)."""
    proto = model.proto if isinstance(model, Model) else model
    out = []
    for info in graph_inputs(proto):
        kind = info.type.tensor_type
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        except (KeyError, ValueError, TypeError):
            dtype = np.dtype(np.float32)
        sizes = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
        out.append(Input(info.name, dtype, sizes))
    return tuple(out)


# --- whole networks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """A model that takes any number of samples at a time.

    Attributes:
        session: What runs.
        proto: The graph behind it, weights among the inputs stripped; batch freed where that works.
        fixed: Samples a run must have, None = any number.
        freed: Whether `proto` is the copy without the file's fixed batch.
    """

    session: Session
    proto: onnx.ModelProto
    fixed: int | None = None
    freed: bool = False

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What must be fed."""
        return self.session.inputs

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs of all samples; with a fixed batch in pieces, the last one filled up with its own last sample."""
        if self.fixed is None:
            return self.session.run(feeds)
        step = self.fixed
        n = len(next(iter(feeds.values())))
        parts = []
        for start in range(0, n, step):
            where = np.minimum(np.arange(start, start + step), n - 1)
            parts.append(self.session.run({name: value[where] for name, value in feeds.items()}))
        merged = [np.concatenate([np.atleast_1d(p[i]) for p in parts]) for i in range(len(parts[0]))]
        return [value[:n] if len(value) >= n else value for value in merged]


def open_network(
    model: Model | onnx.ModelProto,
    *,
    provider: str | Provider = "cpu",
    threads: int | None = None,
    sample: Mapping[str, Array] | None = None,
) -> Network:
    """The model, ready for any number of samples.

    A batch size fixed in the file is freed in a throw-away copy if that copy runs and agrees with the original on
    `sample`; otherwise samples go through in pieces of the fixed size.

    Args:
        model: What to run.
        provider: Name or resolved provider.
        threads: Of one run; None = all cores.
        sample: Inputs of at least 2 samples to try the copy on; default random.

    Raises:
        ModelError: ONNX Runtime does not load or run it.
    """
    where = resolve_provider(provider)
    if isinstance(model, Model):
        model = model.held()
    original = session(model, provider=where, threads=threads)
    proto = plain(model.proto if isinstance(model, Model) else model)
    fixed = {i.batch for i in original.inputs if i.batch is not None}
    if not fixed:
        return Network(original, proto)
    size = max(fixed)
    whole = Network(original, proto, size)
    feeds = {k: v[:3] for k, v in sample.items()} if sample is not None else _random_feeds(original.inputs, 3)
    try:
        copy = free_batch(proto)
        made = Model(copy, "", model.path) if isinstance(model, Model) else copy
        freed = Network(session(made, provider=where, threads=threads), copy, freed=True)
        ours, theirs = freed.run(feeds), whole.run(feeds)
        loose = _AGREE if where.precision == "fp32" else _AGREE_HALF
        if all(_agree(a, b, loose) for a, b in zip(ours, theirs, strict=True)):
            return freed
    except (ModelError, DataError):
        if sample is not None:
            whole.session.bind(feeds)  # data of a wrong shape is not the copy's fault: say so
    return whole


def _agree(a: Array, b: Array, loose: float) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind not in "fc":
        return bool(np.array_equal(a, b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    scale = max(1e-6, float(np.abs(y).max(initial=0)))
    # float16 carries three digits; a batch that leaks between samples is off by far more than this
    return bool(np.abs(x - y).max(initial=0) <= (loose if a.dtype != np.float16 else _AGREE_HALF) * scale)


def _random_feeds(inputs: Sequence[Input], n: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    out = {}
    for i in inputs:
        shape = (n, *(16 if s is None else s for s in i.shape[1:]))
        values = rng.normal(size=shape) if i.dtype.kind == "f" else rng.integers(0, 2, shape)
        out[i.name] = values.astype(i.dtype)
    return out
