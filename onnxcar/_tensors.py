"""Where a tensor's values lie, how many bytes they are, and how to reach them without trusting the file."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import IO, Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, numpy_helper

from onnxcar.errors import ModelError

MAX_RANK = 64  # numpy's limit
# 2**38 elements are a terabyte in FLOAT: a damaged number, and products beyond it overflow in C++ code.
MAX_ELEMENTS = 2**38
# Tensors up to this size are held in memory in any case, so that shape constants are at hand.
SMALL_BYTES = 65536

# Bits of one element, by name because older onnx releases lack the newest types. STRING has none.
_BITS = {
    getattr(TensorProto, name): bits
    for names, bits in (
        ("INT2 UINT2", 2),
        ("INT4 UINT4 FLOAT4E2M1", 4),
        ("BOOL INT8 UINT8 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0", 8),
        ("INT16 UINT16 FLOAT16 BFLOAT16", 16),
        ("INT32 UINT32 FLOAT", 32),
        ("INT64 UINT64 DOUBLE COMPLEX64", 64),
        ("COMPLEX128", 128),
    )
    for name in names.split()
    if hasattr(TensorProto, name)
}
_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True)
class Extent:
    """Where the values of one external tensor lie: ``length`` bytes at ``offset`` of the file ``location``."""

    location: str
    offset: int
    length: int


def quoted(text: str | os.PathLike[str]) -> str:
    """A name out of a file for a one-line message: control characters escaped, at most 80 characters.

    A path, which the user gave, stays whole.
    """
    return f"'{one_line(text, 80) if isinstance(text, str) else one_line(os.fspath(text), 4096)}'"


def one_line(text: str, limit: int) -> str:
    """Text out of a file, control characters escaped, cut to ``limit`` characters."""
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def is_external(tensor: TensorProto) -> bool:
    """Whether the values lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def n_elements(tensor: TensorProto) -> int:
    """Number of elements by the dims."""
    return math.prod(tensor.dims)


def n_bytes(tensor: TensorProto) -> int:
    """Bytes of the values in ``raw_data`` layout; elements below a byte are packed.

    Raises:
        ModelError: The type has no raw layout (strings, unknown types).
    """
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise ModelError(
            f"Tensor {quoted(tensor.name)} has element type {tensor.data_type}, which has no raw bytes in "
            f"onnx {onnx.__version__}. Upgrade onnx, or export the model again.",
            tensor=tensor.name,
        )
    return (n_elements(tensor) * bits + 7) // 8


def graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph, those of attributes and subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        yield from node_tensors(node)


def node_tensors(node: onnx.NodeProto) -> Iterator[TensorProto]:
    """Every tensor in the attributes of a node, subgraphs included."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for graph in subgraphs(attribute):
            yield from graph_tensors(graph)


def subgraphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """The graphs an attribute holds."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def all_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers, attributes, subgraphs, functions."""
    yield from proto.graph.initializer
    yield from nested_tensors(proto)


def check_tensor(tensor: TensorProto) -> None:
    """Refuse a tensor whose values are not exactly as many as its dims and type say.

    Costs no pass over the values.

    Raises:
        ModelError: Negative or huge dims, an unknown type, too few or too many values, several value fields.
    """
    where = f"Tensor {quoted(tensor.name)}"
    again = "The file is damaged: export or download it again."
    dims = list(tensor.dims)
    if any(d < 0 for d in dims) or len(dims) > MAX_RANK or math.prod(max(d, 1) for d in dims) > MAX_ELEMENTS:
        shown = dims if len(dims) <= 8 else f"{dims[:8]}..."
        raise ModelError(f"{where} has impossible dims {shown}. {again}", tensor=tensor.name)
    if tensor.HasField("segment"):
        raise ModelError(f"{where} is stored in segments, which ONNX never defined. Export the model again.")
    held = [f for f in _FIELDS if len(getattr(tensor, f))]
    raw = tensor.HasField("raw_data")
    if tensor.data_type == TensorProto.STRING:
        if is_external(tensor) or raw or set(held) - {"string_data"} or len(tensor.string_data) != n_elements(tensor):
            raise ModelError(f"{where} of strings does not hold {n_elements(tensor)} strings. {again}")
        return
    expected = n_bytes(tensor)
    if is_external(tensor):
        if held or (raw and tensor.raw_data):
            raise ModelError(f"{where} has values inside the model and in an external file. Export the model again.")
        return
    if raw + len(held) > 1:
        raise ModelError(f"{where} holds its values twice. {again}", tensor=tensor.name)
    if not raw and not held and expected:
        raise ModelError(
            f"{where} of dims {dims} holds no values. The weights were stripped: get the complete model.",
            tensor=tensor.name,
        )
    found = len(tensor.raw_data) if raw else _typed_bytes(tensor, held)
    if found != expected:
        raise ModelError(f"{where} of dims {dims} needs {expected} bytes and has {found}. {again}", tensor=tensor.name)


def _typed_bytes(tensor: TensorProto, held: list[str]) -> int:
    """Raw bytes that the values in the typed field make; -1 where the field does not fit the type."""
    if not held:
        return 0
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    if held != [field]:
        return -1
    entries = len(getattr(tensor, field))
    bits = _BITS[tensor.data_type]
    if bits < 8:  # packed to bytes, one byte an int32 entry
        return entries
    per_element = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    return entries * bits // 8 // per_element if entries % per_element == 0 else -1


