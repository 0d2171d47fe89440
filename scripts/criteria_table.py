"""Print the README's table: one model pruned by every criterion at the same ratio, as Markdown.

    python scripts/criteria_table.py
    python scripts/criteria_table.py --ratio 0.75

Every row is what `onnxcar prune` and `onnxcar evaluate` say on the command line, run in fresh processes; nothing is
computed here but the mean over the seeds of `random`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcar.criteria import CRITERIA

MODEL = Path(__file__).resolve().parents[1] / "models" / "digits" / "model.onnx"
SETS = ("data", "test_data")
N_RANDOM = 10


@dataclass(frozen=True)
class Row:
    """One line of the table: how it was made, top-1 on both sets (fractions), and the size."""

    how: str
    top1: tuple[float, float]
    params: int
    macs: int

    def __str__(self) -> str:
        """The line as Markdown."""
        chosen, test = self.top1
        return f"| {self.how} | {chosen:.4f} | {test:.4f} | {self.params:,} | {self.macs:,} |"


def onnxcar(*args: str) -> Any:
    """What a command prints as JSON.

    Raises:
        SystemExit: It failed; its message is shown.
    """
    line = [sys.executable, "-m", "onnxcar", *args, "--json", "-", "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(line[2:])}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(how: str, model: Path, config: Path, sets: Sequence[str]) -> Row:
    """Top-1 of a model on the two sets, and its size."""
    found = [onnxcar("evaluate", str(model), "--config", str(config), "--test-data", data) for data in sets]
    top1 = (found[0]["value"], found[1]["value"])
    return Row(how, top1, found[0]["model"]["params"], found[0]["model"]["macs"])


def table(model: Path, ratio: float, names: Sequence[str]) -> list[Row]:
    """The original, then every criterion at the same ratio; `random` as the mean over its seeds."""
    config = model.with_name("onnxcar.toml")
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    sets = [str(config.parent / settings["data"][name]) for name in SETS]
    ways = {f"`{name}`": ["--criterion", name] for name in names if name != "random"}
    if "car" in names:
        ways["`car --metric loss`"] = ["--criterion", "car", "--metric", "loss"]
    for seed in range(N_RANDOM) if "random" in names else ():
        ways[f"random {seed}"] = ["--criterion", "random", "--seed", str(seed)]
    rows = [measure("original", model, config, sets)]
    with tempfile.TemporaryDirectory() as folder:
        for number, (how, flags) in enumerate(ways.items()):
            out = Path(folder) / f"{number}.onnx"
            onnxcar("prune", str(model), "-o", str(out), "--ratio", str(ratio), *flags)
            rows.append(measure(how, out, config, sets))
    lots = [row for row in rows if row.how.startswith("random ")]
    rows = [rows[0], *sorted((row for row in rows[1:] if row not in lots), key=lambda row: -row.top1[1])]
    if lots:
        top1 = (statistics.fmean(row.top1[0] for row in lots), statistics.fmean(row.top1[1] for row in lots))
        rows.append(Row(f"`random`, mean of {len(lots)} seeds", top1, lots[0].params, lots[0].macs))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="One model pruned by every criterion, as a Markdown table.")
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help="with an onnxcar.toml beside it")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the filters of every conv layer (default 0.5)")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA), metavar="NAME")
    args = parser.parse_args()
    print("| criterion | top-1, selection images | top-1, test images | params | MACs |")
    print("|---|---|---|---|---|")
    for row in table(args.model, args.ratio, args.criteria):
        print(row)


if __name__ == "__main__":
    main()
