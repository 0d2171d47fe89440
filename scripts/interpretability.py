r"""Try what the CAR paper says about interpretation on a real network; the figures of docs/interpretability.md.

    python scripts/interpretability.py --model squeezenet10.onnx --data sample.txt --preprocess raw --channels bgr \
        --mean 104,117,123 --std 1 --size 227 --crop-pct 0.875 --layers conv1 fire2/conv3x3_2 --work interp

Everything that takes long is kept in the folder `--work` and not done again: the responses to all images, the scores
of every filter (a file after every 8 of them), and the greedy path (the journal of `onnxcar prune`). So an interrupted
run goes on, and a run with `--greedy 0` uses what is there. Prints Markdown and writes `results.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
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
    parser.add_argument("--greedy", type=int, default=FIRST, help="steps of greedy CAR in each layer; 0: none")
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


def scores(args: argparse.Namespace, space: Any, data: Dataset, layer: Any) -> tuple[Bools, Bools, Floats]:
    """Samples that are right (n,), flips and changes of loss of every filter (filters, n)."""
    groups = layer.groups.tolist()
    scorer = None
    parts = []
    for start in range(0, len(groups), CHUNK):
        file = args.work / f"scores.{layer.index}.{len(data)}.{start}.npz"
        if not file.exists():
            if scorer is None:
                scorer = Scorer(space, data, provider="cpu")
                scorer.keep_losses = True
            some = groups[start : start + CHUNK]
            scorer.score((), some)
            flips, losses = (np.stack([kept[g] for g in some]) for kept in (scorer.flips, scorer.losses))
            np.savez(file, base=scorer.base_correct, flips=flips, losses=losses)
            print(f"{layer.node}: {start + len(some)} of {len(groups)} filters scored", file=sys.stderr, flush=True)
        parts.append(np.load(file))
    return parts[0]["base"], np.concatenate([p["flips"] for p in parts]), np.concatenate([p["losses"] for p in parts])


def greedy(args: argparse.Namespace, layer: Any) -> list[int]:
    """Filters in the order in which greedy CAR prunes them, as far as it got."""
    name = f"greedy.{layer.index}"
    journal = args.work / f"{name}.journal.jsonl"
    if args.greedy:
        flags = [f"--{part.replace('_', '-')}={value}" for part in PARTS if (value := getattr(args, part)) is not None]
        command = [sys.executable, "-m", "onnxcar", "prune", str(args.model), "--data", args.data, *flags]
        command += [f"--preprocess={args.preprocess}"] if args.preprocess else []
        command += ["--limit", str(args.limit), "--layers", layer.node, "--steps", str(args.greedy), "--force"]
        command += [
            "--multiple-of",
            "1",
            "--no-verify",
            "-o",
            str(args.work / f"{name}.onnx"),
            "--journal",
            str(journal),
        ]
        subprocess.run(command, check=True)
    if not journal.exists():
        return []
    answers = [json.loads(line) for line in journal.read_text().splitlines()]
    picks = [entry["answer"][0][0] for entry in answers if "lowest" in entry.get("ask", {})]
    return [layer.groups.tolist().index(group) for group in picks]


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
    out["random"] = [float(np.mean(chance)), *np.percentile(chance, [2.5, 97.5]).tolist()]
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
    path = greedy(args, layer)
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
    if path:
        out["first"]["car, greedy"] = share_of(coloured, path)
        out["greedy"] = path
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
    d = found["diversity"]
    print(f"Mean twin distance of all filters: {d['all']:.3f}. Of {d['kept']} kept:\n")
    print("| kept by | twin distance | random sets at least as diverse |\n|---|---|---|")
    mean, low, high = d["random"]
    print(f"| random | {mean:.3f} ({low:.3f} to {high:.3f}) | |")
    for name in found["first"]:
        if name in d:
            print(f"| {name} | {d[name][0]:.3f} | {d[name][1]:.1%} |")
    print("\n| filter | q | helps most: change of loss, class-CAR [95 %], images |\n|---|---|---|")
    for row in found["named"]:
        best = "; ".join(
            f"{'**' if e['named'] and row['speaks'] else ''}{e['class']}{'**' if e['named'] and row['speaks'] else ''} "
            f"{e['loss']:+.2f}, {e['car']:+.2f} [{e['interval'][0]:+.2f}, {e['interval'][1]:+.2f}], {e['samples']}"
            for e in row["most"]
        )
        print(f"| {row['filter']} | {row['q']:.3f} | {best} |")


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
