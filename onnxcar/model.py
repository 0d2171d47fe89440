"""Models as files: load behind a wall, save whole or not at all, count parameters."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import TensorProto

from onnxcar import _skeleton, _tensors, _wall
from onnxcar._params import parameters
from onnxcar._tensors import SMALL_BYTES as _SMALL_BYTES
from onnxcar._tensors import Extent, quoted
from onnxcar.errors import ModelError, OutputError

__all__ = ["Model", "check_output", "count_params", "from_proto", "load", "parameters", "save"]

# protobuf cannot hold more in one message.
MAX_PROTO_BYTES = 2**31 - 1
# External data above this many bytes stays on disk until a tensor is asked for.
LAZY_BYTES = 2**30
# Large weights of an .onnx file above this many bytes stay in it until they are asked for.
LAZY_FILE_BYTES = 2**25
# Above this the digest of a protobuf is taken tensor by tensor: serializing it would double the memory.
_DIGEST_BYTES = 2**24
# Smaller tensors stay in the .onnx file when the rest goes to the data file.
_EXTERNAL_MIN_BYTES = 1024
# Offsets in the data file: pages, as ONNX advises for mapping into memory; little ones need no page of their own.
_PAGE_BYTES = 4096
_ALIGN_BYTES = 16
# Up to here the checker reads the file itself; above, a copy without the weights.
_CHECK_FILE_BYTES = 2**28

# First bytes of what people pass by mistake -> what it is.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint; export it with torch.onnx.export",
    b"\x80\x02": "a Python pickle, which is never opened; export the network with torch.onnx.export",
    b"\x80\x04": "a Python pickle, which is never opened; export the network with torch.onnx.export",
    b"\x89HDF": "an HDF5 file, perhaps Keras; convert it with tf2onnx",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer; run git lfs pull",
    b"<": "an HTML or XML page; download the file itself",
}


@dataclass(frozen=True, eq=False)
class Model:
    """An ONNX model and where it came from.

    Attributes:
        proto: The protobuf. Never change it: what was computed from it would no longer fit. Its large tensors may
            be external (left on disk, also where the file itself holds them); read them by `array`.
        sha256: Hex digest of the ``.onnx`` bytes followed by those of each external data file, by sorted name.
        path: The file, or None; external tensors lie relative to its folder.
        external: Came with external data, so it is saved with external data.
        n_bytes: Size on disk, external data included.
    """

    proto: onnx.ModelProto
    sha256: str
    path: Path | None = None
    external: bool = False
    n_bytes: int = 0

    @property
    def folder(self) -> Path | None:
        """Where external tensors lie."""
        return None if self.path is None else self.path.parent

    def array(self, tensor: TensorProto) -> np.ndarray[Any, Any]:
        """The values of one tensor of this model, of shape ``tensor.dims``; may be read-only, never cached.

        Raises:
            ModelError: External, and the data file is gone or too short.
        """
        return _tensors.to_array(tensor, self.folder)

    def held(self) -> Model:
        """This model with the weights that were left in its own ``.onnx`` file read into the protobuf, as a run needs.

        Itself where none were. External data files stay where they are.

        Raises:
            ModelError: The file is gone or is another by now.
        """
        if self.external or self.folder is None or not any(_external(self.proto)):
            return self
        proto = _copy(self.proto)
        for tensor in _external(proto):
            _tensors.embed(tensor, _tensors.raw_bytes(tensor, self.folder))
        return Model(proto, self.sha256, self.path, False, self.n_bytes)

    def with_proto(self, proto: onnx.ModelProto) -> Model:
        """This model after surgery: another protobuf whose external tensors, if any, lie where ours do.

        Raises:
            ModelError: As `from_proto`.
        """
        made = from_proto(proto, self.path)
        return Model(made.proto, made.sha256, self.path, self.external or made.external, made.n_bytes)


def load(path: str | os.PathLike[str]) -> Model:
    """The model in a file, checked so that no later step can stumble over it.

    External data up to 1 GiB is read into the protobuf; more stays on disk. Data files must be regular files
    inside the model's folder, reached without links.

    Raises:
        ModelError: No such file, not ONNX, damaged, fails the checker, or its external data is missing, outside
            the folder, or of another size than its tensors.
    """
    file = Path(path)
    shown = quoted(file)
    proto, digest, size = _open_lazily(file) or _open_whole(file, shown)
    try:
        _wall.check_structure(proto)
        sizes = {name: n for name, n in _data_files(proto, file.parent).items() if name != file.name}
        for name in sorted(sizes):
            with _tensors.open_data(file.parent, name) as stream:
                _digest_stream(digest, stream)
        if sizes:
            _embed_external(proto, file.parent)
        _wall.check_onnx(proto, full=False)
    except ModelError as exc:
        raise ModelError(f"{shown}: {exc}", **exc.facts) from exc
    return Model(proto, digest.hexdigest(), file, bool(sizes), size + sum(sizes.values()))


def from_proto(proto: onnx.ModelProto, path: str | os.PathLike[str] | None = None) -> Model:
    """A protobuf as a model, checked like a file; it is not copied and must not be changed afterwards.

    External tensors stay external. ``sha256`` is that of the serialized bytes; above 16 MiB, which is too much to
    serialize for that, of the protobuf without its weights, followed by each weight.

    Args:
        proto: The model.
        path: The file whose folder holds the external data, if there is any.

    Raises:
        ModelError: As `load`.
    """
    _wall.check_structure(proto)
    file = None if path is None else Path(path)
    external = any(_tensors.is_external(tensor) for tensor in _tensors.all_tensors(proto))
    if external and file is None:
        raise ModelError("The model has external data and no path to find it by. Use onnxcar.load, or pass path=.")
    if external and file is not None:
        _data_files(proto, file.parent)
    _wall.check_onnx(proto, full=False)
    sha256, size = _digest_proto(proto)
    size += sum(at.length for at in {_tensors.extent(tensor) for tensor in _external(proto)})
    return Model(proto, sha256, file, external, size)


def save(
    model: Model, path: str | os.PathLike[str], *, force: bool = False, metadata: Mapping[str, str] | None = None
) -> Model:
    """The model as written to ``path``, whole or not at all.

    The file passes the full checker with strict shape inference before it appears. A model that came with external
    data, or is above 2 GiB, gets its tensors in ``<stem>.data`` beside it, copied one at a time: the largest tensor
    bounds the memory. All else of the protobuf (versions, metadata, doc strings, functions) stays.

    Args:
        model: What to write.
        path: Where to.
        force: Overwrite an existing file.
        metadata: Joins ``metadata_props``; a key that is there gets the new value.

    Raises:
        OutputError: The file exists, the folder is missing or not writable, the disk is full, or the target is
            where the model's own weights still lie.
        ModelError: The model fails the checker.
    """
    target = Path(path)
    external = model.external or _held_bytes(model.proto) > MAX_PROTO_BYTES
    check_output(target, force=force, external=external)
    _check_source(model, target)
    try:
        # A folder beside the target: same file system, so that the last step is a rename, and swept on any failure.
        with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
            draft = Path(folder) / target.name
            draft_data = _data_path(draft)
            proto = _copy_external(model, draft_data) if external else _copy(model.proto)
            _merge_metadata(proto, metadata or {})
            _write(draft, proto, None if external else model.folder)
            _check_draft(proto, draft)
            sha256, size = _digest_files([draft, draft_data])
            _publish(draft, target)
    except OSError as exc:
        raise OutputError(
            f"Cannot write {quoted(target)}: {exc.strerror or exc}. Nothing was written; choose another folder, "
            "or make room in this one.",
            path=str(target),
        ) from exc
    if external:
        _embed_external(proto, target.parent)
    elif any(_external(proto)):  # they lie where the model was made; from now on, in the file that was written
        proto = (_open_lazily(target) or _open_whole(target, quoted(target)))[0]
    return Model(proto, sha256, target, external, size)


def check_output(path: str | os.PathLike[str], *, force: bool = False, external: bool = False) -> None:
    """Refuse a target that `save` would refuse, before hours are spent on what goes there.

    Raises:
        OutputError: It exists (or its data file, if ``external``), or its folder is missing or not writable.
    """
    target = Path(path)
    folder = target.parent
    shown = quoted(target)
    if not folder.is_dir():
        raise OutputError(f"Folder {quoted(folder)} for {shown} does not exist. Create it first.", path=str(target))
    for file in [target, _data_path(target)] if external else [target]:
        if file.is_dir():
            raise OutputError(f"{quoted(file)} is a folder. Name a file inside it.", path=str(file))
        if os.path.lexists(file) and not force:
            raise OutputError(
                f"{quoted(file)} exists already. Choose another name, or overwrite it with --force (force=True).",
                path=str(file),
            )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"Folder {quoted(folder)} is not writable, so {shown} cannot appear there. Choose another folder.",
            path=str(target),
        )


def count_params(model: Model) -> int:
    """Number of parameters; `parameters` says what counts."""
    return sum(parameters(model).values())


def _open_lazily(file: Path) -> tuple[onnx.ModelProto, hashlib._Hash, int] | None:
    """A large file's protobuf without its large weights, hash and size; None where it must be read whole."""
    try:
        if file.is_symlink() or not file.is_file() or not LAZY_FILE_BYTES <= file.stat().st_size <= MAX_PROTO_BYTES:
            return None
        proto = _skeleton.read(file)
        if proto is None or not any(_external(proto)):
            return None
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            return proto, digest, _digest_stream(digest, stream)
    except OSError:
        return None


