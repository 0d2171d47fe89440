"""The greedy loop on a real structure, with importances and scores that are known beforehand."""

from collections.abc import Sequence

import numpy as np
import pytest

from onnxcar.errors import JournalError, PlanError
from onnxcar.greedy import Choice, Mark, Stop, prefixes, retreat, walk
from onnxcar.journal import Journal
from onnxcar.model import from_proto
from onnxcar.rules import analyze
from onnxcar.scope import Keep, fields, select_layers, whole_layers
from tests.graphs import Net


class Known:
    """Every group costs a number of correct samples of 100, whatever else is gone; the cheapest goes first."""

    def __init__(self, cost: Sequence[int]) -> None:
        self.cost = cost
        self.asked: list[tuple[int, int]] = []
        self.told: list[frozenset[int]] = []
        self.scored = 0

    def score(self, removed):
        lost = sum(self.cost[group] for group in removed)
        return Mark((100 - lost) / 100, 100 - lost, 100, lost / 100)

    def lowest(self, removed, candidates, k):
        self.asked.append((len(candidates), k))
        order = sorted(candidates, key=lambda group: (self.cost[group], group))[:k]
        return [Choice(group, self.cost[group] / 100, self.score(removed | {group})) for group in order]

    def mark(self, removed):
        self.scored += 1
        return self.score(removed)

    def step(self, removed):
        self.told.append(removed)

    def work(self, n_candidates):
        return n_candidates


@pytest.fixture
def space(make_model):
    """Groups 0-7 of the first Conv, 8-13 of the second."""
    proto = make_model(
        """a = Conv <pads = [1,1,1,1]> (x, one_w)
           b = Relu(a)
           c = Conv <pads = [1,1,1,1]> (b, two_w)
           d = Relu(c)
           e = GlobalAveragePool(d)
           f = Flatten(e)
           y = Gemm <transB = 1> (f, head_w)""",
        weights={"one_w": (8, 3, 3, 3), "two_w": (6, 8, 3, 3), "head_w": (4, 6)},
    )
    return analyze(from_proto(proto))


COST = [3, 0, 2, 9, 1, 5, 4, 7, 2, 0, 6, 1, 0, 8]


def search(space, stop, *, scope="layer", chooser=None, min_filters=1, multiple=1, **options):
    chooser = chooser or Known(COST)
    selected = select_layers(space)
    whole = whole_layers(space, selected, ()) if scope == "layer" else ()
    keep = Keep(space, min_filters, multiple)
    return walk(space, fields(space, selected, (), scope), chooser, stop=stop, keep=keep, whole=whole, **options)


def order(path):
    return [step.group for step in path.steps]


def test_a_ratio_takes_the_cheapest_of_each_layer_in_graph_order(space):
    path = search(space, Stop(ratio=0.5))
    assert order(path) == [1, 4, 2, 0, 9, 12, 11]
    assert path.stopped == "ratio"
    assert [step.step for step in path.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.mark.correct for step in path.steps] == [100, 99, 97, 94, 94, 94, 93]
    assert [step.importance for step in path.steps] == [0, 0.01, 0.02, 0.03, 0, 0, 0.01]
    assert path.steps[-1].cost == space.cost(path.groups)


def test_every_layer_keeps_min_filters(space):
    path = search(space, Stop(ratio=0.9), min_filters=3)
    assert len([g for g in order(path) if g < 8]) == 5
    assert len([g for g in order(path) if g >= 8]) == 3
    assert path.stopped == "nothing left"


def test_max_drop_leaves_out_the_step_that_would_break_it_and_goes_on_with_the_next_layer(space):
    path = search(space, Stop(max_drop=0.04))
    assert order(path) == [1, 4, 2, 9, 12, 11]
    assert path.steps[-1].mark.drop == pytest.approx(0.04)
    assert path.stopped == "max_drop"


def test_a_step_of_several_that_breaks_max_drop_is_halved(space):
    path = search(space, Stop(max_drop=0.04), per_step=4)
    assert order(path) == [1, 4, 2, 9, 12, 11]  # all four at once would have cost 0.06
    assert [step.step for step in path.steps] == [1, 1, 2, 3, 3, 4]
    assert path.stopped == "max_drop"


