"""What `prune` leaves behind: where the files go, the tables, what to doubt and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnxcar.cli.border import GateNotMetError
from onnxcar.cli.work import check_outputs, json_target, terminal, write_json, write_text
from onnxcar.progress import duration

if TYPE_CHECKING:
    from onnxcar.search import Run

__all__ = ["WHY_STOPPED", "Paths", "advise", "quoted", "show", "write_classes", "write_plan", "write_run"]

# Flags that the suggested `compare` repeats where they were typed; those of a config are found again.
_REPEAT = (
    "preprocess",
    "size",
    "crop_pct",
    "interpolation",
    "mean",
    "std",
    "channels",
    "layout",
    "label_offset",
    "classes",
    "metric",
)


@dataclass(frozen=True)
class Paths:
    """Where everything goes."""

    model: Path
    out: Path
    record: Path
    plan: Path
    journal: Path | None

    @property
    def classes(self) -> Path:
        """Which row is which class, where rows are dropped."""
        return self.out.with_suffix(".classes.txt")

    @classmethod
    def of(cls, params: dict[str, Any]) -> Paths:
        """Where the flags put everything."""
        model = params["model"]
        out = params["output"] or model.with_name(f"{model.stem}.pruned.onnx")
        plan = out if out.suffix == ".json" else out.with_suffix(".plan.json")
        journal = params["journal"]
        if journal is None and params["data"] is not None and params["plan"] is None:
            journal = out.with_suffix(".journal.jsonl")  # without data nothing takes long enough to be kept
        return cls(model, out, out.with_suffix(".json"), plan, journal)

    def check(self, params: dict[str, Any]) -> None:
        """Refuse what could not be written, before hours are spent on it."""
        read = [path for path in (self.model, params["plan"]) if path is not None]
        wanted = [self.plan] if params["dry_run"] else [self.out, self.record]
        if params["drop_outputs"] and not params["dry_run"]:
            wanted.append(self.classes)
        if len({path.absolute() for path in wanted}) < len(wanted):
            raise click.UsageError(f"{self.out} is also the name of the record. Give OUT the suffix .onnx.")
        check_outputs(wanted, force=params["force"], inputs=read)
        if self.journal is not None:
            check_outputs([self.journal], force=True, inputs=[*read, *wanted])
        json_target(params["json"], [*read, *wanted[:1], *([self.journal] if self.journal else [])])


def write_plan(run: Run, path: Path, params: dict[str, Any]) -> None:
    """Write what a dry run would remove."""
    from onnxcar import record

    plan = {"schema": record.SCHEMA, "model_sha256": run.record["model"]["sha256"], "removed": run.record["removed"]}
    record.write(plan, path, force=params["force"])
    write_json(run.record, params["json"])
    n = sum(len(filters) for filters in plan["removed"].values())
    here = terminal()
    if params["json"] != "-":
        here.data(f"{path}  {n} filters to remove; no model was written.")
    here.note(f"Next: onnxcar prune {quoted(params['model'])} --plan {quoted(path)}", command=True)


def write_run(run: Run, paths: Paths, params: dict[str, Any]) -> dict[str, Any]:
    """Write model, record and JSON; the journal goes, unless the search can go on or it was asked for by name."""
    from onnxcar.search import write

    written = write(run, paths.out, record=paths.record, force=params["force"])
    if params["json"] is not None and not _names(params["json"], paths.record):
        write_json(written, params["json"])
    if paths.journal is not None and params["journal"] is None and run.stopped != "time_limit":
        paths.journal.unlink(missing_ok=True)
    if params["drop_outputs"]:
        write_classes(written["classes"], paths.classes)
    return written


def write_classes(kept: Mapping[str, Any], path: Path) -> None:
    """Write which output row is which class, one a line: names, else the labels they had."""
    names = kept["names"] or [str(label) for label in kept["outputs"]]
    write_text("".join(f"{name}\n" for name in names), path)


def _names(json_to: str, path: Path) -> bool:
    return json_to != "-" and Path(json_to).absolute() == path.absolute()


def show(run: Run, record: dict[str, Any]) -> None:
    """Filters of each layer, then the network before and after, on stdout."""
    from onnxcar import report

    removed = record["removed"]
    layers = [
        {
            "node": x.node,
            "kind": x.kind,
            "before": x.filters,
            "after": x.filters - len(removed.get(x.weight, ())),
        }
        for x in run.space.layers
    ]
    terminal().data(*report.prune_tables(record, layers))


WHY_STOPPED = {
    "ratio": "the ratio is reached",
    "max_drop": "the next step would cost more than --max-drop",
    "target_macs": "--target-macs is reached",
    "target_params": "--target-params is reached",
    "target_latency": "--target-latency is reached, or was measured as often as it makes sense",
    "steps": "--steps are done",
    "time_limit": "--time-limit is over",
    "guarantee": "a model pruned further does not pass the test of --guarantee",
    "nothing left": "nothing else may go",
    "plan": "as the plan says",
}


def advise(record: dict[str, Any], params: dict[str, Any], paths: Paths) -> None:
    """Where things are, what to doubt, what to do next."""
    here = terminal()
    n_steps = len({step["step"] for step in record["steps"]})
    why = WHY_STOPPED.get(record["stopped"], record["stopped"])
    here.note(f"{n_steps} steps in {duration(record['seconds'])} on {record['provider']}; stopped: {why}.")
    if record["precision_check"] is not None:
        from onnxcar.scoring import Agreement

        here.note(str(Agreement(**record["precision_check"])))
    verified = record["verify"]
    if verified is None:
        here.warn("Not verified (--no-verify): nothing says that the compact model equals the masked original.")
    else:
        error = verified["max_abs_error"]
        within = f", largest difference {error:.0e}" if error else ", to the last bit"
        here.note(f"Verified on {verified['samples']} samples: output = masked original{within}.")
    _say_recovery(record)
    _say_promise(record)
    _say_latency(record)
    if not record["removed"]:
        here.warn(_nothing_removed(record))
    else:
        _say_widths(record)
    if record["base"] is not None and record["optimistic"]:
        here.note("The scores are optimistic: filters were chosen on the same data. Give --test-data for honest ones.")
    if record["classes"] is not None:
        rows = f"; its rows are those of {paths.classes}" if record["classes"]["dropped"] else ""
        here.note(f"Specialised: {len(record['classes']['outputs'])} classes count, among themselves{rows}.")
    here.note(f"Model   {paths.out}\nRecord  {paths.record}", command=True)
    if record["stopped"] == "time_limit":
        _say_remaining(record)
        here.note(f"Journal {paths.journal}\nThe same command with --force goes on from there.", command=True)
    here.note(f"Next: {_compare_command(params, paths, scored=record['base'] is not None)}", command=True)
    if record["guarantee"] is None:
        _hold_gate(record, params["max_drop"])


def _say_widths(record: dict[str, Any]) -> None:
    """Where ``--multiple-of auto`` took less than the vector width."""
    from onnxcar.scope import vector_width

    if record["width"] is None:
        return
    asked, found = vector_width(record["provider"]), min([record["width"], *record["widths"].values()])
    if found < asked:
        why = "as else next to nothing could go" if record["widths"] else "as the target cannot be met otherwise"
        terminal().note(
            f"Counts are multiples of {found}, less than the {asked} that the processor takes at once, {why}: the time "
            "falls less than the MACs."
        )


def _say_remaining(record: dict[str, Any]) -> None:
    found = record["remaining"]
    if found is not None:
        took = "" if found["seconds"] is None else f", {duration(found['seconds'])} at the pace so far"
        terminal().note(f"Not looked at for want of time: about {found['evaluations']} candidates{took}.")


_BETTER = ", and --recover least-squares does more."


def _say_recovery(record: dict[str, Any]) -> None:
    found = record["recovery"]
    if found is None:
        return
    refitted = sum(layer["method"] != "kept" for layer in found["layers"])
    if found["kept"]:
        terminal().warn(
            f"Recovery ({found['method']}) on {found['samples']} samples brought the outputs no nearer to the "
            f"original's on held-back ones ({found['before']:.3g} of their variance away), so all weights stayed as "
            "they were. More calibration images may help" + ("." if found["method"] == "least-squares" else _BETTER)
        )
    else:
        terminal().note(
            f"Recovered ({found['method']}) on {found['samples']} samples: {refitted} of {len(found['layers'])} layers "
            f"changed; distance of the outputs to the original's on held-back samples {found['before']:.3g} -> "
            f"{found['after']:.3g}."
        )
    if record["stopped"] == "max_drop" and not record["arguments"].get("recover_every"):
        terminal().note(
            "The search stopped at --max-drop of the network without recovery. --recover-every 16 lets it see the "
            "recovered one and go further."
        )


def _say_latency(record: dict[str, Any]) -> None:
    found = record["latency"]
    if found is None:
        return
    low, high = found["interval"]
    text = (
        f"Latency {found['measured']:.2f} of the original's [{low:.2f}, {high:.2f}], predicted "
        f"{found['predicted']:.2f}, target {found['target']:g}"
    )
    if found["met"]:
        terminal().note(f"{text}.")
        return
    further = {
        "max_drop": "Allow a larger --max-drop, or recover.",
        "nothing left": f"Nothing else may go: ask for more than {found['measured']:.2f}, let --dense or fewer "
        "--min-filters add to it, or --multiple-of 1.",
    }
    usual = "What was measured may be noise on a busy machine; else ask for a little less."
    terminal().warn(f"{text}: not reached. {further.get(record['stopped'], usual)}")


def _say_promise(record: dict[str, Any]) -> None:
    found = record["guarantee"]
    if found is None:
        return
    held, passed = found["split"]["held"]["samples"], [test for test in found["tests"] if test["passed"]]
    limit = f"a drop below {found['max_drop']:g} with confidence {found['confidence']:g}"
    if not found["tests"]:
        return  # nothing was removed, which is said
    if not passed:
        terminal().warn(
            f"No model of the path passed the test for {limit} on {held} untouched images. Give more images, allow a "
            "larger --max-drop, or ask for less confidence."
        )
        return
    last = passed[-1]
    terminal().note(
        f"Guaranteed: {limit}, for data like --data. On {held} untouched images the drop is {last['drop']:.4f} "
        f"({last['lost']} lost, {last['won']} won), p = {last['p']:.2g}; {len(found['tests'])} models were tested."
    )


def _hold_gate(record: dict[str, Any], max_drop: float | None) -> None:
    """A search stops in time; a plan may not, and test data were never asked.

    Raises:
        GateNotMetError: The compact model is worse on ``--data`` than ``--max-drop`` allows.
    """
    if max_drop is None:
        return
    from onnxcar.metrics import metric

    sign = 1 if metric(record["metric"]).larger_is_better else -1
    for first, last, where in (("test_base", "test_final", "--test-data"), ("base", "final", "--data")):
        if record[first] is None or record[last] is None:
            continue
        drop = sign * (record[first]["value"] - record[last]["value"])
        if drop <= max_drop + 1e-9:
            continue
        text = f"{record['metric']} on {where} is {drop:.4f} worse than the original's, --max-drop allows {max_drop:g}"
        if where == "--data":
            raise GateNotMetError(f"Gate not met: {text}.")
        terminal().warn(f"{text}: the limit is held on --data only. Choose on more data, or allow less.")


def _nothing_removed(record: dict[str, Any]) -> str:
    if record["stopped"] == "guarantee":
        return "Nothing was removed: OUT equals the original."
    if record["stopped"] == "max_drop":
        return (
            "Nothing was removed: the first step would cost more than --max-drop allows"
            + (" or was given back for --multiple-of" if record["given_back"] else "")
            + ". Allow a larger drop, or more filters to choose from with --scope global."
        )
    if given_back := len(record["given_back"]):
        return (
            f"Nothing was removed: {given_back} removals were given back for --multiple-of, as no layer had lost "
            "enough to reach the next multiple. Search longer, or take --multiple-of 1."
        )
    return "Nothing was removed: OUT equals the original. `onnxcar inspect` says what can go."


def _compare_command(params: dict[str, Any], paths: Paths, *, scored: bool) -> str:
    """What to run next; data without labels tell nothing there."""
    words = ["onnxcar", "compare", str(paths.model), str(paths.out)]
    ctx = click.get_current_context()
    data = ("test_data",) if params["test_data"] else ("data",) if scored else ()
    for key in (*data, *(_REPEAT if data else ())):
        value = params[key]
        if value is not None and ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE:
            text = ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", text]
    return shlex.join(words)


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
