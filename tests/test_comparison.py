"""Comparisons of networks whose answers are known by construction."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from onnxcar import stats
from onnxcar.comparison import Gates, compare, rows
from onnxcar.data import FromCallable
from onnxcar.errors import ConfigError, DataError
from onnxcar.model import Model, from_proto

N = 120


def answering(make_model, scale: list[float]) -> Model:
    """Logits = the first four inputs, each times a factor: its answers can be written down by hand."""
    proto = make_model(
        "[head] y = Gemm (x, w)",
        "float[N,6] x",
        "float[N,6] y",
        {"w": np.diag(np.asarray(scale, np.float32))},
    )
    return from_proto(proto)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 6)).astype(np.float32)
    y = x.argmax(1)
    y[::10] = (y[::10] + 1) % 6
    return FromCallable(lambda: iter([(x, y.astype(np.int64))]))


def plain(data, scale):
    x = data.inputs(np.arange(N))[""]
    return (x * np.asarray(scale, np.float32)).argmax(1)


ONES, HALF = [1.0] * 6, [0.2, 0.2, 1, 1, 1, 1]


def test_counts_are_those_of_the_answers(make_model, data):
    found = compare({"a": answering(make_model, ONES), "b": answering(make_model, HALF)}, data, runs=0)
    a, b = plain(data, ONES), plain(data, HALF)
    right_a, right_b = a == data.labels, b == data.labels
    top1 = found.differences[0].scores["top1"]
    assert (top1.only_base, top1.only_candidate) == (int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()))
    assert top1.only_base > 10
    assert top1.difference == pytest.approx((right_b.sum() - right_a.sum()) / N, abs=1e-12)
    assert top1.p == stats.mcnemar(top1.only_base, top1.only_candidate)
    assert found.differences[0].agreement == pytest.approx((a == b).mean(), abs=1e-12)
    assert 0.3 < found.differences[0].agreement < 0.95


def test_interval_of_the_difference_is_narrower_than_that_of_the_scores(make_model, data):
    slightly = [0.9, 1, 1, 1, 1, 1]
    found = compare({"a": answering(make_model, ONES), "b": answering(make_model, slightly)}, data, runs=0)
    top1 = found.differences[0].scores["top1"]
    alone = found.entries[1].rows["top1"].interval
    assert top1.only_base > 0
    assert top1.interval.high - top1.interval.low < alone.high - alone.low


def test_per_class_counts_add_up(make_model, data):
    found = compare({"a": answering(make_model, ONES), "b": answering(make_model, HALF)}, data, runs=0)
    classes = found.differences[0].per_class
    assert sum(c.samples for c in classes) == N
    assert sum(c.base for c in classes) == found.entries[0].score.top1
    b = plain(data, HALF)
    for c in classes:
        assert c.candidate == int(((b == data.labels) & (data.labels == c.label)).sum())


def test_a_model_compared_with_itself_has_no_difference(make_model, data):
    model = answering(make_model, ONES)
    found = compare({"a": model, "b": model}, data, runs=15, threads=1)
    d = found.differences[0]
    assert (d.scores["top1"].difference, d.scores["top1"].p, d.agreement) == (0.0, 1.0, 1.0)
    assert d.scores["loss"].interval.low == d.scores["loss"].interval.high == 0.0
    assert d.latency_interval.low < 1.5
    assert d.latency_interval.high > 1 / 1.5


def test_top5_is_left_out_where_it_says_nothing(make_model, data):
    assert "top5" in rows(
        compare({"a": answering(make_model, ONES), "b": answering(make_model, HALF)}, data, runs=0).entries[0].score
    )
    proto = make_model("[head] y = Gemm (x, w)", "float[N,6] x", "float[N,4] y", {"w": (6, 4)})
    few = FromCallable(lambda: iter([(np.eye(6, dtype=np.float32), np.arange(6) % 4)]))
    found = compare({"a": from_proto(proto), "b": from_proto(proto)}, few, runs=0)
    assert "top5" not in found.entries[0].rows


def test_balanced_difference_equals_mean_of_class_differences(make_model, data):
    models = {"a": answering(make_model, ONES), "b": answering(make_model, HALF)}
    found = compare(models, data, metric="balanced", runs=0)
    d = found.differences[0]
    by_hand = np.mean([(c.candidate - c.base) / c.samples for c in d.per_class])
    assert d.scores["balanced"].difference == pytest.approx(by_hand, abs=1e-12)
    assert by_hand in d.scores["balanced"].interval
    assert abs(by_hand) > 0.05


def test_loss_interval_is_that_of_the_paired_differences(make_model, data):
    found = compare({"a": answering(make_model, ONES), "b": answering(make_model, HALF)}, data, metric="loss", runs=0)
    gap = found.entries[1].score.outcomes.loss - found.entries[0].score.outcomes.loss
    interval = found.differences[0].scores["loss"].interval
    half = 1.959964 * gap.std(ddof=1) / np.sqrt(N)
    assert (interval.low, interval.high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "gates", "met"),
    [
        ("top1", Gates(max_drop=0.9), True),
        ("top1", Gates(max_drop=0.0), False),
        ("top1", Gates(min_score=0.1), True),
        ("top1", Gates(min_score=0.99), False),
        ("loss", Gates(max_drop=5.0), True),
        ("loss", Gates(max_drop=0.0), False),
        ("loss", Gates(min_score=9.0), True),
        ("loss", Gates(min_score=0.1), False),
    ],
)
def test_gates_know_the_direction_of_the_metric(make_model, data, metric, gates, met):
    models = {"a": answering(make_model, ONES), "b": answering(make_model, [0.1, 0.2, 0.3, 1, 1, 1])}
    found = compare(models, data, metric=metric, gates=gates, runs=0)
    assert found.entries[0].score.reduction(found.entries[1].score) > 0
    assert found.passed is met
    assert len(found.gates) == 1


def test_a_drop_of_exactly_the_limit_meets_the_gate(make_model, data):
    models = {"a": answering(make_model, ONES), "b": answering(make_model, HALF)}
    lost = -compare(models, data, runs=0).differences[0].scores["top1"].difference
    assert lost > 0
    assert compare(models, data, gates=Gates(max_drop=lost), runs=0).passed
    assert not compare(models, data, gates=Gates(max_drop=lost - 0.5 / N), runs=0).passed


def test_several_candidates_are_each_held_against_the_base(make_model, data):
    models = {name: answering(make_model, scale) for name, scale in (("a", ONES), ("b", HALF), ("c", ONES))}
    found = compare(models, data, gates=Gates(max_drop=0.0), runs=0)
    assert [(g.candidate, g.met) for g in found.gates] == [("b", False), ("c", True)]
    assert not found.passed


def test_a_larger_network_is_slower_and_said_to_be(make_model):
    proto = make_model("[head] y = MatMul (x, w)", "float[N,900] x", "float[N,900] y", {"w": (900, 900)})
    small = make_model("[head] y = MatMul (x, w)", "float[N,900] x", "float[N,4] y", {"w": (900, 4)})
    found = compare({"small": from_proto(small), "large": from_proto(proto)}, runs=30, threads=1)
    assert found.differences[0].slower
    assert found.differences[0].latency_ratio > 1.5
    back = compare({"large": from_proto(proto), "small": from_proto(small)}, runs=30, threads=1)
    assert not back.differences[0].slower


def test_result_is_json(make_model, data):
    models = {"a": answering(make_model, ONES), "b": answering(make_model, HALF)}
    found = compare(models, data, gates=Gates(max_drop=0.0), runs=15).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["passed"] is False


def test_what_cannot_be_compared_is_refused(make_model, data):
    model = answering(make_model, ONES)
    with pytest.raises(ConfigError, match="two models"):
        compare({"a": model}, data)
    with pytest.raises(DataError, match="--data"):
        compare({"a": model, "b": model}, gates=Gates(max_drop=0.1))
    with pytest.raises(ConfigError, match="--runs 0"):
        compare({"a": model, "b": model}, gates=Gates(max_latency_ratio=1.0), runs=0)


def test_open_size_without_data_asks_for_data(make_model):
    proto = make_model(
        "[c] y = Conv <pads = [1, 1, 1, 1]> (x, w)", "float[N,3,H,W] x", "float[N,4,H,W] y", {"w": (4, 3, 3, 3)}
    )
    assert isinstance(proto, onnx.ModelProto)
    with pytest.raises(DataError, match="--data"):
        compare({"a": from_proto(proto), "b": from_proto(proto)})
