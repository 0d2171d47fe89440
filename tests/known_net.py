"""A network whose filters' functions can be written down: two that are the same, a dead one, one of one class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

CLASSES = ("gray", "red", "blue")
RED, SAME, DEAD, BLUE, BRIGHT = range(5)
PER_CLASS = 20


def network() -> onnx.ModelProto:
    """Conv(5, 1x1) - Relu - mean - Gemm(3): class red = both red filters, blue = the blue one, gray = a constant."""
    text = """<ir_version: 8, opset_import: ["" : 17]> known (float[N,3,8,8] x) => (float[N,3] y) {
        [conv] a = Conv (x, w, b)
        [relu] r = Relu (a)
        [pool] p = GlobalAveragePool (r)
        [flat] f = Flatten (p)
        [head] y = Gemm <transB = 1> (f, v, c)
    }"""
    proto = onnx.parser.parse_model(text)
    w = np.zeros((5, 3, 1, 1), np.float32)
    w[[RED, SAME], :, 0, 0] = (1, -0.5, -0.5)
    w[BLUE, :, 0, 0] = (-0.5, -0.5, 1)
    w[BRIGHT, :, 0, 0] = (0.299, 0.587, 0.114)
    b = np.asarray([0, 0, -1, 0, 0], np.float32)
    v = np.zeros((3, 5), np.float32)
    v[1, [RED, SAME]] = 2
    v[2, BLUE] = 4
    c = np.asarray([0.3, 0, 0], np.float32)
    for name, value in {"w": w, "b": b, "v": v, "c": c}.items():
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def write(folder: Path, *, classes: tuple[str, ...] = CLASSES) -> tuple[Path, Path]:
    """The model and its images as an npz in a folder; the network gets all of them right."""
    rng = np.random.default_rng(0)
    images = np.zeros((3 * PER_CLASS, 8, 8, 3), np.uint8)
    labels = np.repeat(np.arange(3), PER_CLASS)
    images[labels == 0] = rng.integers(0, 256, (PER_CLASS, 8, 8, 1))
    images[labels == 1, :, :, 0] = rng.integers(150, 256, (PER_CLASS, 8, 8))
    images[labels == 2, :, :, 2] = rng.integers(150, 256, (PER_CLASS, 8, 8))
    model, data = folder / "known.onnx", folder / "known.npz"
    onnx.save(network(), model)
    np.savez(data, images=images, labels=labels, classes=np.asarray(classes))
    return model, data
