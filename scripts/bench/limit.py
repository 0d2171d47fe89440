"""How near exact greedy CAR is to what counting allows and to what the processor gives.

Two floors hold for every exact search that counts errors. A candidate is out only when it has made more errors than the
best one makes in all, E, so (candidates - 1) x (E + 1) + images pairs must be known; some are known without a run, as
the candidate's channels are zero on the image. And each pair that is run costs the MACs behind the readers. Printed are
rows run over the first floor, and GFLOP/s of a core in the runs beside those of a bare 3x3 Conv of the layer's size.

    python scripts/bench/limit.py MODEL IMAGES.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from car_speed import inner
from images import add_data, open_data

from onnxcar.channels import ChannelSpace
from onnxcar.ledger import Ledger
from onnxcar.model import load
from onnxcar.rules import analyze
from onnxcar.runtime import session
from onnxcar.scoring import Scorer
from onnxcar.scoring._state import State

SECONDS = 0.5  # of each bare Conv


def bare_conv(channels: int, size: int) -> float:
    """GFLOP/s of one core in four Convs of 3x3 on 32 images; the median run."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.normal(size=(channels, channels, 3, 3)).astype(np.float32), "w")
    nodes = [helper.make_node("Conv", [f"x{i}", "w"], [f"x{i + 1}"], pads=[1] * 4) for i in range(4)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "bare", [value("x0", TensorProto.FLOAT, None)], [value("x4", TensorProto.FLOAT, None)], [weights]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    runner = session(made, provider="cpu", threads=1)
    x = {"x0": rng.normal(size=(32, channels, size, size)).astype(np.float32)}
    runner.run(x)
    took: list[float] = []
    while sum(took) < SECONDS:
        start = time.thread_time()
        runner.run(x)
        took.append(time.thread_time() - start)
    return 4 * 2 * 32 * channels**2 * 9 * size**2 / float(np.median(took)) / 1e9


class Clock:
    """Seconds of CPU in runs of rows, over all threads."""

    def __init__(self) -> None:
        """Start to listen."""
        self.seconds = 0.0
        inner = State.rows

        def timed(state: State, candidates: np.ndarray, images: np.ndarray) -> object:
            start = time.thread_time()
            try:
                return inner(state, candidates, images)
            finally:
                self.seconds += time.thread_time() - start

        State.rows = timed  # type: ignore[method-assign,assignment]


def behind(space: ChannelSpace, removed: Sequence[int], own: Sequence[int]) -> float:
    """MACs of one image behind the readers of these groups, in the network without `removed`."""
    readers = [i for read in space.reads if set(np.unique(read.groups)) & set(own) for i, _ in read.consumers]
    ledger = Ledger(space)
    ledger.remove(removed)
    left = ledger.by_term()
    return float(sum(macs for term, macs in zip(space.terms, left, strict=True) if term.node > max(readers)))


def main() -> None:
    """Print a line for each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    add_data(parser)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--layers", type=int, nargs="*", help="positions among the inner layers; default all")
    asked = parser.parse_args()
    model = load(asked.model)
    space = analyze(model)
    data = open_data(asked, model)
    scorer, clock = Scorer(space, data, provider="cpu"), Clock()
    layers = [space.layers[i] for i in inner(space)]
    removed: list[int] = []
    print(f"{'layer':32s} errors        rows of all  rows over floor  us a row  GFLOP/s  bare Conv  CPU in runs")
    for layer in layers if asked.layers is None else [layers[i] for i in asked.layers]:
        own = [int(g) for g in layer.groups if g >= 0]
        rows, floor, pairs, flops, cpu, runs = 0, 0, 0, 0.0, time.process_time(), clock.seconds
        errors = []
        for _ in range(int(asked.ratio * len(own))):
            left = [g for g in own if g not in removed]
            before = scorer.work.rows
            pick = scorer.lowest(removed, left)[0]
            ran = scorer.work.rows - before
            errors.append(len(data) - (pick.score.top1 or 0))
            rows, pairs = rows + ran, pairs + len(left) * len(data)
            floor += (len(left) - 1) * (errors[-1] + 1) + len(data)
            flops += 2 * ran * behind(space, removed, own)
            removed.append(pick.group)
        cpu, runs = time.process_time() - cpu, clock.seconds - runs
        size = space.facts.shape(model.proto.graph.node[layer.position].output[0])
        bare = bare_conv(len(own), int(size[-1])) if size else float("nan")
        print(
            f"{layer.node:32s} {errors[0]:4d} to {errors[-1]:4d}  {rows / pairs:11.3f}  {rows / floor:15.2f}  "
            f"{1e6 * runs / rows:8.0f}  {flops / runs / 1e9:7.0f}  {bare:9.0f}  {runs / cpu:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
