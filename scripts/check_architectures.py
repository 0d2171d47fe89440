"""Prune every ONNX file of some folders and hold each result against an independent judge: the tables of the docs.

    python scripts/check_architectures.py GRAPHS_FOLDER MODEL.onnx --ratio 0.3 --markdown table.md

For each file: tensors stored without values are filled (`fill_weights.py`), the network is pruned in a process of its
own, and the written file is judged twice: by `tests/oracle.py`, which looks at nothing but the two files, and by the
masked original (`onnxcar.surgery.verify`). Networks whose weights are all equal (out of ConstantOfShape) are judged by
the masked original alone: their channels cannot be told apart by value. What a row says:

    prunable    filters of Conv and ConvTranspose that may go, of those that neither are channels of an output nor go
                with an input channel by channel; in brackets, of all
    removed     filters that are gone, of those that may go
    max error   largest |difference| over the largest |reference| of any output, by whichever judge saw more
    seconds     load, analysis, choice, rewrite, save, without the masked check; in brackets CPU of analysis + rewrite
    x check     CPU seconds of analysis + rewrite over those of onnx.load + full check + onnx.save of the same file
    peak MB     of the process up to the saved file, Python and libraries included (`at rest` in the summary)
    verdict     exact; exact (mask): by the masked original alone; nothing to prune; refused; anything else is a failure
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent)]
COLUMNS = (
    "model",
    "exporter",
    "convs",
    "filters",
    "prunable",
    "removed",
    "params kept",
    "MACs kept",
    "max error",
    "seconds",
    "x check",
    "peak MB",
    "verdict",
)
GOOD = ("exact", "exact (mask)")
PASSED = (*GOOD, "nothing to prune")
REPEATS = 3
LONG_S = 1.5  # CPU seconds; what takes longer is measured once
LIMIT_S = 600
# Ops that hand an output's channels through: what they keep is kept for the output's sake.
TO_OUTPUT = ("Softmax", "LogSoftmax", "ArgMax", "Identity", "Reshape", "Flatten", "Transpose", "Sigmoid", "Cast")

Row = dict[str, Any]


# --- in a process of its own ------------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> Row:
    """Prune one file; numbers of this process alone."""
    from onnxcar.errors import ModelError, PlanError
    from onnxcar.greedy import Stop
    from onnxcar.model import load, save
    from onnxcar.rules import analyze
    from onnxcar.search import prune
    from onnxcar.surgery import verify

    norms = job["norms"]
    rest = peak_mb()
    started = time.perf_counter()
    try:
        model = load(job["source"])
        begin = time.process_time()
        space = analyze(model, norms=norms)
        analysis = time.process_time() - begin
    except ModelError as exc:
        return {"verdict": "refused", "text": str(exc).replace(f"'{job['source']}'", "").lstrip(": ")}
    row: Row = {"rest": rest, **counted(space)}
    if not row["may_go"]:
        return row | {"verdict": "nothing to prune"}
    try:
        run = prune(
            model,
            criterion=job["criterion"],
            stop=Stop(ratio=job["ratio"]),
            norms=norms,
            seed=job["seed"],
            provider="cpu",
            threads=1,
            verify=False,
        )
    except PlanError as exc:
        return row | {"verdict": "failed", "text": str(exc)}
    save(run.model, job["target"], force=True)
    row["seconds"] = time.perf_counter() - started
    row["peak"] = peak_mb()
    base, left = space.cost(()), space.cost(run.plan.groups)
    gone = run.plan.groups
    row["gone"] = sum(int(sum(g in gone for g in x.groups.tolist())) for x in space.layers if x.kind != "dense")
    row["params"], row["macs"] = left.params / max(1, base.params), left.macs / max(1, base.macs)
    try:
        row["mask_error"] = verify(space, run.plan, run.model).max_rel_error
    except ModelError as exc:
        row["mask_text"] = str(exc)
    except Exception as exc:  # a finding, whatever it is
        row["mask_failed"] = f"{type(exc).__name__}: {exc}"

    if job.get("timing", True):
        row |= timed(job, run.plan, analysis)
    return row


def timed(job: dict[str, Any], plan: Any, analysis: float) -> Row:
    """CPU seconds of analysis and rewrite, and how often those of a plain load, check and save they are."""
    from onnxcar.model import load
    from onnxcar.rules import analyze
    from onnxcar.surgery import remove

    def ours() -> float:
        fresh = load(job["source"])
        begin = time.process_time()
        remove(analyze(fresh, norms=job["norms"]), plan)
        return time.process_time() - begin

    def theirs() -> float:
        begin = time.process_time()
        plain = onnx.load(job["source"])
        onnx.checker.check_model(plain, full_check=True)
        onnx.save(plain, job["target"] + ".copy")
        return time.process_time() - begin

    repeats = 1 if analysis > LONG_S else REPEATS
    row: Row = {"rewrite": median(ours, repeats)}
    try:
        row["ratio"] = row["rewrite"] / median(theirs, repeats)
    except Exception:  # the full check refuses the original: nothing to compare with
        row["ratio"] = None
    Path(job["target"] + ".copy").unlink(missing_ok=True)
    return row


def counted(space: Any) -> Row:
    """Filters of convolutions: all, those that may go, those that are an output's or follow an input, and why."""
    layers = [x for x in space.layers if x.kind != "dense"]
    weights = {x.weight for x in layers}
    outputs = {o.name for o in space.model.proto.graph.output}
    made = {o: n for n in space.model.proto.graph.node for o in n.output}
    near = set(outputs)  # values that reach an output through ops that keep channels as they are
    for name in outputs:
        node = made.get(name)
        while node is not None and node.op_type in TO_OUTPUT:
            near.update([node.input[0], *node.output])
            node = made.get(node.input[0])
    nodes = {n.name or f"{n.op_type}_{i}": n for i, n in enumerate(space.model.proto.graph.node)}
    border, why = 0, Counter()
    for p in space.protected:
        if p.weight not in weights:
            continue
        own, cause = nodes.get(p.layer), nodes.get(p.node)
        to_output = p.op_type == "output" or any(n is not None and set(n.output) & near for n in (own, cause))
        if to_output or p.reason == "its input channels cannot go":
            border += len(p.filters)
        else:
            why[f"{p.op_type or 'value'} '{p.node}': {p.reason}"] += len(p.filters)
    return {
        "convs": len(layers),
        "filters": sum(x.filters for x in layers),
        "may_go": sum(int((x.groups >= 0).sum()) for x in layers),
        "border": border,
        "why": dict(why.most_common()),
    }


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median(measure: Callable[[], float], repeats: int) -> float:
    """Middle one of a few measurements."""
    return statistics.median(measure() for _ in range(repeats))