def test_steps_end_the_whole_search(space):
    path = search(space, Stop(steps=5, ratio=0.5))
    assert order(path) == [1, 4, 2, 0, 9]
    assert path.stopped == "steps"


@pytest.mark.parametrize("which", ["macs", "params"])
def test_a_cost_target_ends_the_search_at_the_first_step_that_meets_it(space, which):
    path = search(space, Stop(**{f"target_{which}": 0.5}), scope="global")
    goal = 0.5 * getattr(space.cost(()), which)
    costs = [getattr(step.cost, which) for step in path.steps]
    assert costs[-1] <= goal < costs[-2]
    assert path.stopped == f"target_{which}"


def test_the_first_of_several_rules_bites(space):
    assert search(space, Stop(ratio=0.5, max_drop=0.01), scope="global").stopped == "max_drop"
    assert search(space, Stop(ratio=0.1, max_drop=0.5), scope="global").stopped == "ratio"


def test_global_scope_takes_the_cheapest_anywhere(space):
    path = search(space, Stop(ratio=0.5), scope="global")
    assert order(path) == [1, 9, 12, 4, 11, 2, 8]


def test_several_groups_a_step_share_its_number_and_score(space):
    chooser = Known(COST)
    path = search(space, Stop(ratio=0.5), per_step=3, chooser=chooser)
    assert order(path) == [1, 4, 2, 0, 9, 11, 12] or order(path) == [1, 4, 2, 0, 9, 12, 11]
    assert [step.step for step in path.steps] == [1, 1, 1, 2, 3, 3, 3]
    assert [step.mark.correct for step in path.steps] == [97, 97, 97, 94, 93, 93, 93]
    assert [k for _, k in chooser.asked] == [3, 1, 3]


def test_several_groups_a_step_never_empty_a_layer(space):
    path = search(space, Stop(steps=4), per_step=5)
    assert len([g for g in order(path) if g < 8]) == 7
    assert len([g for g in order(path) if g >= 8]) == 5


def test_counts_become_multiples_by_giving_back_the_last_removals(space):
    path = search(space, Stop(max_drop=0.07), multiple=2)
    # Layer 1 would lose 1, 4, 2, 0 (drop 6); layer 2 then 9, 12 and 11, whose last one goes back.
    assert order(path) == [1, 4, 2, 0, 9, 12]
    assert [step.group for step in path.given_back] == [11]
    assert path.steps[-1].mark.correct == 94


def test_what_a_layer_gives_back_is_back_before_the_next_one_is_searched(space):
    chooser = Known([0, 1, 4, 9, 9, 9, 9, 9, 2, 2, 9, 9, 9, 9])
    path = search(space, Stop(max_drop=0.05), multiple=2, chooser=chooser)
    # 0, 1 and 2 cost all five; only after 2 is back has the second layer room for 8 and 9.
    assert order(path) == [0, 1, 8, 9]
    assert [step.mark.correct for step in path.steps] == [100, 99, 97, 95]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_search_that_ends_at_its_drop_ships_what_the_narrowest_width_that_helps_allows(scope):
    net = Net()
    x = net.op("Relu", net.conv(net.input(), 16, 3))
    x = net.op("GlobalAveragePool", net.op("Relu", net.conv(x, 16, 3)))
    wide = analyze(net.model(net.gemm(net.op("Flatten", x), 5)))
    chooser = Known([1] * 6 + [50] * 10 + [90] * 16)
    found = fields(wide, select_layers(wide), (), scope)
    keep = Keep(wide, 1, 16, True)

    path = walk(wide, found, chooser, stop=Stop(max_drop=0.06), keep=keep)
    assert path.stopped == "max_drop"
    assert (len(path.steps), len(path.given_back)) == (4, 2)  # 12 of 16 stay, a multiple of 4
    assert path.widths[0] == 4
    assert prefixes(path, keep) == [path.groups]
    assert len(retreat(wide, path, keep).groups) == 0  # 13 are no multiple of 4

    strict = walk(wide, found, Known([1] * 32), stop=Stop(max_drop=0.99, target_macs=0.6), keep=keep)
    assert strict.stopped == "target_macs"
    assert not strict.widths


