"""Criteria: functions that give every channel group an importance, in one table.

Larger means keep. A criterion walks over layers, groups and reads of the `ChannelSpace`, never over ops, so it works on
every architecture that the rules know. CAR is the one this project is about; the others are what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar import runtime
from onnxcar.channels import ChannelSpace, Read
from onnxcar.errors import DataError, PlanError
from onnxcar.model import Model
from onnxcar.recovery import Reconstruction

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.progress import Report
    from onnxcar.scoring import Scorer

__all__ = ["CRITERIA", "Context", "Criterion", "CriterionFunction", "find", "per_layer_unit", "refuse_unscored"]

Importances = npt.NDArray[np.float64]  # (n_groups,), larger = keep; NaN = already removed, or not asked for
CriterionFunction = Callable[[ChannelSpace, "Context"], Importances]


@dataclass(frozen=True, eq=False)
class Context:
    """What a criterion may look at besides the structure.

    Attributes:
        data: Validation samples; None for criteria that need none.
        scorer: Scores candidates on `data`; None likewise.
        removed: Groups that are gone already.
        candidates: Groups that are asked for, None = all that are left.
        seed: Of everything random.
        provider: Execution provider of ONNX Runtime for activations.
        threads: Threads of a session, None = all cores.
        batch_bytes: Bound on the activations held at once.
        memory_bytes: Bound on all that a criterion keeps, None = its own default.
        progress: Told how far a long preparation is.
        memo: What a greedy criterion keeps from step to step; contexts made from one another share it.
    """

    data: Dataset | None = None
    scorer: Scorer | None = None
    removed: frozenset[int] = frozenset()
    candidates: Sequence[int] | None = None
    seed: int = 0
    provider: str = "cpu"
    threads: int | None = None
    batch_bytes: int = 256 << 20
    memory_bytes: int | None = None
    progress: Report | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    def asked(self, space: ChannelSpace) -> list[int]:
        """Ids of the groups an importance is wanted for, ascending."""
        ids = range(len(space.groups)) if self.candidates is None else sorted(self.candidates)
        return [group for group in ids if group not in self.removed]


@dataclass(frozen=True)
class Criterion:
    """One row of the table.

    Attributes:
        name: What people type.
        function: Gives the importances.
        needs_data: Whether it looks at samples.
        needs_labels: Whether it scores networks on them.
        greedy: Whether it is asked again after every step; otherwise one ranking of the original network holds.
        source: Where it comes from.
    """

    name: str
    function: CriterionFunction
    needs_data: bool = False
    needs_labels: bool = False
    greedy: bool = False
    source: str = ""

    def __call__(self, space: ChannelSpace, context: Context) -> Importances:
        """Importance of every group, (n_groups,); see `Context` for what it may use.

        Raises:
            DataError: It needs data and there is none.
        """
        if (self.needs_data and context.data is None) or (self.needs_labels and context.scorer is None):
            raise DataError(
                f"Criterion {self.name!r} looks at samples and got none. Give --data, or take one of "
                f"{', '.join(name for name, row in CRITERIA.items() if not row.needs_data)}."
            )
        return self.function(space, context)


def refuse_unscored(precision: str, criterion: Criterion, data: Dataset | None) -> None:
    """Raise where another precision than FP32 is asked for and nothing would be scored in it.

    Raises:
        DataError: No labelled data, or a criterion that scores no networks.
    """
    if precision != "fp32" and (data is None or not criterion.needs_labels):
        raise DataError(
            f"Precision {precision} is about scoring on data, and the criterion {criterion.name} scores nothing. Leave "
            "it out."
        )


def find(name: str | Criterion | CriterionFunction) -> Criterion:
    """The criterion of that name; a function is one that needs no data and ranks once.

    Raises:
        PlanError: There is none of that name.
    """
    if isinstance(name, Criterion):
        return name
    if callable(name):
        return Criterion(getattr(name, "__name__", "custom"), name)
    if name not in CRITERIA:
        raise PlanError(f"There is no criterion {name!r}. Take one of {', '.join(CRITERIA)}.", criterion=name)
    return CRITERIA[name]


def car(space: ChannelSpace, context: Context) -> Importances:
    """Classification accuracy reduction: base score minus the score without the group, on the same samples.

    For metrics that are losses it is their increase, for regression scores their fall (RAR). 1 / n_samples is the
    smallest step. Source: Abbasi-Asl and Yu 2021, 10.3389/fdata.2021.704182.
    """
    assert context.scorer is not None
    asked = context.asked(space)
    out = np.full(len(space.groups), np.nan)
    base = context.scorer.base(context.removed)
    for group, score in zip(asked, context.scorer.score(context.removed, asked), strict=True):
        out[group] = base.reduction(score)
    return out


def class_car(space: ChannelSpace, context: Context) -> Importances:
    """Largest reduction over the classes: a filter stays as long as any class needs it.

    The CAR of a class is the fall of that class's accuracy (Abbasi-Asl and Yu 2021, 10.3389/fdata.2021.704182); the
    maximum makes one ranking of them.
    """
    assert context.scorer is not None
    asked = context.asked(space)
    out = np.full(len(space.groups), np.nan)
    base = context.scorer.base(context.removed)
    for group, score in zip(asked, context.scorer.score(context.removed, asked), strict=True):
        per_class = base.class_reductions(score)
        if per_class is None:
            raise DataError("Criterion 'class-car' needs class labels, and this data has none. Take 'car'.")
        out[group] = np.nanmax(per_class)
    return out


def l1(space: ChannelSpace, context: Context) -> Importances:
    """Sum of absolute weights of a filter, the mean over the group's filters; biases do not count.

    Source: Li et al. 2017, Pruning filters for efficient ConvNets, arXiv:1608.08710.
    """
    return _filter_norms(space, lambda weight: np.abs(weight).sum(1))


def l2(space: ChannelSpace, context: Context) -> Importances:
    """Euclidean norm of a filter's weights, the mean over the group's filters; biases do not count.

    Source: He et al. 2018, Soft filter pruning, arXiv:1808.06866.
    """
    return _filter_norms(space, lambda weight: np.sqrt(np.square(weight).sum(1)))


def outgoing(space: ChannelSpace, context: Context) -> Importances:
    """Mean absolute value of the weights that read the group's channels, over all reading weights together.

    0 where no weight reads them. One of the criteria that CAR is compared with in Abbasi-Asl and Yu 2021,
    10.3389/fdata.2021.704182.
    """
    return np.asarray([_mean(space.outgoing(group.id), np.abs) for group in space.groups], np.float64)


def variance(space: ChannelSpace, context: Context) -> Importances:
    """Contribution variance: variance of a channel over positions and samples x mean square of the reading weights.

    A reader gets w x from the channel; its variance w^2 var(x) is what no bias can stand in for. A group's var(x) is
    the mean over its channels, where they are read. Source: Thimm and Fiesler 1995, Evaluating pruning methods; for
    channels Polyak and Wolf 2015, 10.1109/ACCESS.2015.2494536.
    """
    moments = _Moments(space)
    for read, values in _activations(space, context):
        moments.add(read, values, values.astype(np.float64), np.square(values, dtype=np.float64))
    first, second = moments.means()
    spread = np.maximum(second - first**2, 0)
    weights = np.asarray([_mean(space.outgoing(group.id), np.square) for group in space.groups], np.float64)
    return moments.per_group(spread) * weights


def apoz(space: ChannelSpace, context: Context) -> Importances:
    """1 - average percentage of zeros: the share of positions and samples where the channel is not zero, as it is read.

    Source: Hu et al. 2016, Network trimming, arXiv:1607.03250 (APoZ, where larger means remove: hence 1 - it).
    """
    moments = _Moments(space)
    for read, values in _activations(space, context):
        moments.add(read, values, (values != 0).astype(np.float64))
    return moments.per_group(moments.means()[0])


def function(space: ChannelSpace, context: Context) -> Importances:
    """How far a filter's function is from that of the filter that could stand in for it: 1 - correlation of responses.

    Filters of a layer whose pooled responses correlate form clusters; the one that contributes most represents its
    cluster and leaves last, so no cluster is emptied before the others. A group counts as its first layer's filter.
    After Qin et al. 2018, Functionality-oriented convolutional filter pruning, arXiv:1810.07322, who cluster
    activation-maximised images; see `interpret.redundancy` and `interpret.contribution`.
    """
    from onnxcar import interpret

    assert context.data is not None
    out = np.full(len(space.groups), 2.0)  # what cannot be watched is taken for unique
    owners = {group.layer for group in space.groups}
    found = interpret.responses(
        space,
        context.data,
        layers=sorted(owners),
        top=False,
        provider=context.provider,
        threads=context.threads,
        batch_bytes=context.batch_bytes,
    )
    for state in found.layers:
        own = np.asarray([g >= 0 and space.groups[g].layer == state.layer.index for g in state.layer.groups])
        at = np.flatnonzero(own)
        groups, first = np.unique(state.layer.groups[at], return_index=True)
        at = at[first]
        share = interpret.contribution(space, state)[at]
        out[groups] = interpret.redundancy(state.correlation()[np.ix_(at, at)], share)
    return out


def reconstruction(space: ChannelSpace, context: Context) -> Importances:
    """Rise of the outputs' squared distance to the original's if the group left and its readers were refitted.

    What a refit makes up for costs nothing: made for `--recover least-squares`, and on its own (unrepaired) no measure
    of what is lost. Asked again at every step. `recovery.Reconstruction` says how. Source: Hassibi and Stork 1993,
    Second order derivatives for network pruning: optimal brain surgeon; for layers Dong et al. 2017, arXiv:1705.07565.
    """
    assert context.data is not None
    if "reconstruction" not in context.memo:
        context.memo["reconstruction"] = Reconstruction(
            space,
            context.data,
            provider=context.provider,
            threads=context.threads,
            memory_bytes=context.memory_bytes,
            seed=context.seed,
            progress=context.progress,
        )
    held: Reconstruction = context.memo["reconstruction"]
    return held.importances(context.removed)


def random(space: ChannelSpace, context: Context) -> Importances:
    """Uniform in [0, 1), by `seed` alone."""
    return np.random.default_rng(context.seed).random(len(space.groups))


CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("car", car, needs_data=True, needs_labels=True, greedy=True, source="10.3389/fdata.2021.704182"),
        Criterion(
            "class-car",
            class_car,
            needs_data=True,
            needs_labels=True,
            greedy=True,
            source="10.3389/fdata.2021.704182",
        ),
        Criterion("l1", l1, source="arXiv:1608.08710"),
        Criterion("l2", l2, source="arXiv:1808.06866"),
        Criterion("outgoing", outgoing, source="10.3389/fdata.2021.704182"),
        Criterion("variance", variance, needs_data=True, source="10.1109/ACCESS.2015.2494536"),
        Criterion("apoz", apoz, needs_data=True, source="arXiv:1607.03250"),
        Criterion("function", function, needs_data=True, source="arXiv:1810.07322"),
        Criterion("reconstruction", reconstruction, needs_data=True, greedy=True, source="arXiv:1705.07565"),
        Criterion("random", random),
    )
}


def per_layer_unit(space: ChannelSpace, importances: Importances) -> Importances:
    """Importances divided by the Euclidean norm of their layer's, so that layers of different scale can compete.

    Source: Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient inference,
    arXiv:1611.06440, section 2.2. A group belongs to its first layer.
    """
    owner = np.asarray([group.layer for group in space.groups])
    out = importances.copy()
    for layer in np.unique(owner):
        members = owner == layer
        norm = float(np.sqrt(np.nansum(np.square(importances[members]))))
        out[members] = importances[members] / norm if norm > 0 else 0.0
    return out


def _filter_norms(
    space: ChannelSpace, norm: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> Importances:
    """Mean over a group's filters of a norm of each: `norm` maps (filters, weights of one) to (filters,)."""
    total, n_filters = np.zeros(len(space.groups)), np.zeros(len(space.groups))
    for layer in space.layers:
        owned = layer.groups >= 0
        if owned.any():
            weight = np.asarray(space.weight(layer), np.float64).reshape(layer.filters, -1)
            np.add.at(total, layer.groups[owned], norm(weight)[owned])
            np.add.at(n_filters, layer.groups[owned], 1)
    return total / np.maximum(n_filters, 1)


