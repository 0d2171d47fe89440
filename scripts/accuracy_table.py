"""Every criterion at some pruning ratios, on single layers and on the whole network, repaired and not: table and plots.

    python scripts/accuracy_table.py
    python scripts/accuracy_table.py --net ResNet-20 resnet20.onnx resnet20.toml --minutes 30

The digits network of this repository is always there. A network of one's own needs its name, its file, and an
`onnxcar.toml` that names data, test_data and preprocessing (calibration_data, if another set is to be fitted on). Cells
are kept in a JSON file, so a run that was interrupted, or ended by --minutes, goes on where it stopped; --only,
--places, --criteria, --ratios and --unrepaired say which cells a run is to compute, and the page shows all there are.
Filters are chosen on `data`, repairs fitted on it without its labels, and accuracies are those on `test_data`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxcar as car
from onnxcar import config
from onnxcar.criteria import CRITERIA
from onnxcar.data import Dataset
from onnxcar.recovery import recover

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ("digits", ROOT / "models" / "digits" / "model.onnx", ROOT / "models" / "digits" / "onnxcar.toml")
PAGE = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- accuracy_table: begin -->", "<!-- accuracy_table: end -->"
PARTS = ("size", "crop_pct", "interpolation", "mean", "std", "channels", "layout")
SEEDS = 3  # of the criterion random
SLOW = ("car", "class-car")  # criteria that look at every candidate again after every step
OWN = ("class-car", "reconstruction")  # criteria besides CAR that are no baselines
WHOLE = "all layers"
PLACES = ("first", "second", "middle", "last", WHOLE)
RATIOS = (0.25, 0.5, 0.75)


@dataclass
class Net:
    """A network of the table."""

    name: str
    path: Path
    toml: Path
    limit: int | None
    threads: int | None
    per_step: int = 1
    journals: Path | None = None
    right: bool = False
    cache: dict[str, Any] = field(default_factory=dict)
    measured: dict[tuple[car.Plan, bool], dict[str, float]] = field(default_factory=dict)

    @property
    def held(self) -> str:
        """Key of its cells in the file."""
        return f"{self.name} {self.model.sha256[:12]} {self.limit}" + (" right" if self.right else "")

    @cached_property
    def model(self) -> car.Model:
        """The network."""
        return car.load(self.path)

    @cached_property
    def space(self) -> car.ChannelSpace:
        """Its structure."""
        return car.analyze(self.model)

    @cached_property
    def flags(self) -> dict[str, Any]:
        """What its `onnxcar.toml` says."""
        return config.defaults(self.path, tables=("data", "preprocess"), file=self.toml)

    def open(self, key: str, *, limit: int | None = None) -> Dataset:
        """The data set of a key of the `onnxcar.toml`."""
        pre = car.Preprocess.resolve(self.flags.get("preprocess"), **{part: self.flags.get(part) for part in PARTS})
        data: Dataset = car.open_dataset(
            self.flags[key], preprocess=pre, label_offset=int(self.flags.get("label_offset") or 0), limit=limit
        )
        shape = self.space.facts.shape(self.model.proto.graph.input[0].name)
        return data.for_input(None if shape is None else (None, *shape[1:]))

    def sample(self, key: str) -> Dataset:
        """So many images of a data set as `limit` says; with `right` of those that the network gets right."""
        if not self.right:
            return self.open(key, limit=self.limit)
        whole = self.open(key)
        outcomes = car.evaluate(self.model, whole, threads=self.threads).outcomes
        assert outcomes is not None
        return whole.subset(outcomes.correct).limit(self.limit)

    @cached_property
    def data(self) -> Dataset:
        """What filters are chosen on."""
        return self.sample("data")

    @cached_property
    def unlabelled(self) -> Dataset:
        """The same for criteria that need no labels: nothing is scored while they choose."""
        found = copy.copy(self.data)
        found.has_labels = False
        return found

    @cached_property
    def calibration(self) -> Dataset:
        """What repairs are fitted on."""
        return self.sample("calibration_data") if self.flags.get("calibration_data") else self.data

    @cached_property
    def test(self) -> Dataset:
        """What is reported on."""
        return self.open("test_data")

    def places(self) -> dict[str, str]:
        """Place -> node of the first, second, middle and last convolution with filters to remove; then all of them."""
        nodes = [x.node for x in self.space.layers if x.kind == "conv" and (x.groups >= 0).sum() > 1]
        at = {"first": 0, "second": 1, "middle": len(nodes) // 2, "last": len(nodes) - 1}
        found: dict[str, str] = {}
        for place, i in at.items():
            if i < len(nodes) and nodes[i] not in found.values():
                found[place] = nodes[i]
        return {**found, WHOLE: ""}

    def score(self, model: car.Model) -> float:
        """Top-1 on the test images."""
        return float(car.evaluate(model, self.test, threads=self.threads).value)

    def base(self) -> float:
        """Top-1 of the original."""
        if "base" not in self.cache:
            self.cache["base"] = self.score(self.model)
        return float(self.cache["base"])

    def plans(self, node: str, ratios: Sequence[float], criterion: str, seed: int) -> Iterator[tuple[float, car.Plan]]:
        """Plans at the ratios, ascending; of one layer they are parts of one path."""
        options: dict[str, Any] = {"criterion": criterion, "seed": seed, "verify": False, "threads": self.threads}
        if criterion in SLOW:
            options |= {"per_step": self.per_step}
        row = CRITERIA[criterion]
        data = self.data if row.needs_labels else self.unlabelled if row.needs_data else None
        if node:
            with self.journal(criterion, node, max(ratios)) as log:
                run = car.prune(
                    self.model, data, stop=car.Stop(ratio=max(ratios)), layers=[node], journal=log, **options
                )
            layer = next(x for x in self.space.layers if x.node == node)
            for ratio in ratios:
                gone: list[int] = []
                for step in run.steps:
                    if (~self.space.alive(gone)[layer.groups]).sum() >= ratio * layer.filters - 1e-9:
                        break
                    gone.append(step.group)
                yield ratio, car.Plan(gone)
            return
        for ratio in ratios:
            with self.journal(criterion, WHOLE, ratio) as log:
                run = car.prune(self.model, data, stop=car.Stop(ratio=ratio), journal=log, **options)
            yield ratio, run.plan

    @contextmanager
    def journal(self, criterion: str, what: str, ratio: float) -> Iterator[Path | None]:
        """A file from which a long search goes on if this run is interrupted; gone once it has ended."""
        if criterion not in SLOW or self.journals is None:
            yield None
            return
        name = re.sub(r"\W+", "_", f"{self.held} {what} {criterion} {ratio:g} {self.per_step}")
        self.journals.mkdir(parents=True, exist_ok=True)
        yield (file := self.journals / f"{name}.jsonl")
        file.unlink(missing_ok=True)

    def cell(self, plan: car.Plan, seed: int, repaired: bool) -> dict[str, float]:
        """Top-1 without the groups of a plan, unrepaired and, if asked for, repaired, and what is left of the MACs."""
        if (plan, repaired) not in self.measured:
            compact = car.remove(self.space, plan)
            found = {"macs": self.space.cost(plan.groups).macs / self.space.cost().macs, "none": self.score(compact)}
            if repaired:
                fixed = recover(self.space, plan, compact, self.calibration, threads=self.threads, seed=seed)
                found["least-squares"] = self.score(fixed.model)
            self.measured[plan, repaired] = found
        return dict(self.measured[plan, repaired])


def key(place: str, ratio: float, criterion: str, seed: int) -> str:
    """Name of a cell."""
    return f"{place}, {ratio:g}, {criterion}, {seed}"


def seeds(criterion: str) -> range:
    """Seeds of a criterion: several of one that draws."""
    return range(SEEDS if criterion == "random" else 1)


def fill(
    nets: Sequence[Net],
    places: Sequence[str],
    ratios: Sequence[float],
    names: Sequence[str],
    repaired: bool,
    file: Path,
    deadline: float,
) -> bool:
    """Compute the missing cells, cheapest criteria first; False if time ran out."""
    order = sorted(names, key=lambda n: (n in SLOW, names.index(n)))
    way = "least-squares" if repaired else "none"
    for net in nets:
        net.base()
        found_places = net.places()
        for place, node in ((p, found_places[p]) for p in places if p in found_places):
            for criterion, seed in ((c, s) for c in order for s in seeds(c)):
                missing = [r for r in ratios if way not in net.cache.get(key(place, r, criterion, seed), {})]
                if not missing:
                    continue
                if time.monotonic() > deadline:
                    return False
                began = time.monotonic()
                for ratio, plan in net.plans(node, missing, criterion, seed):
                    net.cache[key(place, ratio, criterion, seed)] = found = net.cell(plan, seed, repaired)
                    if criterion in SLOW and net.per_step > 1:
                        found["per_step"] = net.per_step
                    spent, began = time.monotonic() - began, time.monotonic()
                    print(f"{net.name}, {key(place, ratio, criterion, seed)}: {found} ({spent:.0f} s)", flush=True)
                    save(net, file)
    return True


def save(net: Net, file: Path) -> None:
    """Keep the cells of a network; those of others stay."""
    held = json.loads(file.read_text()) if file.exists() else {}
    held[net.held] = net.cache
    file.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")


def value(net: Net, place: str, ratio: float, criterion: str, way: str) -> float | None:
    """Mean over the seeds, None while a cell is missing."""
    cells = [net.cache.get(key(place, ratio, criterion, seed), {}).get(way) for seed in seeds(criterion)]
    return None if None in cells else statistics.mean(c for c in cells if c is not None)


def tables(nets: Sequence[Net], ratios: Sequence[float], names: Sequence[str]) -> str:
    """Markdown: for each network and place a line for each criterion; unrepaired, then repaired."""
    out = against(nets, ratios, names)
    for net in nets:
        if not filled(net, ratios, names):
            out += [f"### {net.name}", "", "Not run.", ""]
            continue
        which = " that it gets right" if net.right else ""
        words = f"Original {net.base():.2%}; filters chosen on {len(net.data):,} images{which}."
        out += [f"### {net.name}", "", words, ""]
        out += [f"![accuracy of {net.name} against pruning ratio](img/{picture(net)})", ""]
        for place, node in net.places().items():
            rows = []
            for name in names:
                cells = [value(net, place, r, name, way) for way in ("none", "least-squares") for r in ratios]
                if any(c is not None for c in cells):
                    rows.append((cells, name))
            if not rows:
                out += [f"**{place}** (`{node}`): not run." if node else f"**{place}**: not run.", ""]
                continue
            best = [max((x for c, _ in rows if (x := c[i]) is not None), default=None) for i in range(2 * len(ratios))]
            head = [f"{r:.0%}" for r in ratios] + [f"{r:.0%}, repaired" for r in ratios]
            out += [f"**{place}**" + (f" (`{node}`)" if node else ""), "", f"| criterion | {' | '.join(head)} |"]
            out.append("|---" * (len(head) + 1) + "|")
            for cells, name in rows:
                shown = [
                    "-" if c is None else f"**{100 * c:.1f}**" if c == b else f"{100 * c:.1f}"
                    for c, b in zip(cells, best, strict=True)
                ]
                out.append(f"| {name} | {' | '.join(shown)} |")
            out.append("")
            if steps := strides(net, place, ratios, names):
                out += [f"Groups removed before candidates are looked at again: {steps}.", ""]
            if gaps := missing(net, place, ratios, names):
                out += [f"Not run: {gaps}.", ""]
    return "\n".join(out)


def strides(net: Net, place: str, ratios: Sequence[float], names: Sequence[str]) -> str:
    """Which criteria removed several groups at a time at a place, and how many; empty where none did."""
    found: dict[str, set[int]] = {}
    for name in names:
        for cell in (net.cache.get(key(place, ratio, name, 0), {}) for ratio in ratios):
            if cell.get("per_step", 1) > 1:
                found.setdefault(name, set()).add(cell["per_step"])
    return ", ".join(f"{name} {'/'.join(map(str, sorted(steps)))}" for name, steps in found.items())


def missing(net: Net, place: str, ratios: Sequence[float], names: Sequence[str]) -> str:
    """What of a place was not run, in words; empty where all was."""
    out = []
    for way, said in (("none", ""), ("least-squares", ", repaired")):
        gaps: dict[tuple[float, ...], list[str]] = {}
        for name in names:
            gap = tuple(r for r in ratios if value(net, place, r, name, way) is None)
            if gap:
                gaps.setdefault(gap, []).append(name)
        for gap, found in gaps.items():
            which = "all criteria" if len(found) == len(names) else ", ".join(found)
            at = "" if len(gap) == len(ratios) else f" at {', '.join(f'{r:.0%}' for r in gap)}"
            out.append(f"{which}{at}{said}")
    return "; ".join(out)


def against(nets: Sequence[Net], ratios: Sequence[float], names: Sequence[str]) -> list[str]:
    """Markdown: CAR, the best of the others and the best baseline wherever known and nothing is repaired."""
    out = ["### CAR against the best other, nothing repaired", ""]
    out.append("| network | layer | removed | CAR | best other | CAR ahead by | best baseline | CAR ahead by |")
    out.append("|---" * 8 + "|")
    for net in nets:
        for place in net.places():
            for ratio in ratios:
                own = value(net, place, ratio, "car", "none")
                known = [(value(net, place, ratio, name, "none"), name) for name in names if name != "car"]
                others = [(accuracy, name) for accuracy, name in known if accuracy is not None]
                if own is None or not others:
                    continue
                cells = [net.name, place, f"{ratio:.0%}", f"{100 * own:.1f}"]
                for rivals in (others, [(accuracy, name) for accuracy, name in others if name not in OWN]):
                    best, name = max(rivals, default=(math.nan, "none"))
                    error = math.sqrt((own * (1 - own) + best * (1 - best)) / len(net.test))
                    cells += [f"{100 * best:.1f} ({name})", f"{100 * (own - best):+.1f} ± {100 * error:.1f}"]
                out.append(f"| {' | '.join(cells)} |")
    words = (
        "Points of top-1 on the test images, ± one standard error of two unrelated samples, an upper bound for the",
        "same images twice. The best other is the best of all criteria after the fact, which nobody could have picked;",
        f"the best baseline leaves out {' and '.join(f'`{name}`' for name in OWN)}, which are this project's.",
    )
    return [*out, "", *words, ""]


def picture(net: Net) -> str:
    """File name of a plot."""
    return f"accuracy_{net.name.lower().replace(' ', '_')}.png"


def filled(net: Net, ratios: Sequence[float], names: Sequence[str]) -> list[str]:
    """Places with anything to show."""
    return [p for p in net.places() if any(value(net, p, r, n, "none") is not None for r in ratios for n in names)]


def plot(net: Net, ratios: Sequence[float], names: Sequence[str], folder: Path) -> None:
    """A panel for each place: accuracy against ratio, unrepaired solid, repaired dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    places = filled(net, ratios, names)
    if not places:
        return
    fig, axes = plt.subplots(1, len(places), figsize=(4 * len(places), 3.6), sharey=True, squeeze=False)
    colours = plt.get_cmap("tab20")
    for ax, place in zip(axes[0], places, strict=True):
        for i, name in enumerate(names):
            for way, style in (("none", "-"), ("least-squares", "--")):
                cells = [value(net, place, r, name, way) for r in ratios]
                points = [(r, c) for r, c in zip(ratios, cells, strict=True) if c is not None]
                if points:
                    x, y = zip((0.0, net.base()), *points, strict=True)
                    label = name if way == "none" else None
                    ax.plot(x, [100 * v for v in y], style, color=colours(i % 20), label=label, linewidth=1.4)
        ax.set_title(place)
        ax.set_xlabel("filters removed")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("top-1 on test images, %")
    fig.suptitle(f"{net.name}: solid unrepaired, dashed repaired (least squares)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", fontsize=8)
    fig.tight_layout(rect=(0, 0, 1 - 0.55 / len(places) if len(places) < 3 else 0.89, 1))
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / picture(net), dpi=110)
    plt.close(fig)