# --- one file ---------------------------------------------------------------------------------------------------------


def check(path: Path, options: argparse.Namespace, folder: Path) -> Row:
    """A row of the table."""
    import oracle
    from fill_weights import filled, is_empty, tensors

    proto = onnx.load(path)
    row: Row = {"model": shown_name(path), "exporter": exporter(proto)}
    source = path
    if any(is_empty(t) for _, t in tensors(proto.graph)):
        source = folder / f"{path.stem}.filled.onnx"
        if not source.exists():
            onnx.save(filled(proto, lambda m: oracle.first_run(m, options.seed)[0], options.seed), source)
    target = folder / f"{path.stem}.pruned.onnx"
    target.unlink(missing_ok=True)
    row |= in_process(source, target, options)
    if "verdict" in row:
        return row
    return row | judged(onnx.load(source), onnx.load(target), row)


def in_process(source: Path, target: Path, options: argparse.Namespace) -> Row:
    """`work` in a fresh process."""
    job = {
        "source": str(source),
        "target": str(target),
        "criterion": options.criterion,
        "ratio": options.ratio,
        "norms": options.norms,
        "seed": options.seed,
        "timing": options.timing,
    }
    line = [sys.executable, __file__, "--job", json.dumps(job)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"verdict": "failed", "text": f"took more than {LIMIT_S} seconds"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"verdict": "failed", "text": said[-1][:300]}
    answer: Row = json.loads(done.stdout.splitlines()[-1])
    return answer


