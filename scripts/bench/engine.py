"""What the scorer costs, piece by piece; each figure beside the plain way of getting it, in one run.

    python scripts/bench/engine.py global  MODEL DATA   steps at global scope, the model shrinking and not
    python scripts/bench/engine.py score   MODEL DATA   every candidate in full against the loops; rows/s
    python scripts/bench/engine.py memory  MODEL DATA   peak memory against the number of images
    python scripts/bench/engine.py scaling MODEL DATA   seconds against images, candidates and layers, with a plot
    python scripts/bench/engine.py pixels  MODEL DATA   decoding, prefix and both, in a first process and in a second

DATA is a folder, .npz, .csv or .txt; add --mean, --size, --channels, ... as `onnxcar` takes them. Times on a busy
machine mean nothing: compare ratios.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from car_speed import inner, loop
from images import add_data, flags, open_data

from onnxcar.channels import ChannelSpace
from onnxcar.data import Dataset
from onnxcar.model import load
from onnxcar.rules import analyze
from onnxcar.runtime import open_network
from onnxcar.scoring import Scorer
from onnxcar.scoring._open import open_site
from onnxcar.scoring._site import BASE, reads_of
from onnxcar.shrinking import Shrinking

BATCHES = (8, 16, 32, 64, 128, 256)


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("global", "score", "memory", "scaling", "pixels", "one", "once"))
    parser.add_argument("model")
    add_data(parser)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--per-step", type=int, default=8)
    parser.add_argument("--groups", type=int, help="score: so many candidates, spread over the network; default all")
    parser.add_argument("--loops", type=int, default=3, help="score: evaluations of each loop that are timed")
    parser.add_argument("--memory-gib", type=float, help="bound given to the scorer")
    parser.add_argument("--counts", type=int, nargs="*", help="memory, scaling: numbers of images")
    parser.add_argument("--plot", default="docs/img/cost-against-work.png")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def opened(asked: argparse.Namespace, limit: int | None = None) -> tuple[ChannelSpace, Dataset]:
    """The model's structure and the images."""
    model = load(asked.model)
    return analyze(model), open_data(asked, model, limit)


def options(asked: argparse.Namespace) -> dict[str, object]:
    """Of a scorer."""
    memory = None if asked.memory_gib is None else int(asked.memory_gib * 2**30)
    return {"provider": "cpu", "memory_bytes": memory, "threads": asked.threads}


def all_compete(asked: argparse.Namespace) -> None:
    """Steps at global scope: seconds, work, and whether a shrinking model picks the same."""
    space, data = opened(asked)
    scorers = {"masked": Scorer(space, data, **options(asked)), "shrinking": Shrinking(space, data, **options(asked))}
    paths: dict[str, list[int]] = {name: [] for name in scorers}
    print(f"{len(data)} images, {len(space.groups)} groups")
    print("step  MACs  candidates  " + "".join(f"{name:>10s} s   cpu s    rows  rows/s" for name in scorers))
    for step in range(asked.steps):
        shown = ""
        for name, scorer in scorers.items():
            scorer.all_sites = True
            gone = frozenset(paths[name])
            left = [g.id for g in space.groups if g.id not in gone and space.allows(g.id, gone)]
            rows, cpu, start = scorer.work.rows, time.process_time(), time.perf_counter()
            scorer.step(gone)
            picks = scorer.lowest(gone, left, k=asked.per_step, per_mac=True)
            seconds, cpu, rows = time.perf_counter() - start, time.process_time() - cpu, scorer.work.rows - rows
            paths[name] += [pick.group for pick in picks]
            shown += f"{seconds:12.1f} {cpu:7.1f} {rows:7d} {rows / seconds:7.0f}"
        print(f"{step:4d} {space.cost(gone).macs / space.cost(()).macs:6.3f} {len(left):10d} {shown}", flush=True)
    print("picks equal:", paths["masked"] == paths["shrinking"])


