"""Importances of all groups against counting by hand, and what is said of their reliability."""

from __future__ import annotations

import csv
import io

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcar.data import FromCallable
from onnxcar.errors import DataError, PlanError
from onnxcar.importances import Importances, importance
from onnxcar.model import from_proto
from onnxcar.scoring import Reliability


@pytest.fixture
def data(residual):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((150, 3, 8, 8)) + rng.standard_normal((150, 3, 1, 1))).astype(np.float32)
    logits = onnxruntime.InferenceSession(residual.SerializeToString()).run(None, {"x": x})[0]
    bias = next(t for t in residual.graph.initializer if t.name == "fc_b")  # centred, so that every class occurs
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) - logits.mean(0), "fc_b"))
    y = (logits - logits.mean(0)).argmax(1)
    y[::9] = (y[::9] + 1) % 4
    return FromCallable(lambda: iter([(x, y.astype(np.int64))]))


def without(proto: onnx.ModelProto, filters: list[tuple[str, int]]) -> onnx.ModelProto:
    """The network with filters that give nothing: in this one (no BatchNormalization) zero weights and bias do."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for weight, index in filters:
        for name in (weight, weight.replace("_w", "_b")):
            for tensor in made.graph.initializer:
                if tensor.name == name:
                    values = onnx.numpy_helper.to_array(tensor).copy()
                    values[index] = 0
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    return made


def correct(proto, data) -> int:
    x = data.inputs(np.arange(len(data)))[""]
    return int(
        (onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0].argmax(1) == data.labels).sum()
    )


def test_car_of_every_group_is_what_counting_by_hand_gives(residual, data):
    found = importance(from_proto(residual), data, threads=1)
    base = correct(residual, data)
    by_hand = [
        (base - correct(without(residual, list(found.space.groups[g].filters)), data)) / 150 for g in found.groups
    ]
    assert len(found.groups) == 11
    assert len(set(by_hand)) > 4
    assert found.values.tolist() == by_hand
    assert found.base.correct == base


def test_layers_restrict_the_groups_and_change_no_value(residual, data):
    whole = importance(from_proto(residual), data, threads=1)
    part = importance(from_proto(residual), data, layers=["conv1"], threads=1)
    assert 0 < len(part.groups) < len(whole.groups)
    kept = dict(zip(whole.groups, whole.values.tolist(), strict=True))
    assert part.values.tolist() == [kept[g] for g in part.groups]
    rest = importance(from_proto(residual), data, exclude=["conv1"], threads=1)
    assert sorted(part.groups + rest.groups) == list(whole.groups)


def test_class_car_is_the_largest_of_the_reported_classes(residual, data):
    found = importance(from_proto(residual), data, criterion="class-car", threads=1)
    for group in found.to_dict(by_class=True)["groups"]:
        assert group["importance"] == pytest.approx(max(group["per_class"].values()), abs=1e-12)


def test_csv_holds_what_the_json_holds(residual, data):
    found = importance(from_proto(residual), data, threads=1)
    rows = list(csv.DictReader(io.StringIO(found.to_csv(by_class=True))))
    for row, group in zip(rows, found.to_dict(by_class=True)["groups"], strict=True):
        assert (row["group"], float(row["importance"]), int(row["correct"])) == (
            group["group"],
            group["importance"],
            group["correct"],
        )
        assert {name: float(row[name]) for name in group["per_class"]} == group["per_class"]


def test_reliability_is_of_top1_only(residual, data):
    assert importance(from_proto(residual), data, threads=1).reliability is not None
    other = importance(from_proto(residual), data, metric="loss", threads=1)
    assert other.reliability is None
    assert other.stderr is None
    assert not other.near_noise


@pytest.mark.parametrize(("split_half", "noise"), [(-0.1, True), (0.25, True), (float("nan"), True), (0.8, False)])
def test_noise_is_told_by_the_split_halves(residual, data, split_half, noise):
    found = importance(from_proto(residual), criterion="l1")
    known = Reliability(np.asarray([0.0, 0.02]), split_half)
    made = Importances(found.space, "car", found.groups, found.values, None, None, known)
    assert made.near_noise is noise
    assert made.stderr == pytest.approx(0.02 / np.sqrt(2), abs=1e-12)


def test_progress_reaches_every_layer(residual, data):
    seen = []

    class Told:
        def update(self, done, total, text="", unit=""):
            seen.append((done, total, text))

    importance(from_proto(residual), data, threads=1, progress=Told())
    assert [text for _, _, text in seen] == ["stem", "conv1"]
    assert [(done, total) for done, total, _ in seen] == [(0, 11), (6, 11)]


def test_what_cannot_be_scored_is_refused(residual, data):
    with pytest.raises(DataError, match="--data"):
        importance(from_proto(residual))
    with pytest.raises(PlanError, match="best"):
        importance(from_proto(residual), data, criterion="best")
    with pytest.raises(PlanError, match="conv9"):
        importance(from_proto(residual), data, layers=["conv9"])
