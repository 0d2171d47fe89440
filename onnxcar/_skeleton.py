"""The protobuf of a large file without its large weights: read, and written, one tensor at a time.

protobuf reads a file into bytes and copies every weight out of them, so a model takes twice its size to load. Here the
wire format (https://protobuf.dev/programming-guides/encoding/) is walked, and a large weight becomes a reference to
where its bytes lie in the file, in the form of ONNX's external data whose location is the file itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from onnxcar import _tensors
from onnxcar._tensors import SMALL_BYTES, Extent

__all__ = ["read", "write"]

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = TensorProto.RAW_DATA_FIELD_NUMBER
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class _OddError(Exception):
    """The file is not laid out as this reader knows it."""


def read(path: Path) -> onnx.ModelProto | None:
    """The model in a file with its large weights left there, or None where the whole file must be read.

    None: a damaged file (reading it whole tells how), a name that cannot stand for external data, a model that has
    external data already.
    """
    try:
        with path.open("rb") as stream:
            pieces = list(_model(stream, os.fstat(stream.fileno()).st_size, path.name))
        proto: onnx.ModelProto = onnx.ModelProto.FromString(b"".join(pieces))
        for tensor in _tensors.all_tensors(proto):
            if _tensors.is_external(tensor) and _tensors.extent(tensor).location != path.name:
                return None
    except (_OddError, DecodeError, ValueError, OSError):  # ValueError: what `extent` refuses
        return None
    return proto


def write(stream: IO[bytes], proto: onnx.ModelProto, folder: Path | None) -> None:
    """Write a model whole, its external weights put in, the largest tensor bounding the memory.

    Args:
        stream: Where to.
        proto: The model.
        folder: Where the data files of its external tensors lie.

    Raises:
        ModelError: As `_tensors.raw_bytes`.
    """
    rest = onnx.ModelProto()
    _tensors.copy_fields(proto, rest, skip="graph")
    graph = onnx.GraphProto()
    _tensors.copy_fields(proto.graph, graph, skip="initializer")
    head, body = rest.SerializeToString(), graph.SerializeToString()
    parts = [_framed(tensor) for tensor in proto.graph.initializer]
    stream.write(head)
    stream.write(_tag(_GRAPH, len(body) + sum(len(tag) + len(kept) + n_raw for tag, kept, n_raw in parts)))
    stream.write(body)
    for tensor, (tag, kept, n_raw) in zip(proto.graph.initializer, parts, strict=True):
        stream.write(tag)
        stream.write(kept)
        if n_raw:
            stream.write(_tensors.raw_bytes(tensor, folder))


def _framed(tensor: TensorProto) -> tuple[bytes, bytes, int]:
    """A tensor's tag in the graph, its bytes up to values that lie elsewhere, and how many bytes those are."""
    if not _tensors.is_external(tensor):
        held = tensor.SerializeToString()
        return _tag(_INITIALIZER, len(held)), held, 0
    kept = TensorProto()
    kept.CopyFrom(tensor)
    kept.ClearField("data_location")
    del kept.external_data[:]
    n_raw = _tensors.extent(tensor).length
    frame = kept.SerializeToString() + _tag(_RAW_DATA, n_raw)
    return _tag(_INITIALIZER, len(frame) + n_raw), frame, n_raw


# --- wire format ----------------------------------------------------------------------------------------------------


def _model(stream: IO[bytes], end: int, location: str) -> Iterator[bytes]:
    """The bytes of the model without large weights, in pieces."""
    for number, _, start, stop in _fields(stream, end):
        if number != _GRAPH:
            yield _slice(stream, start, stop)
            continue
        inner = b"".join(_graph(stream, stop, location))
        yield _tag(_GRAPH, len(inner))
        yield inner


def _graph(stream: IO[bytes], end: int, location: str) -> Iterator[bytes]:
    for number, content, start, stop in _fields(stream, end):
        if number != _INITIALIZER or stop - content < SMALL_BYTES:
            yield _slice(stream, start, stop)
            continue
        stream.seek(content)
        tensor = _tensor(stream, stop, location).SerializeToString()
        yield _tag(_INITIALIZER, len(tensor))
        yield tensor
        stream.seek(stop)


def _tensor(stream: IO[bytes], end: int, location: str) -> TensorProto:
    pieces: list[bytes] = []
    at: Extent | None = None
    for number, content, start, stop in _fields(stream, end):
        if number == _RAW_DATA and stop - content >= SMALL_BYTES:
            if at is not None:
                raise _OddError("values twice")
            at = Extent(location, content, stop - content)
            stream.seek(stop)
        else:
            pieces.append(_slice(stream, start, stop))
    tensor: TensorProto = TensorProto.FromString(b"".join(pieces))
    if at is not None:
        if _tensors.is_external(tensor) or tensor.external_data or tensor.HasField("raw_data"):
            raise _OddError("values twice")
        _tensors.refer(tensor, at)
    return tensor


def _fields(stream: IO[bytes], end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, start of the content, start of the tag and end of every field up to `end`.

    Whoever takes a graph's or a tensor's field leaves the stream at its end.
    """
    while (start := stream.tell()) < end:
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length = _varint(stream)
            content = stream.tell()
            stop = content + length
        elif kind == _VARINT:
            content = stream.tell()
            _varint(stream)
            stop = stream.tell()
        elif kind in (_FIXED64, _FIXED32):
            content = stream.tell()
            stop = content + (8 if kind == _FIXED64 else 4)
        else:
            raise _OddError("a wire type that ONNX has not")
        if stop > end:
            raise _OddError("a field beyond the end")
        yield number, content, start, stop


def _slice(stream: IO[bytes], start: int, stop: int) -> bytes:
    stream.seek(start)
    return stream.read(stop - start)


def _varint(stream: IO[bytes]) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)
        if not byte or shift > 63:
            raise _OddError("a number that does not end")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7


def _tag(number: int, length: int) -> bytes:
    """Tag and length of a field of bytes."""
    return _number(number << 3 | _BYTES) + _number(length)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
