"""One greedy path, a model at each of some sizes: accuracy against MACs as a table and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxcar
from onnxcar import record as records
from onnxcar.errors import OutputError, PlanError
from onnxcar.greedy import prefixes, shorten
from onnxcar.model import Model
from onnxcar.pruning import Pruning
from onnxcar.search import Run
from onnxcar.steps import Path as GreedyPath
from onnxcar.steps import Stop

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

__all__ = ["Point", "Sweep", "sweep"]

COLUMNS = ("fraction", "reached", "macs", "params", "filters", "value", "test_value", "path")


@dataclass(frozen=True, eq=False)
class Point:
    """One size.

    Attributes:
        fraction: Of the original's MACs that was asked for.
        run: The first model of the path at or below it; None where the search ended before.
    """

    fraction: float
    run: Run | None


@dataclass(frozen=True, eq=False)
class Sweep:
    """Models of one path.

    Attributes:
        task: What was asked for.
        points: From the largest model to the smallest.
        stopped: What ended the path.
    """

    task: Pruning
    points: tuple[Point, ...]
    stopped: str

    def to_dict(self, paths: Sequence[Path | None] = ()) -> dict[str, Any]:
        """The table as JSON types; the original is the first row.

        Args:
            paths: Where the model of each point lies.
        """
        space = self.task.space
        base, test = self.task.base, self.task.test_base
        cost = space.cost(())
        counted = [layer.index for layer in space.layers if layer.kind != "dense"]
        filters = sum(space.layers[index].filters for index in counted)
        rows: list[dict[str, Any]] = [
            {
                "fraction": 1.0,
                "reached": 1.0,
                "macs": cost.macs,
                "params": cost.params,
                "filters": filters,
                "value": None if base is None else base.value,
                "test_value": None if test is None else test.value,
                "path": None if space.model.path is None else str(space.model.path),
            }
        ]
        for point, path in zip(self.points, list(paths) or [None] * len(self.points), strict=True):
            if point.run is None:
                rows.append({name: None for name in COLUMNS} | {"fraction": point.fraction})
                continue
            found = point.run.record
            left = self.task.keep.filters(point.run.plan.groups)
            rows.append(
                {
                    "fraction": point.fraction,
                    "reached": found["result"]["macs"] / cost.macs,
                    "macs": found["result"]["macs"],
                    "params": found["result"]["params"],
                    "filters": sum(left[index] for index in counted),
                    "value": None if found["final"] is None else found["final"]["value"],
                    "test_value": None if found["test_final"] is None else found["test_final"]["value"],
                    "path": None if path is None else str(path),
                }
            )
        return {
            "onnxcar": onnxcar.__version__,
            "schema": records.SCHEMA,
            "command": "sweep",
            "model": records.model_entry(space.model.path, space.model.sha256, cost, space.model.n_bytes),
            "data": records.data_entry(self.task.data),
            "test_data": records.data_entry(self.task.test_data),
            "metric": self.task.metric,
            "criterion": self.task.criterion.name,
            "recover": self.task.finisher.recover,
            "arguments": self.task.arguments,
            "stopped": self.stopped,
            "points": rows,
        }

    def to_csv(self, paths: Sequence[Path | None] = ()) -> str:
        """One line a model, the original first."""
        stream = io.StringIO()
        out = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(self.to_dict(paths)["points"])
        return stream.getvalue()

    def draw(self, path: Path) -> None:
        """The metric against MACs, as a PNG or SVG by the name of the file.

        Raises:
            OutputError: It cannot be written.
        """
        from matplotlib.figure import Figure

        rows = [row for row in self.to_dict()["points"] if row["reached"] is not None]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for key, label, marker in (("value", "data filters were chosen on", "o--"), ("test_value", "test data", "s-")):
            known = [(row["reached"], row[key]) for row in rows if row[key] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker, label=label)
        axes.set_xlabel("MACs, fraction of the original's")
        axes.set_ylabel(self.task.metric)
        axes.set_title(f"{self.task.criterion.name}, recovery: {self.task.finisher.recover}")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        try:
            # No date and no random ids in the file: the same run draws the same bytes.
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as exc:
            raise OutputError(f"Cannot write {path}: {exc.strerror or exc}. Name a file elsewhere.", path=path) from exc


def sweep(
    model: Model,
    data: Dataset | None,
    fractions: Sequence[float],
    *,
    stop: Stop | None = None,
    journal: str | Path | None = None,
    progress: Report | None = None,
    **options: Any,
) -> Sweep:
    """One greedy path down to the smallest fraction, and the first model of it at or below each.

    Args:
        model: The network.
        data: Validation samples.
        fractions: Of the original's MACs, each in (0, 1).
        stop: Further rules: what bites first ends the path, and the points beyond it stay empty.
        journal: As `search.prune`.
        progress: Told how far the search is.
        options: As `search.prune`, but for `plan` and `guarantee`. With `recover` every point is recovered.

    Raises:
        PlanError: A fraction is out of its range, or there is none.
    """
    wanted = sorted(set(fractions), reverse=True)
    if not wanted or not all(0 < f < 1 for f in wanted):
        raise PlanError(
            f"The sweep's fractions are {list(fractions)}, and must lie between 0 and 1: 0.9, 0.7, 0.5.", field="sweep"
        )
    rule = replace(stop or Stop(), target_macs=wanted[-1])
    task = Pruning.of(model, data, stop=rule, **options)
    task.arguments["sweep"] = wanted
    path = task.search(journal, progress)
    sets = prefixes(path, task.keep)
    macs = task.space.cost(()).macs
    points = []
    for fraction in wanted:
        groups = next((s for s in sets if task.space.cost(s).macs <= fraction * macs), None)
        points.append(
            Point(fraction, None if groups is None else _run(task, path, groups, fraction, journal, progress))
        )
    return Sweep(task, tuple(points), path.stopped)


def _run(
    task: Pruning,
    path: GreedyPath,
    groups: frozenset[int],
    fraction: float,
    journal: str | Path | None,
    progress: Report | None,
) -> Run:
    finished = task.finisher.make(groups, progress=progress)
    part = shorten(task.space, path, groups)
    stopped = path.stopped if groups == path.groups else "target_macs"
    part = replace(part, stopped=stopped)
    record = task.record(finished, part, sweep={"fraction": fraction})
    return Run(task.space, finished.model, finished.plan, record, part, None if journal is None else Path(journal))
