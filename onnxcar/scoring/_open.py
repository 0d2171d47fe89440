"""Makes sites: the graphs of prefix, suffix and shortcut, their sessions, and the proof that rows do not mix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcar.channels import ChannelSpace
from onnxcar.errors import DataError, ModelError
from onnxcar.model import Model
from onnxcar.runtime import Network, Session, extract, graph_inputs, session, uses
from onnxcar.scoring._build import (
    PREFIX,
    batch_first,
    cut_values,
    expand_masks,
    gather_rows,
    mask_name,
    masked,
    outputs,
    own_values,
    value_kinds,
)
from onnxcar.scoring._linear import Reader, linear_readers, subtract
from onnxcar.scoring._site import BASE, Block, Shortcut, Site

__all__ = ["open_site", "shared_site", "whole_site"]

Array = npt.NDArray[Any]
# Not continuous: a difference in the last bit may come out as a whole step.
_STEPS = {"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil", "Sign", "Mod", "ArgMax", "TopK"}
ROUNDING = 1e-3  # a shortcut further off than this, relative to the outputs, is wrong
SAFETY = 64  # rows whose outputs are nearer than so many times the rounding seen run the whole suffix


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
    if network.session.on_device:
        expand_masks(suffix_proto, space, reads)
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
        if network.session.on_device:
            expand_masks(suffix_proto, space, reads)
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
        if network.session.on_device:
            expand_masks(suffix, space, site.reads)
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
    made = Model(proto, "", space.model.path)
    return session(made, provider=inner.provider, threads=inner.threads, wide=own_values(network))


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
    half = want.dtype == np.float16 or site.suffix.provider.precision != "fp32"
    loose = 3e-2 if half else 1e-3  # rounding; rows that mix are off by far more
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max()) <= loose * scale
