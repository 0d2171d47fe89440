"""A scorer over a model that shrinks answers as one that only masks, whatever it was asked before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxcar import surgery
from onnxcar.errors import UnsupportedError
from onnxcar.rules import analyze
from onnxcar.scoring import Scorer, evaluate
from onnxcar.shrinking import Shrinking, every_groups, every_macs, follow
from onnxcar.surgery import Plan
from tests.test_scoring import Loop, opened, plain_net, residual_net


def shrinking(make_model, build=residual_net, metric="top1", seed=0, n=120, **options):
    scorer, loop = opened(build, make_model, metric, seed=seed, n=n)
    made = Shrinking(scorer.space, scorer.data, metric=metric, provider="cpu", threads=1, **options)
    return made, scorer, loop


def candidates(space, removed, scope):
    left = [g.id for g in space.groups if g.id not in removed and space.allows(g.id, removed)]
    if scope == "global":
        return left
    first = min(space.groups[g].layer for g in left)
    return [g for g in left if space.groups[g].layer == first]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(["top1", "balanced", "loss"]),
    scope=st.sampled_from(["layer", "global"]),
    per_step=st.sampled_from([1, 4]),
    build=st.sampled_from([plain_net, residual_net]),
    width=st.integers(3, 5),
)
def test_whole_searches_pick_what_the_loop_picks(make_model, seed, metric, scope, per_step, build, width):
    def net(make_model, seed):
        return build(make_model, width, width + 2, seed=seed)

    made, _, loop = shrinking(make_model, net, metric, seed, n=40, due=every_groups(3))
    made.all_sites = scope == "global"
    space, removed = made.space, []
    while len(removed) < len(space.groups) // 2:
        left = candidates(space, removed, scope)
        base, keys = loop.cost(loop.result(removed), metric), {}
        for g in left:
            first, *rest = loop.key(removed, g, metric)
            keys[g] = ((first - base) / (space.saved_macs(g, removed) if scope == "global" else 1), *rest)
        picks = made.lowest(frozenset(removed), left, k=per_step, per_mac=scope == "global")
        for pick, best in zip(picks, sorted(left, key=keys.__getitem__), strict=False):
            # Sums of another order: candidates whose keys agree to float32's digits may swap.
            assert pick.group == best or np.allclose(keys[pick.group][:2], keys[best][:2], rtol=1e-6, atol=1e-6)
            assert pick.score.correct == loop.result([*removed, pick.group])["correct"]
            assert pick.score.loss == pytest.approx(keys[pick.group][1], abs=1e-5)
        for pick in picks:
            if space.allows(pick.group, removed):
                removed.append(pick.group)
        made.step(frozenset(removed))
        assert made.base(frozenset(removed)).correct == loop.result(removed)["correct"]
    assert made.rebuilds > 0


def test_answers_follow_from_the_steps_and_not_from_the_questions(make_model):
    made, scorer, _ = shrinking(make_model, due=every_groups(2))
    later, _, _ = shrinking(make_model, due=every_groups(2))
    sets = [frozenset(range(8, 8 + i)) for i in range(1, 8)]
    left = [g for g in scorer.space.layers[1].groups.tolist() if g not in sets[-1]]
    for removed in sets:  # the one is asked all along, the other is told the same steps by a journal
        made.lowest(removed, left)
        made.base(removed)
        made.step(removed)
        later.step(removed)
    found, resumed = made.lowest(sets[-1], left, k=3), later.lowest(sets[-1], left, k=3)
    assert [(p.group, p.score.loss_units) for p in found] == [(p.group, p.score.loss_units) for p in resumed]
    assert made.score(sets[-1], left[:2])[1].loss_units == later.score(sets[-1], left[:2])[1].loss_units
    assert later.rebuilds == 1 < made.rebuilds


def test_what_is_given_back_is_asked_of_a_model_that_still_has_it(make_model):
    made, scorer, _ = shrinking(make_model, due=every_groups(2))
    made.step(frozenset({9, 11}))
    made.step(frozenset({9, 11, 14, 20}))
    left = [g for g in scorer.space.layers[1].groups.tolist() if g not in (9, 11)]
    for removed in (frozenset({9, 11, 14, 20}), frozenset({9, 11, 14}), frozenset({9}), frozenset[int]()):
        some = [g for g in left if g not in removed]
        want, got = scorer.score(removed, some), made.score(removed, some)
        assert [s.correct for s in got] == [s.correct for s in want]
        assert [s.loss for s in got] == pytest.approx([s.loss for s in want], abs=1e-6)
        assert {g: f.tolist() for g, f in made.flips.items()} == {g: f.tolist() for g, f in scorer.flips.items()}
        assert made.base(removed).correct == scorer.base(removed).correct
    made.step(frozenset({9, 11, 14}))
    made.base(frozenset({9, 11, 14}))
    assert made.rebuilds == 2  # the first stage is at work again


def test_a_recovered_model_is_what_is_scored(make_model):
    def rebuild(removed):
        compact = surgery.remove(space, Plan(removed))
        for tensor in compact.proto.graph.initializer:
            if tensor.name == "conv2_w":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.3), "conv2_w"))
        return compact

    made, scorer, _ = shrinking(make_model, rebuild=rebuild, due=every_groups(2))
    space, gone = scorer.space, frozenset({9, 15})
    made.step(gone)
    recovered = rebuild(gone)
    assert made.base(gone).loss == pytest.approx(evaluate(recovered, scorer.data, provider="cpu").loss, abs=1e-6)
    ours = Scorer(analyze(recovered), scorer.data, provider="cpu", threads=1)
    left = [g for g in space.layers[1].groups.tolist() if g not in gone]
    names = follow(space, gone, ours.space)
    want = [p.group for p in ours.lowest(frozenset(), [names[g] for g in left], k=4)]
    assert [names[p.group] for p in made.lowest(gone, left, k=4)] == want
    # The original itself is never recovered.
    assert made.base().loss == pytest.approx(scorer.base().loss, abs=1e-6)


def test_a_recovered_model_of_other_filters_is_refused(make_model):
    made, scorer, _ = shrinking(
        make_model, rebuild=lambda removed: surgery.remove(scorer.space, Plan({10})), due=every_groups(2)
    )
    made.step(frozenset({9, 15}))
    with pytest.raises(UnsupportedError, match="leave out --recover-every"):
        made.base(frozenset({9, 15}))


def test_following_knows_layers_of_other_sizes_and_the_last_of_an_axis(make_model):
    _, scorer, _ = shrinking(make_model)
    space = scorer.space
    assert follow(space, frozenset({9}), space) is None
    inner = set(space.layers[1].groups.tolist())
    gone = frozenset(inner - {12})
    names = follow(space, gone, analyze(surgery.remove(space, Plan(gone))))
    assert 12 not in names
    assert set(names) == set(range(len(space.groups))) - inner


def test_a_model_is_made_anew_when_macs_have_come_down(make_model):
    _, scorer, _ = shrinking(make_model)
    due = every_macs(scorer.space, 0.9)
    assert not due(frozenset(), frozenset({9}))
    assert due(frozenset(), frozenset(range(8, 14)))
    assert not due(frozenset(range(8, 13)), frozenset(range(8, 14)))


def test_the_loop_is_the_loop(make_model):
    """The yardstick itself moves when weights do."""
    _, scorer, loop = shrinking(make_model)
    assert isinstance(loop, Loop)
    assert loop.result([])["correct"] == scorer.base().correct != loop.result([9, 10, 11, 12, 13])["correct"]
