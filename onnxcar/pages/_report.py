"""The pages of `compare --html` and `prune --report`: the same parts, the latter with the path of the search."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from onnxcar.interpret import look
from onnxcar.pages._html import render
from onnxcar.pages._sheets import Pixels, pixels, shrunk
from onnxcar.rules import analyze

if TYPE_CHECKING:
    from onnxcar.comparison import Comparison, Entry
    from onnxcar.data import Dataset
    from onnxcar.metrics import Outcomes

__all__ = ["comparison"]

FLIPS = 24  # samples shown of each kind
THUMB = 112
CLASSES = 24  # changed classes shown, half from each end
CONFUSIONS = 12
Json = dict[str, Any]


def comparison(
    found: Comparison,
    *,
    record: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> str:
    """The page as text.

    Args:
        found: The models side by side, the base first.
        record: Of the pruning that made the candidate; adds the path of the search.
        context: Provenance: provider, threads, data, whether scores are optimistic.
        command: That makes the page again.
    """
    facts = found.to_dict()
    base = found.entries[0]
    names = None if found.data is None else found.data.classes
    title = f"{found.entries[1].name} against {base.name}" if len(found.entries) == 2 else f"{base.name} and others"
    return render(
        "report.html",
        title=title,
        facts=facts,
        record=record,
        path=None if record is None else _path(record),
        context={"data": None, "optimistic": False, "provider": None, "threads": None, **(context or {})},
        command=command,
        layers=_layers(found.entries),
        bars=_bars(facts),
        pareto=_pareto(facts, record),
        classes=[_classes(d["per_class"]) for d in facts["differences"]],
        confusions=[_confusions(base, entry, names) for entry in found.entries[1:]],
        flips=[_flips(base, entry, found.data) for entry in found.entries[1:]],
    )


# --- size and speed --------------------------------------------------------------------------------------------------


def _layers(entries: Sequence[Entry]) -> list[Json]:
    """Filters of each layer in every model, by the name of the weight; None where a model has no such weight."""
    counts = [{x.weight: x for x in analyze(entry.model).layers} for entry in entries]
    out = []
    for weight, layer in counts[0].items():
        widths = [c[weight].filters if weight in c else None for c in counts]
        out.append({"node": layer.node, "kind": layer.kind, "widths": widths, "changed": len(set(widths)) > 1})
    return out


def _bars(facts: Mapping[str, Any]) -> list[Json]:
    """Size, MACs and latency of every model as fractions of the largest."""
    rows: list[Json] = []
    for label, key in (("params", "params"), ("MACs", "macs"), ("file", "bytes")):
        rows.append(
            {"label": label, "values": [m[key] for m in facts["models"]], "unit": "B" if key == "bytes" else ""}
        )
    if facts["models"][0]["latency"]:
        values = [m["latency"]["median_ms"] for m in facts["models"]]
        spread = [(m["latency"]["q1_ms"], m["latency"]["q3_ms"]) for m in facts["models"]]
        rows.append({"label": "latency", "values": values, "unit": "ms", "spread": spread})
    for row in rows:
        known = [v for v in row["values"] if v]
        largest = max([*known, *(high for _, high in row.get("spread", ()))], default=1)
        row["parts"] = [None if v is None else v / largest for v in row["values"]]
        row["ends"] = [(a / largest, b / largest) for a, b in row.get("spread", ())]
        row["change"] = [None if not v or not row["values"][0] else v / row["values"][0] - 1 for v in row["values"]]
    return rows


# --- the search ------------------------------------------------------------------------------------------------------


def _path(record: Mapping[str, Any]) -> Json | None:
    """The score after every step, as a polyline in a box of 600 x 180."""
    steps = [step for step in record.get("steps", ()) if step.get("value") is not None]
    base = record.get("base")
    if base is None or base["value"] is None or not steps:
        return None
    last = {step["step"]: step for step in steps}  # of the groups of one step, the last one's score
    points = [(0, base["value"]), *((n, step["value"]) for n, step in last.items())]
    scale = _Scale([v for _, v in points], 8, 172)
    width = max(points[-1][0], 1)
    limit = (record.get("arguments") or {}).get("max_drop")
    at = None if limit is None else base["value"] - limit
    return {
        "points": " ".join(f"{600 * n / width:.1f},{scale(v):.1f}" for n, v in points),
        "ticks": [(scale(v), v) for v in scale.ticks],
        "steps": points[-1][0],
        "limit": None if at is None or not scale.low <= at <= scale.high else scale(at),
        "best": max(v for _, v in points),
        "last": points[-1][1],
        "groups": len(steps),
    }


class _Scale:
    """Values to heights, the largest on top; a little room at both ends."""

    def __init__(self, values: Sequence[float], top: float, bottom: float) -> None:
        low, high = min(values), max(values)
        room = (high - low) * 0.06 or abs(high) * 0.02 or 0.01
        self.low, self.high = float(low - room), float(high + room)
        self._top, self._bottom = top, bottom

    def __call__(self, value: float) -> float:
        part: float = (value - self.low) / (self.high - self.low)
        return float(self._bottom - part * (self._bottom - self._top))

    @property
    def ticks(self) -> list[float]:
        """Round values inside."""
        step = 10.0 ** np.floor(np.log10(self.high - self.low))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if (self.high - self.low) / s <= 6)
        first = np.ceil(self.low / step)
        return [float(first + i) * step for i in range(int((self.high / step) - first) + 1)]


def _pareto(facts: Mapping[str, Any], record: Mapping[str, Any] | None) -> Json | None:
    """The metric over MACs: the models with their intervals, and the path of the search if there is one."""
    metric = facts["metric"]
    models = [m for m in facts["models"] if m["scores"].get(metric)]
    if not models or not models[0]["macs"]:
        return None
    macs = models[0]["macs"]
    entries = [(m["name"], m["macs"] / macs, m["scores"][metric]) for m in models]
    walk = [s for s in (record or {}).get("steps", ()) if s.get("value") is not None and s.get("macs")]
    ends = [v for _, _, s in entries for v in (s.get("interval") or [s["value"]])]
    scale = _Scale([*ends, *(s["value"] for s in walk)], 8, 232)
    largest = max(1.0, *(x for _, x, _ in entries))
    least = min([0.9, *(x for _, x, _ in entries), *(s["macs"] / macs for s in walk)])
    left = max(0.0, least - 0.05)

    def across(part: float) -> float:
        return float(600 * (part - left) / max(largest - left, 1e-9))

    return {
        "dots": [
            {
                "name": name,
                "x": across(x),
                "y": scale(s["value"]),
                "ends": None if not s.get("interval") else [scale(v) for v in s["interval"]],
                "part": x,
                "value": s["value"],
                "first": i == 0,
            }
            for i, (name, x, s) in enumerate(entries)
        ],
        "path": " ".join(f"{across(s['macs'] / macs):.1f},{scale(s['value']):.1f}" for s in walk),
        "ticks": [(scale(v), v) for v in scale.ticks],
        "columns": [(across(v), v) for v in np.arange(0, 1.01, 0.1 if left > 0.5 else 0.2).round(2) if v >= left],
        "metric": metric,
    }


# --- classes and samples ---------------------------------------------------------------------------------------------


def _classes(rows: Sequence[Mapping[str, Any]]) -> Json | None:
    """Classes that lose and gain most, and how many changed."""
    if not rows:
        return None
    changed = [{**row, "change": (row["candidate"] - row["base"]) / row["samples"]} for row in rows]
    changed = sorted((row for row in changed if row["change"]), key=lambda row: (row["change"], row["label"]))
    shown = changed if len(changed) <= CLASSES else [*changed[: CLASSES // 2], *changed[-CLASSES // 2 :]]
    return {"rows": shown, "changed": len(changed), "of": len(rows)}


def _name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def _confusions(base: Entry, entry: Entry, names: Sequence[str] | None) -> Json | None:
    """Pairs of classes that the candidate mixes up more, and less, often than the base."""
    a, b = _outcomes(base), _outcomes(entry)
    if a is None or b is None:
        return None
    counts: dict[tuple[int, int], list[int]] = {}
    for which, outcomes in enumerate((a, b)):
        wrong = ~outcomes.correct
        pairs, n = np.unique(np.stack([outcomes.labels[wrong], outcomes.pred[wrong]]), axis=1, return_counts=True)
        for true, said, number in zip(*pairs.tolist(), n.tolist(), strict=True):
            counts.setdefault((true, said), [0, 0])[which] = number
    rows: list[Json] = [
        {"true": _name(t, names), "said": _name(s, names), "base": n[0], "candidate": n[1], "change": n[1] - n[0]}
        for (t, s), n in sorted(counts.items())
        if n[0] != n[1]
    ]
    rows.sort(key=lambda row: -row["change"])
    more = [row for row in rows if row["change"] > 0][:CONFUSIONS]
    return {"more": more, "less": [row for row in reversed(rows) if row["change"] < 0][:CONFUSIONS]}


def _outcomes(entry: Entry) -> Outcomes | None:
    return None if entry.score is None else entry.score.outcomes


def _flips(base: Entry, entry: Entry, data: Dataset | None) -> Json | None:
    """Samples that only one of the two gets right, those with the largest change of loss first."""
    a, b = _outcomes(base), _outcomes(entry)
    if a is None or b is None or data is None:
        return None
    gap = b.loss - a.loss
    lost = np.flatnonzero(a.correct & ~b.correct)
    won = np.flatnonzero(b.correct & ~a.correct)
    lost, won = lost[np.argsort(-gap[lost], kind="stable")], won[np.argsort(gap[won], kind="stable")]
    wanted = [*lost[:FLIPS].tolist(), *won[:FLIPS].tolist()]
    seen = look(data)
    shots = {} if seen is None or not wanted else {i: _shot(p) for i, p in pixels(data, seen, wanted)}

    def entries(indices: Sequence[int]) -> list[Json]:
        return [
            {
                "name": Path(data.name(i)).name,
                "true": _name(int(a.labels[i]), data.classes),
                "base": _name(int(a.pred[i]), data.classes),
                "candidate": _name(int(b.pred[i]), data.classes),
                "image": shots.get(i, (None, False))[0],
                "tiny": shots.get(i, (None, False))[1],
            }
            for i in indices
        ]

    first, second = entries(lost[:FLIPS].tolist()), entries(won[:FLIPS].tolist())
    return {"lost": first, "n_lost": len(lost), "won": second, "n_won": len(won)}


def _shot(picture: Pixels) -> tuple[str, bool]:
    """A picture as a data URI, and whether it is so small that it is shown in squares."""
    small = shrunk(picture, THUMB)
    tiny = max(small.shape[:2]) <= THUMB // 2
    stream = io.BytesIO()
    image = Image.fromarray(small)
    if tiny:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "WEBP", quality=70)
    kind = "png" if tiny else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", tiny