def test_what_was_given_back_for_a_multiple_is_not_taken_again(space):
    chooser = Known(COST)
    path = search(space, Stop(ratio=0.5), multiple=3, chooser=chooser)
    assert left(space, path) == [6, 3]
    assert order(path) == [1, 4, 9, 12, 11]
    assert [step.group for step in path.given_back] == [2, 0]
    assert len(chooser.asked) == 7


@pytest.fixture
def crossing(make_model):
    """Two Convs of 8 and n filters in either order; the first n channels of the wide one are tied to the narrow one."""

    def build(first, second, n=4):
        convs = {"wide": "a = Conv(x, wide_w)", "narrow": "b = Conv(x, narrow_w)"}
        body = f"""{convs[first]} {convs[second]}
                   c, d = Split <axis = 1> (a, sizes) e = Add(b, c) f = Concat <axis = 1> (e, d) g = Relu(f)
                   h = GlobalAveragePool(g) i = Flatten(h) y = Gemm <transB = 1> (i, head_w)"""
        weights = {"wide_w": (8, 3, 1, 1), "narrow_w": (n, 3, 1, 1), "head_w": (4, 8), "sizes": np.asarray([n, 8 - n])}
        return analyze(from_proto(make_model(body, weights=weights)))

    return build


def left(space, path):
    return Keep(space).filters(path.groups)[:2]


def test_no_layer_is_pushed_past_its_ratio_by_one_it_is_tied_to(crossing):
    space = crossing("wide", "narrow")
    path = search(space, Stop(ratio=0.5), chooser=Known([0, 0, 0, 0, 5, 5, 5, 5]))
    assert order(path) == [0, 1, 4, 5]
    assert left(space, path) == [4, 2]


def test_a_layer_takes_others_past_their_ratio_where_it_has_no_choice(crossing):
    space = crossing("wide", "narrow", n=6)
    path = search(space, Stop(ratio=0.6), chooser=Known([0, 0, 0, 0, 0, 0, 5, 5]))
    assert order(path) == [0, 1, 2, 3, 6]
    more = search(space, Stop(ratio=0.66), chooser=Known([0, 0, 0, 0, 0, 0, 5, 5]))
    assert left(space, more) == [2, 1]  # 0.66 of 6 is 4, and 5 are gone: the wide layer had nothing else left


def test_what_an_earlier_layer_took_along_counts_towards_the_ratio(crossing):
    space = crossing("narrow", "wide")
    path = search(space, Stop(ratio=0.5), chooser=Known([1, 2, 3, 4, 5, 6, 7, 8]))
    assert order(path) == [0, 1, 4, 5]
    assert left(space, path) == [2, 4]


def test_a_layer_that_is_short_at_the_end_is_filled_up_with_shared_groups(crossing):
    space = crossing("narrow", "wide", n=6)
    path = search(space, Stop(ratio=0.66), chooser=Known([1, 2, 3, 4, 5, 6, 7, 8]))
    assert order(path) == [0, 1, 2, 3, 6, 4]
    assert left(space, path) == [1, 2]


def test_filling_up_stays_within_the_drop(crossing):
    space = crossing("narrow", "wide", n=6)
    chooser = Known([1, 2, 3, 4, 5, 6, 7, 8])
    path = search(space, Stop(ratio=0.66, max_drop=0.2), chooser=chooser)
    assert order(path) == [0, 1, 2, 3, 6]
    assert path.stopped == "max_drop"
    assert len(chooser.asked) == 6
    # A layer that the drop has ended is not asked again.
    chooser = Known([1, 2, 3, 4, 5, 6, 7, 8])
    assert order(search(space, Stop(ratio=0.66, max_drop=0.12), chooser=chooser)) == [0, 1, 2, 3]
    assert len(chooser.asked) == 5


