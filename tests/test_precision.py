"""Scoring in another precision: what is converted, what is checked, and where it is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxcar import _providers, runtime
from onnxcar._device import Buffer
from onnxcar._half import half
from onnxcar.data import Npz, Preprocess
from onnxcar.errors import DataError, ModelError, RuntimeMissingError
from onnxcar.importances import importance
from onnxcar.model import from_proto, load
from onnxcar.scoring import Scorer, check_precision
from onnxcar.search import prune
from onnxcar.steps import Stop
from tests.test_cli import run
from tests.test_held import HELD
from tests.test_scoring import opened, plain_net, residual_net, trained

DIGITS = "models/digits/model.onnx"


@pytest.fixture
def net(make_model):
    """A network that tells some classes, and its samples."""
    proto, samples = trained(residual_net(make_model)[0], "fc_w")
    return from_proto(proto), samples


def test_a_half_graph_computes_in_half_and_speaks_in_single(cnn):
    images = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32)
    made = half(cnn)
    assert {t.data_type for t in made.graph.initializer} == {TensorProto.FLOAT16}
    assert {t.data_type for t in cnn.graph.initializer} == {TensorProto.FLOAT}
    single = runtime.session(cnn, threads=1).run({"x": images})[0]
    provider = runtime.resolve_provider("cpu", "fp16")
    short = runtime.session(cnn, provider=provider, threads=1)
    assert short.inputs[0].dtype == np.float32
    out = short.run({"x": images})[0]
    assert out.dtype == np.float32
    assert 0 < np.abs(out - single).max() < 5e-3 * np.abs(single).max()
    narrow = runtime.session(cnn, provider=provider, threads=1, wide=["x"])
    assert narrow.run({"x": images})[0].dtype == np.float16


def test_a_graph_that_cannot_be_half_is_told(monkeypatch, cnn):
    from onnxruntime.transformers import float16

    def fail(*_args, **_options):
        raise ValueError("odd graph")

    monkeypatch.setattr(float16, "convert_float_to_float16", fail)
    with pytest.raises(ModelError, match=r"cannot be converted to float16 \(ValueError: odd graph\).*--precision fp32"):
        half(cnn)


def test_fp32_turns_tf32_off_on_cuda():
    made = _providers.Provider("cuda", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert made.ort_providers[0][1]["use_tf32"] == "0"
    assert dataclasses.replace(made, precision="fp16").ort_providers[0][1]["use_tf32"] == "0"
    assert dataclasses.replace(made, precision="tf32").ort_providers[0][1]["use_tf32"] == "1"
    assert dataclasses.replace(made, precision="tf32").exact.ort_providers == made.ort_providers
    assert made.ort_providers[1] == ("CPUExecutionProvider", {})
    assert made.on_device


@pytest.mark.parametrize(("precision", "said"), [("tf32", "mode of NVIDIA GPUs"), ("fp8", "no precision 'fp8'")])
def test_what_the_provider_does_not_have_is_refused(net, precision, said):
    with pytest.raises(RuntimeMissingError, match=said):
        runtime.resolve_provider("cpu", precision)
    with pytest.raises(RuntimeMissingError, match=said):
        prune(*net, stop=Stop(steps=1), precision=precision, provider="cpu")


@pytest.mark.gpu
def test_tf32_is_something_else_and_near(net):
    try:
        where = runtime.resolve_provider("cuda")
    except RuntimeMissingError as exc:
        pytest.skip(f"no GPU: {exc}")
    model, samples = net
    x = samples.inputs(np.arange(64))[""]
    single, rounded = (runtime.session(model, provider=runtime.resolve_provider(where, p)) for p in ("fp32", "tf32"))
    exact = runtime.session(model, provider="cpu").run({"": x})[0]
    scale = np.abs(exact).max()
    assert np.abs(single.run({"": x})[0] - exact).max() < 1e-5 * scale
    assert np.abs(rounded.run({"": x})[0] - exact).max() < 1e-2 * scale
    assert check_precision(model, samples, "tf32", provider="cuda").top1 > 0.98


@pytest.mark.parametrize("where", ["cpu", HELD, pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("build", [plain_net, residual_net])
@pytest.mark.parametrize("everywhere", [False, True])
def test_candidates_are_scored_in_half_precision(build, where, everywhere, make_model):
    if where == "cuda" and _providers.load_failure("cuda") is not None:
        pytest.skip("no GPU")
    scorer, _ = opened(build, make_model, provider=where, precision="fp16")
    exact, _ = opened(build, make_model)
    scorer.all_sites = exact.all_sites = everywhere
    own = [g for g in scorer.space.layers[0].groups.tolist() if g >= 0]
    ours, theirs = scorer.lowest((), own, k=3), exact.lowest((), own, k=3)
    assert all(abs(p.score.correct - exact.score((), [p.group])[0].correct) <= 2 for p in ours)
    assert abs(ours[0].score.correct - theirs[0].score.correct) <= 2
    assert scorer.base().loss_units != exact.base().loss_units
    states = scorer._wide.states.values() if everywhere else scorer._states.values()
    sites = [state for state in states if state.block is not None]
    assert sites
    assert all(state.site.by_row for state in sites)
    kinds = {value.dtype for state in sites for value in state.block.values.values()}
    assert kinds == {np.dtype(np.float16)}
    if where != "cpu":
        assert all(isinstance(value, Buffer) for state in sites for value in state.block.values.values())
        assert sites[0].verdicts is not None


def test_the_check_says_how_near_it_is(net):
    model, samples = net
    found = check_precision(model, samples, "fp16", provider="cpu", threads=1)
    assert check_precision(model, samples, "fp32", provider="cpu", threads=1) is None
    assert found.samples == len(samples)
    assert found.top1 >= 0.99
    assert 1e-5 < found.max_rel_difference < 5e-3
    assert "Scored in fp16: on 240 samples the same class for" in str(found)


def test_another_network_in_half_precision_is_refused(net):
    model, samples = net
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name == "stem_w":  # values beyond 65504 on the way
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(3e5), tensor.name))
        if tensor.name == "fc_w":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / np.float32(3e5), tensor.name))
    with pytest.raises(ModelError, match=r"In fp16 the network is another one: \d+ of 240.*--precision fp32"):
        prune(from_proto(proto), samples, stop=Stop(steps=1), precision="fp16", provider="cpu")


def test_the_record_names_it_and_the_model_is_as_ever(tmp_path):
    model = load(DIGITS)
    samples = Npz("models/digits/select.npz", Preprocess(channels="gray")).limit(240, 0)
    runs = {}
    for name in ("fp32", "fp16"):
        runs[name] = prune(
            model, samples, stop=Stop(steps=3), layers=["*conv1*"], precision=name, provider="cpu", threads=1,
            journal=tmp_path / f"{name}.jsonl",
        )  # fmt: skip
    record = runs["fp16"].record
    assert record["precision"] == record["arguments"]["precision"] == "fp16"
    assert record["precision_check"]["samples"] == 240
    assert runs["fp32"].record["precision_check"] is None
    assert record["base"] == runs["fp32"].record["base"]  # whole models are scored in single precision
    header = json.loads((tmp_path / "fp16.jsonl").read_text().splitlines()[0])
    assert '"precision": "fp16"' in json.dumps(header)
    assert {t.data_type for t in runs["fp16"].model.proto.graph.initializer} == {TensorProto.FLOAT}
    with pytest.raises(Exception, match="precision"):
        prune(
            model, samples, stop=Stop(steps=3), layers=["*conv1*"], provider="cpu", threads=1,
            journal=tmp_path / "fp16.jsonl",
        )  # fmt: skip


def test_scores_name_it(net):
    found = importance(*net, precision="fp16", provider="cpu", threads=1, layers=["conv1"]).to_dict()
    assert found["precision"] == "fp16"
    assert found["precision_check"]["top1"] >= 0.99
    plain = importance(*net, provider="cpu", threads=1, layers=["conv1"]).to_dict()
    assert (plain["precision"], plain["precision_check"]) == ("fp32", None)
    assert [g["correct"] for g in plain["groups"]] != [None] * len(plain["groups"])


def test_where_nothing_is_scored_it_is_refused(net):
    for call in (prune, importance):
        with pytest.raises(DataError, match="criterion l1 scores nothing"):
            call(*net, criterion="l1", precision="fp16", provider="cpu")


def test_the_command_line_says_it_in_one_line(tmp_path):
    out = tmp_path / "m.onnx"
    done = run("prune", DIGITS, "--steps", "1", "--limit", "100", "--precision", "fp16", "--provider", "cpu", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("Scored in fp16: on 100 samples the same class for 100.0% of them") == 1
    assert json.loads(out.with_suffix(".json").read_text())["precision"] == "fp16"
    for command in ("prune", "score"):
        refused = run(command, DIGITS, "--precision", "tf32", "--provider", "cpu")
        assert refused.exit_code == 2
        assert "--precision tf32 is a mode of the provider cuda, and models run on cpu here" in refused.stderr


def test_a_scorer_says_nothing_about_it_by_itself(net):
    from onnxcar.rules import analyze

    model, samples = net
    assert Scorer(analyze(model), samples, provider="cpu", precision="fp16", threads=1).base().correct > 100
