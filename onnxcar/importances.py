"""Importance of every group at once, and how far to trust the ranking; removes nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar import record as records
from onnxcar.channels import ChannelSpace
from onnxcar.criteria import Context, Criterion, CriterionFunction, find, refuse_unscored
from onnxcar.errors import DataError
from onnxcar.interpret import ClassEffects, ClassSets, class_sets, effects, joined
from onnxcar.model import Model
from onnxcar.rules import analyze
from onnxcar.runtime import resolve_provider
from onnxcar.scope import select_layers
from onnxcar.scoring import Agreement, Reliability, Score, Scorer, check_precision, reliability

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report

__all__ = ["Importances", "importance"]

# Split-half rank correlation below which two halves of the data would rank the groups quite differently.
NOISE = 0.4
PAIRS = 4_000_000  # groups x samples whose effects on classes are found at once, some 40 bytes each


@dataclass(frozen=True, eq=False)
class Importances:
    """Importance of groups on the unpruned network.

    Attributes:
        space: Structure the ids belong to.
        criterion: Its name.
        groups: Ids, ascending.
        values: Importance of each, (n,); larger = keep.
        base: Score of the network; None where the criterion scores nothing.
        scores: Score without each group, in the order of `groups`; None likewise.
        reliability: What chance does to the values; None where the criterion counts no correct answers.
        classes: Names of the classes, None if unknown.
        effects: What each group does to each class, in the order of `groups`; None unless it was asked for.
        agreed: How near scores in another precision are to FP32; None where they are in FP32.
    """

    space: ChannelSpace
    criterion: str
    groups: tuple[int, ...]
    values: npt.NDArray[np.float64]
    base: Score | None
    scores: tuple[Score, ...] | None
    reliability: Reliability | None
    classes: tuple[str, ...] | None = None
    effects: ClassEffects | None = None
    agreed: Agreement | None = None

    @property
    def stderr(self) -> float | None:
        """Standard error of an importance, root mean square over the groups; None where nothing is known of it."""
        if self.reliability is None or not len(self.reliability.stderr):
            return None
        return float(np.sqrt(np.mean(np.square(self.reliability.stderr))))

    @property
    def near_noise(self) -> bool:
        """Whether another sample of that size would rank the groups quite differently."""
        return self.reliability is not None and not self.reliability.split_half >= NOISE

    def to_dict(self, *, by_class: bool = False, top: int = 3) -> dict[str, Any]:
        """As JSON types; ``per_class`` is each class's own reduction, null unless ``by_class``.

        Where `effects` are known, ``classes`` lists the classes (or the user's groups of them) with their samples, and
        ``by_class`` of a group holds the test, the ``top`` classes at both ends, and arrays in the classes' order.
        """
        known = None
        if self.reliability is not None:
            known = {"stderr": self.stderr, "split_half": float(self.reliability.split_half)}
        return {
            "criterion": self.criterion,
            "base": records.score_entry(self.base),
            "precision": "fp32" if self.agreed is None else self.agreed.precision,
            "precision_check": None if self.agreed is None else self.agreed.to_json(),
            "reliability": known,
            "classes": self._class_entries() if by_class else None,
            "groups": [
                {**self._group(i, by_class), **self._effects(i, by_class, top)} for i in range(len(self.groups))
            ],
        }

    def _class_entries(self) -> list[dict[str, Any]] | None:
        """Names, output indices and samples of the classes that `effects` are about."""
        if self.effects is None:
            return None
        sets = self.effects.sets
        rows = zip(sets.names, sets.labels, sets.samples.tolist(), strict=True)
        return [{"class": name, "labels": list(labels), "samples": n} for name, labels, n in rows]

    def _effects(self, i: int, by_class: bool, top: int) -> dict[str, Any]:
        if self.effects is None or not by_class:
            return {}
        return {"by_class": self.effects.to_dict(i, float(self._q[i]), top)}

    @cached_property
    def _q(self) -> npt.NDArray[np.float64]:
        assert self.effects is not None
        return self.effects.q

    def _group(self, i: int, by_class: bool) -> dict[str, Any]:
        group = self.space.groups[self.groups[i]]
        score = None if self.scores is None else self.scores[i]
        return {
            "group": group.name,
            "filters": [list(f) for f in group.filters],
            "importance": float(self.values[i]),
            "stderr": None if self.reliability is None else float(self.reliability.stderr[i]),
            "correct": None if score is None else score.correct,
            "per_class": self._classes(score) if by_class and score is not None else None,
            "macs": self.space.saved_macs(group.id),
            "params": self.space.saved_params(group.id),
        }

    def _classes(self, score: Score) -> dict[str, float] | None:
        fall = None if self.base is None else self.base.class_reductions(score)
        if fall is None:
            return None
        names = self.classes
        return {
            names[i] if names is not None and i < len(names) else str(i): float(x)
            for i, x in enumerate(fall.tolist())
            if not np.isnan(x)
        }

    def to_csv(self, *, by_class: bool = False) -> str:
        """One line a group; with ``by_class`` a column for each class, and with `effects` its interval and loss."""
        rows = self.to_dict(by_class=by_class)["groups"]
        sets = self.effects.sets.names if self.effects is not None and by_class else ()
        names = list(rows[0]["per_class"] or ()) if rows else []
        stream = io.StringIO()
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(["group", "importance", "stderr", "correct", "macs", "params", "filters", *names, *_columns(sets)])
        for row in rows:
            filters = " ".join(f"{weight}:{index}" for weight, index in row["filters"])
            plain = [row[key] for key in ("group", "importance", "stderr", "correct", "macs", "params")]
            classes = [(row["per_class"] or {}).get(name) for name in names]
            out.writerow([*plain, filters, *classes, *_cells(row.get("by_class"))])
        return stream.getvalue()


def _columns(names: Sequence[str]) -> list[str]:
    """CSV columns of the effects on classes of these names."""
    if not names:
        return []
    return ["p", "q", *(f"{name}:{what}" for name in names for what in ("car", "low", "high", "loss"))]


def _cells(found: Mapping[str, Any] | None) -> list[Any]:
    if found is None:
        return []
    classes = zip(found["car"], found["interval"], found["loss"], strict=True)
    return [found["p"], found["q"], *(x for car, pair, loss in classes for x in (car, *pair, loss))]


def importance(
    model: Model | ChannelSpace,
    data: Dataset | None = None,
    *,
    criterion: str | Criterion | CriterionFunction = "car",
    metric: str = "top1",
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    norms: str = "protect",
    by_class: bool = False,
    class_groups: Mapping[str, Sequence[str | int]] | None = None,
    seed: int = 0,
    provider: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    progress: Report | None = None,
) -> Importances:
    """Importance of every group on the unpruned network, all scored on the same samples.

    A ranking made at once is not the order in which groups should go: two that stand in for each other both look free.
    `prune` scores again after every step.

    Args:
        model: The network, or its structure.
        data: Validation samples; criteria that look at weights alone need none.
        criterion: A name of `criteria.CRITERIA`, or a function.
        metric: What CAR is measured in.
        layers: Patterns of node or weight names; default all groups, those of dense layers too.
        exclude: Patterns of layers to leave out.
        norms: As `analyze`.
        by_class: Whether to find what each group does to each class, with intervals and tests; CAR criteria only.
        class_groups: Name -> class names or output indices: these groups of classes instead of single ones.
        seed: Of everything random.
        provider: Execution provider.
        precision: What candidates are scored in: "fp32", "tf32" or "fp16"; see `search.prune`.
        threads: Threads of a session, default all cores.
        batch_size: Samples of an inference call, default from ``memory_bytes``.
        memory_bytes: Bound on the activations held at once, default a quarter of what is free.
        progress: Told how far the work is, in groups.

    Raises:
        DataError: The criterion needs data and there is none.
        PlanError: No such criterion, or a pattern matches nothing.
    """
    row = find(criterion)
    if row.needs_data and data is None:
        raise DataError(f"Criterion {row.name!r} looks at samples, and there is no data. Give --data.")
    space = model if isinstance(model, ChannelSpace) else analyze(model, norms=norms)
    by_layer = _asked(space, layers, exclude)
    asked = tuple(sorted(group for groups in by_layer.values() for group in groups))
    scorer, agreed = None, None
    refuse_unscored(precision, row, data)
    if row.needs_labels and data is not None:
        agreed = check_precision(space.model, data, precision, provider=provider, threads=threads)
        sets = _sets(data, class_groups) if by_class or class_groups else None
        scorer = _Recorder(
            space,
            data,
            metric=metric,
            provider=provider,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            memory_bytes=memory_bytes,
        )
        scorer.watch(sets, seed)
    where = "cpu" if data is None else resolve_provider(provider).name
    context = Context(
        data,
        scorer,
        candidates=asked,
        seed=seed,
        provider=where,
        threads=threads,
        memory_bytes=memory_bytes,
        progress=progress,
    )
    if scorer is None:
        values = row(space, context)
    else:
        values = np.full(len(space.groups), np.nan)
        done = 0
        for name, groups in by_layer.items():
            if progress is not None:
                progress.update(done, len(asked), name)
            found = row(space, replace(context, candidates=groups))
            values[groups] = found[groups]
            done += len(groups)
    return Importances(
        space,
        row.name,
        asked,
        np.asarray(values, np.float64)[list(asked)],
        None if scorer is None else scorer.base(),
        None if scorer is None else tuple(scorer.kept[group] for group in asked),
        None if scorer is None else scorer.reliability(asked, seed),
        None if data is None else data.classes,
        None if scorer is None else scorer.effects(asked),
        agreed,
    )


def _sets(data: Dataset, groups: Mapping[str, Sequence[str | int]] | None) -> ClassSets:
    if not data.has_labels or data.labels.ndim > 1 or data.labels.dtype.kind not in "iu":
        raise DataError(
            f"Data {data.path!r} has no class labels, and effects on classes need them. Leave out --by-class."
        )
    return class_sets(data.labels, data.classes, groups)


def _asked(space: ChannelSpace, layers: Sequence[str], exclude: Sequence[str]) -> dict[str, list[int]]:
    """First layer's name -> ids of the groups that are asked for."""
    wanted: Collection[int] = range(len(space.groups))
    if layers or exclude:
        chosen = select_layers(space, layers, exclude, dense=True)
        wanted = {int(g) for layer in chosen for g in layer.groups if g >= 0}
    found: dict[str, list[int]] = {}
    for group in space.groups:
        if group.id in wanted:
            found.setdefault(space.layers[group.layer].node, []).append(group.id)
    return found


class _Recorder(Scorer):
    """A scorer that keeps the scores and flips a criterion asked for, over several calls."""

    kept: dict[int, Score]
    changed: dict[int, npt.NDArray[np.bool_]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept, self.changed = {}, {}
        self._sets: ClassSets | None = None
        self._seed = 0
        self._parts: list[tuple[tuple[int, ...], ClassEffects]] = []

    def watch(self, sets: ClassSets | None, seed: int) -> None:
        """From now on find what each scored group does to these classes."""
        self._sets, self._seed = sets, seed
        self.keep_losses = sets is not None

    def effects(self, groups: Sequence[int]) -> ClassEffects | None:
        """What was found, in the order of `groups`; None where nothing was watched."""
        if not self._parts:
            return None
        found = joined([part for _, part in self._parts])
        row = {group: i for i, group in enumerate(g for ids, _ in self._parts for g in ids)}
        return found.take([row[group] for group in groups])

    def score(self, removed: Collection[int], candidates: Sequence[int]) -> list[Score]:
        """As `Scorer.score`."""
        found = super().score(removed, candidates)
        self.kept.update(zip(candidates, found, strict=True))
        self.changed.update(self.flips)
        if self._sets is not None and len(self.base_correct):
            # Layer by layer, and of a large one some groups at a time, so that this is all that is held.
            same, still = np.zeros(len(self.data), bool), np.zeros(len(self.data), np.float32)
            some = max(1, PAIRS // len(self.data))
            for part in (candidates[i : i + some] for i in range(0, len(candidates), some)):
                flips = np.stack([self.flips.get(group, same) for group in part])
                losses = np.stack([self.losses.get(group, still) for group in part])
                found_part = effects(self._sets, self.base_correct, flips, losses, seed=self._seed)
                self._parts.append((tuple(part), found_part))
            self.losses = {}
        return found

    def reliability(self, groups: Sequence[int], seed: int) -> Reliability | None:
        """Of top-1 importances only: flips count correct answers."""
        if self.metric.name != "top1" or not len(self.base_correct):
            return None
        same = np.zeros(len(self.base_correct), bool)  # a group that nothing reads changes nothing
        flips: Mapping[int, npt.NDArray[np.bool_]] = {group: self.changed.get(group, same) for group in groups}
        return reliability(self.base_correct, flips, seed=seed)
