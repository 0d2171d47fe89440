"""How much of the speed-up that MACs promise a network can give at all: plans made for the clock, not for accuracy.

    python scripts/latency_limit.py ../shared/models/cifar10_resnet20.onnx --macs 0.565 0.25

At each fraction of the MACs two plans of about that size, timed in turn, round by round, at batch 1:

    even        every layer to the same ratio
    by latency  blocks of filters leave in the order of predicted time saved per MAC, by the table of layers that
                `prune --target-latency` measures: what a search could gain that looked at time alone
    floor       predicted time of the narrowest network of the table: a tenth of the filters, counts aligned

    of promise  speed-up over 1 / MACs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import onnxcar as car
from onnxcar import ChannelSpace, Plan
from onnxcar.latency import measure, ratio
from onnxcar.latency_table import Table, measure_table
from onnxcar.scope import Keep, fields, select_layers, vector_width

FLOOR = 0.25  # of a layer's filters stay


def by_latency(space: ChannelSpace, table: Table, block: int, targets: list[float]) -> dict[float, Plan]:
    """Greedy by seconds saved per MAC saved, a block of one field's groups at a time."""
    parts = fields(space, select_layers(space, (), (), dense=False), (), "layer")
    left = [list(field.groups) for field in parts]
    least = [max(block, int(np.ceil(FLOOR * len(groups)))) for groups in left]
    gone: frozenset[int] = frozenset()
    whole, found = space.cost().macs, dict[float, Plan]()
    for target in sorted(targets, reverse=True):
        while space.cost(gone).macs > target * whole:
            now, macs, best = table.total(space.term_macs(gone)), space.cost(gone).macs, None
            for i, groups in enumerate(left):
                free = [g for g in groups if g not in gone]
                if len(free) - block < least[i]:
                    continue
                after = gone | set(free[-block:])
                saved = (now - table.total(space.term_macs(after))) / max(macs - space.cost(after).macs, 1)
                if best is None or saved > best[0]:
                    best = (saved, after)
            if best is None:
                break
            gone = best[1]
        found[target] = Plan(gone)
    return found


def even(space: ChannelSpace, model: car.Model, target: float, multiple: int) -> Plan:
    """The same ratio everywhere, as near to the target as ratios of a hundredth come."""
    whole = space.cost().macs
    plans = [
        car.prune(model, criterion="l2", stop=car.Stop(ratio=r), multiple_of=multiple, verify=False).plan
        for r in np.sqrt(1 - target) * np.array([0.35, 0.42, 0.5, 0.58, 0.66, 0.75])
    ]
    return min(plans, key=lambda plan: abs(space.cost(plan.groups).macs / whole - target))


def main() -> None:
    """Print a line for each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.565, 0.25])
    parser.add_argument("--runs", type=int, default=100, help="rounds, each runs every model once")
    args = parser.parse_args()
    print("| network | plan | MACs | predicted | latency | of promise |\n|---|---|---|---|---|---|", flush=True)
    for path in args.models:
        model = car.load(path)
        space = car.analyze(model)
        width = vector_width("cpu")
        table = measure_table(space, None, Keep(space, 1, width, True), provider="cpu", threads=1)
        block = min(width, 4)
        plans = [("by latency", plan) for plan in by_latency(space, table, block, args.macs).values()]
        plans += [("even", even(space, model, target, block)) for target in args.macs]
        base, *times = measure(
            [model, *(car.remove(space, plan) for _, plan in plans)], None, provider="cpu", threads=1, runs=args.runs
        )
        first = table.seconds(space.term_macs(()))
        for (name, plan), latency in zip(plans, times, strict=True):
            macs = space.cost(plan.groups).macs / space.cost().macs
            median, at = ratio(base, latency)
            said = table.seconds(space.term_macs(plan.groups)) / first
            print(
                f"| {path.stem} | {name} | {macs:.3f} | {said:.3f} | {median:.3f} [{at.low:.3f}, {at.high:.3f}] | "
                f"{macs / median:.0%} |",
                flush=True,
            )
        print(f"| {path.stem} | floor | | {table.whole[0][1] / first:.3f} | | |", flush=True)


if __name__ == "__main__":
    main()
