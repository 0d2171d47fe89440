r"""Try what the CAR paper says about interpretation on a real network; the figures of docs/interpretability.md.

    python scripts/interpretability.py --model squeezenet10.onnx --data sample.txt --preprocess raw --channels bgr \
        --mean 104,117,123 --std 1 --size 227 --crop-pct 0.875 --layers conv1 fire2/conv3x3_2 --work interp

Everything that takes long is kept in the folder `--work` and not done again: the responses to all images, the scores
of every filter at every step of the greedy path (a file after every 8 of them). So an interrupted run goes on. Prints
Markdown and writes `results.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

import onnxcar as car
from onnxcar import interpret
from onnxcar.criteria import Context, find
from onnxcar.data import Dataset, open_dataset
from onnxcar.interpret._similar import redundancy
from onnxcar.scoring import Scorer

FIRST = 20  # of the filters pruned first, as in the paper
COLOURED = 0.5  # colour selectivity from which on a filter counts as colour-selective
CHUNK = 8
DRAWS = 2000
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
PARTS = ("size", "crop_pct", "interpolation", "mean", "std", "channels", "layout")


def arguments() -> argparse.Namespace:
    """What is typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True, help="as onnxcar --data")
    parser.add_argument("--preprocess")
    for part in PARTS:
        parser.add_argument(f"--{part.replace('_', '-')}")
    parser.add_argument("--layers", nargs="+", default=["conv1"], help="node names")
    parser.add_argument("--limit", type=int, default=200, help="images that filters are scored on (default 200)")
    parser.add_argument("--greedy", type=int, default=FIRST, help="filters that greedy CAR prunes a layer; 0: none")
    parser.add_argument("--per-step", type=int, default=1, help="of them before all others are scored anew (default 1)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--class-groups", type=Path, help="JSON of name: [output indices]")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    return parser.parse_args()


def datasets(args: argparse.Namespace, model: Any) -> tuple[Dataset, Dataset]:
    """All images, and the sample that filters are scored on."""
    pre = car.Preprocess.resolve(args.preprocess, **{part: getattr(args, part) for part in PARTS})
    from onnxcar.runtime import batch_inputs

    data = open_dataset(args.data, preprocess=pre).for_input(batch_inputs(model)[0].shape)
    return data, data.limit(args.limit, 0)


# --- what takes long, kept -------------------------------------------------------------------------------------------


def responses(args: argparse.Namespace, space: Any, data: Dataset, layer: Any) -> dict[str, Any]:
    """Colour selectivity and its terms, kernel colour, correlation and contribution of a layer's filters."""
    file = args.work / f"responses.{layer.index}.npz"
    if not file.exists():
        state = interpret.responses(space, data, layers=[layer.index]).layers[0]
        colour = state.colour_selectivity()
        kernels = state.kernels
        np.savez(
            file,
            colour=colour if colour is not None else np.full(layer.filters, np.nan),
            top=state.top,
            gray=state.gray if state.gray is not None else np.zeros_like(state.top),
            kernel=np.full(layer.filters, np.nan) if kernels is None else interpret.kernel_colour(kernels),
            correlation=state.correlation(),
            contribution=interpret.contribution(space, state),
        )
    return dict(np.load(file))


def scores(
    args: argparse.Namespace, space: Any, data: Dataset, layer: Any, gone: Sequence[int] = ()
) -> tuple[Bools, Bools, Floats]:
    """Without the filters `gone`: samples that are right (n,), flips and changes of loss of the others (filters, n)."""
    groups = layer.groups.tolist()
    rest = [group for i, group in enumerate(groups) if i not in set(gone)]
    mark = "".join(f".{zlib.crc32(repr(sorted(gone)).encode()):08x}" for _ in gone[:1])
    scorer = None
    parts = []
    for start in range(0, len(rest), CHUNK):
        file = args.work / f"scores.{layer.index}.{len(data)}{mark}.{start}.npz"
        if not file.exists():
            if scorer is None:
                scorer = Scorer(space, data, provider="cpu", threads=args.threads)
                scorer.keep_losses = True
            some = rest[start : start + CHUNK]
            scorer.score([groups[i] for i in gone], some)
            flips, losses = (np.stack([kept[g] for g in some]) for kept in (scorer.flips, scorer.losses))
            draft = file.with_suffix(".part.npz")
            np.savez(draft, base=scorer.base_correct, flips=flips, losses=losses)
            draft.replace(file)
            done = f"{start + len(some)} of {len(rest)} filters scored"
            print(f"{layer.node}: {done}, {len(gone)} removed before", file=sys.stderr, flush=True)
        parts.append(np.load(file))
    return parts[0]["base"], np.concatenate([p["flips"] for p in parts]), np.concatenate([p["losses"] for p in parts])


