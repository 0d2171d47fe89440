"""A site: candidates whose channels are read at the same values, and the two graphs that score them.

The prefix is what no candidate changes; it runs once per image. The suffix is everything behind the masked reads. Its
rows are (candidate, image) pairs: each row takes its image's cut values and multiplies what is read by its own mask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar._device import Buffer
from onnxcar.channels import ChannelSpace
from onnxcar.errors import DataError, ModelError
from onnxcar.executors import Pool
from onnxcar.model import Model
from onnxcar.runtime import Network, Session, extract, graph_inputs, session, uses
from onnxcar.scoring._build import PREFIX, batch_first, cut_values, gather_rows, mask_name, masked, outputs, value_kinds
from onnxcar.scoring._held import Sizes, channel_sizes, filled
from onnxcar.scoring._linear import Reader, linear_readers, subtract

__all__ = ["BASE", "Block", "Site", "open_site", "reads_of", "shared_site", "whole_site"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
# Not continuous: a difference in the last bit may come out as a whole step.
_STEPS = {"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil", "Sign", "Mod", "ArgMax", "TopK"}
BASE = -2  # as a candidate: none; -1 marks positions that belong to no group
ROUNDING = 1e-3  # a shortcut further off than this, relative to the outputs, is wrong
SAFETY = 64  # rows whose outputs are nearer than so many times the rounding seen run the whole suffix


@dataclass(frozen=True, eq=False)
class Block:
    """Cut values of some images, held in memory: arrays, or `Buffer`s where sessions run on a device.

    Attributes:
        indices: Which images, (k,).
        values: Value name -> (k, ...).
        read: Output of each linear reader for the network as pruned so far, (k, ...); see `Site.refresh`.
    """

    indices: Indices
    values: dict[str, Any]
    read: dict[str, Any] = field(default_factory=dict)

    def flat(self, name: str) -> Any:
        """A value with images and channels on one axis, (k * channels, ...)."""
        value = self.values[name]
        return value.reshape(-1, *value.shape[2:])

    def where(self, images: Indices) -> Indices:
        """Positions of some of its images in the arrays; `indices` rise."""
        return np.searchsorted(self.indices, images)

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        return sum(value.nbytes for part in (self.values, self.read) for value in part.values())


def reads_of(space: ChannelSpace) -> dict[int, tuple[int, ...]]:
    """Group id -> indices of the reads where its channels are masked; a group that nothing reads is missing."""
    found: dict[int, list[int]] = {}
    for k, read in enumerate(space.reads):
        for group in np.unique(read.groups).tolist():
            if group >= 0:
                found.setdefault(group, []).append(k)
    return {group: tuple(ks) for group, ks in found.items()}


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The suffix behind linear readers: rows subtract from their outputs instead of running them.

    Attributes:
        readers: What is not run.
        reader: Runs them once per image, with the removed channels masked; None where a `Trunk` does.
        suffix: The rest.
        doubt: Outputs closer than this to one another are not told apart: such rows run the whole suffix.
    """

    readers: tuple[Reader, ...]
    reader: Session | None
    suffix: Session
    doubt: float = 0.0


