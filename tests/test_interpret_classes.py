"""Effects on classes: counts by hand, intervals that hold, a test that keeps its level and finds what was put in."""

from __future__ import annotations

import itertools
import json
from math import comb

import numpy as np
import pytest

from onnxcar import stats
from onnxcar.errors import DataError
from onnxcar.importances import importance
from onnxcar.interpret import class_sets, effects
from onnxcar.interpret._classes import benjamini_hochberg, heterogeneity, paired_bounds
from onnxcar.model import from_proto
from tests.test_cli import folder, run  # noqa: F401 - a fixture
from tests.test_importances import correct, data, without  # noqa: F401 - a fixture


def test_bounds_are_those_of_the_paired_interval():
    for lost, won, n in itertools.product((0, 1, 7), (0, 2), (7, 40)):
        known = stats.paired_interval(won, lost, n)
        low, high = paired_bounds(*(np.asarray([x], float) for x in (lost, won, n)))
        assert (low[0], high[0]) == pytest.approx((known.low, known.high), abs=1e-9)


@pytest.mark.parametrize("n", [5, 10, 40])
@pytest.mark.parametrize(("p_lost", "p_won"), [(0.02, 0.02), (0.1, 0.0), (0.3, 0.05), (0.5, 0.2)])
def test_intervals_hold_what_they_promise(n, p_lost, p_won):
    """Exact coverage: the sum of the probabilities of all counts whose interval holds the true difference."""
    covered = 0.0
    for lost in range(n + 1):
        for won in range(n + 1 - lost):
            chance = comb(n, lost) * comb(n - lost, won) * p_lost**lost * p_won**won
            chance *= (1 - p_lost - p_won) ** (n - lost - won)
            low, high = paired_bounds(*(np.asarray([x], float) for x in (lost, won, n)))
            covered += chance * bool(low[0] <= p_lost - p_won <= high[0])
    assert covered > 0.925


def test_class_car_is_what_counting_by_hand_gives(residual, data):  # noqa: F811
    found = importance(from_proto(residual), data, threads=1, by_class=True)
    labels = data.labels
    names = found.effects.sets.names
    assert names == ("0", "1", "2", "3")
    cars = []
    for row, group in enumerate(found.groups):
        cut = without(residual, list(found.space.groups[group].filters))
        for i, name in enumerate(names):
            part = data.subset(labels == int(name))
            fall = (correct(residual, part) - correct(cut, part)) / len(part)
            assert found.effects.car[row, i] == pytest.approx(fall, abs=1e-12)
            cars.append(fall)
    assert len(set(cars)) > 8
    assert found.effects.loss.shape == (11, 4)
    weighted = (found.effects.loss * found.effects.sets.samples).sum(1) / len(data)
    by_score = [score.loss - found.base.loss for score in found.scores]
    assert weighted == pytest.approx(by_score, abs=1e-6)
    assert max(map(abs, by_score)) > 0.01


def test_asking_for_classes_changes_no_importance(residual, data):  # noqa: F811
    plain = importance(from_proto(residual), data, threads=1)
    found = importance(from_proto(residual), data, threads=1, by_class=True)
    assert plain.values.tolist() == found.values.tolist()
    assert plain.effects is None


def test_a_filter_of_one_class_speaks_and_names_it_alone():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 20)
    losses = rng.normal(0, 0.1, (8, 100)).astype(np.float32)
    losses[3, labels == 2] += 1.0
    losses[5, labels == 4] -= 1.0
    flips = np.zeros((8, 100), bool)
    flips[3, labels == 2] = True
    found = effects(class_sets(labels, list("abcde")), np.ones(100, bool), flips, losses)
    assert found.speaks().tolist() == [i in (3, 5) for i in range(8)]
    assert [found.sets.names[i] for i in np.flatnonzero(found.above[3])] == ["c"]
    assert [found.sets.names[i] for i in np.flatnonzero(found.below[5])] == ["e"]
    # What one class pulls the mean away from is not named for that.
    assert not found.above[5].any()
    assert not found.below[3].any()
    entry = found.to_dict(3, 0.001, 1)
    assert entry["most"][0]["class"] == "c"
    assert entry["most"][0]["car"] == 1.0
    assert entry["most"][0]["named"]
    assert entry["most"][0]["interval"][0] > 0.7
    assert not entry["least"][0]["named"]


def test_p_values_of_silent_filters_are_uniform():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 90)
    losses = rng.standard_t(2, (500, 90))  # heavy tails, as losses have
    p = heterogeneity(class_sets(labels), losses)[0]
    for level in (0.05, 0.2, 0.5):
        # 4 standard errors of a proportion over 500 filters
        assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 500)


