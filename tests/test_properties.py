"""Random graphs from all rules, random plans: removed equals masked, and two removals equal one of their union."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcar.channels import ChannelSpace
from onnxcar.model import Model
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests.graphs import assert_exact, assert_valid, feeds, run_all, weights_of
from tests.random_nets import STEPS, grow

STEP = st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 2), st.integers(0, 999))
NETWORKS = st.fixed_dictionaries(
    {
        "steps": st.lists(STEP, min_size=3, max_size=9),
        "seed": st.integers(0, 2**16),
        "opset": st.sampled_from([14, 17, 18, 20]),
        "dynamic": st.booleans(),
    }
)
SHARES = st.sampled_from([0.1, 0.3, 0.6])
NORMS = st.sampled_from(["protect", "protect", "rewrite"])
# One graph takes a quarter of a second: no deadline; the same graphs in every run, so that a failure can be repeated.
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(QUICK, max_examples=2000)


class Tally:
    """What the graphs of one run were like: shows that the property was not held for want of cases."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()

    def check(self, network: dict, share: float, norms: str) -> None:
        """The property for one graph and one plan."""
        model = grow(**network)
        seed = network["seed"]
        space = analyze(model, norms=norms)
        self.counts["graphs"] += 1
        self.counts["groups"] += len(space.groups)
        self.ops.update({n.op_type for n in model.proto.graph.node})
        (done,) = assert_exact(model, share=share, seeds=(seed,), norms=norms, trivial=True)
        self.counts["removed"] += len(done.plan.groups)
        self.counts["moved"] += int(done.moved > 1)
        if norms == "protect" and len(done.plan.groups) > 1:
            self._two_steps(done.space, done.plan, done.pruned, seed)

    def _two_steps(self, space: ChannelSpace, plan: Plan, at_once: Model, seed: int) -> None:
        rng = np.random.default_rng(seed)
        order = rng.permutation(sorted(plan.groups)).tolist()
        first, second = Plan(order[: len(order) // 2]), Plan(order[len(order) // 2 :])
        half = remove(space, first)
        rest = surviving(space, first, second, analyze(half))
        if rest is None:
            self.counts["regrouped"] += 1
            return
        pruned = remove(analyze(half), rest)
        assert_valid(pruned)
        want, got = weights_of(at_once), weights_of(pruned)
        for name in weights_of(space.model).keys() & want.keys() & got.keys():
            assert np.array_equal(want[name], got[name]), name
        given = [feeds(space.model, 2, seed)]
        error = np.abs(run_all(at_once, given)[0][0] - run_all(pruned, given)[0][0]).max()
        assert error < 1e-4, f"two steps differ from one by {error}"
        self.counts["two steps"] += 1

    def finish(self, graphs: int) -> None:
        """Print the counts; fail where they are too small to show anything."""
        c = self.counts
        print(f"\n{dict(c)}, {len(self.ops)} operators")
        assert c["graphs"] >= graphs
        assert c["moved"] > 0.9 * c["graphs"], "most plans must change the outputs"
        assert c["removed"] > 0.2 * c["groups"]
        assert c["groups"] > 10 * c["graphs"], "networks without channels that may go show nothing"
        assert c["two steps"] > 0.4 * c["graphs"]
        assert c["regrouped"] < 0.1 * c["two steps"]
        assert len(self.ops) > 40


def surviving(space: ChannelSpace, first: Plan, second: Plan, after: ChannelSpace) -> Plan | None:
    """`second` in the space that `first` leaves: by weight names and indices; None where groups meet anew there."""
    gone = first.removed(space)
    held = {x.weight for x in after.layers}
    wanted = {
        (name, i - sum(j < i for j in gone.get(name, [])))
        for name, indices in second.removed(space).items()
        for i in indices
        if name in held
    }
    owner = {f: g.id for g in after.groups for f in g.filters}
    if not wanted <= owner.keys():
        return None
    plan = Plan(owner[f] for f in wanted)
    names = {x.weight for x in space.layers}
    whole = {f for g in plan.groups for f in after.groups[g].filters if f[0] in names}
    return plan if whole == wanted else None


def test_removed_equals_masked_on_random_graphs():
    tally = Tally()
    QUICK(given(NETWORKS, SHARES, NORMS)(tally.check))()
    tally.finish(150)


@pytest.mark.slow
def test_removed_equals_masked_on_two_thousand_random_graphs():
    tally = Tally()
    MANY(given(NETWORKS, SHARES, NORMS)(tally.check))()
    tally.finish(2000)


def test_every_step_makes_a_valid_graph():
    for which in range(len(STEPS)):
        for k in range(6):
            model = grow([(which, 0, k), (1, 0, k)], seed=k)
            assert len(analyze(model).groups) >= 5


def test_the_networks_that_are_grown_are_the_same_in_every_run():
    steps = [(i * 7, i, i * 31) for i in range(6)]
    first, second = (grow(steps, seed=3).proto.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
