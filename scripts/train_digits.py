"""Train the network of `models/digits` on scikit-learn's digits and write everything that folder holds.

    pip install "torch==2.13.0" "scikit-learn>=1.5" onnx onnxruntime
    python scripts/train_digits.py --out models/digits

The images are split once, class by class, with a seeded shuffle: 400 to choose filters on (`select.npz`), 500 to
report on (`test.npz`), the other 897 to train. No image is in two sets. The run is seeded and single-threaded, so the
same machine writes the same bytes; another CPU may round differently and end in other weights.

A tool for developers: the package itself never imports torch or scikit-learn.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

N_SELECT_PER_CLASS = 40
N_TEST_PER_CLASS = 50
OPSET = 17
IR_VERSION = 8  # what opset 17 came with; every ONNX Runtime since 1.12 loads it


@dataclass(frozen=True)
class Split:
    """Images (n, 8, 8) uint8, 0 is paper and 255 is ink, and their labels (n,) int64."""

    images: np.ndarray
    labels: np.ndarray


def split_digits(seed: int) -> dict[str, Split]:
    """Train, selection and test set: disjoint, the last two with the same number of images of every class."""
    digits = load_digits()
    # The set counts ink in 0..16; ordinary 8-bit gray is what viewers and preprocessing presets expect.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"select": [], "test": [], "train": []}
    for label in range(10):
        ids = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum([N_SELECT_PER_CLASS, N_TEST_PER_CLASS])
        for name, part in zip(parts, np.split(ids, ends), strict=True):
            parts[name].append(part)
    splits = {}
    for name, chosen in parts.items():
        order = rng.permutation(np.concatenate(chosen))
        splits[name] = Split(images[order], labels[order])
    return splits


class Digits(nn.Module):
    """LeNet for 8x8 images: two 5x5 conv layers of 20 and 50 filters, each pooled by 2, and two dense layers."""

    def __init__(self, n_hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, padding=2)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=2)
        self.fc1 = nn.Linear(50 * 2 * 2, n_hidden)
        self.fc2 = nn.Linear(n_hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8) in 0..1."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc2(functional.dropout(x, 0.3, self.training))


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images turned by up to 12 degrees, scaled by 0.9 to 1.1 and shifted by up to 0.8 pixels, each on its own."""
    n = len(x)
    draw = torch.rand(4, n, generator=generator) * 2 - 1
    angle, scale = draw[0] * np.deg2rad(12), 1 + draw[1] * 0.1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * torch.cos(angle)
    theta[:, 0, 1] = -scale * torch.sin(angle)
    theta[:, 1, 0] = scale * torch.sin(angle)
    theta[:, :, 2] = draw[2:].T * (0.8 * 2 / 8)  # the grid spans -1..1 over 8 pixels
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


def train(split: Split, *, n_hidden: int, epochs: int, seed: int) -> Digits:
    """The trained network: momentum SGD with weight decay and a cosine schedule, batches of 64.

    Plain SGD with weight decay is how LeNet is usually trained. Adam was as accurate but left less redundant filters:
    half of them away by CAR cost three points instead of none. The training decides how far a net can be pruned.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Digits(n_hidden)
    x, y = torch.from_numpy(split.images[:, None] / np.float32(255)), torch.from_numpy(split.labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    n_batches = -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * n_batches)
    for epoch in range(epochs):
        for ids in torch.randperm(len(x), generator=generator).split(64):
            loss = functional.cross_entropy(net(augment(x[ids], generator)), y[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}", flush=True)
    return net.eval()


def to_onnx(net: Digits) -> onnx.ModelProto:
    """The network node by node: the names are ours, and nothing of an exporter gets into the file."""
    nodes = [
        helper.make_node(
            "Conv", ["input", "conv1.weight", "conv1.bias"], ["conv1.out"], "conv1", kernel_shape=[5, 5], pads=[2] * 4
        ),
        helper.make_node("Relu", ["conv1.out"], ["relu1.out"], "relu1"),
        helper.make_node("MaxPool", ["relu1.out"], ["pool1.out"], "pool1", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node(
            "Conv",
            ["pool1.out", "conv2.weight", "conv2.bias"],
            ["conv2.out"],
            "conv2",
            kernel_shape=[5, 5],
            pads=[2] * 4,
        ),
        helper.make_node("Relu", ["conv2.out"], ["relu2.out"], "relu2"),
        helper.make_node("MaxPool", ["relu2.out"], ["pool2.out"], "pool2", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pool2.out"], ["flat.out"], "flat", axis=1),
        helper.make_node("Gemm", ["flat.out", "fc1.weight", "fc1.bias"], ["fc1.out"], "fc1", transB=1),
        helper.make_node("Relu", ["fc1.out"], ["relu3.out"], "relu3"),
        helper.make_node("Gemm", ["relu3.out", "fc2.weight", "fc2.bias"], ["logits"], "fc2", transB=1),
    ]
    weights = [numpy_helper.from_array(value.detach().numpy(), name) for name, value in net.named_parameters()]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onnxcar-train-digits", producer_version="1"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: onnx.ModelProto, split: Split) -> tuple[int, int]:
    """Images right and images seen, by plain ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": split.images[:, None] / np.float32(255)})
    return int((logits.argmax(axis=1) == split.labels).sum()), len(split.labels)


def main() -> None:
    """Train, export, measure, write."""
    parser = argparse.ArgumentParser(description="Train the network of models/digits.")
    parser.add_argument("--out", type=Path, default=Path("models/digits"), help="folder to write into")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=100, help="units of the first dense layer")
    parser.add_argument("--seed", type=int, default=1, help="of weights and augmentation; the split is fixed")
    parser.add_argument("--no-test", action="store_true", help="do not look at the test set (while tuning)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    splits = split_digits(seed=0)
    net = train(splits["train"], n_hidden=args.hidden, epochs=args.epochs, seed=args.seed)
    model = to_onnx(net)

    args.out.mkdir(parents=True, exist_ok=True)
    onnx.save(model, args.out / "model.onnx")
    for name in ("select", "test"):
        np.savez_compressed(args.out / f"{name}.npz", images=splits[name].images, labels=splits[name].labels)
    for name in ("train", "select") if args.no_test else ("train", "select", "test"):
        right, seen = accuracy(model, splits[name])
        print(f"{name:6s}  {right} of {seen} right, {100 * right / seen:.2f} %")
    for path in sorted(args.out.glob("*.n*")) + sorted(args.out.glob("*.onnx")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