def test_one_image_a_class_is_silent_until_classes_are_grouped():
    rng = np.random.default_rng(2)
    labels = np.arange(60)
    losses = rng.normal(0, 0.1, (3, 60))
    losses[1, :8] += 0.4
    assert heterogeneity(class_sets(labels), losses)[0].tolist() == [1.0, 1.0, 1.0]
    groups = {"fruit": list(range(8)), "cars": [str(i) for i in range(20, 40)]}
    p, above, _ = heterogeneity(class_sets(labels, None, groups), losses)
    assert p[1] < 0.001
    assert p[0] > 0.05
    assert above[1].tolist() == [True, False]


def test_a_group_that_changes_nothing_has_p_one():
    labels = np.repeat(np.arange(3), 5)
    found = effects(class_sets(labels), np.ones(15, bool), np.zeros((2, 15), bool), np.zeros((2, 15)))
    assert found.p.tolist() == [1.0, 1.0]
    assert not found.above.any()
    assert (found.low < 0).all()
    assert (found.high > 0).all()


def test_adjusted_p_values_are_monotone_and_never_below_p():
    p = np.random.default_rng(3).random(50) ** 3
    q = benjamini_hochberg(p)
    assert (q >= p).all()
    assert (np.diff(q[np.argsort(p)]) >= 0).all()
    assert q.max() <= 1


@pytest.mark.parametrize(
    ("groups", "says"),
    [({"x": ["lemmon"]}, "'lemon'"), ({"x": []}, "list of class names"), ({"x": "lemon"}, "list of class names")],
)
def test_groups_that_fit_no_class_are_refused(groups, says):
    with pytest.raises(DataError, match=says):
        class_sets(np.asarray([0, 1, 1]), ["lemon", "car"], groups)


def test_classes_without_samples_are_left_out_of_a_group():
    sets = class_sets(np.asarray([0, 1, 1]), ["lemon", "car", "bus"], {"wheels": ["bus", 1, 77]})
    assert sets.labels == ((1,),)
    with pytest.raises(DataError, match="No sample"):
        class_sets(np.asarray([0, 1, 1]), ["lemon", "car", "bus"], {"far": ["bus"]})


def test_groups_take_names_and_indices():
    sets = class_sets(np.asarray([0, 1, 1, 2]), ["lemon", "car", "bus"], {"wheels": ["car", 2, "bus"], "fruit": ["0"]})
    assert sets.samples.tolist() == [3, 1]
    assert sets.labels == ((1, 2), (0,))


def test_score_by_class_on_the_command_line(folder):  # noqa: F811
    done = run("score", "m.onnx", "--data", "val.npz", "--by-class", "--json", "s.json")
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "s.json").read_text())
    assert [c["samples"] for c in found["classes"]] == [n for n in (c["samples"] for c in found["classes"]) if n > 5]
    for group in found["groups"]:
        assert list(group["per_class"].values()) == pytest.approx(group["by_class"]["car"], abs=1e-6)
        assert len(group["by_class"]["most"]) == 3
    assert "q(classes)" in done.stdout
    assert "Bonett and Price" in done.stderr
    (folder / "g.json").write_text('{"low": [0, 1], "high": ["2", 3]}')
    done = run(
        "score", "m.onnx", "--data", "val.npz", "--class-groups", "g.json", "--top-classes", "1", "--json", "g.csv"
    )
    assert done.exit_code == 0, done.output
    head = (folder / "g.csv").read_text().splitlines()[0]
    assert "low:car,low:low,low:high,low:loss,high:car" in head


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--class-groups", "nope.json"], 1, "nope.json"),
        (["--by-class", "--criterion", "l1"], 2, "--by-class is about CAR"),
    ],
)
def test_score_by_class_refuses_what_it_cannot_do(folder, args, code, says):  # noqa: F811
    done = run("score", "m.onnx", "--data", "val.npz", *args)
    assert done.exit_code == code
    assert says in done.stderr


def test_effects_do_not_depend_on_how_many_groups_are_looked_at_at_once(residual, data, monkeypatch):  # noqa: F811
    whole = importance(from_proto(residual), data, threads=1, by_class=True).effects
    monkeypatch.setattr("onnxcar.importances.PAIRS", 2 * len(data))
    parts = importance(from_proto(residual), data, threads=1, by_class=True).effects
    assert parts.car.tolist() == whole.car.tolist()
    assert parts.loss == pytest.approx(whole.loss, abs=1e-12)
    assert parts.p == pytest.approx(whole.p, abs=0.02)
