"""Latency of networks from a table of layers: closed forms, real layers, and the search that uses it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar import latency_table
from onnxcar.choosers import chooser
from onnxcar.criteria import Context, Criterion
from onnxcar.errors import PlanError
from onnxcar.greedy import CHECKS, walk
from onnxcar.journal import Journal
from onnxcar.latency_table import Pace, Table, measure_table, monotone
from onnxcar.model import from_proto
from onnxcar.rules import analyze
from onnxcar.scope import Keep, fields, select_layers
from onnxcar.search import prune
from onnxcar.steps import Choice, Stop


def test_a_table_reads_off_what_was_measured_and_between():
    layers = [[(100.0, 2.0), (50.0, 1.0)], [(10.0, 0.5)], []]
    whole = [(np.asarray([100.0, 10, 7]), 6.0), (np.asarray([50.0, 10, 7]), 4.0)]
    table = Table.of(layers, whole)
    assert table.whole == ((1.5, 4.0), (2.5, 6.0))  # sums of the layers, and what the networks took
    assert [table.seconds(np.asarray([m, 10.0, 7.0])) for m in (100, 75, 50)] == [6.0, 5.0, 4.0]
    assert table.seconds(np.asarray([1.0, 10, 7])) == 4.0  # below the narrowest layer there is no less
    assert Table.from_json(table.to_json()) == table


def test_below_the_smallest_network_time_follows_the_layers():
    wide = [(np.asarray([100.0, 10]), 6.0), (np.asarray([50.0, 10]), 4.0)]
    table = Table.of([[(100.0, 2.0), (50.0, 1.0), (1.0, 0.1)], [(10.0, 0.5)]], wide)
    assert table.seconds(np.asarray([1.0, 10.0])) == pytest.approx(4.0 * 0.6 / 1.5)


def test_a_narrower_layer_is_never_slower_than_a_wider_one():
    found = monotone([(1, 5.0), (2, 1.0), (4, 3.0), (4, 2.5), (8, 2.0)])
    assert found == ((1, 1.0), (2, 1.0), (4, 2.0), (8, 2.0))


@pytest.fixture
def space(make_model):
    proto = make_model(
        """a = Conv <pads = [1,1,1,1]> (x, one_w)
           b = Relu(a)
           c = Conv <pads = [1,1,1,1]> (b, two_w)
           d = Relu(c)
           e = GlobalAveragePool(d)
           f = Flatten(e)
           y = Gemm <transB = 1> (f, head_w)""",
        inputs="float[N,3,24,24] x",
        weights={"one_w": (32, 3, 3, 3), "two_w": (32, 32, 3, 3), "head_w": (4, 32)},
    )
    return analyze(from_proto(proto))


def test_macs_of_terms_add_up_to_those_of_the_network(space):
    for removed in ((), (0, 1, 40), range(20)):
        assert space.term_macs(frozenset(removed)).sum() == pytest.approx(space.cost(frozenset(removed)).macs)


def test_every_layer_of_a_real_network_is_timed_and_less_is_not_predicted_slower(space):
    table = measure_table(space, None, Keep(space, 1, 4), provider="cpu", threads=1)
    assert [len(points) >= 3 for points in table.layers] == [True] * 3
    assert all(seconds > 0 for points in table.layers for _, seconds in points)
    assert len(table.whole) >= 4
    pace = Pace(space, table, None, "cpu", 1)
    shares = [pace.predict(range(n)) for n in (0, 8, 16, 24, 31)]
    assert shares[0] == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.95


class Known:
    """Groups go in the order of their ids."""

    def lowest(self, removed, candidates, k):
        return [Choice(group, 0.0) for group in sorted(candidates)[:k]]

    def mark(self, removed):
        return None

    def step(self, removed):
        pass

    def work(self, n_candidates):
        return 1


class Clock:
    """Predicts 1 % less a group; really each is `worth` of that."""

    def __init__(self, worth=1.0):
        self.worth, self.checked = worth, []

    def predict(self, removed):
        return 1 - len(removed) / 100

    def check(self, removed):
        self.checked.append(len(removed))
        return 1 - self.worth * len(removed) / 100


def timed(space, goal, clock, keep=1, **options):
    found = fields(space, select_layers(space), (), "global")
    return walk(
        space, found, Known(), stop=Stop(target_latency=goal), keep=Keep(space, 1, keep), clock=clock, **options
    )


def test_a_search_ends_where_the_prediction_is_confirmed(space):
    clock = Clock()
    path = timed(space, 0.8, clock)
    assert (path.stopped, len(path.steps), clock.checked) == ("target_latency", 20, [20])
    assert [(c.groups, c.predicted, c.measured) for c in path.checks] == [(20, 0.8, 0.8)]


def test_a_search_goes_on_where_the_measurement_misses(space):
    clock = Clock(worth=0.7)
    path = timed(space, 0.8, clock)
    assert path.stopped == "target_latency"
    assert clock.checked[0] == 20
    assert path.checks[-1].measured <= 0.8 < path.checks[-2].measured
    assert len(path.steps) == clock.checked[-1] >= 29


def test_a_search_does_not_measure_for_ever(space):
    path = timed(space, 0.9, Clock(worth=0.0))
    assert len(path.checks) == CHECKS
    assert path.stopped == "target_latency"


def test_what_is_predicted_and_measured_is_what_would_be_shipped(space):
    clock = Clock()
    path = timed(space, 0.8, clock, keep=8)
    assert clock.checked == [24]  # the first number of at least 20 that leaves multiples of 8
    assert len(path.steps) == 24


def test_a_resumed_search_measures_nothing_again(space, tmp_path):
    first, second = Clock(worth=0.7), Clock(worth=0.0)
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        want = timed(space, 0.8, first, journal=journal)
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        assert timed(space, 0.8, second, journal=journal) == want
    assert first.checked
    assert not second.checked


def test_the_record_holds_prediction_and_measurement_and_a_resumed_run_the_same_table(space, tmp_path, monkeypatch):
    options = {
        "criterion": "l2",
        "scope": "global",
        "provider": "cpu",
        "threads": 1,
        "stop": Stop(target_latency=0.85),
        "multiple_of": 4,
        "journal": tmp_path / "j.jsonl",
    }
    run = prune(space.model, **options)
    found = run.record["latency"]
    assert {"target", "predicted", "measured", "interval", "met", "checks", "table"} == set(found)
    assert found["checks"][-1]["predicted"] == pytest.approx(found["predicted"])
    assert found["interval"][0] <= found["measured"] <= found["interval"][1]

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(latency_table.Pace, "check", refuse)
    monkeypatch.setattr("onnxcar.pruning.measure_table", refuse)
    again = prune(space.model, **options)
    assert again.plan == run.plan
    assert again.record["latency"]["table"] == found["table"]
    assert prune(space.model, **{**options, "stop": Stop(ratio=0.2), "journal": None}).record["latency"] is None


def test_a_target_out_of_range_is_refused():
    with pytest.raises(PlanError, match="target_latency"):
        Stop(target_latency=1.0)
    assert Stop(target_latency=0.5).budget


def test_prices_are_of_the_way_down_to_the_narrowest():
    layers = [[(100.0, 3.0), (50.0, 2.9), (10.0, 1.0)], [(10.0, 0.5)], []]
    table = Table.of(layers, [(np.asarray([100.0, 10, 7]), 6.0)])
    assert table.prices(np.asarray([100.0, 10, 7])) == pytest.approx([2 / 90, 0, 0])
    assert table.prices(np.asarray([50.0, 5, 7])) == pytest.approx([1.9 / 40, 0, 0])
    assert table.prices(np.asarray([10.0, 5, 7])) == pytest.approx([0, 0, 0])


def test_a_global_search_for_a_latency_takes_from_layers_that_take_the_time(space):
    macs = space.term_macs(())
    slow = Table.of([[(m, s), (m / 8, s / 8)] for m, s in zip(macs, (1e-3, 1e-5, 1e-6), strict=True)], [(macs, 2e-3)])
    pace = Pace(space, slow, None, "cpu", 1)
    saved = pace.saved(range(64), frozenset())
    for group in (0, 40):
        gone = space.term_macs(()) - space.term_macs([group])
        assert saved[group] == round(1e12 * float((gone * slow.prices(macs)).sum()))
    same = Criterion("same", lambda space, context: np.ones(len(space.groups)), greedy=True)
    by_macs = chooser(space, same, Context(), "global")
    by_time = chooser(space, same, Context(), "global", pace.saved)
    second = {g.id for g in space.groups if g.layer == 1}
    assert by_macs.lowest(frozenset(), range(64), 1)[0].group not in second  # both Convs shrink with the first
    picks = [by_time.lowest(frozenset(), range(64), 1)[0].group]
    assert picks[0] not in second
    fast = Table.of([[(m, s), (m / 8, s / 8)] for m, s in zip(macs, (1e-9, 1e-9, 1e-3), strict=True)], [(macs, 2e-3)])
    by_head = chooser(space, same, Context(), "global", Pace(space, fast, None, "cpu", 1).saved)
    assert by_head.lowest(frozenset(), range(64), 1)[0].group in second  # the head alone reads them
