"""Constants behind nodes that onnx's reference evaluator does not know in the model's opset."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.facts import trace
from tests.graphs import Net


@pytest.mark.parametrize("opset", [13, 17, 19, 21])
def test_dequantized_weights_can_be_read_at_every_opset(opset: int) -> None:
    net = Net(opset=opset)
    codes = net.rng.integers(-90, 90, (6, 3, 3, 3)).astype(np.int8)
    scales, zeros = net.positive(6), np.arange(6, dtype=np.int8)
    weight = net.op("DequantizeLinear", codes, scales, zeros, axis=0)
    y = net.conv(net.input("x", (1, 3, 6, 6)), 6, weight=weight)
    want = (codes.astype(np.float32) - zeros.reshape(6, 1, 1, 1)) * scales.reshape(6, 1, 1, 1)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(trace(net.model(y)).array(weight), want, rtol=1e-6)
