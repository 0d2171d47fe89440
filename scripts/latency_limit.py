"""How much of the speed-up that MACs promise a network can give at all: plans made for the clock, not for accuracy.

    python scripts/latency_limit.py ../shared/models/cifar10_resnet20.onnx --macs 0.565 0.25

At each fraction of the MACs two plans of about that size, timed in turn, round by round, at batch 1:

    even        every layer to the same ratio
    by latency  a layer at a time goes down to its next count that suits the processor, the one first that saves most
                predicted time per MAC, by the table of layers that `prune --target-latency` measures: what a search
                could gain that looked at time alone
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
from onnxcar.scope import Field, Keep, fields, select_layers, vector_width

FLOOR = 0.25  # of a layer's filters stay


def by_latency(keep: Keep, table: Table, targets: list[float]) -> dict[float, Plan]:
    """Greedy by seconds saved per MAC saved; a layer goes down to its next count that suits the processor."""
    space = keep.space
    parts = fields(space, select_layers(space, (), (), dense=False), (), "layer")
    gone: frozenset[int] = frozenset()
    whole, found = space.cost().macs, dict[float, Plan]()
    for target in sorted(targets, reverse=True):
        while space.cost(gone).macs > target * whole:
            now, macs, best = table.total(space.term_macs(gone)), space.cost(gone).macs, None
            for part in parts:
                after = lower(keep, part, gone)
                if after is None:
                    continue
                saved = (now - table.total(space.term_macs(after))) / max(macs - space.cost(after).macs, 1)
                if best is None or saved > best[0]:
                    best = (saved, after)
            if best is None:
                break
            gone = best[1]
        found[target] = Plan(gone)
    return found


def lower(keep: Keep, part: Field, gone: frozenset[int]) -> frozenset[int] | None:
    """`gone` and as many groups of one layer as take it to its next count; None where a quarter of it is all it has."""
    layer, free = part.layers[0], [g for g in part.groups if g not in gone]
    left = part.filters - sum(n for g, n in part.counts.items() if g in gone)
    least = FLOOR * part.filters
    while free:
        group = free.pop()
        gone, left = gone | {group}, left - part.counts[group]
        if left < least:
            return None
        if keep.suits(layer, left):
            return gone
    return None


def even(space: ChannelSpace, model: car.Model, target: float) -> Plan:
    """The same ratio everywhere, counts as they come; that of a few ratios which is nearest to the target."""
    whole = space.cost().macs
    plans = [
        car.prune(model, criterion="l2", stop=car.Stop(ratio=r), multiple_of=1, verify=False).plan
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
        keep = Keep(space, 1, vector_width("cpu"), True)
        table = measure_table(space, None, keep, provider="cpu", threads=1)
        plans = [("by latency", plan) for plan in by_latency(keep, table, args.macs).values()]
        plans += [("even", even(space, model, target)) for target in args.macs]
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