def test_a_journal_whose_answer_was_changed_is_refused(space, tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, {}) as journal:
        search(space, Stop(ratio=0.5), journal=journal)
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"answer":[[4,' in line)
    path.write_text("".join([*lines[:at], lines[at].replace("[[4,", "[[5,"), *lines[at + 1 :]]))
    with Journal(path, {}) as journal, pytest.raises(JournalError, match=f"line {at + 2}: this run asks"):
        search(space, Stop(ratio=0.5), journal=journal)


def test_a_cost_target_is_met_by_what_is_left_after_giving_back(space):
    plain = search(space, Stop(target_macs=0.6), scope="global")
    even = search(space, Stop(target_macs=0.6), scope="global", multiple=4)
    assert even.given_back
    assert even.steps[-1].cost.macs <= 0.6 * space.cost(()).macs
    assert even.groups != plain.groups
    one, two = left(space, even)
    assert one % 4 == 0
    assert two in (4, 6)


def test_giving_back_never_breaks_the_promised_drop(space):
    class Jealous(Known):
        """Group 9 may only go together with group 12."""

        def score(self, removed):
            lost = sum(self.cost[group] for group in removed) + (20 if 9 in removed and 12 not in removed else 0)
            return Mark((100 - lost) / 100, 100 - lost, 100, lost / 100)

        def lowest(self, removed, candidates, k):
            return [Choice(group, 0.0, self.score(removed | {group})) for group in (11, 9, 12, 8, 10, 13)[:k]]

    found = fields(space, select_layers(space, ["two_w"]), (), "layer")
    stop, keep = Stop(max_drop=0.05, steps=1), Keep(space, 1, 2)
    path = walk(space, found, Jealous(COST), stop=stop, keep=keep, per_step=3)
    # Three of six leave three: 12 goes back for an even count, which breaks the promise, so all goes back.
    assert path.steps == ()
    assert [step.group for step in path.given_back] == [9, 11, 12]
    loose = walk(space, found, Jealous(COST), stop=Stop(max_drop=0.3, steps=1), keep=keep, per_step=3)
    assert order(loose) == [11, 9]
    assert loose.steps[-1].mark.drop == pytest.approx(0.21)


def test_a_path_can_retreat_by_one_removal(space):
    path = search(space, Stop(ratio=0.5))
    shorter = retreat(space, path, Keep(space))
    assert order(shorter) == order(path)[:-1]
    assert [step.group for step in shorter.given_back] == [11]
    assert shorter.steps[-1].cost == space.cost(shorter.groups)
    even = retreat(space, search(space, Stop(ratio=0.5), multiple=2), Keep(space, 1, 2))
    assert order(even) == [1, 4, 2, 0]


def test_a_resumed_walk_equals_an_uninterrupted_one_whatever_it_was_killed_after(space, tmp_path):
    options = {"stop": Stop(max_drop=0.15), "per_step": 2, "multiple": 2}
    whole = tmp_path / "whole.jsonl"
    with Journal(whole, {}) as journal:
        want = search(space, journal=journal, **options)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) > 8
    for n in range(1, len(lines) + 1):
        path = tmp_path / f"{n}.jsonl"
        path.write_bytes(b"".join(lines[:n]) + lines[min(n, len(lines) - 1)][: n % 5])
        chooser = Known(COST)
        with Journal(path, {}) as journal:
            assert search(space, journal=journal, chooser=chooser, **options) == want
        assert len(chooser.asked) + chooser.scored == len(lines) - n
        assert path.read_bytes() == whole.read_bytes()


def test_a_journal_of_other_removals_is_refused(space, tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, {}) as journal:
        search(space, Stop(ratio=0.5), journal=journal)
    with Journal(path, {}) as journal, pytest.raises(JournalError, match="this run asks"):
        search(space, Stop(ratio=0.5), scope="global", journal=journal)


def slow(monkeypatch):
    """A chooser that takes ten seconds a question, from time 0 on."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    class Slow(Known):
        def lowest(self, removed, candidates, k):
            now[0] += 10
            return super().lowest(removed, candidates, k)

    return Slow(COST)


def test_time_ends_the_search_with_what_is_done(space, monkeypatch):
    path = search(space, Stop(ratio=0.9, time_limit=35), chooser=slow(monkeypatch), started=0.0)
    assert order(path) == [1, 4, 2]
    assert path.stopped == "time_limit"


def test_progress_counts_candidates_and_never_passes_its_total(space):
    seen = []

    class Meter:
        def update(self, done, total, text="", unit=""):
            seen.append((done, total, text))

    search(space, Stop(ratio=0.5), progress=Meter())
    assert seen[0][:2] == (0, 8 + 7 + 6 + 5 + 6 + 5 + 4)
    assert [done for done, _, _ in seen] == [0, 8, 15, 21, 26, 32, 37, 41]
    assert len({total for _, total, _ in seen}) == 1
    assert "groups removed" in seen[-1][2]
    assert "drop" in seen[-1][2]


@pytest.mark.parametrize("multiple", [1, 2])
def test_progress_toward_a_target_is_told_in_proportion_to_what_is_still_to_go(space, multiple):
    seen = []

    class Meter:
        def update(self, done, total, text="", unit=""):
            seen.append((done, total))

    path = search(space, Stop(target_macs=0.4), scope="global", multiple=multiple, progress=Meter())
    assert path.stopped == "target_macs"
    whole, in_all = seen[0][1], seen[-1][0]
    assert whole == 14 * 15 / 2  # at first nothing is known but all groups there are
    told = [total for _, total in seen[len(seen) // 2 :]]
    assert max(told) < 0.85 * whole
    assert max(told) < 1.25 * in_all
    assert all(total >= done for done, total in seen)


@pytest.mark.parametrize(
    "bad",
    [
        {"ratio": 0},
        {"ratio": 1},
        {"ratio": 50},
        {"max_drop": -0.1},
        {"target_macs": 1.0},
        {"steps": 0},
        {"time_limit": 0},
    ],
)
def test_a_rule_out_of_range_is_refused(bad):
    (name,) = bad
    with pytest.raises(PlanError, match=name) as caught:
        Stop(**bad)
    assert caught.value.field == name


def test_a_budget_is_what_bounds_the_cost_but_does_not_say_how_much_to_remove():
    assert Stop(max_drop=0.01).budget
    assert Stop(target_macs=0.5, time_limit=60).budget
    assert not Stop(ratio=0.5, max_drop=0.01).budget
    assert not Stop(time_limit=60).budget
    assert not Stop().any


def test_the_chooser_is_told_of_every_step_and_of_what_goes_back(space):
    chooser = Known(COST)
    path = search(space, Stop(max_drop=0.07), multiple=2, chooser=chooser)
    assert chooser.told[:4] == [{1}, {1, 4}, {1, 4, 2}, {1, 4, 2, 0}]
    assert chooser.told[-2:] == [path.groups | {11}, path.groups]


def test_a_search_that_runs_out_of_time_says_what_the_rest_would_cost(space, monkeypatch):
    path = search(space, Stop(ratio=0.9, time_limit=35), chooser=slow(monkeypatch), started=0.0)
    assert path.stopped == "time_limit"
    looked = sum(len(space.layers[0].groups) - i for i in range(len(path.steps)))
    whole = search(space, Stop(ratio=0.9), chooser=(ahead := Known(COST)))
    left = sum(n for n, _ in ahead.asked) - looked
    assert left <= path.remaining.evaluations <= 1.1 * left  # one that may not go is counted as if it might
    # Ten seconds a question.
    assert path.remaining.seconds == pytest.approx(path.remaining.evaluations * 10 * len(path.steps) / looked, abs=1e-3)
    assert whole.remaining is None
    early = search(space, Stop(target_macs=0.3, time_limit=35), chooser=slow(monkeypatch), started=0.0, scope="global")
    all_steps = sum(range(len(space.groups) + 1)) - sum(len(space.groups) - i for i in range(len(early.steps)))
    assert 0 < early.remaining.evaluations < all_steps  # in proportion to the MACs that are still to go