def main() -> None:
    """Fill the cells, write the tables into the page and the plots beside it."""
    parser = argparse.ArgumentParser(description="Accuracy of every criterion, repaired and not.")
    parser.add_argument("--net", nargs=3, action="append", default=[], metavar=("NAME", "MODEL", "TOML"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks to compute cells of; default all")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES), metavar="PLACE")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), metavar="R")
    parser.add_argument("--criteria", nargs="+", choices=list(CRITERIA), default=list(CRITERIA), metavar="NAME")
    parser.add_argument("--unrepaired", action="store_true", help="leave out the repair; a later run adds it")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="[NAME=]N",
        help="images of a --net that filters are chosen and repairs fitted on; of all or of the one that is named",
    )
    parser.add_argument(
        "--right",
        action="append",
        default=[],
        metavar="NAME",
        help="network whose filters are chosen, and repairs fitted, on images of its data that it gets right",
    )
    parser.add_argument(
        "--per-step",
        action="append",
        default=[],
        metavar="[NAME=]K",
        help=f"groups that {', '.join(SLOW)} remove before they look again, at single layers and all; default 1",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many minutes")
    parser.add_argument("--cache", type=Path, default=ROOT / "docs" / "img" / "accuracy.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--no-page", action="store_true", help="compute only")
    args = parser.parse_args()
    limits, at_once = by_name(args.limit), by_name(args.per_step)
    nets = [Net(*DIGITS, None, args.threads)]
    for name, model, toml in args.net:
        limit, k = limits.get(name, limits.get("")), at_once.get(name, at_once.get("", 1))
        journals, right = args.cache.with_suffix(""), name in args.right
        nets.append(Net(name, Path(model), Path(toml), limit, args.threads, k, journals, right))
    held = json.loads(args.cache.read_text()) if args.cache.exists() else {}
    for net in nets:
        net.cache = held.get(net.held, {})
    asked = [net for net in nets if args.only is None or net.name in args.only]
    deadline = time.monotonic() + 60 * args.minutes
    done = fill(asked, args.places, sorted(args.ratios), args.criteria, not args.unrepaired, args.cache, deadline)
    if not args.no_page:
        write(nets, args.page)
    if not done:
        print("Time is up; the same command goes on.")


def by_name(values: Sequence[str]) -> dict[str, int]:
    """Name -> number of flags like NAME=N, "" -> that of a bare N."""
    return {name: int(number) for name, _, number in (value.rpartition("=") for value in values)}


def write(nets: Sequence[Net], page: Path) -> None:
    """The plots, and the tables in their place of the page."""
    names = list(CRITERIA)
    for net in nets:
        plot(net, RATIOS, names, page.parent / "img")
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{tables(nets, RATIOS, names)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
