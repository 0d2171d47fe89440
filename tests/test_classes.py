"""Networks for some of their classes: judged among these, output rows dropped, and understood by every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import onnxcar as car
from onnxcar.classes import KEY, Kept, common, fitted, kept_by, resolve
from onnxcar.cli import app
from onnxcar.data import Dataset, Npz
from onnxcar.data._sources import ArraySource
from onnxcar.errors import DataError, ModelError
from onnxcar.model import from_proto
from onnxcar.search import prune, write
from onnxcar.steps import Stop
from onnxcar.surgery import Plan, keep_outputs, remove

DIGITS = Path(__file__).resolve().parents[1] / "models" / "digits"
ONE = {"provider": "cpu", "threads": 1}
KEPT = [1, 3, 4, 8]


@pytest.fixture(scope="module")
def digits():
    return car.load(DIGITS / "model.onnx")


def npz(name: str) -> Dataset:
    return Npz(DIGITS / name, car.Preprocess(channels="gray")).for_input((None, 1, 8, 8))


def run(model, x):
    session = ort.InferenceSession(model.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


# --- judged among some classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["top1", "loss", "balanced"])
def test_a_score_is_that_among_the_classes_that_count(digits, metric):
    data = npz("test.npz")
    weak = remove(car.analyze(digits), Plan(range(0, 40, 2)))
    part = data.only(KEPT)
    x, labels = part.inputs(np.arange(len(part)))[""], np.asarray(KEPT)[part.labels]
    assert set(labels) == set(KEPT)
    assert len(part) == np.isin(data.labels, KEPT).sum()
    logits = run(weak, x).astype(np.float64)[:, KEPT]
    own = np.searchsorted(KEPT, labels)
    right = logits.argmax(1) == own
    log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = {
        "top1": right.mean(),
        "loss": -log_share[np.arange(len(own)), own].mean(),
        "balanced": np.mean([right[own == k].mean() for k in range(4)]),
    }
    found = car.evaluate(weak, part, metric=metric, **ONE)
    assert found.value == pytest.approx(want[metric], abs=1e-6)
    assert found.value != pytest.approx(car.evaluate(weak, data, metric=metric, **ONE).value, abs=1e-3)
    assert len(found.per_class) == 4


def test_probabilities_are_taken_among_the_classes_that_count(make_model):
    rng = np.random.default_rng(0)
    proto = make_model(
        "a = GlobalAveragePool(x) b = Flatten(a) c = Gemm <transB = 1> (b, w) y = Softmax <axis = 1> (c)",
        "float[N,6,2,2] x",
        "float[N,6] y",
        weights={"w": rng.normal(size=(6, 6)).astype(np.float32)},
    )
    x = rng.normal(size=(50, 6, 2, 2)).astype(np.float32)
    data = Dataset(ArraySource({"": x}, "x"), rng.integers(0, 6, 50), path="x")
    part = data.only([0, 2, 5])
    inputs = part.inputs(np.arange(len(part)))[""]
    p = run(from_proto(proto), inputs)[:, [0, 2, 5]].astype(np.float64)
    p /= p.sum(1, keepdims=True)
    want = -np.log(p[np.arange(len(p)), part.labels]).mean()
    assert car.evaluate(from_proto(proto), part, metric="loss", **ONE).value == pytest.approx(want, rel=1e-6)


def test_filters_are_chosen_by_what_the_classes_lose(digits):
    data = npz("select.npz").only(KEPT)
    found = prune(digits, data, metric="loss", stop=Stop(steps=2), layers=["conv1"], **ONE)
    space = car.analyze(digits)
    x = data.inputs(np.arange(len(data)))[""]

    def loss(groups):
        logits = run(remove(space, Plan(groups)), x).astype(np.float64)[:, KEPT]
        share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -share[np.arange(len(x)), data.labels].mean()

    first = {g.id: loss([g.id]) for g in space.groups if g.name.startswith("conv1")}
    assert found.steps[0].group == min(first, key=first.__getitem__)
    assert found.steps[0].importance == pytest.approx(first[found.steps[0].group] - loss([]), abs=1e-6)
    whole = prune(digits, npz("select.npz"), metric="loss", stop=Stop(steps=2), layers=["conv1"], **ONE)
    assert whole.plan != found.plan
    assert found.record["classes"] == {"outputs": KEPT, "names": ["1", "3", "4", "8"], "dropped": False, "map": None}
    assert found.record["arguments"]["classes"] == KEPT
    assert whole.record["classes"] is None


@pytest.mark.parametrize(("wanted", "words"), [([3], "only 1 class"), ([1, 11], "no sample of class 11")])
def test_classes_that_make_no_data_are_refused(wanted, words):
    with pytest.raises(DataError, match=words):
        npz("select.npz").only(wanted)
    with pytest.raises(DataError, match="of all classes"):
        npz("select.npz").only([1, 2]).only([0, 1])


def test_a_class_beyond_the_outputs_is_refused(make_model):
    proto = make_model("a = GlobalAveragePool(x) y = Flatten(a)", "float[N,3,2,2] x", "float[N,3] y")
    x = np.random.default_rng(0).normal(size=(8, 3, 2, 2)).astype(np.float32)
    data = Dataset(ArraySource({"": x}, "x"), np.asarray([0, 1, 2, 7] * 2), path="x").only([0, 7])
    with pytest.raises(DataError, match="Class 7 was asked for"):
        car.evaluate(from_proto(proto), data, **ONE)


def test_names_labels_and_files_say_which_classes(tmp_path):
    data = npz("select.npz")
    assert resolve("3, 1", data) == [3, 1]
    assert resolve("3,1", data, 1) == [4, 2]
    data.classes = ("cat", "dog", "horse")
    assert resolve("horse,cat", data) == [2, 0]
    (tmp_path / "list.txt").write_text("dog\n\n2\n")
    assert resolve(f"@{tmp_path / 'list.txt'}", data) == [1, 2]
    with pytest.raises(DataError, match="Did you mean 'horse'"):
        resolve("hores", data)
    with pytest.raises(DataError, match="cannot be read"):
        resolve("@nowhere.txt", data)


# --- rows that are dropped ------------------------------------------------------------------------------------------

HEADS = {
    "gemm": ("c = GlobalAveragePool(b) d = Flatten(c) y = Gemm <transB = 1> (d, w, v)", (6, 5), (6,), "float[N,6] y"),
    "softmax": (
        "c = GlobalAveragePool(b) d = Flatten(c) e = Gemm <transB = 1> (d, w, v) y = Softmax <axis = 1> (e)",
        *((6, 5), (6,), "float[N,6] y"),
    ),
    "conv": (
        "c = Conv(b, w, v) d = Relu(c) e = GlobalAveragePool(d) y = Flatten(e)",
        (6, 5, 1, 1),
        (6,),
        "float[N,6] y",
    ),
    "conv4": ("c = Conv(b, w, v) y = GlobalAveragePool(c)", (6, 5, 1, 1), (6,), "float[N,6,1,1] y"),
    "matmul": ("c = GlobalAveragePool(b) d = Flatten(c) e = MatMul(d, w) y = Add(e, v)", (5, 6), (6,), "float[N,6] y"),
}


@pytest.mark.parametrize("head", HEADS)
def test_dropped_rows_leave_exactly_the_other_rows(make_model, head):
    body, w, v, output = HEADS[head]
    proto = make_model(
        f"a = Conv(x, first_w) b = Relu(a) {body}",
        outputs=output,
        weights={"first_w": (5, 3, 3, 3), "w": w, "v": np.linspace(-0.2, 0.3, v[0]).astype(np.float32)},
    )
    model = from_proto(proto)
    small = keep_outputs(model, [4, 0, 3])
    onnx.checker.check_model(small.proto, full_check=True)
    x = np.random.default_rng(1).normal(size=(7, 3, 8, 8)).astype(np.float32)
    want = run(model, x)[:, [0, 3, 4]]
    if head == "softmax":
        want = want / want.sum(1, keepdims=True)
    got = run(small, x)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert [o.name for o in small.proto.graph.output] == ["y"]
    assert "Gather" not in {node.op_type for node in small.proto.graph.node}
    assert {t.name: tuple(t.dims) for t in small.proto.graph.initializer}["v"] == (3,)
    assert small.proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 3
    assert model.proto == proto


def test_rows_that_something_else_needs_are_not_dropped(make_model):
    body = "a = GlobalAveragePool(x) b = Flatten(a) y = Gemm <transB = 1> (b, w) z = Relu(y)"
    proto = make_model(body, "float[N,3,8,8] x", "float[N,6] y, float[N,6] z", weights={"w": (6, 3)})
    with pytest.raises(ModelError, match="something else needs them"):
        keep_outputs(from_proto(proto), [0, 1])
    with pytest.raises(ModelError, match="row 9 was to be kept"):
        keep_outputs(from_proto(proto), [0, 9])
    proto = make_model("a = GlobalAveragePool(x) y = Flatten(a)", "float[N,3,2,2] x", "float[N,3] y")
    with pytest.raises(ModelError, match="--drop-outputs"):
        keep_outputs(from_proto(proto), [0, 1])


@pytest.mark.parametrize("name", ["mnist_cntk_op8", "cifar10_resnet20", "imagenet_squeezenet11"])
def test_rows_of_real_networks(shared, name):
    model = car.load(shared / "models" / f"{name}.onnx")
    small = keep_outputs(model, [0, 5, 7])
    shape = [d.dim_value or 1 for d in model.proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    want, got = run(model, x)[:, [0, 5, 7]], run(small, x)
    if name.startswith("imagenet"):
        want = want / want.sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_a_specialised_model_says_what_its_rows_are(digits, tmp_path):
    data, test = npz("select.npz").only(KEPT), npz("test.npz").only(KEPT)
    run_ = prune(digits, data, test_data=test, criterion="l2", stop=Stop(ratio=0.4), drop_outputs=True, **ONE)
    record = write(run_, tmp_path / "m.onnx")
    assert record["classes"]["map"] == {"1": 0, "3": 1, "4": 2, "8": 3}
    model = car.load(tmp_path / "m.onnx")
    assert kept_by(model) == Kept(tuple(KEPT), ("1", "3", "4", "8"), True)
    assert record["result"]["params"] == car.model.count_params(model)
    assert record["result"]["macs"] == car.analyze(model).cost().macs
    # The same plan without dropping: the same answers among the classes.
    whole = prune(digits, data, test_data=test, criterion="l2", stop=Stop(ratio=0.4), **ONE)
    assert whole.plan == run_.plan
    assert whole.record["final"] == record["final"]
    assert whole.record["test_final"] == record["test_final"]
    x = test.inputs(np.arange(20))[""]
    np.testing.assert_allclose(run(model, x), run(whole.model, x)[:, KEPT], rtol=1e-5, atol=1e-6)
    # All data, seen by a model of four rows.
    part = fitted(model, npz("test.npz"))
    assert car.evaluate(model, part, **ONE).correct == record["test_final"]["correct"]
    two = fitted(model, npz("test.npz").only([3, 8]))
    assert two.outputs.tolist() == [1, 3]
    with pytest.raises(DataError, match="no row for class 7"):
        fitted(model, npz("test.npz").only([3, 7]))
    assert common([digits, model], npz("test.npz")).outputs.tolist() == KEPT
    assert common([digits], npz("test.npz")).outputs is None


def test_rows_are_dropped_for_data_of_some_classes_only(digits):
    with pytest.raises(DataError, match="--classes"):
        prune(digits, npz("select.npz"), stop=Stop(ratio=0.5), drop_outputs=True, **ONE)


def test_metadata_that_say_something_else_are_refused(digits):
    proto = onnx.ModelProto()
    proto.CopyFrom(digits.proto)
    proto.metadata_props.add(key=KEY, value='{"outputs": [3, 1], "names": null, "dropped": true}')
    with pytest.raises(ModelError, match="do not ascend"):
        kept_by(from_proto(proto))


# --- the commands ---------------------------------------------------------------------------------------------------


def cli(tmp_path, command, *args):
    (tmp_path / "c.toml").write_text("")
    where = ["--config", str(tmp_path / "c.toml"), "--data", str(DIGITS / "test.npz"), "--channels", "gray"]
    return CliRunner().invoke(app, [command, *map(str, args), *where, "--threads", "1"])


def test_every_command_understands_a_specialised_model(tmp_path):
    out = tmp_path / "m.onnx"
    some = ("--classes", "1,3,4,8")
    plan = ("--criterion", "l2", "--ratio", "0.4", "-o", out)
    done = cli(tmp_path, "prune", DIGITS / "model.onnx", *some, "--drop-outputs", *plan)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.classes.txt").read_text() == "1\n3\n4\n8\n"
    assert "4 classes count" in " ".join(done.output.split())
    said = cli(tmp_path, "evaluate", out, "--json", tmp_path / "e.json", "--per-class")
    assert said.exit_code == 0, said.output
    result = json.loads((tmp_path / "e.json").read_text())
    assert [row["class"] for row in result["per_class"]] == ["1", "3", "4", "8"]
    assert result["value"] == json.loads(out.with_suffix(".json").read_text())["final"]["value"]
    said = cli(tmp_path, "compare", DIGITS / "model.onnx", out, "--runs", "0", "--json", tmp_path / "k.json")
    assert said.exit_code == 0, said.output
    models = json.loads((tmp_path / "k.json").read_text())["models"]
    assert models[0]["scores"]["top1"]["samples"] == models[1]["scores"]["top1"]["samples"] == result["samples"]
    base = cli(tmp_path, "evaluate", DIGITS / "model.onnx", *some, "--json", tmp_path / "b.json")
    assert base.exit_code == 0, base.output
    assert json.loads((tmp_path / "b.json").read_text())["value"] == models[0]["scores"]["top1"]["value"]


@pytest.mark.parametrize(
    ("args", "words"), [(["--drop-outputs", "--ratio", "0.5"], "--classes"), (["--classes", ""], "only 0 class")]
)
def test_what_makes_no_sense_is_refused(tmp_path, args, words):
    result = cli(tmp_path, "prune", DIGITS / "model.onnx", *args, "-o", tmp_path / "m.onnx")
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)


def test_a_limit_is_about_the_classes_that_count(tmp_path):
    said = cli(
        *(tmp_path, "evaluate", DIGITS / "model.onnx", "--classes", "1,3", "--limit", "20"),
        *("--json", tmp_path / "e.json"),
    )
    assert said.exit_code == 0, said.output
    result = json.loads((tmp_path / "e.json").read_text())
    assert [row["samples"] for row in result["per_class"]] == [10, 10]
