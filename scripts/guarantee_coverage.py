"""How often the promise of `prune --guarantee` is broken, in simulated worlds: the table of docs/guarantee.md.

    python scripts/guarantee_coverage.py --worlds 2000

A world is a path of pruned models whose true drops are known, and one data set of some images. Flips are nested, as on
a real path: an image that a lightly pruned model loses is lost by the heavier ones, too. Half of the images are held
back; the sequence of models is tested on them as `prune` does. Three ways to choose are compared:

    promise    the last model of the sequence that passes
    same data  the most pruned model whose drop on all images is at most the limit
    held back  the same on the held images, without a test

`broken` is how often the true drop of the shipped model exceeds the limit (the promise allows 1 - confidence), `drop`
the mean true drop of what is shipped.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcar.guarantee import images_needed, p_value

MODELS = 16


@dataclass
class Counts:
    """What one way to choose shipped."""

    broken: int = 0
    drop: float = 0.0
    shipped: int = 0

    def add(self, drop: float, limit: float) -> None:
        """One world; a drop of 0 with nothing removed counts, too."""
        self.broken += drop > limit
        self.drop += drop
        self.shipped += 1


def world(
    rng: np.random.Generator, n: int, losses: npt.NDArray[np.float64], gains: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images lost and won by each model, (models,) each."""
    u = rng.random(n)
    return (u < losses[:, None]).sum(1), (u > 1 - gains[:, None]).sum(1)


def simulate(n: int, limit: float, confidence: float, gain: float, worlds: int, seed: int) -> dict[str, Counts]:
    """All three ways in so many worlds.

    Args:
        n: Images, half of them held back.
        limit: `--max-drop`.
        confidence: `--guarantee`.
        gain: Images that the most pruned model alone gets right, as a fraction.
        worlds: How many.
        seed: Of everything random.
    """
    rng = np.random.default_rng(seed)
    gains = np.linspace(0, gain, MODELS + 1)[1:]
    drops = np.linspace(0, 3 * limit, MODELS + 1)[1:]
    losses = drops + gains
    p = functools.cache(lambda lost, won: p_value(lost, won, n // 2, limit, 1 - confidence))
    found = {name: Counts() for name in ("promise", "same data", "held back")}
    for _ in range(worlds):
        chosen, held = world(rng, n - n // 2, losses, gains), world(rng, n // 2, losses, gains)
        last = 0.0
        for i in range(MODELS):
            if p(int(held[0][i]), int(held[1][i])) > 1 - confidence:
                break
            last = float(drops[i])
        found["promise"].add(last, limit)
        for name, (lost, won), m in (
            ("same data", (chosen[0] + held[0], chosen[1] + held[1]), n),
            ("held back", held, n // 2),
        ):
            within = np.flatnonzero((lost - won) / m <= limit)
            found[name].add(float(drops[within[-1]]) if len(within) else 0.0, limit)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| images | limit | confidence | won at the end | promise: broken, drop | held back, no test | same data |")
    print("|---|---|---|---|---|---|---|")
    for n, limit, confidence, gain in (
        (1000, 0.02, 0.9, 0.0),
        (1000, 0.02, 0.9, 0.02),
        (1000, 0.05, 0.95, 0.02),
        (5000, 0.01, 0.95, 0.01),
        (5000, 0.01, 0.95, 0.04),
        (20000, 0.005, 0.99, 0.02),
    ):
        found = simulate(n, limit, confidence, gain, args.worlds, args.seed)
        cells = [f"{c.broken / c.shipped:.1%}, {c.drop / c.shipped:.4f}" for c in found.values()]
        print(f"| {n} | {limit:g} | {confidence:g} | {gain:.0%} | {cells[0]} | {cells[2]} | {cells[1]} |", flush=True)
    print()
    print("| limit | confidence 0.9 | 0.95 | 0.99 |")
    print("|---|---|---|---|")
    for limit in (0.005, 0.01, 0.02, 0.05):
        print(f"| {limit:g} | " + " | ".join(str(images_needed(limit, c)) for c in (0.9, 0.95, 0.99)) + " |")


if __name__ == "__main__":
    main()