def in_full(asked: argparse.Namespace) -> None:
    """Every candidate on every image, against the loops; rows per second against a loop over one suffix."""
    space, data = opened(asked)
    images, labels = data.inputs(np.arange(len(data)))[""], data.labels
    groups = [g.id for g in space.groups if space.allows(g.id, ())]
    if asked.groups:
        groups = groups[:: max(1, len(groups) // asked.groups)]
    scorer = Scorer(space, data, **options(asked))
    start = time.perf_counter()
    scores = scorer.score((), groups)
    ours = (time.perf_counter() - start) / len(groups)
    print(f"{len(data)} images, {len(groups)} candidates: {ours:.3f} s a candidate, {scorer.work.rows} rows run")
    some = groups[:: max(1, len(groups) // asked.loops)][: asked.loops]
    from torch_loop import torch_loop  # PyTorch takes memory that `memory` must not count

    for name, run in (("ONNX Runtime", loop), ("PyTorch", torch_loop)):
        seconds, wrong = [], 0
        for group in some:
            start = time.perf_counter()
            right = run(space, frozenset([group]), images, labels, 250)
            seconds.append(time.perf_counter() - start)
            wrong += right != scores[groups.index(group)].correct
        each = statistics.median(seconds)
        print(f"{name} loop: {each:.3f} s a candidate: {each / ours:.1f}x; {wrong} of {len(some)} counts differ")
    sites: dict[tuple[int, ...], list[int]] = {}
    for group, key in reads_of(space).items():
        sites.setdefault(key, []).append(group)
    for key in list(sites)[:: max(1, len(sites) // 4)]:
        rows_per_second(asked, space, data, key, sites[key])


def rows_per_second(
    asked: argparse.Namespace, space: ChannelSpace, data: Dataset, key: tuple[int, ...], groups: Sequence[int]
) -> None:
    """Rows per second of `score` at one site, and of a plain loop over the same suffix at its best batch size."""
    few = data.inputs(np.arange(4))
    network = open_network(space.model, provider="cpu", sample=few)  # all cores in each run
    site = open_site(space, network, key, (), sample=network.session.bind(few))
    at = np.arange(min(len(data), 256))
    block = site.load(lambda i: network.session.bind(data.inputs(i)), at, 64)
    best = 0.0
    for batch in BATCHES:
        rows = np.resize(at, batch)
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < 0.5:
            site.run(block, np.full(batch, BASE), rows)
            n += batch
        best = max(best, n / (time.perf_counter() - start))
    scorer = Scorer(space, data, **options(asked))
    scorer.score((), groups[:1])  # opens the site and runs its prefix
    rows_before, start = scorer.work.rows, time.perf_counter()
    scorer.score((), groups[:4])
    ours = (scorer.work.rows - rows_before) / (time.perf_counter() - start)
    print(f"suffix behind read {key[0]:3d}: {ours:8.0f} rows/s, plain loop {best:8.0f}: {ours / best:.2f}")


def one(asked: argparse.Namespace) -> None:
    """One search step of one layer, for `memory`: prints the peak in MiB."""
    space, data = opened(asked)
    scorer = Scorer(space, data, **options(asked))
    layer = inner(space)[0]
    scorer.lowest((), [g for g in space.layers[layer].groups.tolist() if g >= 0])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def memory(asked: argparse.Namespace) -> None:
    """Peak memory of a step, each number of images in a process of its own."""
    peaks = []
    for n in asked.counts or (1_000, 10_000):
        command = [sys.executable, __file__, "one", asked.model, asked.data, "--limit", str(n), *flags(asked)]
        command += ["--memory-gib", str(asked.memory_gib or 0.25)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(int(out.split()[-1]))
        print(f"{n:8d} images: {peaks[-1]} MiB", flush=True)
    print(f"largest over smallest: {max(peaks) / min(peaks):.2f}")


def once(asked: argparse.Namespace) -> None:
    """For `pixels`: seconds of CPU and of the clock that pixels alone take, a scorer's base, and the base once more."""
    space, data = opened(asked)
    done: list[str] = []

    def timed(what: str, run: Callable[[], object]) -> None:
        start = time.perf_counter(), time.process_time()
        run()
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        done.append(f"{what} {cpu:.1f} s of CPU in {wall:.1f} s")

    if asked.steps == 0:  # pixels alone, batch by batch as a search takes them
        timed("pixels", lambda: [data.inputs(np.arange(i, min(i + 32, len(data)))) for i in range(0, len(data), 32)])
    scorer = Scorer(space, data, **options(asked))
    timed("whole network", scorer.base)
    scorer._scores.clear()
    timed("once more", scorer.base)
    print("; ".join(done))


def pixels(asked: argparse.Namespace) -> None:
    """Decoding against computing, with an empty cache and with a full one, each in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        for steps, name in ((0, "apart, nothing kept yet"), (4, "together, nothing kept yet"), (4, "second process")):
            folder = Path(cache) / ("apart" if steps == 0 else "together")
            command = [sys.executable, __file__, "once", asked.model, asked.data, "--steps", str(steps), *flags(asked)]
            command += ["--limit", str(asked.limit)] if asked.limit else []
            env = dict(os.environ, ONNXCAR_CACHE=str(folder))
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
            kept = sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file()) if folder.exists() else 0
            print(f"{name}: {out.strip()}; {kept >> 20} MiB kept on disk", flush=True)


def timed(run: Callable[[], object]) -> float:
    """Seconds of CPU: another process takes none of them."""
    start = time.process_time()
    run()
    return time.process_time() - start


def scaling(asked: argparse.Namespace) -> None:
    """CPU seconds of one greedy step against images, candidates and layers; exponents of a power law."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    counts = asked.counts or (250, 500, 1_000)
    space, data = opened(asked)
    layers = inner(space)
    own = [g for g in space.layers[layers[0]].groups.tolist() if g >= 0]
    parts: dict[str, list[tuple[int, float]]] = {"images": [], "candidates": [], "layers": []}
    for n in counts:
        some = data.limit(n, 0)
        parts["images"].append((n, timed(lambda some=some: Scorer(space, some, **options(asked)).lowest((), own))))
    for n in (len(own) // 4, len(own) // 2, len(own)):
        parts["candidates"].append((n, timed(lambda n=n: Scorer(space, data, **options(asked)).lowest((), own[:n]))))
    for n in (len(layers) // 4, len(layers) // 2, len(layers)):
        some = [g for k in layers[:n] for g in space.layers[k].groups.tolist() if g >= 0]
        scorer = Scorer(space, data, **options(asked))
        scorer.all_sites = True
        parts["layers"].append((n, timed(lambda s=scorer, g=some: s.lowest((), g, per_mac=True))))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for axis, (name, points) in zip(axes, parts.items(), strict=True):
        x, y = np.asarray(points, float).T
        slope, offset = np.polyfit(np.log(x), np.log(y), 1)
        print(f"{name}: " + ", ".join(f"{int(a)}: {b:.2f} s" for a, b in points) + f"; exponent {slope:.2f}")
        axis.loglog(x, y, "o", color="black")
        axis.loglog(x, np.exp(offset) * x**slope, "-", color="gray")
        axis.set(xlabel=name, ylabel="CPU seconds of a step", title=f"exponent {slope:.2f}")
    Path(asked.plot).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.plot, dpi=120)
    print(f"plot: {asked.plot}")


if __name__ == "__main__":
    asked = arguments()
    runs = {"global": all_compete, "score": in_full, "memory": memory, "one": one, "pixels": pixels, "once": once}
    (runs | {"scaling": scaling})[asked.what](asked)