def greedy(args: argparse.Namespace, space: Any, data: Dataset, layer: Any, coloured: Bools) -> dict[str, Any]:
    """Filters in the order in which CAR prunes them when all are scored anew after every `--per-step` of them.

    The interval is over resampled images, given the path: at each step the resampled scores choose among the filters
    that were scored there. What was chosen is kept after every step, with the file of the layer's results.
    """
    rng = np.random.default_rng(0)
    weights = [np.bincount(rng.integers(0, len(data), len(data)), minlength=len(data)) for _ in range(DRAWS)]
    chosen: list[set[int]] = [set() for _ in weights]
    path: list[int] = []
    out: dict[str, Any] = {"path": path, "images": len(data), "per_step": args.per_step}
    while len(path) < min(args.greedy, layer.filters - 1):
        found = scores(args, space, data, layer, path)
        rest = np.asarray([i for i in range(layer.filters) if i not in set(path)])
        k = min(args.per_step, args.greedy - len(path))
        for picked, w in zip(chosen, weights, strict=True):
            order = rest[car_order(*found, w.astype(float))].tolist()
            picked.update([i for i in order if i not in picked][:k])
        path += rest[car_order(*found)][:k].tolist()
        counts = [int(coloured[list(picked)].sum()) for picked in chosen]
        out["interval"] = np.percentile(counts, [2.5, 97.5]).tolist()
        (args.work / f"greedy.{layer.index}.{len(data)}.{args.per_step}.json").write_text(json.dumps(out))
        print(f"{layer.node}: {len(path)} of {args.greedy} filters pruned", file=sys.stderr, flush=True)
    return out


# --- the claims ------------------------------------------------------------------------------------------------------


def car_order(base: Bools, flips: Bools, losses: Floats, weights: Floats | None = None) -> npt.NDArray[np.int64]:
    """Filters by rising CAR, ties by rising loss; `weights` counts every sample so often (bootstrap)."""
    change = flips * np.where(base, 1.0, -1.0)
    w = np.ones(len(base)) if weights is None else weights
    return np.lexsort((np.arange(len(flips)), np.round(losses @ w, 6), change @ w))


def share_of(coloured: Bools, order: Sequence[int]) -> dict[str, Any]:
    """Colour-selective filters among the first ones, and the chance of as many or more by a random order."""
    k = min(FIRST, len(order))
    found = int(coloured[np.asarray(order[:k], int)].sum())
    p = float(hypergeom.sf(found - 1, len(coloured), int(coloured.sum()), k))
    return {"first": k, "coloured": found, "expected": float(k * coloured.mean()), "p": p}


def bootstrap(coloured: Bools, base: Bools, flips: Bools, losses: Floats) -> list[float]:
    """95 % interval of the number of colour-selective filters among the first, over resampled images."""
    rng = np.random.default_rng(0)
    n, counts = len(base), []
    for _ in range(DRAWS):
        weights = np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
        counts.append(int(coloured[car_order(base, flips, losses, weights)[:FIRST]].sum()))
    return np.percentile(counts, [2.5, 97.5]).tolist()


def diversity(correlation: Floats, orders: dict[str, npt.NDArray[np.int64]], keep: int) -> dict[str, Any]:
    """Mean nearest-twin distance of the filters that each order keeps; the random one as mean and 95 % range."""
    rng = np.random.default_rng(0)
    n = len(correlation)

    def kept(ids: Sequence[int]) -> float:
        return interpret.twin_distance(correlation[np.ix_(ids, ids)])

    chance = [kept(rng.choice(n, keep, replace=False)) for _ in range(DRAWS)]
    out: dict[str, Any] = {"all": interpret.twin_distance(correlation), "kept": keep}
    out["random"] = [float(np.nanmean(chance)), *np.nanpercentile(chance, [2.5, 97.5]).tolist()]
    for name, order in orders.items():
        value = kept(order[-keep:])
        out[name] = [value, float(np.mean(np.asarray(chance) >= value))]
    return out


def named(args: argparse.Namespace, data: Dataset, found: tuple[Bools, Bools, Floats]) -> list[dict[str, Any]]:
    """For the filters of largest CAR: the groups of classes that stand out, if the test speaks."""
    groups = None if args.class_groups is None else json.loads(args.class_groups.read_text())
    if groups is not None:
        have = set(data.labels.tolist())
        groups = {name: ids for name, ids in groups.items() if have & set(ids)}
    effects = interpret.effects(interpret.class_sets(data.labels, data.classes, groups), *found)
    order = car_order(*found)[::-1][:10]
    return [{"filter": int(i), **effects.to_dict(int(i), float(effects.q[i]), 3)} for i in order]