def _mean(arrays: Sequence[npt.NDArray[Any]], of: Callable[[Any], Any]) -> float:
    """Mean of a function of all elements of several arrays, 0.0 of none."""
    size = sum(array.size for array in arrays)
    return sum(float(of(np.asarray(array, np.float64)).sum()) for array in arrays) / size if size else 0.0


class _Moments:
    """Sums over samples and positions for every channel of every read, in float64, batch by batch."""

    def __init__(self, space: ChannelSpace) -> None:
        self._n_groups = len(space.groups)
        self._sums: dict[str, list[npt.NDArray[np.float64]]] = {}
        self._counts: dict[str, int] = {}
        self._groups: dict[str, npt.NDArray[np.int32]] = {}

    def add(self, read: Read, values: npt.NDArray[Any], *terms: npt.NDArray[np.float64]) -> None:
        """Add `terms`, arrays like `values` (batch, ...), to the sums of this read."""
        rest = tuple(axis for axis, size in enumerate(read.groups.shape) if size == 1)
        sums = [term.sum(axis=rest, keepdims=True) for term in terms]
        held = self._sums.setdefault(read.value, [np.zeros(read.groups.shape) for _ in sums])
        for total, new in zip(held, sums, strict=True):
            total += new
        self._counts[read.value] = self._counts.get(read.value, 0) + values.size // read.groups.size
        self._groups[read.value] = read.groups

    def means(self) -> list[npt.NDArray[np.float64]]:
        """Mean of each term for all channels of all reads, one after the other, (n_channels,) each."""
        if not self._sums:
            return [np.zeros(0), np.zeros(0)]
        per_read = [[total.ravel() / self._counts[name] for total in sums] for name, sums in self._sums.items()]
        return [np.concatenate(column) for column in zip(*per_read, strict=True)]

    def per_group(self, channels: npt.NDArray[np.float64]) -> Importances:
        """Mean over each group's channels of a number per channel, in the order of `means`; 0 if never read."""
        if not self._groups:
            return np.zeros(self._n_groups)
        ids = np.concatenate([groups.ravel() for groups in self._groups.values()])
        owned = ids >= 0
        total = np.bincount(ids[owned], channels[owned], self._n_groups)
        number = np.bincount(ids[owned], minlength=self._n_groups)
        return np.asarray(total / np.maximum(number, 1), np.float64)


