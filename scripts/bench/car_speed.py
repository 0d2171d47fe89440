"""Greedy CAR against the obvious loop, layer by layer, interleaved in one run.

The loop: zero the weights that read the candidate, make a session, run all images; here through `onnxcar.surgery.mask`.
Running it for every candidate takes hours, so a few of its evaluations are timed between our steps and their median is
taken times the number of evaluations; with --check the loop is run for all candidates of some steps and must agree.

    python scripts/bench/car_speed.py MODEL IMAGES.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
    python scripts/bench/car_speed.py MODEL list.txt --layers 8 11 --at 0 0.25 0.45 --steps 3 --approximate 0.05

With --at a layer's path is sampled: --steps steps where that part of its filters is gone (in between the lowest are
removed many at a time, untimed). "open" is what a layer costs once, its sessions and its prefix; "to half" is the layer
at --ratio as these steps extrapolate, with that once.

With --threads 1 all sides run on one thread, and times are seconds of CPU, which other processes do not change much.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parent))
from images import add_data, open_data

from onnxcar.channels import ChannelSpace
from onnxcar.importances import importance
from onnxcar.model import load
from onnxcar.rules import analyze
from onnxcar.scoring import Scorer
from onnxcar.surgery import Plan, mask


def loop(
    space: ChannelSpace,
    groups: frozenset[int],
    images: np.ndarray,
    labels: np.ndarray,
    batch: int,
    threads: int | None = None,
) -> int:
    """Correct samples without these groups, the obvious way; by ONNX Runtime's own default threads if None."""
    proto = mask(space, Plan(groups)).proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = 0
    for i in range(0, len(images), batch):
        out = session.run(None, {name: images[i : i + batch]})[0]
        right += int((out.reshape(len(out), -1).argmax(1) == labels[i : i + batch]).sum())
    return right


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    add_data(parser)
    parser.add_argument("--layers", type=int, nargs="*", help="positions among the layers; default the inner ones")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--at", type=float, nargs="*", help="parts of a layer's filters gone where steps are timed")
    parser.add_argument("--steps", type=int, default=3, help="steps at each of these; without --at all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--loops", type=int, default=2, help="evaluations of each loop timed in each layer")
    parser.add_argument("--torch", action="store_true", help="PyTorch's loop, too")
    parser.add_argument("--check", type=int, default=0, help="steps a layer at which the loop scores all candidates")
    parser.add_argument("--batch", type=int, default=250, help="of the loops")
    parser.add_argument("--approximate", type=float, help="a second search at this error probability, step by step")
    parser.add_argument("--no-exact", action="store_true", help="only that one")
    parser.add_argument("--jump", default="car", help="criterion that removes filters between timed steps, or car")
    return parser.parse_args()


def clock(asked: argparse.Namespace) -> float:
    """Seconds, of CPU where all sides have one thread."""
    return time.process_time() if asked.threads == 1 else time.perf_counter()


class Layer:
    """The timed steps of one layer and the loops' evaluations between them."""

    def __init__(self, asked: argparse.Namespace, space: ChannelSpace, scorers: dict[str, Scorer]) -> None:
        """Hold what is needed."""
        self.asked, self.space, self.scorers = asked, space, scorers
        self.steps: dict[str, list[tuple[int, float]]] = {name: [] for name in scorers}  # candidates, seconds
        self.rows = dict.fromkeys(scorers, 0)
        self.opened = 0.0
        self.wrong = self.differ = 0

    def run(self, own: list[int], removed: list[int], judge: Callable[[frozenset[int], str], int]) -> None:
        """All timed steps; `judge` runs a loop and keeps its time."""
        asked, n = self.asked, len(own)
        half = int(asked.ratio * n)
        first = len(removed)
        stops = [int(part * n) for part in asked.at] if asked.at else [0]
        length = asked.steps if asked.at else half
        loops = {round(k * length * len(stops) / max(1, asked.loops)) for k in range(asked.loops)}
        start = clock(asked)
        for scorer in self.scorers.values():
            scorer.score(frozenset(removed), own[:1])
            self.opened += clock(asked) - start
            start = clock(asked)
        done = 0
        for stop in stops:
            gone = len(removed) - first
            if stop > gone:
                removed += self.jump([g for g in own if g not in removed], removed, stop - gone)
            for _ in range(length):
                self.step([g for g in own if g not in removed], removed, done < asked.check)
                if done in loops:
                    count = judge(frozenset(removed), "ONNX Runtime")
                    self.wrong += count != self.counted
                    if asked.torch:
                        self.wrong += judge(frozenset(removed), "PyTorch") != self.counted
                done += 1

    def jump(self, left: list[int], removed: list[int], n: int) -> list[int]:
        """The n groups that leave untimed."""
        if self.asked.jump == "car":
            return [p.group for p in next(iter(self.scorers.values())).lowest(removed, left, k=n)]
        found = importance(self.space.model, criterion=self.asked.jump)
        scores = dict(zip(found.groups, found.values, strict=True))
        return sorted(left, key=lambda group: scores[group])[:n]

    def step(self, left: list[int], removed: list[int], check: bool) -> None:
        """One step by every scorer; the exact one's pick is removed."""
        picked = {}
        for name, scorer in self.scorers.items():
            rows, start = scorer.work.rows, clock(self.asked)
            picked[name] = scorer.lowest(frozenset(removed), left)[0]
            self.steps[name].append((len(left), clock(self.asked) - start))
            self.rows[name] += scorer.work.rows - rows
        pick = next(iter(picked.values()))
        self.differ += any(other.group != pick.group for other in picked.values())
        if check:
            images, labels = self.images
            batch, threads = self.asked.batch, self.asked.threads
            counts = {g: loop(self.space, frozenset([*removed, g]), images, labels, batch, threads) for g in left}
            self.wrong += counts[pick.group] != max(counts.values()) or counts[pick.group] != pick.score.correct
        self.counted = pick.score.correct
        removed.append(pick.group)

    images: tuple[np.ndarray, np.ndarray]
    counted: int | None = None


