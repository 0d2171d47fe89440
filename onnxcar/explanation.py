"""What every filter of a network does, in one place: responses, classes, colour, twins, and what was removed."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar import interpret, pages, record
from onnxcar.channels import ChannelSpace, Layer
from onnxcar.errors import ConfigError, DataError, PlanError
from onnxcar.importances import Importances, importance
from onnxcar.interpret import LayerResponses, Responses
from onnxcar.model import Model, load
from onnxcar.rules import analyze
from onnxcar.runtime import resolve_provider
from onnxcar.scope import select_layers

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

__all__ = ["Explanation", "explain", "read_removed", "read_scores"]

SIMILARITIES = ("responses", "maximised")
SHOWN = 4  # classes at both ends whose bars a filter shows, where there are many
BATCH_BYTES = 256 << 20
Json = dict[str, Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Facts about filters as JSON types, and the pictures that go with them.

    Attributes:
        facts: What `to_dict` gives.
        responses: The strongest responses and their places.
        data: The images.
    """

    facts: Json
    responses: Responses
    data: Dataset

    def to_dict(self) -> Json:
        """Model, data, layers, and for each filter its numbers; keys stable, pictures left out."""
        return self.facts

    def to_html(self, path: str | pathlib.Path, *, force: bool = True) -> pathlib.Path:
        """Write one self-contained page and return its path.

        Raises:
            OutputError: It exists and ``force`` is off, or it cannot be written.
        """
        return pages.write(pages.explanation(self.facts, self.responses, self.data), path, force=force)


def explain(
    model: Model | ChannelSpace,
    data: Dataset,
    *,
    scores: Importances | Mapping[str, Any] | None = None,
    car: bool = True,
    metric: str = "top1",
    removed: Mapping[str, Sequence[int]] | None = None,
    maximise: float | None = None,
    similarity: str = "responses",
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    provider: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    progress: Report | None = None,
) -> Explanation:
    """What the filters of a network do on some images.

    Costs two runs of the images (colour images are run in gray as well) and one `importance`, which takes most of it.

    Args:
        model: The network, or its structure.
        data: Images, labelled where CAR is asked for.
        scores: An earlier result of `importance` with ``by_class``, or its JSON: saves scoring again.
        car: Whether to score; False leaves CAR and class-CAR out.
        metric: What CAR is measured in.
        removed: Weight name -> filters that a plan or a pruned model removed, to be shown as such.
        maximise: Seconds for making an image that excites each filter (activation maximisation); None: none are made.
        similarity: What clusters and twins are about: `responses` to the images, or to the images made (`maximised`).
        layers: Patterns of node or weight names; default all layers.
        exclude: Patterns of layers to leave out.
        seed: Of everything random.
        provider: Execution provider.
        threads: Threads of a session, default all cores.
        batch_size: Samples of a run of `importance`.
        memory_bytes: Bound on the activations held at once.
        progress: Told how far the work is.

    Raises:
        DataError: There are no images, or `scores` are of another model.
        PlanError: A pattern matches nothing.
        ConfigError: `similarity` is unknown, or asks for images that are not made.
        RuntimeMissingError: `maximise` needs an extra that is not installed.
    """
    if similarity not in SIMILARITIES or (similarity == "maximised" and maximise is None):
        raise ConfigError(
            f"Similarity {similarity!r} cannot be had. Take one of {', '.join(SIMILARITIES)}; the latter needs "
            "--maximise T (maximise=seconds)."
        )
    if maximise is not None:
        interpret.need_torch()
    if len(data) == 0:
        raise DataError("The data set has no samples. Point --data at a folder, npz or list that has some.")
    space = model if isinstance(model, ChannelSpace) else analyze(model)
    chosen = list(range(len(space.layers)))
    if layers or exclude:
        chosen = [layer.index for layer in select_layers(space, layers, exclude, dense=True)]
    if scores is None and car and data.has_labels:
        scores = importance(
            space,
            data,
            metric=metric,
            layers=layers,
            exclude=exclude,
            by_class=data.labels.ndim == 1 and data.labels.dtype.kind in "iu",
            seed=seed,
            provider=provider,
            threads=threads,
            batch_size=batch_size,
            memory_bytes=memory_bytes,
            progress=progress,
        )
    found = interpret.responses(
        space,
        data,
        layers=chosen,
        provider=resolve_provider(provider).name,
        threads=threads,
        batch_bytes=min(BATCH_BYTES, memory_bytes or BATCH_BYTES),
        progress=progress,
    )
    known = scores.to_dict(by_class=True, top=SHOWN) if isinstance(scores, Importances) else scores
    made = None
    if maximise is not None:
        made = _made(space, found, data, maximise, seed, threads, memory_bytes, progress)
    facts = _facts(space, data, found, known, metric, removed or {}, similarity)
    return Explanation(facts | {"maximised": made, "similarity": similarity}, found, data)


