"""Readers that are linear: their output without channel c is Z - W[:, c] x_c, so no row has to run them again.

A Conv (1 group), Gemm or MatMul with constant weights reads the masked value. Z is computed once per image for the
network as pruned so far; a row then subtracts what its candidate's channels contribute, a product as small as the
candidate. Rounding differs from a run of the whole reader: who uses this must look again at rows on the edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxcar.channels import ChannelSpace, Read

__all__ = ["Reader", "linear_readers", "subtract"]

Array = npt.NDArray[Any]
PREFIX = "onnxcar."
# Attributes of a Conv that say where its windows lie.
_WINDOW = ("auto_pad", "dilations", "pads", "strides")


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear node that reads a value.

    Attributes:
        value: What it reads.
        output: Its output, Z.
        channels: Group id -> its positions on axis 1 of the value, the same number for each.
        table: Contribution weights by group, (n_groups + 1, n_out, channels x window); the last, zeros, is nobody's.
        window: For a Conv the kernel size; None where a sample is a row of a matrix.
        attributes: Of the Conv, where its windows lie.
    """

    value: str
    output: str
    channels: dict[int, list[int]]
    table: Array
    window: tuple[int, ...] | None
    attributes: dict[str, Any]

    def lookup(self, candidates: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each row's group its position in the table, (k,), and its channels, (k, per_group)."""
        where = np.full(max(max(self.channels), 0) + 1, len(self.channels), np.int64)
        where[list(self.channels)] = np.arange(len(self.channels))
        inside = (candidates >= 0) & (candidates < len(where))
        position = np.where(inside, where[np.where(inside, candidates, 0)], len(self.channels))
        lists = np.asarray([*self.channels.values(), [0] * self.per_group], np.int64)
        return position, lists[position]

    @property
    def per_group(self) -> int:
        """Channels of each group."""
        return len(next(iter(self.channels.values())))


def linear_readers(space: ChannelSpace, proto: onnx.ModelProto, reads: Sequence[int]) -> list[Reader] | None:
    """The nodes behind these reads as `Reader`s, None unless all of them are linear and small in each group."""
    out = []
    for k in reads:
        read = space.reads[k]
        channels = _channels(read)
        if channels is None:
            return None
        for i, j in read.consumers:
            reader = _reader(space, proto.graph.node[i], j, read.value, channels)
            if reader is None:
                return None
            out.append(reader)
    return out


def _channels(read: Read) -> dict[int, list[int]] | None:
    """Positions of each group on axis 1, None where channels lie elsewhere or groups differ in size."""
    if read.groups.ndim < 2 or read.groups.shape[1] != read.groups.size:
        return None
    found: dict[int, list[int]] = {}
    for i, group in enumerate(read.groups.ravel().tolist()):
        if group >= 0:
            found.setdefault(group, []).append(i)
    sizes = {len(positions) for positions in found.values()}
    # With few groups the rows would do as much work as the whole reader.
    return found if len(sizes) == 1 and len(found) >= 4 else None


def _reader(
    space: ChannelSpace, node: onnx.NodeProto, position: int, value: str, channels: dict[int, list[int]]
) -> Reader | None:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if position != 0 or len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
        return None
    if len(node.input) < 2 or not space.facts.constant(node.input[1]) or space.facts.dtype(value) != 1:
        return None
    if any(x and not space.facts.constant(x) for x in node.input[1:]):
        return None
    window: tuple[int, ...] | None = None
    weights = space.facts.array(node.input[1])
    if node.op_type == "Conv":
        if attributes.get("group", 1) != 1:
            return None
        window = tuple(weights.shape[2:])
    elif node.op_type == "Gemm":
        if attributes.get("transA", 0) or weights.ndim != 2:
            return None
        weights = weights if attributes.get("transB", 0) else weights.T
        weights = weights * np.float32(attributes.get("alpha", 1.0))
    elif node.op_type == "MatMul":
        if weights.ndim != 2 or len(space.facts.shape(value) or ()) != 2:
            return None
        weights = weights.T
    else:
        return None
    if weights.dtype != np.float32 or max(map(max, channels.values())) >= weights.shape[1]:
        return None
    table = np.zeros(
        (len(channels) + 1, len(weights), weights[:, : len(next(iter(channels.values())))][0].size), np.float32
    )
    for i, positions in enumerate(channels.values()):
        table[i] = weights[:, positions].reshape(len(weights), -1)
    kept = {name: value for name, value in attributes.items() if name in _WINDOW} if window is not None else {}
    return Reader(value, node.output[0], channels, table, window, kept)


def subtract(proto: onnx.ModelProto, readers: Sequence[Reader], rows: str, types: Mapping[str, int]) -> None:
    """Put in front of a graph that takes each reader's output what makes it from Z and the candidate's channels.

    New inputs for each value: ``flat.<value>``, all images' channels one after the other; ``channel.<value>``, which of
    them each row takes, (k, per_group); ``candidate.<value>``, position of the row's group in the table, (k,); and
    ``all.<output>``, Z of all images.
    """
    graph = proto.graph
    nodes: list[onnx.NodeProto] = []
    taken = {i.name for i in graph.input}

    def given(name: str, kind: int) -> str:
        if name not in taken:
            taken.add(name)
            graph.input.append(helper.make_tensor_value_info(name, kind, None))
        return name

    def constant(name: str, values: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    for n, reader in enumerate(readers):
        kind = types[reader.value]
        at = f"{PREFIX}linear.{n}."
        flat = given(f"{PREFIX}flat.{reader.value}", kind)
        channel = given(f"{PREFIX}channel.{reader.value}", onnx.TensorProto.INT64)
        candidate = given(f"{PREFIX}candidate.{reader.value}", onnx.TensorProto.INT64)
        whole = given(f"{PREFIX}all.{reader.output}", kind)
        nodes += [
            helper.make_node("Gather", [whole, rows], [at + "z"], axis=0),
            helper.make_node("Gather", [constant(at + "table", reader.table), candidate], [at + "w"], axis=0),
            helper.make_node("Gather", [flat, channel], [at + "x"], axis=0),
        ]
        seen = at + "x"
        if reader.window is not None and (set(reader.window) != {1} or _moves(reader.attributes)):
            size = int(np.prod(reader.window))
            eye = np.tile(
                np.eye(size, dtype=np.float32).reshape(size, 1, *reader.window),
                (reader.per_group,) + (1,) * (len(reader.window) + 1),
            )
            seen = at + "windows"
            nodes.append(
                helper.make_node(
                    "Conv", [at + "x", constant(at + "eye", eye)], [seen], group=reader.per_group, **reader.attributes
                )
            )
        shape = constant(at + "shape", np.asarray([0, reader.table.shape[2], -1], np.int64))
        nodes += [
            helper.make_node("Reshape", [seen, shape], [at + "columns"]),
            helper.make_node("MatMul", [at + "w", at + "columns"], [at + "product"]),
            helper.make_node("Shape", [at + "z"], [at + "size"]),
            helper.make_node("Reshape", [at + "product", at + "size"], [at + "lost"]),
            helper.make_node("Sub", [at + "z", at + "lost"], [reader.output]),
        ]
    old = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *old])


def _moves(attributes: Mapping[str, Any]) -> bool:
    """Whether a window of size 1 still skips or pads positions."""
    return any(s != 1 for s in attributes.get("strides", ())) or any(attributes.get("pads", ()))