def _open_whole(file: Path, shown: str) -> tuple[onnx.ModelProto, hashlib._Hash, int]:
    data = _read(file, shown)
    return _parse(data, shown), hashlib.sha256(data), len(data)


def _read(file: Path, shown: str) -> bytes:
    """The bytes of a regular file below 2 GiB."""
    try:
        # Non-blocking, or a pipe would make us wait for ever.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as exc:
        if file.is_dir():  # how Windows says it
            raise ModelError(f"{shown} is a folder. Name the .onnx file inside it.", path=str(file)) from None
        reason = getattr(exc, "strerror", None) or exc
        raise ModelError(f"Cannot read {shown}: {reason}. Check the path.", path=str(file)) from exc
    status = os.fstat(descriptor)
    problem = ""
    if stat.S_ISDIR(status.st_mode):
        problem = "is a folder. Name the .onnx file inside it."
    elif not stat.S_ISREG(status.st_mode):
        problem = "is no regular file. Name an .onnx file."
    elif status.st_size > MAX_PROTO_BYTES:
        problem = (
            f"has {status.st_size} bytes; an ONNX file holds at most 2 GiB. Export it with external data "
            "(torch.onnx.export does so above 2 GiB)."
        )
    if problem:
        os.close(descriptor)
        raise ModelError(f"{shown} {problem}", path=str(file))
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def _parse(data: bytes, shown: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{shown} is empty. Export or download the model again.")
    for prefix, what in _FOREIGN.items():
        if data.startswith(prefix):
            raise ModelError(f"{shown} is no ONNX model but {what}.")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as exc:
        raise ModelError(f"{shown} is no ONNX model, or is damaged or cut short. Export or download it again.") from exc
    return proto


def _external(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in _tensors.all_tensors(proto) if _tensors.is_external(tensor))


def _data_files(proto: onnx.ModelProto, folder: Path) -> dict[str, int]:
    """Bytes of every external data file, after checking that each tensor lies within its file."""
    sizes: dict[str, int] = {}
    for tensor in _external(proto):
        at = _tensors.extent(tensor)
        if at.location not in sizes:
            with _tensors.open_data(folder, at.location) as stream:
                sizes[at.location] = os.fstat(stream.fileno()).st_size
        _tensors.check_bounds(at, sizes[at.location], tensor)
    return sizes


def _embed_external(proto: onnx.ModelProto, folder: Path) -> None:
    """Read external tensors into the protobuf: all of them if that is little, else only small and nested ones."""
    total = sum(_tensors.extent(tensor).length for tensor in _external(proto))
    limit = total if total <= LAZY_BYTES else _SMALL_BYTES
    nested = [(tensor, LAZY_BYTES) for tensor in _tensors.nested_tensors(proto)]
    for tensor, most in [*((tensor, limit) for tensor in proto.graph.initializer), *nested]:
        if _tensors.is_external(tensor):
            at = _tensors.extent(tensor)
            if at.length <= most:
                _tensors.embed(tensor, _tensors.read_extent(folder, at, tensor))


def _held_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of tensor values inside the protobuf."""
    return sum(
        _tensors.n_bytes(tensor)
        for tensor in _tensors.all_tensors(proto)
        if not _tensors.is_external(tensor) and tensor.data_type != TensorProto.STRING
    )


def _digest_stream(digest: hashlib._Hash, stream: IO[bytes]) -> int:
    size = 0
    while chunk := stream.read(2**20):
        digest.update(chunk)
        size += len(chunk)
    return size


def _digest_files(files: Sequence[Path]) -> tuple[str, int]:
    """Hash and total bytes of those files that exist, one after the other."""
    digest = hashlib.sha256()
    size = 0
    for file in files:
        if file.exists():
            with file.open("rb") as stream:
                size += _digest_stream(digest, stream)
    return digest.hexdigest(), size


def _digest_proto(proto: onnx.ModelProto) -> tuple[str, int]:
    """Hash and bytes of a protobuf; see `from_proto`."""
    if _held_bytes(proto) <= _DIGEST_BYTES:
        data = _serialize(proto)
        return hashlib.sha256(data).hexdigest(), len(data)
    data = _serialize(_tensors.copy_without_weights(proto))
    digest = hashlib.sha256(data)
    size = len(data)
    for tensor in proto.graph.initializer:
        header = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        values = b"" if _tensors.is_external(tensor) else _tensors.raw_bytes(tensor, None)
        for part in (_serialize(header), values):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size


def _serialize(message: Message) -> bytes:
    try:
        return bytes(message.SerializeToString())
    except (EncodeError, ValueError) as exc:
        raise ModelError(f"The model cannot be serialized: {exc}. Split it, or use smaller tensors.") from exc


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    return out


def _copy_external(model: Model, data_file: Path) -> onnx.ModelProto:
    """A copy whose weights are in a new data file; equal extents of the source stay shared."""
    out = _tensors.copy_without_weights(model.proto)
    written: dict[Extent, Extent] = {}
    with data_file.open("xb") as stream:
        for tensor in model.proto.graph.initializer:
            target = out.graph.initializer.add()
            in_memory = not _tensors.is_external(tensor)
            if tensor.data_type == TensorProto.STRING or (in_memory and _tensors.n_bytes(tensor) < _EXTERNAL_MIN_BYTES):
                target.CopyFrom(tensor)
                continue
            source = None if in_memory else _tensors.extent(tensor)
            at = written.get(source) if source else None
            if at is None:
                at = _append(stream, data_file.name, _tensors.raw_bytes(tensor, model.folder))
                if source:
                    written[source] = at
            target.name, target.data_type = tensor.name, tensor.data_type
            target.dims.extend(tensor.dims)
            if tensor.HasField("doc_string"):
                target.doc_string = tensor.doc_string
            target.metadata_props.extend(tensor.metadata_props)
            _tensors.refer(target, at)
        stream.flush()
        os.fsync(stream.fileno())
    if not data_file.stat().st_size:
        data_file.unlink()
    return out


def _append(stream: IO[bytes], name: str, data: bytes) -> Extent:
    """Write one tensor at an aligned offset."""
    align = _PAGE_BYTES if len(data) >= _SMALL_BYTES else _ALIGN_BYTES
    stream.write(b"\0" * (-stream.tell() % align))
    at = Extent(name, stream.tell(), len(data))
    stream.write(data)
    return at


def _merge_metadata(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    entries = {entry.key: entry for entry in proto.metadata_props}
    for key, value in metadata.items():
        if key in entries:
            entries[key].value = value
        else:
            proto.metadata_props.add(key=key, value=value)


def _write(file: Path, proto: onnx.ModelProto, folder: Path | None) -> None:
    """The protobuf as a file; external weights that lie in `folder` go inside, unless it is None."""
    with file.open("xb") as stream:
        if folder is not None and any(_external(proto)):
            _skeleton.write(stream, proto, folder)
        else:
            stream.write(_serialize(proto))
        stream.flush()
        os.fsync(stream.fileno())


def _check_draft(proto: onnx.ModelProto, draft: Path) -> None:
    """The full checker on what was written."""
    if draft.stat().st_size > _CHECK_FILE_BYTES:
        _wall.check_onnx(proto, full=True)
        return
    try:
        onnx.checker.check_model(draft, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as exc:
        raise _wall.refusal(exc, full=True) from exc


def _publish(draft: Path, target: Path) -> None:
    """Rename the draft, and its data file before it, to where they belong; undo the first if the second fails."""
    data, data_target = _data_path(draft), _data_path(target)
    if not data.exists():
        draft.replace(target)
        return
    previous = draft.with_name("previous.data")
    if data_target.exists():
        data_target.replace(previous)
    try:
        data.replace(data_target)
        draft.replace(target)
    except BaseException:
        data_target.unlink(missing_ok=True)
        if previous.exists():
            previous.replace(data_target)
        raise


def _data_path(file: Path) -> Path:
    return file.with_name(f"{file.stem}.data")


def _check_source(model: Model, target: Path) -> None:
    """Refuse to replace files that the model still reads its weights from."""
    if model.folder is None:
        return
    ours = {os.path.realpath(target), os.path.realpath(_data_path(target))}
    for tensor in _external(model.proto):
        source = model.folder / _tensors.extent(tensor).location
        if os.path.realpath(source) in ours:
            raise OutputError(
                f"{quoted(target)} would replace {quoted(source.name)}, where the model's own weights lie. "
                "Choose another name.",
                path=str(target),
            )
