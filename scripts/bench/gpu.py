"""What scoring costs on a GPU, in one go: steps against the obvious loop, one-shot CAR of a big net, time in kernels.

    python scripts/bench/gpu.py                      three parts, CUDA, each precision; some minutes
    python scripts/bench/gpu.py --provider cpu --tiny    the same code on a tiny network, in seconds

The networks are made here with random weights: a ResNet-20 of CIFAR size for the steps, a ResNet-50 for the rest.
Labels are what the network says, some of them changed. With --model, --data and --preprocess the steps are taken of
these instead.

Time in kernels is told twice where it can be: from ONNX Runtime's own profile (kernels on CUDA builds with CUPTI; on
other builds the operators, as the host sees them), and as the driver's utilisation, sampled while scoring runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxcar.channels import ChannelSpace
from onnxcar.data import Dataset, FromCallable, Preprocess, open_dataset
from onnxcar.model import Model, from_proto, load
from onnxcar.rules import analyze
from onnxcar.runtime import Provider, batch_inputs, open_network, resolve_provider, session
from onnxcar.scoring import Scorer, check_precision
from onnxcar.scoring._open import open_site
from onnxcar.scoring._site import BASE, reads_of
from onnxcar.surgery import Plan, mask

WRONG = 0.1  # labels that are changed


# --- networks and images --------------------------------------------------------------------------------------------


class Net:
    """A residual network in the making; weights are random and of a scale that keeps signals alive."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        """Random weights."""
        fan = int(np.prod(shape[1:]))
        values = self._rng.normal(size=shape) * scale * np.sqrt(2 / fan)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node; its output."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def conv(self, x: str, name: str, c: int, n: int, k: int, stride: int = 1, scale: float = 1.0) -> str:
        """A Conv from c to n channels."""
        w = self.weight(name + "_w", n, c, k, k, scale=scale)
        return self.node("Conv", [x, w], name, strides=[stride, stride], pads=[k // 2] * 4)

    def block(self, x: str, name: str, c: int, inner: int, out: int, stride: int, bottleneck: bool) -> str:
        """A residual block; returns its output, with `out` channels."""
        y = x
        if bottleneck:
            y = self.node("Relu", [self.conv(y, name + ".1", c, inner, 1)], name + ".r1")
            y = self.node("Relu", [self.conv(y, name + ".2", inner, inner, 3, stride)], name + ".r2")
            y = self.conv(y, name + ".3", inner, out, 1, scale=0.3)
        else:
            y = self.node("Relu", [self.conv(y, name + ".1", c, inner, 3, stride)], name + ".r1")
            y = self.conv(y, name + ".2", inner, out, 3, scale=0.3)
        if c != out or stride != 1:
            x = self.conv(x, name + ".down", c, out, 1, stride)
        return self.node("Relu", [self.node("Add", [x, y], name + ".sum")], name + ".out")

    def model(self, x: str, c: int, classes: int, size: int) -> Model:
        """With a pool and a dense layer behind x."""
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [x], "pool")], "flat")
        self.node("Gemm", [flat, self.weight("fc_w", classes, c)], "y", transB=1)
        value = helper.make_tensor_value_info
        shape = ["n", 3, size, size]
        graph = helper.make_graph(
            self.nodes,
            "resnet",
            [value("x", TensorProto.FLOAT, shape)],
            [value("y", TensorProto.FLOAT, ["n", classes])],
            self.weights,
        )
        return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def resnet(widths: Sequence[int], blocks: Sequence[int], size: int, classes: int, bottleneck: bool) -> Model:
    """ResNet-20 is widths 16, 32, 64 and three blocks each; ResNet-50 widths 64 to 512, bottlenecks 3, 4, 6, 3."""
    net, c = Net(), widths[0]
    if bottleneck:
        x = net.node("Relu", [net.conv("x", "stem", 3, c, 7, 2)], "stem.r")
        x = net.node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    else:
        x = net.node("Relu", [net.conv("x", "stem", 3, c, 3)], "stem.r")
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for j in range(count):
            out = 4 * width if bottleneck else width
            x = net.block(x, f"b{i}.{j}", c, width, out, 2 if i and not j else 1, bottleneck)
            c = out
    return net.model(x, c, classes, size)


def images_for(model: Model, size: int, n: int, where: Provider) -> FromCallable:
    """Random images with the classes that the network gives them, a part of them changed."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3, size, size)).astype(np.float32)
    network = open_network(model, provider=where)
    out = np.concatenate([network.run({"": x[i : i + 32]})[0] for i in range(0, n, 32)])
    labels = out.argmax(1)
    changed = rng.random(n) < WRONG
    labels[changed] = rng.integers(0, out.shape[1], int(changed.sum()))
    return FromCallable(lambda: [(x, labels.astype(np.int64))])


# --- parts ----------------------------------------------------------------------------------------------------------


