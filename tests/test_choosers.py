"""Rankings of criteria other than CAR: ties, comparability over layers, and when they are asked again."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.choosers import CarChooser, RankChooser, chooser, per_mac
from onnxcar.criteria import CRITERIA, Context, Criterion
from onnxcar.model import from_proto
from onnxcar.rules import analyze


@pytest.fixture
def space(make_model):
    """Groups 0-3 of a large first Conv, 4-6 of a small second one."""
    proto = make_model(
        """a = Conv <pads = [1,1,1,1]> (x, one_w) b = Relu(a) c = Conv(b, two_w) d = Relu(c)
           e = GlobalAveragePool(d) f = Flatten(e) y = Gemm <transB = 1> (f, head_w)""",
        weights={"one_w": (4, 3, 3, 3), "two_w": (3, 4, 1, 1), "head_w": (4, 3)},
    )
    return analyze(from_proto(proto))


def ranked(space, importances, scope="layer", greedy=False):
    row = Criterion("given", lambda space, context: np.asarray(importances(context), np.float64), greedy=greedy)
    return RankChooser(space, row, Context(), scope)


def picks(found):
    return [choice.group for choice in found]


def test_the_lowest_go_first(space):
    rank = ranked(space, lambda context: [3, 1, 2, 0, 9, 9, 9])
    assert picks(rank.lowest(frozenset(), range(4), 3)) == [3, 1, 2]
    assert [choice.importance for choice in rank.lowest(frozenset({3}), [0, 1, 2], 2)] == [1, 2]


def test_of_equals_the_one_that_saves_more_goes_then_the_lower_index(space):
    rank = ranked(space, lambda context: [5, 1, 1, 5, 1, 1, 1])
    assert space.saved_macs(1) > space.saved_macs(4) > 0
    assert picks(rank.lowest(frozenset(), range(7), 1)) == [1]
    assert picks(rank.lowest(frozenset(), range(7), 4)) == [1, 2, 4, 5]
    assert picks(rank.lowest(frozenset(), [6, 5, 4], 2)) == [4, 5]


def test_at_global_scope_layers_are_compared_in_units_of_their_norm(space):
    def importances(context):
        return [400, 300, 500, 600, 0.6, 0.1, 0.8]

    assert picks(ranked(space, importances).lowest(frozenset(), range(7), 2)) == [5, 4]
    assert picks(ranked(space, importances, "global").lowest(frozenset(), range(7), 3)) == [5, 1, 0]


def test_at_global_scope_reductions_are_taken_per_mac_saved(space):
    def importances(context):
        return [0.02, 0.05, 0.05, 0.05, 0.01, 0.05, 0.05]

    assert space.saved_macs(0) > 2 * space.saved_macs(4)
    assert picks(ranked(space, importances, "layer", greedy=True).lowest(frozenset(), range(7), 1)) == [4]
    assert picks(ranked(space, importances, "global", greedy=True).lowest(frozenset(), range(7), 1)) == [0]


def test_what_saves_nothing_goes_last_unless_it_costs_nothing():
    found = per_mac(np.asarray([0.1, 0.0, -0.1, 0.2]), np.asarray([0.0, 0.0, 0.0, 100.0]))
    assert found.tolist() == [np.inf, 0.0, -np.inf, 0.002]


def test_a_ranking_is_made_once_and_a_greedy_one_every_step(space):
    asked = []

    def importances(context):
        asked.append((context.removed, context.candidates))
        return [0, 1, 2, 3, 4, 5, 6]

    once = ranked(space, importances)
    once.lowest(frozenset(), range(4), 1)
    once.lowest(frozenset({0}), [1, 2, 3], 1)
    assert asked == [(frozenset(), None)]
    greedy = ranked(space, importances, greedy=True)
    greedy.lowest(frozenset({0}), [1, 2, 3], 1)
    assert asked[1:] == [(frozenset({0}), [1, 2, 3])]
    assert (once.work(9), greedy.work(9)) == (1, 9)


def test_without_data_there_is_no_score(space):
    rank = ranked(space, lambda context: [0] * 7)
    assert rank.mark(frozenset()) is None
    assert rank.lowest(frozenset(), range(4), 1)[0].mark is None


def test_car_is_eliminated_and_all_else_is_ranked(space):
    class Anything:
        pass

    context = Context(scorer=Anything())
    assert isinstance(chooser(space, CRITERIA["car"], context, "layer"), CarChooser)
    for name in ("class-car", "l2", "apoz"):
        assert isinstance(chooser(space, CRITERIA[name], context, "layer"), RankChooser)
