"""Latency against MACs of networks pruned by l2, counts aligned and not: what `--multiple-of auto` is for.

    python scripts/bench/latency_macs.py ../shared/models/cifar10_resnet20.onnx --ratios 0.25 0.5 0.75

Each network is pruned evenly (`--criterion l2 --ratio R`) with `--multiple-of 1` and `auto`; all models of a network
are timed in turn, round by round, at batch 1 on one thread, on seeded noise. What a row says:

    MACs       of the pruned model, as a fraction of the original's
    latency    median of its time over the original's, with the 95 % interval of that median
    speed-up   1 / latency
    of promise speed-up over 1 / MACs: how much of the speed-up that the MACs promise is there
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxcar as car
from onnxcar.latency import measure, ratio


def rows(path: Path, ratios: list[float], runs: int, threads: int) -> list[str]:
    """Table lines of one network."""
    model = car.load(path)
    space = car.analyze(model)
    whole = space.cost(()).macs
    models, said = [model], []
    for share in ratios:
        for multiple in (1, "auto"):
            stop = car.Stop(ratio=share)
            run = car.prune(model, criterion="l2", stop=stop, multiple_of=multiple, provider="cpu", verify=False)
            models.append(run.model)
            said.append((share, multiple, run.record["result"]["macs"] / whole))
    base, *times = measure(models, None, provider="cpu", threads=threads, runs=runs)
    lines = []
    for (share, multiple, macs), latency in zip(said, times, strict=True):
        median, interval = ratio(base, latency)
        promise = macs / median
        lines.append(
            f"| {path.stem} | {share:g} | {multiple} | {macs:.3f} | {median:.3f} "
            f"[{interval.low:.3f}, {interval.high:.3f}] | {1 / median:.2f} | {promise:.0%} |"
        )
    return lines


def main() -> None:
    """Print the table, network by network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--runs", type=int, default=100, help="rounds, each runs every model once")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| network | ratio | multiple of | MACs | latency | speed-up | of promise |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for path in args.models:
        print("\n".join(rows(path, args.ratios, args.runs, args.threads)), flush=True)


if __name__ == "__main__":
    main()