def _made(
    space: ChannelSpace,
    found: Responses,
    data: Dataset,
    seconds: float,
    seed: int,
    threads: int | None,
    memory_bytes: int | None,
    progress: Report | None,
) -> Json:
    """Make images for the filters, keep them with their layers, and say how many there are and what has none."""
    images, left = interpret.maximise(
        space,
        found,
        data,
        seconds=seconds,
        seed=seed,
        threads=threads,
        batch_bytes=min(BATCH_BYTES, memory_bytes or BATCH_BYTES),
        progress=progress,
    )
    for state in found.layers:
        state.made = images.get(state.layer.index)
    return {
        "images": sum(int(one.done.sum()) for one in images.values()),
        "left": [
            {"layer": state.layer.node, "reason": left[state.layer.index]}
            for state in found.layers
            if state.layer.index in left
        ],
    }


# --- facts -----------------------------------------------------------------------------------------------------------


def _facts(
    space: ChannelSpace,
    data: Dataset,
    found: Responses,
    scores: Mapping[str, Any] | None,
    metric: str,
    removed: Mapping[str, Sequence[int]],
    similarity: str,
) -> Json:
    groups = _by_filter(space, scores)
    names = data.classes
    classes = [names[c] if names is not None and c < len(names) else str(c) for c in found.classes]
    layers: list[Json] = []
    filters: list[Json] = []
    for state in found.layers:
        gone = set(removed.get(state.layer.weight, ()))
        alike = _correlation(state, similarity)
        rows = _filters(space, state, alike, groups, gone, classes)
        for row in rows:
            row["layer"] = len(layers)
        layers.append(_layer(state, alike, rows))
        filters.extend(rows)
    return {
        "model": record.model_entry(space.model.path, space.model.sha256, space.cost(), space.model.n_bytes),
        "data": record.data_entry(data),
        "metric": metric if scores is None else scores.get("metric", metric),
        "base": None if scores is None else scores.get("base"),
        "reliability": None if scores is None else scores.get("reliability"),
        "classes": classes,
        "class_sets": _class_sets(scores),
        "layers": layers,
        "filters": filters,
    }


def _correlation(state: LayerResponses, similarity: str) -> Floats:
    """How alike the filters of a layer are, (filters, filters), NaN where it is not known."""
    if similarity == "responses":
        return state.correlation()
    found = None if state.made is None else state.made.correlation()
    return np.full((state.layer.filters,) * 2, np.nan) if found is None else found


def _class_sets(scores: Mapping[str, Any] | None) -> list[Json] | None:
    known = None if scores is None else scores.get("classes")
    return None if known is None else [{"class": c["class"], "samples": c["samples"]} for c in known]


def _by_filter(space: ChannelSpace, scores: Mapping[str, Any] | None) -> dict[tuple[str, int], Json]:
    """(weight, filter) -> the entry of its group in the JSON of `score`."""
    if scores is None:
        return {}
    found = {(str(w), int(i)): dict(group) for group in scores["groups"] for w, i in group["filters"]}
    known = {f for group in space.groups for f in group.filters}
    stray = next((f for f in found if f not in known), None)
    if stray is not None:
        raise DataError(
            f"The scores name filter {stray[1]} of {stray[0]!r}, which cannot go from this model: they are another "
            "model's. Score this one, or leave out --scores."
        )
    return found


def _layer(state: LayerResponses, correlation: Floats, rows: Sequence[Json]) -> Json:
    field = state.field
    alive = [i for i, row in enumerate(rows) if not row["removed"]]
    return {
        "node": state.layer.node,
        "weight": state.layer.weight,
        "kind": state.layer.kind,
        "before": state.layer.filters,
        "after": len(alive),
        "dead": int(state.dead.sum()),
        "clusters": len({row["cluster"] for row in rows} - {-1}),
        "twin_distance": _number(interpret.twin_distance(correlation)),
        "twin_distance_after": _number(interpret.twin_distance(correlation[np.ix_(alive, alive)])),
        "field": None if field is None else [round(field.size[0]), round(field.size[1])],
    }