def look_at(args: argparse.Namespace, space: Any, layer: Any, data: Dataset, few: Dataset) -> dict[str, Any]:
    """All claims on one layer."""
    known = responses(args, space, data, layer)
    base, flips, losses = scores(args, space, few, layer)
    coloured = np.nan_to_num(known["colour"]) >= COLOURED
    context = Context(few)
    orders = {
        "car, scored once": car_order(base, flips, losses),
        "l1": np.argsort(find("l1")(space, context)[layer.groups], kind="stable"),
        "variance": np.argsort(find("variance")(space, context)[layer.groups], kind="stable"),
        "function": np.argsort(redundancy(known["correlation"], known["contribution"]), kind="stable"),
    }
    walked = greedy(args, space, few, layer, coloured)
    out: dict[str, Any] = {
        "layer": layer.node,
        "filters": layer.filters,
        "images": len(few),
        "right": int(base.sum()),
        "coloured": int(coloured.sum()),
        "kernel_coloured": int((known["kernel"] >= 1 / 3).sum()) if np.isfinite(known["kernel"]).any() else None,
        "first": {name: share_of(coloured, order.tolist()) for name, order in orders.items()},
        "bootstrap": bootstrap(coloured, base, flips, losses),
        "diversity": diversity(known["correlation"], orders, max(2, layer.filters // 10)),
        "named": named(args, few, (base, flips, losses)),
    }
    if walked["path"]:
        out["first"]["car, greedy"] = share_of(coloured, walked["path"])
        out["greedy"] = walked
        rest = [i for i in range(layer.filters) if i not in set(walked["path"])]
        orders = {"car, greedy": np.asarray([*walked["path"], *rest]), **orders}
        out["after"] = diversity(known["correlation"], orders, len(rest))
    return out


def show(found: dict[str, Any]) -> None:
    """One layer as Markdown."""
    n, coloured = found["filters"], found["coloured"]
    print(f"\n### {found['layer']}: {n} filters, {found['images']} images, {found['right']} of them right\n")
    print(f"Colour-selective (index of at least {COLOURED}): {coloured} of {n}, {coloured / n:.0%}.\n")
    print("| pruned first by | filters | colour-selective | expected | p |\n|---|---|---|---|---|")
    for name, row in found["first"].items():
        print(f"| {name} | {row['first']} | {row['coloured']} | {row['expected']:.1f} | {row['p']:.3f} |")
    low, high = found["bootstrap"]
    print(f"\nCAR scored once, 95 % interval over the images: {low:.0f} to {high:.0f}.\n")
    if "greedy" in found:
        (low, high), step = found["greedy"]["interval"], found["greedy"]["per_step"]
        print(f"Greedy CAR, {step} a step, given its path: {low:.0f} to {high:.0f}.\n")
    for part in ("diversity", "after"):
        if part in found:
            show_diversity(found[part], list(found["first"]))
    print("\n| filter | q | helps most: change of loss, class-CAR [95 %], images |\n|---|---|---|")
    for row in found["named"]:
        best = "; ".join(
            f"{'**' if e['named'] and row['speaks'] else ''}{e['class']}{'**' if e['named'] and row['speaks'] else ''} "
            f"{e['loss']:+.2f}, {e['car']:+.2f} [{e['interval'][0]:+.2f}, {e['interval'][1]:+.2f}], {e['samples']}"
            for e in row["most"]
        )
        print(f"| {row['filter']} | {row['q']:.3f} | {best} |")


def show_diversity(d: dict[str, Any], names: Sequence[str]) -> None:
    """Twin distances of what is kept as Markdown."""
    print(f"\nMean twin distance of all filters: {d['all']:.3f}. Of {d['kept']} kept:\n")
    print("| kept by | twin distance | random sets at least as diverse |\n|---|---|---|")
    mean, low, high = d["random"]
    print(f"| random | {mean:.3f} ({low:.3f} to {high:.3f}) | |")
    for name in names:
        if name in d:
            print(f"| {name} | {d[name][0]:.3f} | {d[name][1]:.1%} |")


def main() -> None:
    """Look at every layer."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    model = car.load(args.model)
    space = car.analyze(model)
    data, few = datasets(args, model)
    layers = [next(x for x in space.layers if x.node == name) for name in args.layers]
    found = [look_at(args, space, layer, data, few) for layer in layers]
    (args.work / "results.json").write_text(json.dumps(found, indent=1))
    for one in found:
        show(one)


if __name__ == "__main__":
    main()
