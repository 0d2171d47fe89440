"""Finished results as tables for a terminal. Plain data in, rich tables out; nothing is computed here but percentages.

Every function takes the JSON-like mapping that ``--json`` writes, so a table and a file cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

__all__ = [
    "comparison_tables",
    "count",
    "doctor_tables",
    "evaluation_table",
    "group_table",
    "layer_table",
    "per_class_table",
    "percent_change",
    "protected_table",
    "prune_tables",
    "score_table",
    "sensitivity_table",
    "size",
    "sweep_table",
    "value",
]

_SHOWN_CLASSES = 10
Json = Mapping[str, Any]


def count(number: float | None) -> str:
    """A count with three digits and a letter.

    >>> count(999), count(41_300_000), count(270_896), count(None)
    ('999', '41.3 M', '271 k', '-')
    """
    if number is None:
        return "-"
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power * 0.9995:
            scaled = number / power
            digits = max(0, 2 - len(str(int(abs(scaled)))) + 1)
            return f"{scaled:.{digits}f} {letter}"
    return f"{number:.0f}"


def size(n_bytes: float | None) -> str:
    """Bytes as kB, MB, GB (powers of 1,000).

    >>> size(1_102_345), size(12)
    ('1.10 MB', '12 B')
    """
    text = count(n_bytes)
    return text if n_bytes is None else f"{text}{'' if ' ' in text else ' '}B"


def value(number: float | None) -> str:
    """A metric's value; four digits carry more than any data set of this size does."""
    return "-" if number is None else f"{number:.4f}"


def signed(number: float | None) -> str:
    """A difference with its sign."""
    return "-" if number is None else f"{number:+.4f}"


def percent_change(before: float | None, after: float | None) -> str:
    """How much smaller or larger, e.g. ``-48.1%``."""
    if not before or after is None:
        return "-"
    return f"{after / before - 1:+.1%}"


def interval(pair: Sequence[float] | None, form: str = ".4f") -> str:
    """An interval as ``[low, high]``."""
    return "" if pair is None else f"[{pair[0]:{form}}, {pair[1]:{form}}]"


