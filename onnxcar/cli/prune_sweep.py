"""``prune --sweep``: one search, a model at each of some sizes, a table and a plot; and how any search is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from onnxcar.cli.border import InterruptedRunError
from onnxcar.cli.prune_result import WHY_STOPPED, Paths, write_classes
from onnxcar.cli.work import check_outputs, json_target, terminal, write_json, write_text
from onnxcar.errors import OnnxcarError

__all__ = ["searched", "sweep_models"]

T = TypeVar("T")


def searched(function: Callable[..., T], journal: Path | None, *args: Any, **arguments: Any) -> T:
    """What the function finds, its progress shown; an interruption says how to go on."""
    from onnxcar.progress import open_meter

    here = terminal()
    there = journal is not None and journal.exists()
    if there:
        here.note(f"Going on from {journal}.")
    meter = open_meter(here.err, "pruning", "evaluations", quiet=here.quiet)
    try:
        with meter:
            return function(*args, journal=journal, progress=meter, **arguments)
    except OnnxcarError:
        if journal is not None and not there:
            _forget(journal)
        raise
    except KeyboardInterrupt as exc:
        raise InterruptedRunError(_how_to_go_on(meter.text, journal)) from exc


def _forget(journal: Path) -> None:
    """Remove the journal of a run that failed before it chose anything: it would only stand in the next one's way."""
    try:
        with journal.open(encoding="utf-8") as lines:
            chose = any('"lowest"' in line for line in lines)
        if not chose:
            journal.unlink()
    except OSError:
        pass


def _how_to_go_on(text: str, journal: Path | None) -> str:
    where = f" ({text})" if text else ""
    if journal is not None and journal.exists():
        return f"Interrupted{where}; no model was written. Start the same command again to go on from {journal}."
    return f"Interrupted{where}; no file was written. Start the same command again to begin anew."


def sweep_models(params: dict[str, Any], paths: Paths, opened: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Search once, write a model and a record for each fraction, then the table and the plot."""
    from onnxcar import record, report, search
    from onnxcar.sweep import sweep

    fractions = sorted(set(params["sweep"]), reverse=True)
    models = [paths.out.with_suffix(f".macs{fraction:g}{paths.out.suffix}") for fraction in fractions]
    tables = {kind: paths.out.with_suffix(f".sweep.{kind}") for kind in ("csv", "json", "png")}
    wanted = [*models, *(model.with_suffix(".json") for model in models), *tables.values()]
    if params["drop_outputs"]:
        wanted.append(paths.classes)
    check_outputs(wanted, force=params["force"], inputs=[paths.model])
    if paths.journal is not None:
        check_outputs([paths.journal], force=True, inputs=[paths.model, *wanted])
    json_target(params["json"], [paths.model, *wanted])
    found = searched(sweep, paths.journal, fractions=fractions, **opened(params))
    written: list[Path | None] = []
    for point, path in zip(found.points, models, strict=True):
        if point.run is not None:
            search.write(point.run, path, force=params["force"])
        written.append(None if point.run is None else path)
    table = found.to_dict(written)
    write_text(found.to_csv(written), tables["csv"])
    record.write(table, tables["json"], force=True)
    found.draw(tables["png"])
    if params["drop_outputs"] and found.task.kept is not None:
        write_classes(found.task.kept.to_json(), paths.classes)
    write_json(table, params["json"])
    if paths.journal is not None and params["journal"] is None and found.stopped != "time_limit":
        paths.journal.unlink(missing_ok=True)
    here = terminal()
    if params["json"] != "-":
        here.data(report.sweep_table(table))
    for point in found.points:
        if point.run is None:
            here.warn(
                f"No model at {point.fraction:g} of the MACs: {WHY_STOPPED.get(found.stopped, found.stopped)}."
                + (" --scope global reaches further than layer by layer." if params["scope"] == "layer" else "")
            )
    if table["test_data"] is None and table["data"] is not None:
        here.note("The scores are optimistic: filters were chosen on the same data. Give --test-data for honest ones.")
    if params["drop_outputs"]:
        here.note(f"Classes {paths.classes}: which row of the models' outputs is which", command=True)
    here.note(f"Table   {tables['csv']}, {tables['json']}\nPlot    {tables['png']}", command=True)