def main() -> None:
    """Print a line for each layer and one for all."""
    asked = arguments()
    model = load(asked.model)
    space = analyze(model)
    data = open_data(asked, model)
    parts = [data.inputs(np.arange(i, min(i + 100, len(data))))[""] for i in range(0, len(data), 100)]
    images, labels = np.concatenate(parts), data.labels
    del parts
    memory = None if asked.memory_gib is None else int(asked.memory_gib * 2**30)
    scorers = {}
    if not asked.no_exact:
        scorers["exact"] = Scorer(space, data, provider="cpu", threads=asked.threads, memory_bytes=memory)
    if asked.approximate:
        close = Scorer(
            space, data, provider="cpu", threads=asked.threads, memory_bytes=memory, approximate=asked.approximate
        )
        scorers[f"at {asked.approximate:g}"] = close
    removed: list[int] = []
    totals: dict[tuple[str, str], list[float]] = {}
    wrong = differ = 0
    print(f"{len(data)} images, {next(iter(scorers.values())).base().correct} right at first")
    print(f"{'layer':28s} search     steps candidates  open s  s a step  rows  loop: s a step      ratio to half")
    for index in asked.layers if asked.layers else inner(space):
        own = [g for g in space.layers[index].groups.tolist() if g >= 0]
        layer = Layer(asked, space, scorers)
        layer.images = (images, labels)
        took: dict[str, list[float]] = {}

        def judge(groups: frozenset[int], name: str, took: dict[str, list[float]] = took) -> int:
            if name == "PyTorch":
                from torch_loop import torch_loop  # takes seconds the first time
            start = clock(asked)
            if name == "PyTorch":
                count = torch_loop(space, groups, images, labels, asked.batch, asked.threads)
            else:
                count = loop(space, groups, images, labels, asked.batch, asked.threads)
            took.setdefault(name, []).append(clock(asked) - start)
            return count

        layer.run(own, removed, judge)
        half = int(asked.ratio * len(own))
        for name, steps in layer.steps.items():
            n, seconds = sum(n for n, _ in steps), sum(s for _, s in steps)
            for other, times in took.items():
                each = statistics.median(times)
                opened = layer.opened / len(scorers)
                ours, theirs = opened + seconds / len(steps) * half, each * n / len(steps) * half
                total = totals.setdefault((name, other), [0.0, 0.0])
                total[0], total[1] = total[0] + ours, total[1] + theirs
                print(
                    f"{space.layers[index].node[-28:]:28s} {name:10s} {len(steps):5d} {n:10d} {opened:7.1f} "
                    f"{seconds / len(steps):9.2f} {layer.rows[name] / (n * len(data)):5.3f}  "
                    f"{other:12s} {each * n / len(steps):8.1f} {each * n / seconds:6.1f} {theirs / ours:7.1f}",
                    flush=True,
                )
        wrong, differ = wrong + layer.wrong, differ + layer.differ
    for (name, other), (ours, theirs) in totals.items():
        print(f"all layers to {asked.ratio:g}, {name}: {ours:.0f} s; {other} {theirs:.0f} s: {theirs / ours:.1f}x")
    print(f"{wrong} counts or picks wrong; steps at which an approximate pick differs: {differ}")


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
