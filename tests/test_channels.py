"""The algebra of labels, and what a space says of groups, costs and limits."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.channels import Classes, Reason, unique_sets
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import Net, layer_of, random_plan, weights_of

WHY, OTHER = Reason("a", "Add", "first"), Reason("b", "Mul", "second")


# --- classes -----------------------------------------------------------------------------------------------------


def test_fresh_labels_are_classes_of_their_own():
    classes = Classes()
    a, b = classes.fresh(3), classes.fresh(2)
    assert a.tolist() == [1, 2, 3]
    assert b.tolist() == [4, 5]
    assert len(set(classes.roots(np.concatenate([a, b])).tolist())) == 5


def test_ties_are_transitive_and_the_smallest_label_stands_for_all():
    classes = Classes()
    x = classes.fresh(6)
    classes.tie(x[[4]], x[[2]], WHY)
    classes.tie(x[[2]], x[[5]], WHY)
    classes.tie(x[[5]], x[[0]], WHY)
    assert classes.roots(x).tolist() == [1, 2, 1, 4, 1, 1]
    assert classes.find(int(x[4])) == 1


def test_ties_broadcast():
    classes = Classes()
    x = classes.fresh(6).reshape(2, 3)
    classes.tie(x[:1], x, WHY)
    assert classes.roots(x).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_a_tie_to_nothing_is_protection_whenever_it_comes():
    classes = Classes()
    x = classes.fresh(4)
    classes.tie(x[[0]], np.zeros(1, np.int64), WHY)
    classes.tie(x[[0]], x[[1]], OTHER)
    classes.tie(x[[2]], x[[3]], OTHER)
    classes.protect(x[[3]], WHY)
    assert [classes.reason(int(i)) for i in x] == [WHY, WHY, WHY, WHY]


def test_the_first_reason_of_a_class_stays():
    classes = Classes()
    x = classes.fresh(2)
    classes.protect(x[[1]], WHY)
    classes.protect(x[[1]], OTHER)
    classes.tie(x[[0]], x[[1]], OTHER)
    assert classes.reason(1) == classes.reason(2) == WHY


def test_what_is_free_has_no_reason_and_nothing_is_label_zero():
    classes = Classes()
    x = classes.fresh(1)
    assert classes.reason(int(x[0])) is None
    assert classes.reason(0) is not None
    classes.protect(np.zeros(3, np.int64), WHY)
    assert classes.reason(0) != WHY


def test_long_chains_of_ties_are_found():
    classes = Classes()
    x = classes.fresh(5000)
    for i in range(4999, 0, -1):
        classes.tie(x[[i]], x[[i - 1]], WHY)
    assert set(classes.roots(x).tolist()) == {1}


def test_roots_follow_ties_made_after_they_were_asked_for():
    classes = Classes()
    x = classes.fresh(4)
    classes.settle()
    assert classes.roots(x).tolist() == [1, 2, 3, 4]
    classes.tie(x[[0]], x[[3]], WHY)
    assert classes.roots(x).tolist() == [1, 2, 3, 1]
    y = classes.fresh(1)
    assert classes.roots(y).tolist() == y.tolist()


def test_sets_are_kept_once():
    a, b = np.asarray([1, 2]), np.asarray([3])
    assert [n for n, _ in unique_sets([("x", a), ("y", b), ("z", a.copy())])] == ["x", "y"]


# --- spaces ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space():
    """conv (6, tied to block), inner (4), depth (6, with conv), tail (5), head."""
    net = Net()
    a = net.op("Relu", net.norm(net.conv(net.input(), 6)))
    b = net.conv(net.op("Relu", net.conv(a, 4, name="inner")), 6, name="block")
    c = net.op("Relu", net.op("Add", a, b))
    return analyze(net.model(net.head(net.conv(c, 6, group=6, name="depth"))))


def test_groups_are_dense_and_in_graph_order(space):
    assert [g.id for g in space.groups] == list(range(15))
    assert [g.layer for g in space.groups] == [0] * 6 + [1] * 4 + [4] * 5
    assert [x.node for x in space.layers] == ["conv", "inner", "block", "depth", "tail", "head"]
    assert [x.kind for x in space.layers] == ["conv", "conv", "conv", "depthwise", "conv", "dense"]
    for g in space.groups:
        assert g.name == f"{space.layers[g.layer].node}:{g.filters[0][1]}"


def test_members_agree_with_layers(space):
    for layer in space.layers:
        for i, g in enumerate(layer.groups.tolist()):
            assert g < 0 or (layer.weight, i) in space.groups[g].filters
    assert space.groups[0].filters == (("conv_w", 0), ("block_w", 0), ("depth_w", 0))


def test_costs_by_hand(space):
    conv, inner, block, depth, tail = 6 * 27, 4 * 54, 6 * 36, 6 * 9, 5 * 54
    assert space.cost().macs == 64 * (conv + inner + block + depth + tail) + 20
    left = 64 * (5 * 27 + 4 * 45 + 5 * 36 + 5 * 9 + 5 * 45) + 20
    assert space.cost({0}).macs == left
    assert space.saved_macs(0) == space.cost().macs - left
    gone = 1 * 27 + 1 + 4 + 4 * 9 + 36 + 1 + 9 + 1 + 5 * 9  # conv, norm, inner, block, depth, tail
    assert space.cost().params - space.cost({0}).params == gone


def test_saved_macs_add_up_along_any_order(space):
    for seed in range(4):
        order = sorted(random_plan(space, 0.6, seed).groups, key=lambda g: (g * 7 + seed) % 11)
        removed: set[int] = set()
        for g in order:
            saved = space.saved_macs(g, removed)
            assert saved == space.cost(removed).macs - space.cost(removed | {g}).macs
            removed.add(g)
        assert space.saved_macs(order[0], removed) == 0


def test_the_last_channel_of_an_axis_is_never_allowed(space):
    inner = [g.id for g in space.groups if g.layer == 1]
    assert space.allows(inner[2], set(inner[:2]))
    assert not space.allows(inner[3], set(inner[:3]))
    assert space.blocked(set(inner[:3])) == {inner[3]}
    assert space.blocked(set()) == set()
    assert space.empties(set(inner[:3])) is None
    assert space.empties(set(inner)) is not None


def test_blocked_is_what_allows_denies(space):
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        removed: set[int] = set()
        for g in rng.permutation(len(space.groups)).tolist():
            if space.allows(g, removed):
                removed.add(g)
        left = set(range(len(space.groups))) - removed
        assert space.blocked(removed) & left == {g for g in left if not space.allows(g, removed)}
        seen += len(left)
    assert seen > 50


def test_weights_have_filters_first(space):
    held = weights_of(space.model)
    for name in ("conv", "inner", "block", "depth", "tail", "head"):
        layer = layer_of(space, name)
        assert np.array_equal(space.weight(layer), held[layer.weight])


def test_weights_of_grouped_transposed_convs_have_filters_first():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    w = net.random(6, 4, 2, 2)
    y = net.op("ConvTranspose", a, w, name="up", group=2, strides=[2, 2])
    space = analyze(net.model(net.head(y)))
    found = space.weight(layer_of(space, "up"))
    assert found.shape == (8, 3, 2, 2)
    for f in range(8):  # filter f lies in block f // 4, column f % 4, and reads that block's three channels
        assert np.array_equal(found[f], w[f // 4 * 3 : f // 4 * 3 + 3, f % 4])


def test_outgoing_weights_are_the_readers_slices(space):
    held = weights_of(space.model)
    (inner,) = space.outgoing(next(g.id for g in space.groups if g.name == "inner:2"))
    assert np.array_equal(np.ravel(inner), held["block_w"][:, 2].ravel())
    sizes = sorted(x.size for x in space.outgoing(0))
    assert sizes == [4 * 9, 5 * 9]  # inner and, behind the depthwise Conv, tail
    (last,) = space.outgoing(next(g.id for g in space.groups if g.name == "tail:1"))
    assert np.array_equal(np.ravel(last), held["head_w"][:, 1])


def test_outgoing_weights_of_grouped_readers():
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 8))
    y = net.conv(a, 6, group=2, name="grouped")
    space = analyze(net.model(net.head(y)))
    held = weights_of(space.model)["grouped_w"]
    members = [i for n, i in space.groups[0].filters if n == "conv_w"]
    (found,) = space.outgoing(0)
    want = np.concatenate([held[i // 4 * 3 : i // 4 * 3 + 3, i % 4].ravel() for i in members])
    assert sorted(found.ravel().tolist()) == sorted(want.tolist())


def test_tables_of_what_lives(space):
    alive = space.alive({1, 3})
    assert alive.shape == (len(space.groups) + 1,)
    assert alive[-1]
    assert np.flatnonzero(~alive).tolist() == [1, 3]


def test_every_filter_is_in_a_group_or_protected_with_a_reason(space):
    for layer in space.layers:
        held = {i for p in space.protected if p.layer == layer.node for i in p.filters}
        assert held == set(np.flatnonzero(layer.groups < 0).tolist())
    assert all(p.reason and p.node for p in space.protected)


def test_labels_of_a_space_are_those_of_the_pruned_one(space):
    # what the space says of every axis is what the file has after the removal
    plan = random_plan(space, 0.5, 2)
    table = space.alive(plan.groups)
    facts = analyze(remove(space, plan)).facts
    checked = 0
    for name, ids in space.labels.items():
        want = [int(table[ids].any(axis=tuple(b for b in range(ids.ndim) if b != a)).sum()) for a in range(ids.ndim)]
        got = facts.shape(name)
        assert all(n == 1 or n == w for n, w in zip(ids.shape, got, strict=True)) or got is not None
        for axis, n in enumerate(ids.shape):
            if n > 1:
                assert got[axis] == want[axis], name
                checked += 1
    assert checked > 8
    assert plan != Plan()