class Site:
    """Scores candidates whose channels are read at `reads`; see `open_site`.

    Attributes:
        reads: Indices of the reads in the space.
        shared: Other reads whose mask is an input.
        by_row: Whether each row has a mask of its own; else all rows of a run share one candidate.
        cut: Names of the cut values with a row for each image.
        entries: Those of the reads that are cut values: their channels are known before the suffix runs.
        shortcut: Linear readers, where there are some.
    """

    def __init__(
        self,
        space: ChannelSpace,
        reads: tuple[int, ...],
        prefix: Network | None,
        suffix: Session,
        cut: Sequence[str],
        fixed: int | None = None,
        *,
        by_row: bool = False,
        shared: Collection[int] = (),
    ) -> None:
        """Hold the sessions; `open_site` and `shared_site` make them."""
        self.space = space
        self.reads = reads
        self.shared = tuple(shared)
        self.prefix = prefix
        self.suffix = suffix
        self.cut = tuple(cut)
        self.by_row = by_row
        self.shortcut: Shortcut | None = None
        self._fixed = fixed
        self.entries = tuple(k for k in reads if space.reads[k].value in self.cut) if self.by_row else ()
        self._groups = {k: space.reads[k].groups for k in reads}
        self._types = {i.name: i.dtype for i in suffix.inputs}
        self._keep: dict[int, Array] = {}
        self._sizes: dict[Any, Sizes] = {}
        self.set_removed(())

    def set_removed(self, removed: Collection[int]) -> None:
        """From now on these groups are masked in every row, besides the row's candidate; blocks need a `refresh`."""
        alive = self.space.alive(removed)
        self._keep = {k: alive[groups] for k, groups in self._groups.items()}
        self._common = {mask_name(k): alive[self.space.reads[k].groups] for k in self.shared}

    def load(
        self, inputs: Callable[[Indices], dict[str, Array]], indices: Indices, batch: int, pool: Pool | None = None
    ) -> Block:
        """Cut values of the images at `indices`; `inputs` gives their network inputs."""
        if self.by_row and self.prefix is not None and self.suffix.on_device:
            front = self.prefix.session
            held = filled(front, self.cut, lambda i, j: inputs(indices[i:j]), len(indices), batch, pool)
            return Block(indices, held)
        values: dict[str, Array] = {}

        def run(start: int) -> tuple[int, list[Array]]:
            feeds = inputs(indices[start : start + batch])
            return start, self.prefix.run(feeds) if self.prefix is not None else [feeds[name] for name in self.cut]

        for start, got in (pool or Pool(1)).map(run, range(0, len(indices), batch)):
            _store(values, dict(zip(self.cut, got, strict=True)), start, len(indices))
        return Block(indices, values)

    def refresh(self, block: Block, batch: int, pool: Pool | None = None) -> None:
        """Run the linear readers on all images of the block, for the groups that are removed now."""
        if self.shortcut is None or self.shortcut.reader is None:
            return
        session = self.shortcut.reader
        wanted = {i.name for i in session.inputs}
        masks = {name: value for name, value in self.masks(np.asarray([BASE]), session).items() if name in wanted}
        n = len(block.indices)
        values = {name: value for name, value in block.values.items() if name in wanted}

        def feeds(first: int, last: int) -> dict[str, Any]:
            return masks | {name: value[first:last] for name, value in values.items()}

        if session.on_device:
            block.read.update(filled(session, session.outputs, feeds, n, batch, pool, block.read))
            return

        def run(start: int) -> tuple[int, list[Array]]:
            return start, session.run(feeds(start, start + batch))

        for start, got in (pool or Pool(1)).map(run, range(0, n, batch)):
            _store(block.read, dict(zip(session.outputs, got, strict=True)), start, n)

    def masks(self, candidates: Indices, session: Session | None = None) -> dict[str, Array]:
        """Feeds that mask each row's candidate, (k,), and all removed groups."""
        types = self._types if session is None else {i.name: i.dtype for i in session.inputs}
        out = {name: keep.astype(types[name]) for name, keep in self._common.items() if name in types}
        for k, groups in self._groups.items():
            name = mask_name(k)
            if name in types:
                shape = (-1, *(1,) * (groups.ndim - 1))
                alive = self._keep[k] & (groups != candidates.reshape(shape))
                out[name] = alive.astype(types[name])
        return out

    def sizes(self, k: int, block: Block) -> npt.NDArray[np.float32]:
        """Sum of squares of the channels at the read k, one of `entries`, on each image, (k, channels).

        Zero exactly where all values of a channel are zero.
        """
        read = self.space.reads[k]
        values = block.values[read.value]
        rest = tuple(axis for axis, size in enumerate(read.groups.shape) if axis > 0 and size == 1)
        if isinstance(values, Buffer):
            key = (values.dtype.str, len(values.shape), rest)
            if key not in self._sizes:
                self._sizes[key] = Sizes(
                    values.dtype, len(values.shape), rest, self.suffix.provider, self.suffix.threads
                )
            return self._sizes[key].of(values)
        return channel_sizes(values, rest)

    def run(self, block: Block, candidates: Indices, rows: Indices, *, exact: bool = True) -> Array:
        """First output of the network for each pair, (k, ...).

        Args:
            block: Cut values.
            candidates: Group to mask in each row, `BASE` for none, (k,).
            rows: Position in `block` of each row's image, (k,).
            exact: Run all nodes; otherwise take the `shortcut` where there is one.
        """
        if self.by_row:
            n = len(rows)
            if n == 1:  # a single row takes another matrix kernel, which rounds differently
                candidates, rows = np.repeat(candidates, 2), np.repeat(rows, 2)
            short = None if exact else self.shortcut
            run = (
                self._run_rows(block, candidates, rows)
                if short is None
                else self._run_short(short, block, candidates, rows)
            )
            return run[:n]
        out: Array | None = None
        for group in np.unique(candidates).tolist():
            where = np.flatnonzero(candidates == group)
            got = self._run_shared(block, group, rows[where])
            if out is None:
                out = np.empty((len(rows), *got.shape[1:]), got.dtype)
            out[where] = got
        assert out is not None
        return out

    def _run_rows(self, block: Block, candidates: Indices, rows: Indices) -> Array:
        wanted = {i.name for i in self.suffix.inputs}
        feeds: dict[str, Any] = {PREFIX + "all." + name: value for name, value in (block.values | block.read).items()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        feeds[PREFIX + "rows"] = rows
        feeds.update(self.masks(candidates))
        return self.suffix.run(feeds)[0]

    def _run_short(self, short: Shortcut, block: Block, candidates: Indices, rows: Indices) -> Array:
        feeds: dict[str, Any] = {PREFIX + "rows": rows}
        feeds |= {f"{PREFIX}all.{name}": value for name, value in (block.values | block.read).items()}
        for reader in short.readers:
            if PREFIX + "flat." + reader.value in feeds:
                continue
            value = block.values[reader.value]
            feeds[PREFIX + "flat." + reader.value] = block.flat(reader.value)
            position, channels = reader.lookup(candidates)
            feeds[PREFIX + "candidate." + reader.value] = position
            feeds[PREFIX + "channel." + reader.value] = rows[:, None] * value.shape[1] + channels
        feeds.update(self.masks(candidates, short.suffix))
        return short.suffix.run({i.name: feeds[i.name] for i in short.suffix.inputs})[0]

    def _run_shared(self, block: Block, group: int, rows: Indices) -> Array:
        masks = self.masks(np.asarray([group]))
        step = self._fixed or len(rows)
        parts = []
        for start in range(0, len(rows), step):
            # A fixed batch is filled up with the last sample.
            where = rows[np.minimum(np.arange(start, start + step), len(rows) - 1)]
            feeds = {name: value[where] for name, value in block.values.items()}
            parts.append(self.suffix.run(feeds | masks)[0])
        return np.concatenate(parts)[: len(rows)]


def _store(into: dict[str, Array], parts: Mapping[str, Array], start: int, n: int) -> None:
    """Put a batch's values at `start` of arrays for n images."""
    for name, value in parts.items():
        if name not in into:
            into[name] = np.empty((n, *value.shape[1:]), value.dtype)
        into[name][start : start + len(value)] = value


def open_site(
    space: ChannelSpace,
    network: Network,
    reads: tuple[int, ...],
    removed: Collection[int],
    *,
    sample: Mapping[str, Array] | None = None,
) -> Site:
    """Graphs and sessions for candidates read at `reads`.

    Args:
        space: Structure of the model.
        network: The model, loaded; its node indices are those of the space.
        reads: Indices into `space.reads`.
        removed: Groups masked throughout; those at other reads are written into the graphs.
        sample: Network inputs of a few samples, on which a run by rows is held against the whole network; None: trust.

    Raises:
        ModelError: ONNX Runtime does not run the graphs.
    """
    if reads and network.fixed is None and all(batch_first(space, space.reads[k]) for k in reads):
        try:
            site = _row_site(space, network, reads, removed)
            if sample is None or _agrees(site, network, sample, removed):
                if sample is not None:
                    _shorten_alone(site, network, removed, sample)
                return site
        except (ModelError, DataError):
            pass  # a graph that mixes its rows, or cannot be cut: the whole network for each candidate
    return whole_site(space, network, reads, removed)


def whole_site(space: ChannelSpace, network: Network, reads: tuple[int, ...], removed: Collection[int]) -> Site:
    """A site that runs the whole network, one candidate a run: for fixed batches, or reads whose batch is not first."""
    proto = masked(space, network.proto, reads, removed)
    names = [i.name for i in graph_inputs(network.proto)]
    suffix = _session(
        space, extract(proto, [*names, *map(mask_name, reads)], outputs(proto), value_kinds(space, proto)), network
    )
    site = Site(space, reads, None, suffix, names, network.fixed)
    site.set_removed(removed)
    return site


def _row_site(space: ChannelSpace, network: Network, reads: tuple[int, ...], removed: Collection[int]) -> Site:
    proto = masked(space, network.proto, reads, removed)
    cut = cut_values(space, network.proto, reads)
    types = value_kinds(space, proto)
    suffix_proto = extract(proto, [*cut, *map(mask_name, reads)], outputs(proto), types)
    gather_rows(suffix_proto, cut)
    prefix_proto = extract(proto, [i.name for i in graph_inputs(network.proto)], cut, types)
    prefix = Network(_session(space, prefix_proto, network), prefix_proto)
    site = Site(space, reads, prefix, _session(space, suffix_proto, network), cut, by_row=True)
    site.set_removed(removed)
    return site


def shared_site(
    space: ChannelSpace, network: Network, reads: tuple[int, ...], shared: Collection[int], block: Block, want: Array
) -> Site | None:
    """A site without a prefix, every mask an input: a `Trunk` makes its blocks, and no session is made anew.

    Args:
        space: Structure of the model.
        network: The model, loaded.
        reads: Indices into `space.reads`.
        shared: All other reads.
        block: Values at the cut and outputs of linear readers, of a few samples.
        want: The network's outputs on them.

    Returns:
        None if the graph cannot be cut here, or mixes its rows.
    """
    try:
        proto = masked(space, network.proto, reads, (), shared)
        cut = cut_values(space, network.proto, reads)
        types = value_kinds(space, proto)
        suffix_proto = _used(extract(proto, [*cut, *map(mask_name, [*reads, *shared])], outputs(proto), types))
        gather_rows(suffix_proto, cut)
        site = Site(space, reads, None, _session(space, suffix_proto, network), cut, by_row=True, shared=sorted(shared))
        if not _rows_agree(site, block, want):
            return None
        readers = _readers(site, network)
        if readers:
            _shorten(site, network, proto, readers, block)
    except (ModelError, DataError):
        return None
    return site


def _used(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without inputs that nothing reads."""
    used = {name for node in proto.graph.node for name in uses(node)}
    kept = [i for i in proto.graph.input if i.name in used]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto


def _readers(site: Site, network: Network) -> list[Reader] | None:
    entries = [k for k in site.reads if k in site.entries]
    return linear_readers(site.space, network.proto, entries) if entries else None


def _shorten_alone(site: Site, network: Network, removed: Collection[int], sample: Mapping[str, Array]) -> None:
    """A shortcut for a site with a prefix of its own."""
    readers = _readers(site, network)
    if not readers:
        return
    _shorten(site, network, masked(site.space, network.proto, site.reads, removed), readers)
    if site.shortcut is None:
        return
    feeds = {i.name: value for i, value in zip(network.inputs, network.session.bind(sample).values(), strict=True)}
    n = len(next(iter(feeds.values())))
    try:
        block = site.load(lambda at: {name: value[at] for name, value in feeds.items()}, np.arange(n), n)
        site.refresh(block, n)
        doubt = _rounding(site, block)
    except (ModelError, DataError):
        doubt = None
    site.shortcut = None if doubt is None else replace(site.shortcut, doubt=doubt)


def _shorten(
    site: Site, network: Network, proto: onnx.ModelProto, readers: Sequence[Reader], block: Block | None = None
) -> None:
    """Give the site a shortcut over its linear readers if outputs stay the same but for rounding.

    Args:
        site: Takes it.
        network: The model, loaded.
        proto: Its graph with the masks of the site.
        readers: What the shortcut leaves out.
        block: A few samples with the readers' outputs; without it a session is made that runs the readers, and
            `_rounding` is the caller's to call.
    """
    space = site.space
    read = [reader.output for reader in readers]
    entries = [k for k in site.reads if k in site.entries]
    types = value_kinds(space, proto)
    try:
        reader = None
        if block is None:
            values = [space.reads[k].value for k in entries]
            reader = _session(space, extract(proto, [*values, *map(mask_name, entries)], read, types), network)
        rest = [mask_name(k) for k in (*site.reads, *site.shared) if k not in entries]
        suffix = extract(proto, [*dict.fromkeys([*site.cut, *read]), *rest], outputs(proto), types)
        used = {name for node in suffix.graph.node for name in uses(node)}
        if any(node.op_type in _STEPS for node in suffix.graph.node):
            return  # behind a step function rounding can become anything
        if set(read) - used:
            return  # Z is the network's output itself
        kept = [i for i in suffix.graph.input if i.name in used and i.name not in read]
        del suffix.graph.input[:]
        suffix.graph.input.extend(kept)
        gather_rows(suffix, site.cut)
        subtract(suffix, readers, PREFIX + "rows", types)
        site.shortcut = Shortcut(tuple(readers), reader, _session(space, suffix, network))
        doubt = None if block is None else _rounding(site, block)
    except (ModelError, DataError):
        doubt = None
    if block is not None:
        site.shortcut = None if doubt is None or site.shortcut is None else replace(site.shortcut, doubt=doubt)


def _rounding(site: Site, block: Block) -> float | None:
    """A distance of outputs far beyond what the shortcut's rounding can bridge; None if it is no matter of rounding."""
    n = len(block.indices)
    groups = [g for g in np.unique(site.space.reads[site.entries[0]].groups).tolist() if g >= 0]
    tried = np.asarray([BASE, *groups[:: max(1, len(groups) // 16)]], np.int64)
    candidates, rows = np.repeat(tried, n), np.tile(np.arange(n), len(tried))
    exact = site.run(block, candidates, rows).astype(np.float64)
    short = site.run(block, candidates, rows, exact=False).astype(np.float64)
    if exact.shape != short.shape or not np.isfinite(exact).all():
        return None
    gap, scale = float(np.abs(exact - short).max()), max(1e-6, float(np.abs(exact).max()))
    return None if not gap <= ROUNDING * scale else max(SAFETY * gap, 1e-5 * scale)


def _session(space: ChannelSpace, proto: onnx.ModelProto, network: Network) -> Session:
    inner = network.session
    return session(Model(proto, "", space.model.path), provider=inner.provider, threads=inner.threads)


def _agrees(site: Site, network: Network, sample: Mapping[str, Array], removed: Collection[int]) -> bool:
    """Whether a run by rows gives what the network gives; `_rows_agree` says how."""
    feeds = {i.name: value for i, value in zip(network.inputs, network.session.bind(sample).values(), strict=True)}
    n = len(next(iter(feeds.values())))
    block = site.load(lambda at: {name: value[at] for name, value in feeds.items()}, np.arange(n), n)
    if removed:
        whole = whole_site(site.space, network, site.reads, removed)
        want = whole.run(
            whole.load(lambda at: {k: v[at] for k, v in feeds.items()}, np.arange(n), n), np.full(n, BASE), np.arange(n)
        )
    else:
        want = network.run(feeds)[0]
    return _rows_agree(site, block, want)


def _rows_agree(site: Site, block: Block, want: Array) -> bool:
    """Whether rows without a candidate give these outputs; they repeat and swap images on purpose."""
    n = len(want)
    rows = np.asarray([i % n for i in range(n, -1, -1)] + [0], np.int64)
    got = site.run(block, np.full(len(rows), BASE), rows)
    want = want[rows]
    if got.shape != want.shape:
        return False
    if not np.isfinite(want.astype(np.float64)).all():
        return bool(np.array_equal(got, want, equal_nan=True))
    scale = max(1e-6, float(np.abs(want.astype(np.float64)).max()))
    loose = 3e-2 if want.dtype == np.float16 else 1e-3  # rounding; rows that mix are off by far more
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max()) <= loose * scale