def judged(original: onnx.ModelProto, pruned: onnx.ModelProto, row: Row) -> Row:
    """The verdict of both judges."""
    import oracle

    mask = row.get("mask_error")
    if "mask_failed" in row:
        return {"verdict": "differs", "text": f"from the masked original: {row['mask_failed']}"}
    if all_equal(original):
        good = mask is not None
        return {"verdict": GOOD[1] if good else "not run", "error": mask, "text": "" if good else row["mask_text"]}
    try:
        result = oracle.judge(original, pruned)
    except oracle.OriginalError as exc:
        return {"verdict": "not run", "text": str(exc)}
    found: Row = {"moved": result.moved, "text": result.text, "oracle": result.verdict, "oracle_error": result.error}
    if result.verdict == "differs" and mask is not None:
        return found | {"verdict": "differs (mask agrees)", "error": mask}
    errors = [e for e in (mask, result.error) if e is not None]
    if result.verdict == "exact" and not result.moved:
        found["text"] = "silencing moved no output"
    return found | {"verdict": result.verdict, "error": max(errors)}


def all_equal(model: onnx.ModelProto) -> bool:
    """Whether the filters of every Conv come out of ConstantOfShape."""
    made = {o: n.op_type for n in model.graph.node for o in n.output}
    weights = [n.input[1] for n in model.graph.node if n.op_type == "Conv"]
    return bool(weights) and all(made.get(w) == "ConstantOfShape" for w in weights)


def exporter(model: onnx.ModelProto) -> str:
    """Who wrote a file, and its opset."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    return f"{model.producer_name or 'unnamed'} {opset}"


# --- the table --------------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """A row as the table shows it, in the order of `COLUMNS`; what was not measured is a dash."""

    def share(part: float | None, whole: float | None) -> str:
        return "-" if part is None or not whole else f"{100 * part / whole:.1f} %"

    all_, free = row.get("filters"), row.get("may_go")
    prunable = "-"
    if all_:
        prunable = f"{share(free, all_ - row['border'])} ({share(free, all_)})"
    seconds = "-"
    if "seconds" in row:
        seconds = f"{row['seconds']:.1f}" + (f" ({row['rewrite']:.2f})" if "rewrite" in row else "")
    return [
        row["model"],
        row["exporter"],
        str(row.get("convs", "-")),
        str(all_ if all_ is not None else "-"),
        prunable,
        share(row.get("gone"), free),
        share(row.get("params"), 1),
        share(row.get("macs"), 1),
        "-" if row.get("error") is None else f"{row['error']:.0e}",
        seconds,
        "-" if row.get("ratio") is None else f"{row['ratio']:.1f}",
        "-" if "peak" not in row else f"{row['peak']:.0f}",
        row["verdict"],
    ]


def summary(rows: Sequence[Row]) -> str:
    """The table in some lines."""
    pruned = [r for r in rows if "gone" in r]
    counts = Counter(r["verdict"] for r in rows)
    exact = sum(counts[v] for v in GOOD)
    could = [r for r in rows if r.get("may_go")]
    inner = sum(r["filters"] - r["border"] for r in rows if "filters" in r)
    free = sum(r.get("may_go", 0) for r in rows)
    total = sum(r.get("filters", 0) for r in rows)
    lines = [
        f"{exact} exact of {len(could)} that have something to prune; "
        + ", ".join(f"{n} {v}" for v, n in counts.items())
    ]
    if inner:
        lines.append(
            f"prunable: {100 * free / inner:.2f} % of {inner:,} filters that do not reach an output or follow an input "
            f"({100 * free / total:.2f} % of all {total:,})"
        )
    if pruned:
        least = min(pruned, key=lambda r: r["gone"] / r["may_go"])
        lines.append(
            f"removed: {100 * sum(r['gone'] for r in pruned) / sum(r['may_go'] for r in pruned):.1f} % of the prunable "
            f"filters, least {100 * least['gone'] / least['may_go']:.1f} % ({least['model']})"
        )
        ratios = [r["ratio"] for r in pruned if r.get("ratio") is not None]
        if ratios:
            lines.append(
                f"x check: median {statistics.median(ratios):.1f}, largest {max(ratios):.1f}, "
                f"{sum(x <= 3 for x in ratios)} of {len(ratios)} within 3"
            )
        lines.append(f"peak: at most {max(r['peak'] for r in pruned):.0f} MB, at rest {pruned[0]['rest']:.0f} MB")
    return "\n".join(lines)


def markdown(rows: Sequence[Row], command: str) -> str:
    """Command, table, what was not pruned, what keeps filters, summary."""
    lines = [f"`{command}`", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    shown = [r for r in rows if r["verdict"] not in ("nothing to prune", "refused")]
    lines += ["| " + " | ".join(cells(r)) + " |" for r in shown]
    for verdict in ("nothing to prune", "refused"):
        rest = [r for r in rows if r["verdict"] == verdict]
        if rest:
            names = [f"`{r['model']}`" + (f" ({r['text']})" if r.get("text") else "") for r in rest]
            lines += ["", f"{verdict.capitalize()}: {', '.join(names)}."]
    kept = [(r["model"], n, text) for r in rows for text, n in r.get("why", {}).items()]
    if kept:
        lines += ["", "Kept inside the network:", ""]
        lines += [f"- `{m}`: {n} filters, {text}" for m, n, text in sorted(kept, key=lambda k: -k[1])[:30]]
    notes = [f"- `{r['model']}`: {r['text']}" for r in shown if r.get("text")]
    if notes:
        lines += ["", "Notes:", "", *notes]
    return "\n".join([*lines, "", *(f"- {x}" for x in summary(rows).splitlines()), ""])


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the rows depend on."""
    return {name: getattr(options, name) for name in ("ratio", "criterion", "norms", "seed")}


