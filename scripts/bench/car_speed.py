"""Greedy CAR against the obvious loop, layer by layer, interleaved in one run.

The loop: zero the weights that read the candidate, make a session, run all images; here through `onnxcar.surgery.mask`.
Running it for every candidate takes hours, so a few of its evaluations are timed between our steps and their median is
taken times the number of evaluations; with --check the loop is run for all candidates of some steps and must agree.

    python scripts/bench/car_speed.py MODEL IMAGES.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime

from onnxcar.channels import ChannelSpace
from onnxcar.data import Dataset, Npz
from onnxcar.model import load
from onnxcar.preprocess import Preprocess
from onnxcar.rules import analyze
from onnxcar.scoring import Scorer
from onnxcar.surgery import Plan, mask


def loop(space: ChannelSpace, groups: frozenset[int], images: np.ndarray, labels: np.ndarray, batch: int) -> int:
    """Correct samples without these groups, the obvious way, by ONNX Runtime's own default threads."""
    proto = mask(space, Plan(groups)).proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = 0
    for i in range(0, len(images), batch):
        right += int((session.run(None, {name: images[i : i + batch]})[0].argmax(1) == labels[i : i + batch]).sum())
    return right


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    return tuple(float(part) for part in text.split(","))


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--mean", type=numbers, default=(0.0,))
    parser.add_argument("--std", type=numbers, default=(1.0,))
    parser.add_argument("--limit", type=int, help="images, default all")
    parser.add_argument("--layers", type=int, nargs="*", help="positions among the layers; default the inner ones")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--loops", type=int, default=2, help="evaluations of the loop timed in each layer")
    parser.add_argument("--check", type=int, default=0, help="steps a layer at which the loop scores all candidates")
    parser.add_argument("--batch", type=int, default=250, help="of the loop")
    return parser.parse_args()


def main() -> None:
    """Print a line for each layer and one for all."""
    asked = arguments()
    model = load(asked.model)
    space = analyze(model)
    data: Dataset = Npz(asked.images, Preprocess(mean=asked.mean, std=asked.std))
    if asked.limit:
        data = data.limit(asked.limit, 0)
    images = data.inputs(np.arange(len(data)))[""]
    labels = data.labels
    layers = asked.layers if asked.layers else inner(space)
    memory = None if asked.memory_gib is None else int(asked.memory_gib * 2**30)
    scorer = Scorer(space, data, provider="cpu", threads=asked.threads, memory_bytes=memory)
    removed: list[int] = []
    total, naive, evaluations, wrong = 0.0, 0.0, 0, 0
    print(f"{len(data)} images, {len(layers)} layers")
    print("layer                                steps evaluations    ours s    loop s  ratio  work  rows/s")
    for index in layers:
        own = [g for g in space.layers[index].groups.tolist() if g >= 0]
        n_steps = int(asked.ratio * len(own))
        seconds, loops, n, rows, pairs = 0.0, [], 0, scorer.work.rows, scorer.work.pairs
        for step in range(n_steps):
            left = [g for g in own if g not in removed]
            start = time.perf_counter()
            pick = scorer.lowest(frozenset(removed), left)[0]
            seconds += time.perf_counter() - start
            n += len(left)
            if step < asked.check:
                counts = {g: loop(space, frozenset([*removed, g]), images, labels, asked.batch) for g in left}
                wrong += counts[pick.group] != max(counts.values()) or counts[pick.group] != pick.score.correct
            if step % max(1, n_steps // max(1, asked.loops)) == 0 and len(loops) < asked.loops:
                start = time.perf_counter()
                wrong += (
                    loop(space, frozenset([*removed, pick.group]), images, labels, asked.batch) != pick.score.correct
                )
                loops.append(time.perf_counter() - start)
            removed.append(pick.group)
        spent = statistics.median(loops) * n if loops else float("nan")
        rows, pairs = scorer.work.rows - rows, scorer.work.pairs - pairs
        print(
            f"{space.layers[index].node:36.36s} {n_steps:5d} {n:11d} {seconds:9.1f} {spent:9.0f} "
            f"{spent / seconds:6.1f} {rows / max(1, pairs):5.3f} {rows / seconds:7.0f}",
            flush=True,
        )
        total, naive, evaluations = total + seconds, naive + spent, evaluations + n
    print(f"all: {evaluations} evaluations, {total:.1f} s against {naive:.0f} s: {naive / total:.1f}x, {wrong} wrong")


def inner(space: ChannelSpace) -> list[int]:
    """Layers whose channels are read at one value: those inside residual blocks, and all of a plain chain."""
    found = []
    for layer in space.layers:
        own = {g for g in layer.groups.tolist() if g >= 0}
        reads = [read for read in space.reads if own & set(np.unique(read.groups).tolist())]
        if own and len(reads) == 1 and layer.kind == "conv":
            found.append(layer.index)
    return found


if __name__ == "__main__":
    main()
