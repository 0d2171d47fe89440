"""Activations that stay on the device: buffers filled batch by batch, and the sizes of channels, counted there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from onnxcar._device import Buffer, aligned
from onnxcar.executors import Pool
from onnxcar.runtime import Provider, Session, session

__all__ = ["Sizes", "channel_sizes", "few_sizes", "filled"]

Array = npt.NDArray[Any]
OPSET, IR = 13, 7  # of graphs that are ours alone; what ONNX Runtime 1.20 and later all run
CHUNK_BYTES = 64 << 20  # of values in one run


def filled(
    front: Session,
    names: Sequence[str],
    feeds: Callable[[int, int], Mapping[str, Any]],
    n: int,
    batch: int,
    pool: Pool | None = None,
    room: Mapping[str, Buffer] | None = None,
    told: Callable[[int, int, list[Array]], None] | None = None,
    others: Sequence[str] = (),
) -> dict[str, Buffer]:
    """Outputs of a session for n images, each batch written to its place on the device.

    Args:
        front: What runs.
        names: Outputs with a row for each image.
        feeds: Of the images from one position up to another.
        n: Images.
        batch: Images of a run, about.
        pool: Runs batches side by side.
        room: Buffers of these outputs that may be overwritten.
        told: Told the positions of a run and, on the host, the outputs `others`.
        others: Further outputs.
    """
    if room and all(name in room and len(room[name]) >= n for name in names):
        made = {name: room[name][:n] for name in names}
    else:
        made = front.room(names, n, feeds(0, min(n, 2)))
    step = aligned(batch, (buffer.row_bytes for buffer in made.values()))

    def run(start: int) -> tuple[int, int, list[Array]]:
        stop = min(start + step, n)
        into = {name: buffer[start:stop] for name, buffer in made.items()}
        return start, stop, front.run_into(feeds(start, stop), into, others)

    for start, stop, got in (pool or Pool(1)).map(run, range(0, n, step)):
        if told is not None:
            told(start, stop, got)
    return made


def few_sizes(n: int) -> int:
    """The rows that a run of n rows is filled up to: 4, 5, 6 or 7 times a power of two.

    A GPU prepares its kernels for each number of rows that it meets; a fifth of the rows at most are run in vain.
    """
    unit = 1 << max(0, n.bit_length() - 3)
    return max(4, -(-n // unit) * unit)


class Sizes:
    """How large channels are on each image: sums of squares, of which only these come back to the host."""

    def __init__(self, dtype: np.dtype[Any], rank: int, rest: Sequence[int], provider: Provider, threads: int) -> None:
        """Make the session.

        Args:
            dtype: Of the values.
            rank: Of the values.
            rest: Axes to sum over.
            provider: Where the values lie.
            threads: Of a run.
        """
        value, node = helper.make_tensor_value_info, helper.make_node
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        nodes = [node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT)]
        if rest:
            axes = list(rest)
            # Squares underflow, sums of absolute values do not: what is not zero must not look like it.
            nodes += [
                node("ReduceSumSquare", ["wide"], ["squares"], axes=axes, keepdims=0),
                node("ReduceL1", ["wide"], ["sums"], axes=axes, keepdims=0),
            ]
        else:
            nodes += [node("Mul", ["wide", "wide"], ["squares"]), node("Abs", ["wide"], ["sums"])]
        nodes += [
            node("Equal", ["squares", "zero"], ["none"]),
            node("Greater", ["sums", "zero"], ["some"]),
            node("And", ["none", "some"], ["lost"]),
            node("Where", ["lost", "tiny", "squares"], ["sizes"]),
        ]
        graph = helper.make_graph(
            nodes,
            "sizes",
            [value("x", kind, [None] * rank)],
            [value("sizes", TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(np.zeros((), np.float32), "zero"),
                numpy_helper.from_array(np.asarray(np.finfo(np.float32).tiny), "tiny"),
            ],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        self._session = session(proto, provider=provider.exact, threads=threads)

    def of(self, values: Buffer) -> npt.NDArray[np.float32]:
        """Sum of squares of each channel, (k, channels); zero exactly where all its values are zero."""
        step = max(1, CHUNK_BYTES // max(1, values.row_bytes))
        parts = [self._session.run({"x": values[i : i + step]})[0] for i in range(0, len(values), step)]
        return np.concatenate(parts).reshape(len(values), -1)


def channel_sizes(values: Array, rest: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """As `Sizes`, of an array of the host.

    Args:
        values: (k, ...).
        rest: Axes to sum over.
    """
    parts = []
    for start in range(0, len(values), 64):
        part = values[start : start + 64].astype(np.float32, copy=False)
        norm = np.square(part).sum(rest) if rest else np.square(part)
        # Squares underflow: what is not zero must not look like it.
        tiny = (norm == 0) & ((part != 0).any(rest) if rest else part != 0)
        parts.append(np.where(tiny, np.finfo(np.float32).tiny, norm).reshape(len(part), -1))
    return np.concatenate(parts)
