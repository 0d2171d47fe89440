"""How much of each layer can go: the score of the network with a part of one layer removed, all others whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcar import record as records
from onnxcar.channels import ChannelSpace
from onnxcar.errors import OutputError, PlanError
from onnxcar.importances import importance
from onnxcar.model import Model
from onnxcar.rules import analyze
from onnxcar.scope import Field, Keep, fields, select_layers
from onnxcar.scoring import Score, Scorer

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

__all__ = ["RATIOS", "Curve", "Point", "Sensitivity", "sensitivity"]

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = ("layer", "filters", "ratio", "removed", "value", "drop", "correct", "macs")
LINES = 12  # layers with a colour of their own in the plot


@dataclass(frozen=True, eq=False)
class Point:
    """One layer at one ratio.

    Attributes:
        ratio: What was asked for.
        groups: What is gone: the least important groups of the layer.
        removed: Filters of the layer that are gone; fewer than asked for where no more may go.
        score: Of the network without them.
        macs: Of that network.
    """

    ratio: float
    groups: frozenset[int]
    removed: int
    score: Score
    macs: int


@dataclass(frozen=True, eq=False)
class Curve:
    """One layer at all ratios; groups that span several layers count for the first of them."""

    layer: str
    filters: int
    points: tuple[Point, ...]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """All layers.

    Attributes:
        space: Structure of the network.
        criterion: Who ranked the groups.
        base: Score of the whole network.
        curves: By layer, in graph order.
    """

    space: ChannelSpace
    criterion: str
    base: Score
    curves: tuple[Curve, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One for each layer and ratio, keys `COLUMNS`."""
        return [
            {
                "layer": curve.layer,
                "filters": curve.filters,
                "ratio": point.ratio,
                "removed": point.removed,
                "value": point.score.value,
                "drop": self.base.reduction(point.score),
                "correct": point.score.correct,
                "macs": point.macs,
            }
            for curve in self.curves
            for point in curve.points
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        by_layer: dict[str, dict[str, Any]] = {}
        for row in self.rows():
            entry = by_layer.setdefault(row["layer"], {"layer": row["layer"], "filters": row["filters"], "points": []})
            entry["points"].append({key: row[key] for key in COLUMNS[2:]})
        return {
            "criterion": self.criterion,
            "base": records.score_entry(self.base),
            "layers": list(by_layer.values()),
        }

    def to_csv(self) -> str:
        """One line for each layer and ratio."""
        stream = io.StringIO()
        out = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(self.rows())
        return stream.getvalue()

    def draw(self, path: Path) -> None:
        """The metric against the ratio, a line a layer; the most sensitive ones in colour. PNG or SVG by the name.

        Raises:
            OutputError: It cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        worst = sorted(self.curves, key=lambda c: -sum(self.base.reduction(p.score) for p in c.points))[:LINES]
        for curve in self.curves:
            x = [0.0, *(point.removed / curve.filters for point in curve.points)]
            y = [self.base.value, *(point.score.value for point in curve.points)]
            if any(curve is other for other in worst):
                axes.plot(x, y, "o-", markersize=3, label=curve.layer)
            else:
                axes.plot(x, y, color="0.75", linewidth=0.8, zorder=1)
        axes.set_xlabel("filters of the layer removed")
        axes.set_ylabel(self.base.metric)
        axes.set_title(f"One layer at a time, lowest {self.criterion} first")
        axes.grid(alpha=0.3)
        if self.curves:
            axes.legend(fontsize="small", title=f"most sensitive of {len(self.curves)}")
        try:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as exc:
            raise OutputError(f"Cannot write the plot {path}: {exc}. Name a .png or .svg file.", path=path) from exc


def sensitivity(
    model: Model,
    data: Dataset,
    *,
    criterion: str = "car",
    metric: str = "top1",
    ratios: Sequence[float] = RATIOS,
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    norms: str = "protect",
    seed: int = 0,
    provider: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    progress: Report | None = None,
) -> Sensitivity:
    """The score of the network with the least important filters of one layer removed, for every layer and ratio.

    One ranking is made of the whole network. Costs one pass over the data for each layer and ratio, besides the
    ranking.

    Args:
        model: The network.
        data: Samples.
        criterion: A name of `criteria.CRITERIA`.
        metric: What is measured.
        ratios: Fractions of a layer's filters, each in (0, 1).
        layers: Patterns of node or weight names; default all convolutions.
        exclude: Patterns of layers to leave out.
        norms: As `analyze`.
        seed: Of everything random.
        provider: Execution provider.
        threads: Threads of a session, default all cores.
        batch_size: Samples of an inference call.
        memory_bytes: Bound on the activations held at once.
        progress: Told how far the work is, in networks.

    Raises:
        PlanError: A ratio is out of its range, no such criterion, or a pattern matches nothing.
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise PlanError(f"Ratios are {list(ratios)}, and must lie between 0 and 1: 0.1 to 0.9.", field="ratios")
    space = analyze(model, norms=norms)
    on: dict[str, Any] = {
        "provider": provider,
        "threads": threads,
        "batch_size": batch_size,
        "memory_bytes": memory_bytes,
    }
    searched = fields(space, select_layers(space, layers, exclude), exclude, "layer")
    ranked = importance(
        space, data, criterion=criterion, metric=metric, layers=layers, exclude=exclude, seed=seed, **on
    )
    keys: dict[int, tuple[float, int, int]] = {}
    for i, group in enumerate(ranked.groups):
        loss = (
            0 if ranked.scores is None else ranked.scores[i].loss_units
        )  # of equal counts the smaller loss goes first
        keys[group] = (float(ranked.values[i]), loss, group)
    scorer, keep = Scorer(space, data, metric=metric, **on), Keep(space)
    total, done, curves = len(searched) * len(ratios), 0, []
    for field in searched:
        order = sorted(field.groups, key=keys.__getitem__)
        points = []
        for ratio in sorted(ratios):
            if progress is not None:
                progress.update(done, total, f"{field.name} at {ratio:g}")
            gone, removed = _lowest(field, order, ratio, keep)
            points.append(Point(ratio, gone, removed, scorer.base(gone), space.cost(gone).macs))
            done += 1
        curves.append(Curve(field.name, field.filters, tuple(points)))
    return Sensitivity(space, ranked.criterion, scorer.base(()), tuple(curves))


def _lowest(field: Field, order: Sequence[int], ratio: float, keep: Keep) -> tuple[frozenset[int], int]:
    """The first groups in order that take so many of the layer's filters, and how many they take."""
    gone: set[int] = set()
    removed = 0
    for group in order:
        if removed >= field.wanted(ratio):
            break
        if keep.allowed([group], gone):
            gone.add(group)
            removed += field.counts[group]
    return frozenset(gone), removed