def _activations(space: ChannelSpace, context: Context) -> Iterator[tuple[Read, npt.NDArray[Any]]]:
    """Values whose channels are read, of the original network, batch by batch over all samples."""
    data = context.data
    assert data is not None
    reads = {read.value: read for read in space.reads if (read.groups >= 0).any()}
    few = data.inputs(np.arange(min(4, len(data))))
    sample = few if len(data) > 1 else None  # whether a fixed batch can be freed shows on more than one
    network = runtime.open_network(space.model, provider=context.provider, threads=context.threads, sample=sample)
    proto = onnx.ModelProto()
    proto.CopyFrom(network.proto)
    del proto.graph.output[:]
    for name in reads:
        kind = space.facts.dtype(name) or onnx.TensorProto.FLOAT
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    watched = runtime.session(Model(proto, "", space.model.path), provider=context.provider, threads=context.threads)
    # Shapes are known at batch 2; four bytes an element.
    per_sample = sum(2 * int(np.prod(space.facts.shape(name) or (1,))) for name in reads)
    size = network.fixed or max(1, min(256, context.batch_bytes // max(per_sample, 1)))
    for start in range(0, len(data), size):
        # A fixed batch is filled up with its own last sample; those rows are taken off again.
        n = min(size, len(data) - start)
        where = np.minimum(np.arange(start, start + (network.fixed or n)), len(data) - 1)
        for (_, read), values in zip(reads.items(), watched.run(data.inputs(where), list(reads)), strict=True):
            yield read, values[:n] if len(values) == len(where) else values