def loop(space: ChannelSpace, group: int, data: Any, where: Provider, batch: int) -> int:
    """Correct images without a group the obvious way: masked weights, a session, all images."""
    made = session(mask(space, Plan(frozenset([group]))), provider=where)
    right = 0
    for i in range(0, len(data), batch):
        at = np.arange(i, min(i + batch, len(data)))
        right += int((made.run(data.inputs(at))[0].reshape(len(at), -1).argmax(1) == data.labels[at]).sum())
    return right


def inner_layers(space: ChannelSpace) -> list[list[int]]:
    """Groups of the layers whose filters leave one by one, layer by layer."""
    own: dict[int, list[int]] = {}
    for group in space.groups:
        if len(group.filters) == 1 and space.allows(group.id, ()):
            own.setdefault(group.layer, []).append(group.id)
    return [groups for groups in own.values() if len(groups) >= 4]


def steps(asked: argparse.Namespace, model: Model, data: Any, where: Provider, precision: str) -> dict[str, Any]:
    """Greedy steps of some layers, evaluations of the loop between them; counts have to agree in FP32."""
    space = analyze(model)
    layers = inner_layers(space)
    layers = layers[:: max(1, len(layers) // asked.layers)][: asked.layers]
    scorer = Scorer(space, data, provider=where, precision=precision)
    ours, naive, evaluations, differ = 0.0, [], 0, 0
    for groups in layers:
        scorer.score((), groups[:1])  # sessions and kernels
        removed: list[int] = []
        for _ in range(min(asked.steps, len(groups) - 1)):
            left = [g for g in groups if g not in removed]
            start = time.perf_counter()
            removed.append(scorer.lowest(frozenset(removed), left)[0].group)
            ours += time.perf_counter() - start
            evaluations += len(left)
        start = time.perf_counter()
        count = loop(space, groups[0], data, replace(where, precision=precision), asked.batch)
        naive.append(time.perf_counter() - start)
        differ += count != scorer.score((), groups[:1])[0].correct
    each = statistics.median(naive)
    return {
        "precision": precision,
        "layers": len(layers),
        "evaluations": evaluations,
        "ours_s": ours,
        "loop_s": each * evaluations,
        "ratio": each * evaluations / ours,
        "rows": scorer.work.rows,
        "counts_differ": differ,
    }


def one_shot(asked: argparse.Namespace, model: Model, data: Any, where: Provider, precision: str) -> dict[str, Any]:
    """CAR of some filters of every inner layer in full: candidate-images a second, spread over the network."""
    space = analyze(model)
    groups = [g for layer in inner_layers(space) for g in layer]
    some = groups[:: max(1, len(groups) // asked.groups)][: asked.groups]
    agreed = check_precision(model, data, precision, provider=where)
    scorer = Scorer(space, data, provider=where, precision=precision)
    with utilisation(where) as busy:
        start = time.perf_counter()
        scorer.score((), some)
        seconds = time.perf_counter() - start
    return {
        "precision": precision,
        "groups": len(groups),
        "scored": len(some),
        "images": len(data),
        "seconds": seconds,
        "candidate_images_per_s": scorer.work.pairs / seconds,
        "rows_per_s": scorer.work.rows / seconds,
        "agreement": None if agreed is None else agreed.to_json(),
        "gpu_utilisation": busy(),
    }


def in_kernels(asked: argparse.Namespace, model: Model, data: Any, where: Provider, precision: str) -> dict[str, Any]:
    """Part of the time of a suffix's runs that goes by in kernels, in the middle of the network."""
    space = analyze(model)
    layers = inner_layers(space)
    key = reads_of(space)[layers[len(layers) // 2][0]]
    few = data.inputs(np.arange(4))
    network = open_network(model, provider=replace(where, precision=precision), threads=1)
    with profiling() as folder:
        site = open_site(space, network, key, (), sample=network.session.bind(few))
        at = np.arange(min(len(data), asked.rows))
        block = site.load(lambda i: network.session.bind(data.inputs(i)), at, 64)
        rows = np.resize(at, asked.rows)
        once: Callable[[], object] = lambda: site.run_held(block, np.full(len(rows), BASE), rows)  # noqa: E731
        if not site.by_row:
            once = lambda: site.run(block, np.full(len(rows), BASE), rows)  # noqa: E731
        for _ in range(3):
            once()
        begun = time.perf_counter()
        with utilisation(where) as busy:
            for _ in range(asked.runs):
                once()
            wall = time.perf_counter() - begun
        inner = site.suffix._inner
        events = json.loads((folder / Path(inner.end_profiling()).name).read_text(encoding="utf-8"))
    kernels = [e for e in events if e.get("cat") == "Kernel"]
    counted = kernels or [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    runs = [e for e in events if e.get("name") == "model_run"][-asked.runs :]
    first = min((e["ts"] for e in runs), default=0)
    spent = sum(e["dur"] for e in counted if e["ts"] >= first) / 1e6
    return {
        "precision": precision,
        "what": "kernels" if kernels else "operators",
        "rows": len(rows),
        "rows_per_s": asked.runs * len(rows) / wall,
        "share": spent / wall,
        "gpu_utilisation": busy(),
    }


@contextlib.contextmanager
def profiling() -> Iterator[Path]:
    """Sessions that are made meanwhile write ONNX Runtime's profile to a folder."""
    plain = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory() as folder:

        def made() -> Any:
            options = plain()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            return options

        onnxruntime.SessionOptions = made
        try:
            yield Path(folder)
        finally:
            onnxruntime.SessionOptions = plain


@contextlib.contextmanager
def utilisation(where: Provider) -> Iterator[Callable[[], float | None]]:
    """Gives a function for the mean share of time in which kernels ran, as the driver samples it; None without one."""
    tool = shutil.which("nvidia-smi") if where.name != "cpu" else None
    if tool is None:
        yield lambda: None
        return
    command = [tool, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def mean() -> float | None:
        process.terminate()
        said = process.communicate(timeout=10)[0].split()
        values = [float(word) for word in said if word.replace(".", "").isdigit()]
        return statistics.mean(values) / 100 if values else None

    try:
        yield mean
    finally:
        if process.poll() is None:
            process.terminate()


# --- the whole ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of the steps; default: made here")
    parser.add_argument("--data", help="a folder, .npz, .csv or .txt for it")
    parser.add_argument("--preprocess", help="a preset or a JSON file")
    parser.add_argument("--channels", choices=("rgb", "bgr", "gray"))
    parser.add_argument("--provider", default="cuda", choices=("cuda", "cpu", "tensorrt"))
    parser.add_argument("--precisions", nargs="*", help="default: all that the provider has")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and few images: does it run?")
    parser.add_argument("--images", type=int, help="of the networks made here; default 1000")
    parser.add_argument("--layers", type=int, default=6, help="layers whose steps are timed")
    parser.add_argument("--steps", type=int, default=6, help="steps of each")
    parser.add_argument("--groups", type=int, default=212, help="filters of the big network that are scored")
    parser.add_argument("--rows", type=int, default=512, help="rows of a run whose kernels are timed")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=250, help="of the loop")
    parser.add_argument("--json", help="write all figures there")
    asked = parser.parse_args()
    if asked.tiny:
        asked.layers, asked.steps, asked.groups, asked.rows, asked.runs = 2, 2, 6, 16, 2
    return asked


def table(rows: Sequence[dict[str, Any]]) -> None:
    """A Markdown table."""
    names = [name for name in rows[0] if name != "agreement"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def main() -> None:
    """Print one table for each part."""
    asked = arguments()
    where = resolve_provider(asked.provider)
    if where.name == "cpu" and asked.tiny:
        where = replace(where, buffers=True)  # the way of a GPU
    precisions = asked.precisions or {"cuda": ["fp32", "tf32", "fp16"]}.get(where.name, ["fp32", "fp16"])
    n = asked.images or (24 if asked.tiny else 1000)
    if asked.tiny:
        small = resnet((8, 16), (1, 1), 16, 10, bottleneck=False)
        big, size = resnet((4, 8), (1, 1), 32, 10, bottleneck=True), 32
    else:
        small = resnet((16, 32, 64), (3, 3, 3), 32, 10, bottleneck=False)
        big, size = resnet((64, 128, 256, 512), (3, 4, 6, 3), 224, 1000, bottleneck=True), 224
    chosen = load(asked.model) if asked.model else small
    data: Dataset = images_for(small, 16 if asked.tiny else 32, n, where)
    if asked.model:
        pre = Preprocess.resolve(asked.preprocess, channels=asked.channels)
        given = open_dataset(asked.data, preprocess=pre, limit=asked.images, seed=0)
        data = given.for_input(batch_inputs(chosen)[0].shape)
    found: dict[str, Any] = {
        "provider": where.name,
        "onnxruntime": onnxruntime.__version__,
        "cpu": platform.processor(),
    }
    print(f"Provider {where.name}, ONNX Runtime {onnxruntime.__version__}\n")
    print(f"Greedy steps, {len(data)} images, against masked weights, a session and all images for each candidate\n")
    found["steps"] = [steps(asked, chosen, data, where, name) for name in precisions]
    table(found["steps"])
    shown = images_for(big, size, n, where)
    print(f"One-shot CAR of a network of ResNet-50's {'form, tiny' if asked.tiny else 'size'}, {len(shown)} images\n")
    found["one_shot"] = [one_shot(asked, big, shown, where, name) for name in precisions]
    table(found["one_shot"])
    print("Time in kernels while the suffix in the middle of it runs\n")
    found["in_kernels"] = [in_kernels(asked, big, shown, where, name) for name in precisions]
    table(found["in_kernels"])
    if asked.json:
        Path(asked.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
