"""Cut weights of models that are too big for memory: written to a temporary data file, one at a time."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import onnx

from onnxcar._tensors import Extent, is_external, n_bytes, raw_bytes, refer
from onnxcar.facts import SMALL
from onnxcar.model import Model, from_proto

_SMALL_BYTES = 8 * SMALL  # whatever shape arithmetic may look at stays in the protobuf
_PAGE_BYTES = 4096


class Spill:
    """A temporary folder whose data file takes tensors; it lives as long as the model that `model` returns."""

    def __init__(self, source: Model) -> None:
        self._source = source
        self._folder = tempfile.TemporaryDirectory(prefix="onnxcar-")
        self._path = Path(self._folder.name) / "weights.data"
        self._stream = self._path.open("xb")

    def put(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """The tensor with its values in the data file; itself if it is small."""
        if not is_external(tensor) and n_bytes(tensor) < _SMALL_BYTES:
            return tensor
        data = raw_bytes(tensor, self._source.folder)
        self._stream.write(b"\0" * (-self._stream.tell() % _PAGE_BYTES))
        made = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        refer(made, Extent(self._path.name, self._stream.tell(), len(data)))
        self._stream.write(data)
        return made

    def model(self, proto: onnx.ModelProto) -> Model:
        """The finished model; the data file goes with it."""
        self._stream.close()
        made = from_proto(proto, self._path.with_name("model.onnx"))
        made = replace(made, external=self._source.external)  # what came in one file is written as one file
        weakref.finalize(made, self._folder.cleanup)
        return made


def spill_for(model: Model) -> Spill | None:
    """A spill where the model's weights are still on disk, else None."""
    return Spill(model) if any(is_external(t) for t in model.proto.graph.initializer) else None
