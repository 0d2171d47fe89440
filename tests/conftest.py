"""Fixtures every test may use: tiny models in ONNX text syntax, and the folder of real ones where it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

MakeModel = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and images beside the checkout; the test is skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("no ../shared folder with models")
    return folder


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """``make_model(body, inputs, outputs, weights, opset=17, ir=8, seed=0)``: a checked ModelProto.

    ``body`` is nodes in ONNX text syntax; ``weights`` maps a name to an array, or to dims for seeded random floats
    of the scale that keeps signals alive.
    """

    def make(
        body: str,
        inputs: str = "float[N,3,8,8] x",
        outputs: str = "float[N,4] y",
        weights: Mapping[str, object] | None = None,
        *,
        opset: int = 17,
        ir: int = 8,
        seed: int = 0,
    ) -> onnx.ModelProto:
        text = f'<ir_version: {ir}, opset_import: ["" : {opset}]> tiny ({inputs}) => ({outputs}) {{ {body} }}'
        proto = onnx.parser.parse_model(text)
        rng = np.random.default_rng(seed)
        for name, value in (weights or {}).items():
            if not isinstance(value, np.ndarray):
                dims = tuple(value)  # type: ignore[call-overload]
                fan_in = int(np.prod(dims[1:])) or 1
                value = (rng.standard_normal(dims) * np.sqrt(2 / fan_in)).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        onnx.checker.check_model(proto, full_check=True)
        return proto

    return make


@pytest.fixture
def cnn(make_model: MakeModel) -> onnx.ModelProto:
    """Conv(6) - Relu - Conv(5) - Relu - mean - Gemm(4): 6*27+6 + 5*54+5 + 4*5+4 = 467 parameters."""
    return make_model(
        """
        [conv1] a = Conv <pads = [1, 1, 1, 1]> (x, conv1_w, conv1_b)
        [relu1] b = Relu (a)
        [conv2] c = Conv <pads = [1, 1, 1, 1]> (b, conv2_w, conv2_b)
        [relu2] d = Relu (c)
        [pool] e = GlobalAveragePool (d)
        [flat] f = Flatten (e)
        [fc] y = Gemm <transB = 1> (f, fc_w, fc_b)
        """,
        weights={
            "conv1_w": (6, 3, 3, 3),
            "conv1_b": (6,),
            "conv2_w": (5, 6, 3, 3),
            "conv2_b": (5,),
            "fc_w": (4, 5),
            "fc_b": (4,),
        },
    )


@pytest.fixture
def residual(make_model: MakeModel) -> onnx.ModelProto:
    """A stem of 6 filters, one residual block with 5 inner filters, mean, Gemm(4)."""
    return make_model(
        """
        [stem] a = Conv <pads = [1, 1, 1, 1]> (x, stem_w)
        [relu0] b = Relu (a)
        [conv1] c = Conv <pads = [1, 1, 1, 1]> (b, conv1_w, conv1_b)
        [relu1] d = Relu (c)
        [conv2] e = Conv <pads = [1, 1, 1, 1]> (d, conv2_w, conv2_b)
        [add] f = Add (e, b)
        [relu2] g = Relu (f)
        [pool] h = GlobalAveragePool (g)
        [flat] i = Flatten (h)
        [fc] y = Gemm <transB = 1> (i, fc_w, fc_b)
        """,
        weights={
            "stem_w": (6, 3, 3, 3),
            "conv1_w": (5, 6, 3, 3),
            "conv1_b": (5,),
            "conv2_w": (6, 5, 3, 3),
            "conv2_b": (6,),
            "fc_w": (4, 6),
            "fc_b": (4,),
        },
    )
