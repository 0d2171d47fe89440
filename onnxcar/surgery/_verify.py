"""Pruned output against masked output: the check before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar._tensors import copy_without_weights
from onnxcar.channels import ChannelSpace
from onnxcar.errors import InternalError
from onnxcar.facts import BATCHES, SIZES, Facts, input_types
from onnxcar.model import Model
from onnxcar.surgery._mask import masked_structure
from onnxcar.surgery._plan import Plan
from onnxcar.surgery._runs import outputs

# Largest |difference| over the largest |reference| of an output. Summation order alone gives about 1e-6 in float32.
TOLERANCE = {onnx.TensorProto.FLOAT: 1e-3, onnx.TensorProto.DOUBLE: 1e-6}
_COARSE = 5e-2  # half precision and quantized networks
_SQUASH = (
    "Softmax",
    "LogSoftmax",
    "Sigmoid",
    "HardSigmoid",
    "ArgMax",
    "ArgMin",
    "Cast",
    "Reshape",
    "Flatten",
    "Identity",
)


@dataclass(frozen=True)
class Verified:
    """How far the pruned model is from the masked original.

    Attributes:
        max_abs_error: Largest absolute difference of any output element.
        max_rel_error: The same over the largest absolute reference value of that output.
        samples: Inputs compared.
    """

    max_abs_error: float
    max_rel_error: float
    samples: int


def verify(
    space: ChannelSpace,
    plan: Plan,
    pruned: Model,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    seed: int = 0,
) -> Verified:
    """Compare the pruned model with the masked original on real or random inputs.

    Outputs behind a saturating op are compared in front of it as well: a one-hot softmax hides errors.

    Raises:
        InternalError: They differ by more than rounding: a bug of ours, the file must not be written.
        ModelError: The original itself does not run in ONNX Runtime.
    """
    feeds = dict(feeds) if feeds is not None else random_feeds(space.facts, seed)
    names = _compared(space.model.proto)
    want = outputs(masked_structure(space, plan), space.model, feeds, names, "the masked original")
    got = outputs(copy_without_weights(pruned.proto), pruned, feeds, names, "the pruned model")
    worst_abs = worst_rel = 0.0
    for name, a, b in zip(names, want, got, strict=True):
        if a.shape != b.shape:
            raise InternalError(
                f"Output '{name}' changed its shape from {a.shape} to {b.shape}. Please report the model."
            )
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not a.size:
            continue
        same_nan = np.isnan(x) == np.isnan(y)
        difference = float(np.nanmax(np.abs(x - y), initial=0.0)) if same_nan.all() else float("inf")
        scale = float(np.nanmax(np.abs(x), initial=0.0))
        relative = difference / (scale + 1e-30) if difference else 0.0
        limit = TOLERANCE.get(onnx.helper.np_dtype_to_tensor_dtype(a.dtype), _COARSE)
        if not _is_float(a):
            continue  # indices flip on ties; the floats behind them are compared
        if relative > limit:
            raise InternalError(
                f"Output '{name}' of the pruned model differs from the masked original by {relative:.2e} of its "
                f"largest value (limit {limit:.0e}). Nothing was written; please report the model."
            )
        worst_abs, worst_rel = max(worst_abs, difference), max(worst_rel, relative)
    n = next((len(v) for v in feeds.values() if v.ndim), 1)
    return Verified(worst_abs, worst_rel, n)


def random_feeds(facts: Facts, seed: int = 0) -> dict[str, Any]:
    """Random values for every input of a model: normal floats, small integers.

    Dynamic axes get the sizes at which the whole graph is consistent.
    """
    types = facts.traces[0].types
    wanted = {k: types[k] for k in input_types(facts.model, BATCHES[0], SIZES[0])}
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, kind in wanted.items():
        dims = [d.dim_value for d in kind.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
        if dtype == np.bool_:
            feeds[name] = np.ones(dims, bool)
        elif np.issubdtype(dtype, np.integer):
            low = -100 if np.issubdtype(dtype, np.signedinteger) and np.dtype(dtype).itemsize == 1 else 0
            high = 2 if np.dtype(dtype).itemsize > 1 else 100
            feeds[name] = rng.integers(low, high, dims).astype(dtype)
        else:
            feeds[name] = rng.normal(size=dims).astype(dtype)
    return feeds


def _is_float(a: npt.NDArray[Any]) -> bool:
    return bool(np.issubdtype(a.dtype, np.floating)) or a.dtype.name in ("bfloat16", "float16")


def _compared(proto: onnx.ModelProto) -> list[str]:
    """Outputs, and what enters the saturating ops that make them."""
    made = {o: n for n in proto.graph.node for o in n.output}
    names = [o.name for o in proto.graph.output]
    for name in list(names):
        node = made.get(name)
        while node is not None and node.op_type in _SQUASH and node.input[0]:
            if node.op_type not in ("Reshape", "Flatten", "Identity", "Cast"):
                names.append(node.input[0])
            node = made.get(node.input[0])
    inputs = {i.name for i in proto.graph.input} | {t.name for t in proto.graph.initializer}
    return [n for n in dict.fromkeys(names) if n not in inputs]