def extent(tensor: TensorProto) -> Extent:
    """Where an external tensor's values lie, from its entries alone; no file is touched.

    Raises:
        ModelError: No or several locations, a path that leaves the model's folder, a number that is none, a
            length other than dims and type need.
    """
    where = f"External data of tensor {quoted(tensor.name)}"
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries:
            raise ModelError(f"{where} gives {quoted(entry.key)} twice. Export the model again.", tensor=tensor.name)
        entries[entry.key] = entry.value
    location = entries.get("location", "")
    parts = location.replace("\\", "/").split("/")
    outside = (
        ".." in parts
        or PureWindowsPath(location).anchor  # absolute on POSIX too
        or ":" in location
        or not location.isprintable()
        or parts[-1] in ("", ".")
    )
    if outside:
        raise ModelError(
            f"{where} lies in {quoted(location)}, which is no file name inside the model's folder: refused. "
            "Put the data file beside the model and name it by a relative path.",
            tensor=tensor.name,
            location=location,
        )
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise ModelError(
                f"{where} has {key} {quoted(text)}, which is no number of bytes. Export the model again.",
                tensor=tensor.name,
            )
        numbers[key] = int(text)
    expected = n_bytes(tensor)
    if "length" in entries and numbers["length"] != expected:
        raise ModelError(
            f"{where} is {numbers['length']} bytes, but dims {list(tensor.dims)} need {expected}. "
            "The model does not fit its data file: get both from one export.",
            tensor=tensor.name,
        )
    return Extent(location, numbers["offset"], expected)


def open_data(folder: Path, location: str) -> IO[bytes]:
    """The external data file, open for reading, when it is a regular file reached without a link.

    Raises:
        ModelError: Missing, a link (also in a folder on the way), a device, a pipe, or not readable.
    """
    path = folder / location
    shown = quoted(location)
    real_folder = os.path.realpath(folder)
    if os.path.realpath(path) != os.path.normpath(os.path.join(real_folder, location)):  # noqa: PTH118 - no Path.resolve: normpath must not follow links
        raise ModelError(
            f"External data {shown} is reached through a link, which may lead out of the model's folder: refused. "
            "Replace the link by the file itself (cp -L).",
            location=location,
        )
    try:
        # Non-blocking, or a pipe of that name would make us wait for ever.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except OSError as exc:
        what = "is missing" if isinstance(exc, FileNotFoundError) else f"cannot be read ({exc.strerror})"
        raise ModelError(
            f"External data {shown} {what} in {folder}. Put the model's data file there, readable.",
            location=location,
        ) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"External data {shown} is not a regular file: refused. Put the data file itself there.")
    return os.fdopen(descriptor, "rb")


def read_extent(folder: Path, at: Extent, tensor: TensorProto) -> bytes:
    """The raw bytes of an external tensor.

    Raises:
        ModelError: As `open_data`, or the file ends before the tensor does.
    """
    with open_data(folder, at.location) as file:
        check_bounds(at, os.fstat(file.fileno()).st_size, tensor)
        file.seek(at.offset)
        data = file.read(at.length)
    if len(data) != at.length:
        check_bounds(at, at.offset + len(data), tensor)
    return data


def check_bounds(at: Extent, file_bytes: int, tensor: TensorProto) -> None:
    """Refuse an extent beyond the end of its file.

    Raises:
        ModelError: It is.
    """
    if at.offset + at.length > file_bytes:
        raise ModelError(
            f"External data of tensor {quoted(tensor.name)} ends at byte {at.offset + at.length}, but "
            f"{quoted(at.location)} has {file_bytes}. The data file is truncated: get it again.",
            tensor=tensor.name,
            location=at.location,
        )


def raw_bytes(tensor: TensorProto, folder: Path | None) -> bytes:
    """The values in ``raw_data`` layout, wherever they lie.

    Raises:
        ModelError: External, and there is no folder or the file is not what the tensor says.
    """
    if is_external(tensor):
        if folder is None:
            raise ModelError(
                f"Tensor {quoted(tensor.name)} lies in external data and the model has no path. "
                "Use onnxcar.load(path), or pass path= to onnxcar.from_proto.",
                tensor=tensor.name,
            )
        return read_extent(folder, extent(tensor), tensor)
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)


def to_array(tensor: TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """The values as an array; see `Model.array`."""
    if not is_external(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    inner = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw_bytes(tensor, folder))
    return np.asarray(numpy_helper.to_array(inner))


def refer(tensor: TensorProto, at: Extent) -> None:
    """Say that the values of a tensor lie in a file."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", at.location), ("offset", at.offset), ("length", at.length)):
        tensor.external_data.add(key=key, value=str(value))


def embed(tensor: TensorProto, data: bytes) -> None:
    """Put the values of an external tensor into it."""
    tensor.raw_data = data
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def copy_fields(message: Any, out: Any, *, skip: str) -> None:
    """Copy every field of a protobuf message but one into the empty ``out``."""
    for field, value in message.ListFields():
        if field.name == skip:
            continue
        if isinstance(value, Message):
            getattr(out, field.name).CopyFrom(value)
        elif isinstance(value, str | bytes | int | float):
            setattr(out, field.name, value)
        else:
            getattr(out, field.name).extend(value)


def copy_without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy but for the graph's initializers, which are never touched."""
    out = onnx.ModelProto()
    copy_fields(proto, out, skip="graph")
    copy_fields(proto.graph, out.graph, skip="initializer")
    return out


def nested_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor but the graph's initializers: in attributes, subgraphs, functions."""
    for node in proto.graph.node:
        yield from node_tensors(node)
    for function in proto.functions:
        for node in function.node:
            yield from node_tensors(node)
