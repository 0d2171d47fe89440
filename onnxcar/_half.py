"""Half precision: throw-away copies of graphs that compute in float16."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import onnx

from onnxcar.errors import ModelError

__all__ = ["half"]


def half(proto: onnx.ModelProto, wide: Collection[str] | None = None) -> onnx.ModelProto:
    """A copy whose weights and values are float16; what is no float32 stays as it is.

    Operators without a float16 form are surrounded by casts. Weights beyond 65504 are cut off there.

    Args:
        proto: A graph with its weights in it.
        wide: Inputs and outputs that stay float32; None: all of them.

    Raises:
        ModelError: The graph cannot be converted.
    """
    # Part of both wheels of ONNX Runtime; not loaded before somebody asks for it.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    names = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    kept = names if wide is None else [name for name in names if name in wide]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are cut off: the check against fp32 speaks about that
            converted: onnx.ModelProto = convert_float_to_float16(made, keep_io_types=kept)
            return converted
    except Exception as exc:
        raise ModelError(
            f"The network cannot be converted to float16 ({type(exc).__name__}: {exc}). Take --precision fp32."
        ) from exc