def resumed(options: argparse.Namespace) -> tuple[list[Row], set[str]]:
    """Rows of an earlier run with the same settings, and the models they are of."""
    if options.json is None or not options.json.exists():
        return [], set()
    held = json.loads(options.json.read_text())
    if held["options"] != settings(options):
        sys.exit(f"error: {options.json} holds rows of {held['options']}. Name another file.")
    return held["rows"], {r["model"] for r in held["rows"]}


def shown_name(path: Path) -> str:
    """Name of a file in the table."""
    return path.name.removesuffix(".onnx").removesuffix(".skel")


def main() -> int:
    """Check every file; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, metavar="DIR_OR_FILE")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--criterion", choices=("l1", "l2", "outgoing", "random"), default="l2")
    parser.add_argument("--norms", choices=("protect", "rewrite"), default="protect")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="files whose name contains it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, and go on from them")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep filled and pruned files here, and reuse the filled"
    )
    parser.add_argument("--no-timing", dest="timing", action="store_false", help="leave out the columns of CPU time")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(json.loads(options.job))))
        return 0
    files = [f for p in options.paths for f in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]
    files = [f for f in files if options.only in f.name]
    rows, done = resumed(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            if shown_name(path) in done:
                continue
            try:
                rows.append(check(path, options, folder))
            except Exception as exc:
                row = {"model": path.stem, "exporter": "-", "verdict": "failed", "text": f"{type(exc).__name__}: {exc}"}
                rows.append(row)
            print("  ".join(cells(rows[-1])) + (f"  {rows[-1]['text']}" if rows[-1].get("text") else ""), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"options": settings(options), "rows": rows}, indent=1))
            if options.work is None:
                for made in folder.glob(f"{path.stem}.*"):
                    made.unlink()
    print("\n" + summary(rows))
    command = f"python scripts/check_architectures.py FOLDERS --ratio {options.ratio:g} --criterion {options.criterion}"
    command += f" --norms {options.norms}" if options.norms != "protect" else ""
    if options.markdown:
        options.markdown.write_text(markdown(rows, command))
    return int(any(r["verdict"] not in (*PASSED, "refused", "not run", "untouched") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