def _filters(
    space: ChannelSpace,
    state: LayerResponses,
    correlation: Floats,
    groups: Mapping[tuple[str, int], Json],
    gone: set[int],
    classes: Sequence[str],
) -> list[Json]:
    layer = state.layer
    cluster, near = interpret.clusters(correlation), interpret.twins(correlation)
    share = interpret.contribution(space, state)
    colour = state.colour_selectivity()
    kernels = state.kernels
    stripes = None if kernels is None else interpret.orientation(kernels)
    kernel_colour = None if kernels is None or kernels.shape[-1] != 3 else interpret.kernel_colour(kernels)
    rank = _ranks(layer, groups)
    rows = []
    for i in range(layer.filters):
        group = groups.get((layer.weight, i))
        rows.append(
            {
                "filter": i,
                "group": None if group is None else group["group"],
                "tied": 1 if group is None else len(group["filters"]),
                "importance": None if group is None else group["importance"],
                "rank": rank.get(i),
                "protected": bool(layer.groups[i] < 0),
                "removed": i in gone,
                "dead": bool(state.dead[i]),
                "mean": _number(state.mean[i]),
                "largest": _number(state.high[i]),
                "contribution": _number(share[i]),
                "cluster": int(cluster[i]),
                "twins": [[j, round(r, 4)] for j, r in near[i]],
                "colour": None if colour is None else _number(colour[i]),
                "kernel_colour": None if kernel_colour is None else _number(kernel_colour[i]),
                "orientation": None if stripes is None else _number(stripes[0][i]),
                "coherence": None if stripes is None else _number(stripes[1][i]),
                "kernel": kernels is not None,
                "made": None if state.made is None else _number(state.made.responses[i]),
                "responds": _strongest(state, i, classes),
                "by_class": _bars(group),
            }
        )
    return rows


def _ranks(layer: Layer, groups: Mapping[tuple[str, int], Json]) -> dict[int, int]:
    """Filter -> its place by importance in the layer, 1 = goes first."""
    known = [(groups[layer.weight, i]["importance"], i) for i in range(layer.filters) if (layer.weight, i) in groups]
    return {i: place for place, (_, i) in enumerate(sorted(known), 1)}


def _strongest(state: LayerResponses, i: int, classes: Sequence[str]) -> list[list[Any]]:
    """The classes with the largest mean response: name and value."""
    if not len(classes):
        return []
    column = state.class_mean[:, i]
    order = np.argsort(-column, kind="stable")[:SHOWN]
    return [[classes[c], _number(column[c])] for c in order]


def _bars(group: Mapping[str, Any] | None) -> Json | None:
    """Class-CAR of a filter's group: all classes where they are few, both ends where they are many."""
    found = None if group is None else group.get("by_class")
    if found is None:
        return None
    unique: dict[str, Json] = {}
    for entry in (*found["most"], *reversed(found["least"])):  # where classes are few, both ends hold the same ones
        known = unique.setdefault(entry["class"], dict(entry))
        known["named"] = known["named"] or entry["named"]
    return {
        "p": found["p"],
        "q": found["q"],
        "speaks": found["speaks"],
        "entries": [
            [e["class"], e["samples"], e["car"], *e["interval"], e["loss"], e["named"]] for e in unique.values()
        ],
    }


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.5g}") if np.isfinite(number) else None


# --- files of earlier runs -------------------------------------------------------------------------------------------


def read_removed(path: pathlib.Path, model: Model) -> dict[str, list[int]]:
    """Weight name -> removed filters, out of a plan, a record, or a model that `prune` wrote.

    Raises:
        PlanError: The file says nothing of removed filters, or is about another model.
    """
    if path.suffix == ".onnx":
        known = {p.key: p.value for p in load(path).proto.metadata_props}
        found = {
            "removed": json.loads(known.get("onnxcar.removed_filters", "null")),
            "model_sha256": known.get("onnxcar.source_sha256"),
        }
    else:
        found = _json(path, PlanError)
    removed, source = found.get("removed"), found.get("model_sha256") or (found.get("model") or {}).get("sha256")
    if not isinstance(removed, dict):
        raise PlanError(f"{path} does not say what was removed. Give a plan, a record, or a model that prune wrote.")
    if source is not None and source != model.sha256:
        raise PlanError(
            f"{path} is about another model (SHA-256 {str(source)[:12]}..., this one has {model.sha256[:12]}...). "
            "Explain the original that it was made from."
        )
    return {str(name): [int(i) for i in filters] for name, filters in removed.items()}


def read_scores(path: pathlib.Path, model: Model) -> Json:
    """The JSON that `score` wrote.

    Raises:
        DataError: It is none, or is about another model.
    """
    found = _json(path, DataError)
    if found.get("command") != "score" or not isinstance(found.get("groups"), list):
        raise DataError(f"{path} is no result of `onnxcar score --json`. Make one with --by-class.")
    if found.get("model", {}).get("sha256") != model.sha256:
        raise DataError(f"{path} holds scores of another model. Score this one, or leave out --scores.")
    return found


def _json(path: pathlib.Path, error: type[DataError] | type[PlanError]) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as exc:
        raise error(f"{path} cannot be read as JSON ({exc}). Name the file that onnxcar wrote.") from exc
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, no result of onnxcar. Name the file that onnxcar wrote.")
    return found
