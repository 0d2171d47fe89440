"""How far greedy CAR is from the best set: filters that were removed are exchanged for kept ones while that helps.

    python scripts/exchange.py resnet20.onnx cifar.toml --limit 500 --ratio 0.5

One layer is pruned by a criterion, then the best single exchange of a removed filter for a kept one is made, again and
again until none gives more right answers (or as many at a lower loss) on the images that filters are chosen on. The
last set cannot be bettered by any exchange of two filters. The `onnxcar.toml` names data, test_data and preprocessing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accuracy_table import Net

import onnxcar as car
from onnxcar.criteria import CRITERIA
from onnxcar.scoring import Score, Scorer


def key(score: Score) -> tuple[int, float]:
    """What sets are compared by: right answers, then the loss."""
    assert score.correct is not None
    assert score.loss is not None
    return score.correct, -score.loss


def exchanged(scorer: Scorer, groups: list[int], removed: frozenset[int]) -> frozenset[int]:
    """The set after the best exchange; the same where none helps."""
    best, found = key(scorer.base(removed)), removed
    kept = [group for group in groups if group not in removed]
    for back in sorted(removed):
        less = removed - {back}
        for group, score in zip(kept, scorer.score(less, kept), strict=True):
            if key(score) > best:
                best, found = key(score), less | {group}
    return found


def main() -> None:
    """Print a line for the greedy set and one for each exchange."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("toml", type=Path)
    parser.add_argument("--place", default="first", choices=("first", "second", "middle", "last"))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--criterion", nargs="+", default=["car"], choices=list(CRITERIA))
    parser.add_argument("--limit", type=int, help="images that filters are chosen on; default all")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    net = Net(args.model.stem, args.model, args.toml, args.limit, args.threads)
    node = net.places()[args.place]
    layer = next(x for x in net.space.layers if x.node == node)
    groups = sorted({int(g) for g in layer.groups if g >= 0})
    scorer = Scorer(net.space, net.data, provider="cpu", threads=args.threads)
    print(f"{node}, {args.ratio:g} of {layer.filters} filters, chosen on {len(net.data):,} images")
    print("| set | right of those | loss | top-1, test |\n|---|---|---|---|")
    for name in args.criterion:
        ((_, plan),) = net.plans(node, [args.ratio], name, 0)
        removed, label = frozenset(plan.groups), name
        while True:
            score = scorer.base(removed)
            test = net.cell(car.Plan(removed), 0, False)["none"]
            print(f"| {label} | {score.correct} | {score.loss:.3f} | {test:.4f} |")
            after = exchanged(scorer, groups, removed)
            if after == removed:
                break
            removed, label = after, "an exchange"


if __name__ == "__main__":
    main()
