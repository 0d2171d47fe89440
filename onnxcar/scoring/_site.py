"""A site: candidates whose channels are read at the same values, and the two graphs that score them.

The prefix is what no candidate changes; it runs once per image. The suffix is everything behind the masked reads. Its
rows are (candidate, image) pairs: each row takes its image's cut values and multiplies what is read by its own mask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar._device import Buffer
from onnxcar.channels import ChannelSpace
from onnxcar.executors import Pool
from onnxcar.runtime import Network, Session
from onnxcar.scoring._build import (
    CANDIDATE,
    PREFIX,
    keep_name,
    mask_name,
)
from onnxcar.scoring._held import Sizes, channel_sizes, few_sizes, filled
from onnxcar.scoring._linear import Reader

__all__ = ["BASE", "Block", "Shortcut", "Site", "reads_of"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
BASE = -2  # as a candidate: none; -1 marks positions that belong to no group


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
    """Scores candidates whose channels are read at `reads`; see `_open`.

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
        """Hold the sessions; `open_site` and `shared_site` of `_open` make them."""
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
        self._tables: dict[str, Any] = {}

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

    def masks(self, candidates: Indices, session: Session | None = None) -> dict[str, Any]:
        """Feeds that mask each row's candidate, (k,), and all removed groups."""
        types = self._types if session is None else {i.name: i.dtype for i in session.inputs}
        if CANDIDATE in types:  # masks are made in the graph; what rows share is there already
            tables = self._common | {keep_name(k): keep for k, keep in self._keep.items()}
            for name in tables.keys() & types.keys() - self._tables.keys():
                self._tables[name] = self.suffix.hold(tables[name].astype(types[name]))
            shared = {name: table for name, table in self._tables.items() if name in types}
            return {**shared, CANDIDATE: candidates}
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
            session, feeds = self._feeds(block, candidates, rows, exact)
            return session.run(feeds)[0][: len(rows)]
        out: Array | None = None
        for group in np.unique(candidates).tolist():
            where = np.flatnonzero(candidates == group)
            got = self._run_shared(block, group, rows[where])
            if out is None:
                out = np.empty((len(rows), *got.shape[1:]), got.dtype)
            out[where] = got
        assert out is not None
        return out

    def run_held(self, block: Block, candidates: Indices, rows: Indices, *, exact: bool = True) -> Buffer:
        """As `run`, by rows, with the outputs left on the device."""
        session, feeds = self._feeds(block, candidates, rows, exact)
        return session.run_held(feeds)[: len(rows)]

    def _feeds(self, block: Block, candidates: Indices, rows: Indices, exact: bool) -> tuple[Session, dict[str, Any]]:
        """What to run and on what; filled up with copies of the last row where that is better."""
        n = len(rows)
        size = few_sizes(n) if self.suffix.on_device else n
        if size == 1:  # a single row takes another matrix kernel, which rounds differently
            size = 2
        if size > n:
            fill = np.minimum(np.arange(size), n - 1)
            candidates, rows = candidates[fill], rows[fill]
        if exact or self.shortcut is None:
            return self.suffix, self._row_feeds(block, candidates, rows)
        return self.shortcut.suffix, self._short_feeds(self.shortcut, block, candidates, rows)

    def _row_feeds(self, block: Block, candidates: Indices, rows: Indices) -> dict[str, Any]:
        wanted = {i.name for i in self.suffix.inputs}
        feeds: dict[str, Any] = {PREFIX + "all." + name: value for name, value in (block.values | block.read).items()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        feeds[PREFIX + "rows"] = rows
        feeds.update(self.masks(candidates))
        return feeds

    def _short_feeds(self, short: Shortcut, block: Block, candidates: Indices, rows: Indices) -> dict[str, Any]:
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
        return {i.name: feeds[i.name] for i in short.suffix.inputs}

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