def _table(*columns: str, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns are text that folds, the others numbers that do not."""
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    for i, name in enumerate(columns):
        if i < left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def layer_table(result: Json) -> Table:
    """Layers of ``inspect``."""
    table = _table("layer", "op", "filters", "prunable", "groups", "params", "MACs", left=2)
    for layer in result["layers"]:
        table.add_row(
            layer["node"],
            layer["op"] if layer["kind"] != "depthwise" else f"{layer['op']} (depthwise)",
            str(layer["filters"]),
            Text(str(layer["prunable"]), style="" if layer["prunable"] else "yellow"),
            str(layer["groups"]),
            count(layer["params"]),
            count(layer["macs"]),
        )
    table.add_section()
    total = result["filters"]
    table.add_row(
        "total",
        "",
        str(sum(layer["filters"] for layer in result["layers"])),
        str(sum(layer["prunable"] for layer in result["layers"])),
        str(total["groups"]),
        count(result["model"]["params"]),
        count(result["model"]["macs"]),
        style="bold",
    )
    return table


def protected_table(result: Json) -> Table:
    """What cannot go, and why, in words."""
    table = _table("protected layer", "filters", "kept by", "because", left=4)
    for entry in result["protected"]:
        table.add_row(entry["layer"], _filters(entry["filters"], entry["of"]), entry["node"] or "-", entry["reason"])
    return table


def _filters(indices: Sequence[int], of: int) -> str:
    return f"all {len(indices)}" if len(indices) == of else f"{len(indices)} ({ranges(indices)})"


def ranges(indices: Iterable[int]) -> str:
    """Ascending indices, runs joined, long lists cut.

    >>> ranges([0, 1, 2, 7, 9, 10])
    '0-2, 7, 9-10'
    """
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]]
    return ", ".join([*shown, "..."] if len(runs) > 8 else shown)


def group_table(result: Json) -> str:
    """Groups of ``inspect --groups``, with all members."""
    rows = []
    for group in result["groups"]:
        members: dict[str, list[int]] = {}
        for weight, index in group["filters"]:
            members.setdefault(weight, []).append(index)
        text = "  ".join(f"{weight}[{ranges(ids)}]" for weight, ids in members.items())
        rows.append((group["group"], count(group["params"]), count(group["macs"]), text))
    return _listing(("group", "params", "MACs", "filters that leave together"), rows, right=(1, 2))


def _listing(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Thousands of rows as aligned lines, never folded; a rich table takes milliseconds a row."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def evaluation_table(result: Json) -> Table:
    """Metrics of ``evaluate``."""
    table = _table("metric", "value", "95 % interval", "correct")
    for name, entry in result["scores"].items():
        correct = "" if entry.get("correct") is None else f"{entry['correct']}/{entry['samples']}"
        table.add_row(name, value(entry["value"]), interval(entry.get("interval")), correct)
    return table


def per_class_table(result: Json) -> Table:
    """Correct per true class."""
    table = _table("class", "correct", "of", "score")
    for entry in result["per_class"]:
        n = entry["samples"]
        table.add_row(str(entry["class"]), str(entry["correct"]), str(n), value(entry["correct"] / n) if n else "-")
    return table


def score_table(result: Json, limit: int | None = None) -> str:
    """Groups by rising importance: what goes first stands first.

    Args:
        result: What ``score`` found.
        limit: Show the two ends of a longer list only.
    """
    by_class = any(group["per_class"] for group in result["groups"])
    header = ["group", "importance", "stderr", "correct", "MACs", "params", "filters"]
    tested = any("by_class" in group for group in result["groups"])
    header += ["q(classes)", "helps most", "helps least"] if tested else ["needed most by"] if by_class else []
    groups = sorted(result["groups"], key=lambda g: g["importance"])
    rows = [_score_row(group, by_class) for group in groups]
    if limit is not None and len(rows) > limit:
        gap = [f"... {len(rows) - limit} more", *[""] * (len(header) - 1)]
        rows = [*rows[: limit // 2], gap, *rows[len(rows) - limit // 2 :]]
    return _listing(header, rows, right=range(1, 8 if tested else 7))


def _score_row(group: Json, by_class: bool) -> list[str]:
    counted = group["correct"] is not None
    return [
        group["group"],
        f"{group['importance']:{'+.4f' if counted else '.5g'}}",
        "-" if group["stderr"] is None else f"{group['stderr']:.4f}",
        str(group["correct"]) if counted else "-",
        count(group["macs"]),
        count(group["params"]),
        str(len(group["filters"])),
        *(_served(group["by_class"]) if "by_class" in group else [_neediest(group["per_class"])] if by_class else []),
    ]


def _served(found: Json) -> list[str]:
    """Adjusted p-value, and the classes at both ends with their change of loss: only what is more than chance."""
    named = {end: [c for c in found[end] if c["named"]] if found["speaks"] else [] for end in ("most", "least")}
    texts = [", ".join(f"{c['class']} ({c['loss']:+.3f})" for c in entries) for entries in named.values()]
    return [f"{found['q']:.4f}", *(text or "-" for text in texts)]


def _neediest(per_class: Mapping[str, float] | None) -> str:
    """The class whose accuracy falls most without a group."""
    if not per_class:
        return "-"
    name = max(per_class, key=lambda key: per_class[key])
    return f"{name} ({-per_class[name]:+.4f})" if per_class[name] > 0 else "none"


def prune_tables(record: Json, layers: Sequence[Json]) -> list[Table]:
    """Filters per layer, then the network before and after.

    Args:
        record: The record of the run.
        layers: ``node``, ``kind``, ``before`` and ``after`` (filters) of each layer that has filters.
    """
    cut = [layer for layer in layers if layer["after"] != layer["before"]]
    tables = []
    if cut:
        table = _table("layer", "filters", "kept", "removed")
        for layer in cut:
            was, kept = layer["before"], layer["after"]
            table.add_row(layer["node"], str(was), str(kept), f"{was - kept} ({1 - kept / was:.0%})")
        tables.append(table)
    table = _table("", "original", "pruned", "change")
    old, new = record["model"], record["result"]
    for name, dense in (("filters", False), ("dense units", True)):
        counted = [layer for layer in layers if (layer["kind"] == "dense") is dense]
        before, after = sum(layer["before"] for layer in counted), sum(layer["after"] for layer in counted)
        if before and (before != after or not dense):
            table.add_row(name, str(before), str(after), percent_change(before, after))
    for name, key, form in (("params", "params", count), ("MACs", "macs", count), ("file", "bytes", size)):
        table.add_row(name, form(old[key]), form(new[key]), percent_change(old[key], new[key]))
    on_data = "data (optimistic)" if record["optimistic"] else "data"
    for first, last, where in (("base", "final", on_data), ("test_base", "test_final", "test data")):
        if record[first] is not None and record[last] is not None:
            a, b = record[first]["value"], record[last]["value"]
            change = signed(None if a is None or b is None else b - a)
            table.add_row(f"{record['metric']} on {where}", value(a), value(b), change)
    tables.append(table)
    return tables


def recovery_tables(result: Json) -> list[Table]:
    """How far each layer's outputs are from the original's, before and after; then the scores of ``recover``."""
    layers = _table("layer", "refitted", "before", "after", "ridge")
    for fit in result["recovery"]["layers"]:
        numbers = ["-" if fit[key] is None else f"{fit[key]:.3g}" for key in ("before", "after", "ridge")]
        layers.add_row(fit["node"], fit["method"] if not fit["reason"] else f"kept: {fit['reason']}", *numbers)
    scores = _table("", "original", "pruned", "recovered")
    on_data = "data (optimistic)" if result["optimistic"] else "data"
    for prefix, where in (("", on_data), ("test_", "test data")):
        if result[f"{prefix}final"] is not None:
            values = [value(result[f"{prefix}{name}"]["value"]) for name in ("base", "pruned", "final")]
            scores.add_row(f"{result['metric']} on {where}", *values)
    return [table for table in (layers, scores) if table.row_count]


def sensitivity_table(result: Json) -> Table:
    """A line for each layer, a column for each ratio."""
    ratios = [point["ratio"] for point in result["layers"][0]["points"]] if result["layers"] else []
    table = _table("layer", "filters", *(f"{ratio:g}" for ratio in ratios))
    table.padding = (0, 0)  # nine ratios and a name fit into 80 columns
    table.columns[0].min_width = 14
    for layer in result["layers"]:
        table.add_row(layer["layer"], str(layer["filters"]), *(f"{p['value']:.3f}" for p in layer["points"]))
    table.caption = (
        f"{result['metric']} with that fraction of one layer removed; whole network {value(result['base']['value'])}"
    )
    return table


def sweep_table(result: Json) -> Table:
    """Models of a sweep, the original first."""
    table = _table("MACs asked for", "reached", "MACs", "params", "filters", result["metric"], "on test data", "model")
    for row in result["points"]:
        reached = "-" if row["reached"] is None else f"{row['reached']:.3f}"
        sizes = (count(row["macs"]), count(row["params"]), "-" if row["filters"] is None else str(row["filters"]))
        table.add_row(
            f"{row['fraction']:g}", reached, *sizes, value(row["value"]), value(row["test_value"]), row["path"] or "-"
        )
    return table


def comparison_tables(result: Json) -> list[Table | str]:
    """Side by side, then each candidate's difference from the base, then classes, then gates."""
    models = result["models"]
    table = _table("", *(m["name"] for m in models))
    for name in models[0]["scores"]:
        cells = []
        for m in models:
            entry = m["scores"][name]
            cells.append(f"{value(entry['value'])} {interval(entry.get('interval'))}".rstrip())
        table.add_row(name, *cells)
    for label, key, form in (("params", "params", count), ("MACs", "macs", count), ("file", "bytes", size)):
        table.add_row(label, *(_with_change(models[0][key], m[key], form, first=i == 0) for i, m in enumerate(models)))
    if models[0]["latency"]:
        table.add_row("latency, median", *(f"{m['latency']['median_ms']:.3g} ms" for m in models))
        table.add_row(
            "  middle half", *(interval([m["latency"]["q1_ms"], m["latency"]["q3_ms"]], ".3g") for m in models)
        )
    tables: list[Table | str] = [table]
    if result["differences"]:
        tables.append(_difference_table(result))
        tables.extend(_class_tables(result))
    if result["gates"]:
        gates = _table("gate", "candidate", "limit", "measured", "", left=2)
        for g in result["gates"]:
            verdict = Text("met", style="green") if g["met"] else Text("NOT MET", style="bold red")
            gates.add_row(g["gate"], g["candidate"], f"{g['limit']:g}", value(g["measured"]), verdict)
        tables.append(gates)
    return tables


def _with_change(before: float, after: float, form: Any, *, first: bool) -> str:
    return str(form(after)) if first else f"{form(after)} ({percent_change(before, after)})"


def _difference_table(result: Json) -> Table:
    base = result["models"][0]["name"]
    table = _table(f"against {base}", *(d["candidate"] for d in result["differences"]))
    differences = result["differences"]
    names = {name: None for d in differences for name in d["scores"]}
    for name in names:
        rows = [d["scores"].get(name) or {} for d in differences]
        cells = [f"{signed(r.get('difference'))} {interval(r.get('interval'), '+.4f')}".rstrip() for r in rows]
        table.add_row(f"{name} difference", *cells)
        if any(r.get("p") is not None for r in rows):
            table.add_row("  McNemar p", *(p_value(r.get("p")) for r in rows))
            flips = (f"{r['only_base']} / {r['only_candidate']}" if r else "-" for r in rows)
            table.add_row("  only base / only it right", *flips)
    if any(d["agreement"] is not None for d in differences):
        table.add_row("same answer", *("-" if d["agreement"] is None else f"{d['agreement']:.4f}" for d in differences))
    if any(d["latency_ratio"] for d in differences):
        table.add_row("latency ratio", *(_ratio(d["latency_ratio"]) for d in differences))
    return table


def _ratio(ratio: Json | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} {interval(ratio['interval'], '.2f')}"


def p_value(p: float | None) -> str:
    """A p-value, never 0."""
    if p is None:
        return "-"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _class_tables(result: Json) -> list[Table | str]:
    tables: list[Table | str] = []
    for d in result["differences"]:
        changed = [c for c in d["per_class"] or [] if c["candidate"] != c["base"]]
        if not changed:
            continue
        changed.sort(key=lambda c: ((c["candidate"] - c["base"]) / c["samples"], c["class"]))
        shown = changed
        title = f"Correct answers in classes that changed, {d['candidate']}"
        if len(changed) > _SHOWN_CLASSES:
            half = _SHOWN_CLASSES // 2
            shown = [*changed[:half], *changed[-half:]]
            title += f" ({len(changed)}; here the {half} that lose and the {half} that gain most)"
        table = _table("class", "base", "candidate", "of", "change")
        for c in shown:
            change = (c["candidate"] - c["base"]) / c["samples"]
            table.add_row(str(c["class"]), str(c["base"]), str(c["candidate"]), str(c["samples"]), signed(change))
        tables += [title, table]
    return tables


def doctor_tables(result: Json) -> list[Table | Text]:
    """What ``doctor`` found, and what to do."""
    table = _table("", "", left=2)
    table.show_header = False
    table.add_row("system", result["system"])
    table.add_row("python", result["python"])
    for name, version in result["packages"].items():
        table.add_row(name, version or Text("not installed", style="dim"))
    for state in result["providers"]:
        verdict = (
            Text("works", style="green") if state["loads"] else Text(state["reason"] or "does not load", style="yellow")
        )
        table.add_row(f"--provider {state['name']}", verdict)
    for line in result["gpus"] or ["none found"]:
        table.add_row("gpu", line)
    if result["driver"]:
        table.add_row("driver", result["driver"])
    for name, where in result["cuda_libraries"].items():
        table.add_row(name, where or Text("missing", style="yellow"))
    if not result["advice"]:
        return [table, Text("All is well.")]
    return [table, Text("To do:\n" + "\n".join(f"- {line}" for line in result["advice"]))]
