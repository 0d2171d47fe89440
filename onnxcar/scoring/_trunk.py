"""One pass for all sites: the network as pruned so far gives every site's cut values and its own outputs at once.

Where all sites compete, a prefix for each would run the front of the network again and again. Here masks are inputs,
so that neither this pass nor the sites' suffixes are made anew when groups leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar._device import Buffer
from onnxcar.channels import ChannelSpace
from onnxcar.errors import ModelError
from onnxcar.executors import Pool
from onnxcar.model import Model
from onnxcar.runtime import Network, extract, graph_inputs, session
from onnxcar.scoring._build import batch_first, cut_values, mask_name, masked, outputs, own_values, value_kinds
from onnxcar.scoring._held import filled
from onnxcar.scoring._linear import linear_readers
from onnxcar.scoring._open import shared_site
from onnxcar.scoring._site import Block, Site

__all__ = ["Trunk", "open_trunk"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


class Trunk:
    """What all sites share; `open_trunk` makes it.

    Attributes:
        sites: Reads -> the site, for every key of the space.
        sizes: Name of a value -> bytes of one image.
        each_bytes: Memory of one image's values.
        provider: Where it runs.
    """

    def __init__(self, space: ChannelSpace, network: Network, values: Sequence[str], read: Sequence[str]) -> None:
        """Make the session.

        Args:
            space: Structure of the model.
            network: The model, loaded.
            values: Cut values of all sites.
            read: Outputs of linear readers.

        Raises:
            ModelError: ONNX Runtime does not run the graph.
        """
        self.space = space
        self.sites: dict[tuple[int, ...], Site] = {}
        self.each_bytes = 1
        self.sizes: dict[str, int] = {}
        self._values, self._read = tuple(values), tuple(read)
        every = range(len(space.reads))
        proto = masked(space, network.proto, (), (), every)
        names = [i.name for i in graph_inputs(network.proto)]
        self._output = outputs(proto)[0]
        self._direct = [name for name in self._values if name in names]
        self._made = [name for name in dict.fromkeys([*self._values, *self._read]) if name not in names]
        wanted = list(dict.fromkeys([*self._made, self._output]))
        made = extract(proto, [*names, *map(mask_name, every)], wanted, value_kinds(space, proto))
        inner = network.session
        whole = Model(made, "", space.model.path)
        self._session = session(whole, provider=inner.provider, threads=inner.threads, wide=own_values(network))
        self.provider = inner.provider
        self._types = {i.name: i.dtype for i in self._session.inputs}
        self._room: dict[str, Array] = {}
        self._held: dict[str, Buffer] = {}

    def bytes_of(self, names: Iterable[str]) -> int:
        """Memory of one image's values of these names."""
        return max(1, sum(self.sizes[name] for name in names))

    def keep_only(self, values: Sequence[str], read: Sequence[str]) -> None:
        """Store no other values from now on."""
        self._direct = [name for name in self._direct if name in values]
        self._made = [name for name in self._made if name in values or name in read]
        self._values = tuple(name for name in self._values if name in values)
        self._read = tuple(name for name in self._read if name in read)
        self._room.clear()
        self._held.clear()

    def run(self, feeds: Mapping[str, Array], removed: frozenset[int], *, values: bool = True) -> dict[str, Array]:
        """Values of some images without the groups `removed`; the network's output under the key ""."""
        masks = self.masks(removed)
        wanted = [*(self._made if values else ()), self._output]
        got = dict(zip(wanted, self._session.run(dict(feeds) | masks, wanted), strict=True))
        out = {name: got[name] for name in self._made} | {name: feeds[name] for name in self._direct} if values else {}
        return out | {"": got[self._output]}

    def masks(self, removed: frozenset[int]) -> dict[str, Array]:
        """Feeds that mask these groups."""
        alive = self.space.alive(removed)
        return {
            mask_name(k): alive[read.groups].astype(self._types[mask_name(k)])
            for k, read in enumerate(self.space.reads)
        }

    def load(
        self,
        inputs: Callable[[Indices], dict[str, Array]],
        indices: Indices,
        removed: frozenset[int],
        batch: int,
        pool: Pool,
        outputs: Callable[[Indices, Array], None],
    ) -> Block:
        """All values of the images at `indices`, which rise; any block loaded before is overwritten.

        Args:
            inputs: Gives the network inputs of images.
            indices: Which images.
            removed: Groups that are masked.
            batch: Images of a run.
            pool: Runs batches side by side.
            outputs: Told the network's outputs of images.
        """
        n = len(indices)
        if self._session.on_device:
            return self._load_held(inputs, indices, removed, batch, pool, outputs)
        if any(len(room) < n for room in self._room.values()):
            self._room.clear()

        def run(start: int) -> tuple[Indices, Array]:
            at = indices[start : start + batch]
            got = self.run(inputs(at), removed)
            out = got.pop("")
            for name, value in got.items():
                room = self._room.get(name)
                if room is None:
                    room = self._room.setdefault(name, np.empty((n, *value.shape[1:]), value.dtype))
                room[start : start + len(at)] = value
            return at, out

        for at, out in pool.map(run, range(0, n, batch)):
            outputs(at, out)
        held = {name: room[:n] for name, room in self._room.items()}
        return Block(indices, {name: held[name] for name in self._values}, {name: held[name] for name in self._read})

    def _load_held(
        self,
        inputs: Callable[[Indices], dict[str, Array]],
        indices: Indices,
        removed: frozenset[int],
        batch: int,
        pool: Pool,
        outputs: Callable[[Indices, Array], None],
    ) -> Block:
        """As `load`, with the values left on the device."""
        masks = {name: self._session.hold(mask) for name, mask in self.masks(removed).items()}
        n, lock = len(indices), Lock()
        made = [name for name in self._made if name != self._output]
        rooms: dict[str, Array] = {}  # what the host has anyway

        def keep(name: str, first: int, value: Array) -> None:
            with lock:
                room = rooms.setdefault(name, np.empty((n, *value.shape[1:]), value.dtype))
            room[first : first + len(value)] = value

        def feeds(first: int, last: int) -> dict[str, Any]:
            got = inputs(indices[first:last])
            for name in self._direct:
                keep(name, first, got[name])
            return got | masks

        def told(first: int, last: int, got: list[Array]) -> None:
            outputs(indices[first:last], got[0])
            if self._output in self._made:
                keep(self._output, first, got[0])

        held = filled(self._session, made, feeds, n, batch, pool, self._held, told, others=[self._output])
        if any(len(buffer) > len(self._held.get(name, ())) for name, buffer in held.items()):
            self._held = dict(held)
        held = held | {name: self._session.hold(room) for name, room in rooms.items()}
        return Block(indices, {name: held[name] for name in self._values}, {name: held[name] for name in self._read})


