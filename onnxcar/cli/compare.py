"""``onnxcar compare``: models side by side, and the gate of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcar.cli.border import GateNotMetError
from onnxcar.cli.command import Command
from onnxcar.cli.later import later_options
from onnxcar.cli.options import (
    classes_option,
    data_options,
    general_options,
    json_option,
    metric_option,
    option,
    runtime_options,
    test_data_option,
)
from onnxcar.cli.types import NUMBER, Count, Fraction
from onnxcar.cli.work import (
    check_model,
    check_outputs,
    header,
    json_target,
    need_data,
    open_provider,
    open_reported,
    terminal,
    this_command,
    write_json,
)

if TYPE_CHECKING:
    from onnxcar.comparison import Comparison, Gates

_GATES = "Gates (exit 3 where a candidate does not meet one)"


@click.command("compare", cls=Command, model="base", short_help="Models side by side; the pipeline's gate.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidates", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="CANDIDATE...")
@option(
    "--max-drop",
    section=_GATES,
    type=Fraction(low_in=True, high_in=True),
    metavar="D",
    help="The metric may be D worse than the base's.",
)
@option(
    "--min-score", section=_GATES, type=NUMBER, metavar="S", help="The metric must be at least S (a loss: at most)."
)
@option(
    "--max-latency-ratio",
    section=_GATES,
    type=Fraction(high=1000.0),
    metavar="R",
    help="Candidate's latency over the base's may be R.",
)
@data_options
@classes_option
@test_data_option
@metric_option
@json_option
@option(
    "--html",
    section="Output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write an HTML page; pictures of samples that changed are in it.",
)
@option(
    "--runs",
    section="Running",
    type=Count(0),
    metavar="N",
    help="Timed rounds at batch 1; 0: no latency.  [default: some seconds]",
)
@runtime_options
@later_options("compare")
@general_options
def command(base: Path, candidates: tuple[Path, ...], **params: Any) -> None:
    """Accuracy, agreement, per-class change, size, MACs and latency of each CANDIDATE against BASE.

    Scores are on --test-data, else on --data; without either only size and latency are compared.

    \b
    onnxcar compare model.onnx model.pruned.onnx --test-data test --preprocess imagenet --max-drop 0.01
    """  # noqa: D301 - click reads \b
    from onnxcar import report
    from onnxcar.cli.watch import Watched
    from onnxcar.comparison import Gates, compare
    from onnxcar.model import load
    from onnxcar.progress import open_meter

    for path in (base, *candidates):
        check_model(path)
    gates = Gates(params["max_drop"], params["min_score"], params["max_latency_ratio"])
    if gates.need_data:
        need_data(params, "A gate on scores (--max-drop, --min-score)")
    if gates.max_latency_ratio is not None and params["runs"] == 0:
        raise click.UsageError("--max-latency-ratio needs timed runs: leave out --runs 0.")
    paths = [base, *candidates]
    json_to = params["json"]
    json_target(json_to, paths)
    if params["html"] is not None:
        check_outputs([params["html"]], force=True, inputs=paths)
    models = {name: load(path) for name, path in zip(_names(paths), paths, strict=True)}
    provider = open_provider(params)
    first = next(iter(models.values()))
    data = open_reported(params, first)
    here = terminal()
    if data is not None:
        from onnxcar.classes import common

        every = len(data)
        data = common(models, data)
        if len(data) < every:
            here.note(f"A model has outputs for some classes only: compared on their {len(data)} samples.")
    with open_meter(here.err, "comparing", "samples", quiet=here.quiet) as meter:
        found = compare(
            models,
            None if data is None else Watched(data, meter, len(models)),
            metric=params["metric"],
            gates=gates,
            provider=provider.name,
            threads=params["threads"],
            batch_size=params["batch_size"],
            memory_bytes=params["memory"],
            runs=params["runs"],
        )
    result = {**header("compare"), **_context(params, provider.name, data), **found.to_dict()}
    write_json(result, json_to)
    if params["html"] is not None:
        found.to_html(params["html"], context=result, command=this_command())
    if json_to != "-":
        here.data(*report.comparison_tables(result))
    if result["optimistic"]:
        here.note("Scores are on --data: optimistic if filters were chosen on it. Give --test-data for honest ones.")
    rows = found.entries[0].rows
    if rows and (method := next(iter(rows.values())).method):
        here.note(f"Intervals: {method}; that of the difference on the same resamples for both.")
    _advise(found, gates)
    missed = [gate for gate in found.gates if not gate.met]
    if missed:
        raise GateNotMetError("Gate not met: " + "; ".join(_missed(gate, params["metric"]) for gate in missed) + ".")


def _context(params: dict[str, Any], provider: str, data: Any) -> dict[str, Any]:
    from onnxcar import record
    from onnxcar.runtime import n_cores

    known = {"data": record.data_entry(data), "optimistic": data is not None and params["test_data"] is None}
    return {**known, "provider": provider, "threads": params["threads"] or n_cores()}


def _names(paths: list[Path]) -> list[str]:
    """File names without suffix where that tells them apart, else paths; the same path twice is numbered."""
    for form in (lambda p: p.stem, str):
        names = [form(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" if i else str(path) for i, path in enumerate(paths)]


def _missed(gate: Any, metric: str) -> str:
    what = {
        "max-drop": f"{metric} of {gate.candidate} is {gate.measured:.4f} worse than the base's, "
        f"--max-drop allows {gate.limit:g}",
        "min-score": f"{metric} of {gate.candidate} is {gate.measured:.4f}, --min-score asks for {gate.limit:g}",
        "max-latency-ratio": f"{gate.candidate} takes {gate.measured:.3f} times as long as the base, "
        f"--max-latency-ratio allows {gate.limit:g}",
    }
    return what[gate.gate]


def _advise(found: Comparison, gates: Gates) -> None:
    here = terminal()
    base = found.entries[0]
    for entry, difference in zip(found.entries[1:], found.differences, strict=True):
        if difference.slower and entry.macs < base.macs:
            here.warn(
                f"{entry.name} has {1 - entry.macs / base.macs:.0%} fewer MACs and is SLOWER than {base.name}, "
                f"{difference.latency_ratio:.2f} times as long. Filter counts that do not fit the vector width cost "
                "more than they save: prune again with --multiple-of auto (or 8, 16)."
            )
        top1 = difference.scores.get("top1")
        if gates.max_drop is not None and top1 is not None and top1.interval is not None:
            met = all(gate.met for gate in found.gates if gate.candidate == entry.name and gate.gate == "max-drop")
            if met and -top1.interval.low > gates.max_drop:
                here.note(
                    f"--max-drop {gates.max_drop:g} is met by {entry.name}, but a drop of {-top1.interval.low:.4f} "
                    "is still within the 95 % interval: more samples would narrow it."
                )
