"""Metrics against scikit-learn and numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcar._judge import Judge
from onnxcar.errors import DataError, MetricError
from onnxcar.metrics import METRICS, Outcomes, Tally, gives_probabilities, metric

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 7, 200)
LOGITS = (RNG.normal(size=(200, 7)) + 1.5 * np.eye(7)[LABELS]).astype(np.float32)


def scored(name, targets, outputs, *, pieces=(0, 13, 14, 150), **options):
    """The score, counted in pieces."""
    judge = Judge(metric(name), targets, outputs[:4], **options)
    tally, ends = Tally(), [*pieces[1:], len(outputs)]
    for start, end in zip(pieces, ends, strict=True):
        at = np.arange(start, end)
        tally.add(judge.tally(judge.rows(outputs[at], at), at))
    return judge.score(tally, outputs)


def test_every_classification_metric_is_scikit_learns():
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    top1 = scored("top1", LABELS, LOGITS)
    assert top1.value == sklearn.metrics.accuracy_score(LABELS, LOGITS.argmax(1))
    assert 0.3 < top1.value < 0.95
    assert scored("top5", LABELS, LOGITS).value == sklearn.metrics.top_k_accuracy_score(LABELS, LOGITS, k=5)
    balanced = sklearn.metrics.balanced_accuracy_score(LABELS, LOGITS.argmax(1))
    assert scored("balanced", LABELS, LOGITS).value == pytest.approx(balanced, abs=1e-12)
    loss = sklearn.metrics.log_loss(LABELS, probabilities)
    assert scored("loss", LABELS, LOGITS).value == pytest.approx(loss, abs=1e-6)
    assert scored("loss", LABELS, probabilities, softmax=True).value == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("name", ["r2", "mse", "mae", "pearson"])
def test_every_regression_metric_is_scikit_learns(name):
    y = RNG.normal(size=(200, 3)) * [1, 5, 0.1]
    out = (y + 0.3 * RNG.normal(size=y.shape)).astype(np.float32)
    want = {
        "r2": lambda: sklearn.metrics.r2_score(y, out),
        "mse": lambda: sklearn.metrics.mean_squared_error(y, out),
        "mae": lambda: sklearn.metrics.mean_absolute_error(y, out),
        "pearson": lambda: np.mean([np.corrcoef(y[:, j], out[:, j])[0, 1] for j in range(3)]),
    }[name]()
    score = scored(name, y, out)
    assert score.value == pytest.approx(want, abs=1e-7)
    assert score.correct is None


def test_equal_outputs_go_to_the_lowest_index():
    outputs = np.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    assert scored("top1", np.asarray([0, 1, 0]), outputs, pieces=(0,)).correct == 2


def test_a_nan_is_wrong_and_costs_the_most():
    outputs = np.asarray([[np.nan, 0, 0], [5, 0, 0], [0, 5, 0]], np.float32)
    score = scored("loss", np.asarray([0, 0, 1]), outputs, pieces=(0,))
    assert score.correct == 2
    assert score.value > 1e5
    assert np.isfinite(score.value)


def test_trailing_axes_of_one_do_not_count():
    assert scored("top1", LABELS, LOGITS[:, :, None, None]).correct == scored("top1", LABELS, LOGITS).correct


def test_counts_by_class_add_up_to_all():
    score = scored("top1", LABELS, LOGITS)
    assert score.per_class.sum() == score.correct
    assert score.class_samples.tolist() == np.bincount(LABELS).tolist()


def test_class_reductions_are_falls_of_each_accuracy():
    base, other = scored("top1", LABELS, LOGITS), scored("top1", LABELS, LOGITS[:, ::-1].copy())
    want = (base.per_class - other.per_class) / np.bincount(LABELS, minlength=7)
    assert base.class_reductions(other).tolist() == want.tolist()
    assert base.reduction(other) == (base.correct - other.correct) / 200


def test_reduction_is_positive_where_the_other_is_worse():
    worse = LOGITS * np.float32(-1)
    for name in ("top1", "top5", "balanced", "loss"):
        assert scored(name, LABELS, LOGITS).reduction(scored(name, LABELS, worse)) > 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 199), min_size=1, max_size=6), st.sampled_from(["top1", "balanced", "loss"]))
def test_pieces_in_any_order_give_the_same_bits(cuts, name):
    judge = Judge(metric(name), LABELS, LOGITS[:4])
    parts = np.split(np.random.default_rng(sum(cuts)).permutation(200), sorted(cuts))
    tally = Tally()
    for at in parts:
        if len(at):
            tally.add(judge.tally(judge.rows(LOGITS[at], at), at))
    whole = scored(name, LABELS, LOGITS)
    assert (tally.cost, tally.loss, tally.top1) == (whole.cost, whole.loss_units, whole.top1)


def test_balanced_costs_order_models_as_the_value_does():
    models = [LOGITS + RNG.normal(size=LOGITS.shape).astype(np.float32) for _ in range(20)]
    scores = [scored("balanced", LABELS, model) for model in models]
    assert len({s.value for s in scores}) > 5
    by_cost = sorted(scores, key=lambda s: s.cost)
    assert all(a.value >= b.value - 1e-12 for a, b in itertools.pairwise(by_cost))


def test_doubt_is_raised_on_the_edge_alone():
    outputs = np.asarray([[1, 0.9999, 0], [1, 0, 0], [0, 1, 0.99995], [0.99999, 1, 0]], np.float32)
    judge = Judge(metric("top1"), np.asarray([0, 0, 0, 0]), outputs)
    assert judge.doubtful(outputs, np.arange(4), 1e-3).tolist() == [True, False, False, True]


def test_a_label_outside_the_classes_is_named():
    with pytest.raises(DataError, match=r"Sample 3 has label 7.*0 to 6.*--label-offset") as caught:
        Judge(metric("top1"), np.asarray([0, 1, 2, 7]), LOGITS[:4])
    assert caught.value.sample == 3


def test_a_metric_of_another_kind_is_refused():
    with pytest.raises(MetricError, match="needs class labels"):
        Judge(metric("top1"), np.zeros((4, 2)), LOGITS[:4])
    with pytest.raises(MetricError, match=r"shape \(n, classes\)"):
        Judge(metric("top1"), np.zeros(4, np.int64), np.zeros((4, 3, 5, 5), np.float32))
    with pytest.raises(MetricError, match=r"no metric 'accuracy'.*top1"):
        metric("accuracy")


def test_a_function_is_found_by_module_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def gap(outputs, targets):\n    return abs(outputs[:, 0] - targets)\n")
    found = metric(f"{tmp_path / 'mine.py'}:gap")
    judge = Judge(found, np.zeros(4), LOGITS[:4])
    tally = judge.tally(judge.rows(LOGITS[:4], np.arange(4)), np.arange(4))
    assert judge.score(tally, LOGITS[:4]).value == pytest.approx(np.abs(LOGITS[:4, 0]).mean())
    assert metric("numpy:mean").function is np.mean
    with pytest.raises(MetricError, match="cannot be imported"):
        metric("no_such_module:f")


def test_a_function_that_fails_is_a_metric_error():
    for bad, message in ((lambda o, t: 1 / 0, "ZeroDivisionError"), (lambda o, t: np.nan, "finite number")):
        judge = Judge(metric(bad), LABELS, LOGITS[:4])
        with pytest.raises(MetricError, match=message):
            judge.score(judge.tally(judge.rows(LOGITS, np.arange(200)), np.arange(200)), LOGITS)


def test_a_softmax_at_the_end_is_seen(make_model):
    body = "a = GlobalAveragePool (x) b = Flatten (a) c = Gemm <transB = 1> (b, w)"
    soft = make_model(body + " d = Softmax (c) y = Identity (d)", weights={"w": (4, 3)})
    hard = make_model(body + " y = Identity (c)", weights={"w": (4, 3)})
    assert gives_probabilities(soft)
    assert not gives_probabilities(hard)


def test_a_confusion_counts_true_by_predicted():
    pred, labels = np.asarray([0, 1, 1, 2]), np.asarray([0, 1, 2, 2])
    outcomes = Outcomes(pred, pred == labels, pred == labels, np.zeros(4), labels)
    assert outcomes.confusion(3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_the_table_names_its_rows():
    assert all(name == row.name for name, row in METRICS.items())