def open_trunk(
    space: ChannelSpace, network: Network, keys: Sequence[tuple[int, ...]], sample: Mapping[str, Array]
) -> Trunk | None:
    """A trunk with the sites of these keys, None if one of them cannot be scored by rows.

    Args:
        space: Structure of the model.
        network: The model, loaded.
        keys: Reads of each site.
        sample: Network inputs of a few samples, by the graph's names.
    """
    every = set(range(len(space.reads)))
    if network.fixed is not None or not all(batch_first(space, read) for read in space.reads):
        return None
    try:
        cuts = {key: cut_values(space, network.proto, key) for key in keys}
        values = list(dict.fromkeys(name for cut in cuts.values() for name in cut))
        read: dict[str, None] = {}
        for key, cut in cuts.items():
            entries = [k for k in key if space.reads[k].value in cut]
            for reader in (linear_readers(space, network.proto, entries) or ()) if entries else ():
                read[reader.output] = None
        trunk = Trunk(space, network, values, list(read))
        got = trunk.run(sample, frozenset())
    except ModelError:
        return None
    want = got.pop("")
    n = len(want)
    block = Block(
        np.arange(n, dtype=np.int64), {name: got[name] for name in values}, {name: got[name] for name in read}
    )
    if any(len(value) != n for value in got.values()):
        return None
    for key in keys:
        site = shared_site(space, network, key, every - set(key), block, want)
        if site is None:
            return None
        trunk.sites[key] = site
    used = [site for site in trunk.sites.values() if site.shortcut is not None]
    kept = {reader.output for site in used for reader in (site.shortcut.readers if site.shortcut else ())}
    trunk.keep_only(values, sorted(kept))
    trunk.sizes = {name: max(1, got[name].nbytes // n) for name in {*values, *kept}}
    trunk.each_bytes = trunk.bytes_of(trunk.sizes)
    return trunk
