"""Plans: round trips, and everything a plan file can be wrong in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from onnxcar.errors import PlanError
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, mask, remove
from tests.graphs import Net, random_plan


@pytest.fixture(scope="module")
def space():
    """conv (6 filters, tied to `block`), inner (4), head protected."""
    net = Net()
    a = net.op("Relu", net.conv(net.input(), 6))
    b = net.conv(net.op("Relu", net.conv(a, 4, name="inner")), 6, name="block")
    return analyze(net.model(net.head(net.op("Add", a, b))))


def obj(space, **removed):
    return {"schema": 1, "model_sha256": space.model.sha256, "removed": removed}


def test_a_plan_survives_json(space):
    for seed in range(5):
        plan = random_plan(space, 0.5, seed)
        text = json.dumps(plan.to_json(space))
        assert Plan.from_json(space, json.loads(text)) == plan
        assert plan.groups


def test_a_plan_names_filters_in_graph_order(space):
    plan = Plan([3, 1, 7])
    assert plan.removed(space) == {"conv_w": [1, 3], "inner_w": [1], "block_w": [1, 3]}
    assert list(plan.removed(space)) == ["conv_w", "inner_w", "block_w"]
    assert plan.to_json(space) == obj(space, conv_w=[1, 3], inner_w=[1], block_w=[1, 3])


def test_plans_are_sets():
    assert Plan([2, 1, 2]) == Plan((1, 2))
    assert hash(Plan([1, 2])) == hash(Plan([2, 1]))
    assert Plan([1]) | Plan([2]) == Plan([1, 2])
    assert Plan() == Plan([])


def test_a_record_is_a_plan(space):
    plan = Plan([0, 6])
    record = {**plan.to_json(space), "kind": "record", "model": {"sha256": space.model.sha256}, "steps": []}
    del record["model_sha256"]
    assert Plan.from_json(space, record) == plan


def test_the_plan_of_another_model_is_refused(space):
    theirs = {**obj(space, inner_w=[0]), "model_sha256": "0" * 64}
    with pytest.raises(PlanError, match="made for a model with sha256 000000000000") as caught:
        Plan.from_json(space, theirs)
    assert caught.value.ours == space.model.sha256
    record = {"schema": 1, "model": {"sha256": "1" * 64}, "removed": {}}
    with pytest.raises(PlanError, match="its own model"):
        Plan.from_json(space, record)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "plan",
        {},
        {"removed": []},
        {"removed": {}},
        {"schema": 2, "removed": {}},
        {"schema": "1", "removed": {}},
    ],
)
def test_what_is_no_plan_is_refused(space, broken):
    with pytest.raises(PlanError):
        Plan.from_json(space, broken)


@pytest.mark.parametrize("indices", [3, "3", [1.0], ["1"], [True], [None], {"0": 1}])
def test_indices_are_lists_of_integers(space, indices):
    with pytest.raises(PlanError, match="inner_w"):
        Plan.from_json(space, obj(space, inner_w=indices))


def test_an_unknown_weight_is_refused(space):
    with pytest.raises(PlanError, match=r"'nobody'.*no layer"):
        Plan.from_json(space, obj(space, nobody=[0]))


@pytest.mark.parametrize("index", [4, -1, 10**12])
def test_an_unknown_filter_is_refused(space, index):
    with pytest.raises(PlanError, match=f"filter {index} of 'inner_w', which has 4"):
        Plan.from_json(space, obj(space, inner_w=[index]))


def test_a_protected_filter_is_refused_with_its_reason(space):
    with pytest.raises(PlanError, match=r"filter 1 of 'head_w', which is protected: is an output of the network"):
        Plan.from_json(space, obj(space, head_w=[1]))


def test_part_of_a_group_is_refused_and_the_rest_is_named(space):
    with pytest.raises(PlanError, match=r"filter 2 of 'conv_w' but not filter 2 of 'block_w'") as caught:
        Plan.from_json(space, obj(space, conv_w=[2]))
    assert caught.value.kept == ("block_w", 2)


@pytest.mark.parametrize("act", [remove, mask])
def test_a_plan_that_empties_a_value_is_refused(space, act):
    with pytest.raises(PlanError, match="all channels of"):
        act(space, Plan([g.id for g in space.groups if g.filters[0][0] == "inner_w"]))


@pytest.mark.parametrize("act", [remove, mask])
@pytest.mark.parametrize("group", [-1, 10**6])
def test_a_group_that_is_none_is_refused(space, act, group):
    with pytest.raises(PlanError, match="groups 0 to"):
        act(space, Plan([group]))


def test_duplicate_indices_are_one_removal(space):
    assert Plan.from_json(space, obj(space, inner_w=[1, 1])) == Plan([7])


def test_a_plan_without_removals_changes_nothing(space):
    assert remove(space, Plan()) is space.model
    assert mask(space, Plan()).proto.graph.node == space.model.proto.graph.node


def test_a_plan_fits_the_same_file_loaded_again(space):
    again = analyze(replace(space.model))
    plan = Plan([0, 8])
    assert Plan.from_json(again, plan.to_json(space)) == plan
