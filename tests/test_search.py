"""Whole searches: picks against brute force, resume, plans, and what is written."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxcar
from onnxcar import surgery
from onnxcar.data import Npz, Preprocess, open_dataset
from onnxcar.errors import DataError, JournalError, OutputError, PlanError
from onnxcar.greedy import Stop
from onnxcar.model import from_proto, load, save
from onnxcar.rules import analyze
from onnxcar.search import prune, write
from onnxcar.surgery import Plan

DIGITS = Path(__file__).resolve().parents[1] / "models" / "digits"
SHAPE = (3, 6, 6)


def classify(session, x):
    (name,) = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x})[0].astype(np.float64)


def open_session(proto):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def cross_entropy(logits, labels):
    high = logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(logits - high).sum(1)) + high[:, 0] - logits[np.arange(len(labels)), labels]))


@pytest.fixture(scope="module")
def residual_proto(make_model):
    """Two blocks with an Add, one with a BatchNormalization, one with a projection; 12 + 10 + 10 + 16 groups."""
    rng = np.random.default_rng(11)
    scale, shift = rng.uniform(0.5, 1.5, 10), rng.normal(size=10) / 2
    mean, var = rng.normal(size=10) / 2, rng.uniform(0.5, 1.5, 10)
    bn = {f"bn_{k}": v.astype(np.float32) for k, v in zip("sbmv", (scale, shift, mean, var), strict=True)}
    body = """a = Conv <pads = [1,1,1,1]> (x, stem_w)
              b = Relu(a)
              c = Conv <pads = [1,1,1,1]> (b, one_w)
              d = BatchNormalization(c, bn_s, bn_b, bn_m, bn_v)
              e = Relu(d)
              f = Conv <pads = [1,1,1,1]> (e, two_w)
              g = Add(f, b)
              h = Relu(g)
              i = Conv <pads = [1,1,1,1], strides = [2,2]> (h, three_w)
              j = Relu(i)
              k = Conv <pads = [1,1,1,1]> (j, four_w)
              l = Conv <strides = [2,2]> (h, side_w)
              m = Add(k, l)
              n = Relu(m)
              o = GlobalAveragePool(n)
              p = Flatten(o)
              y = Gemm <transB = 1> (p, head_w)"""
    weights = {
        "stem_w": (12, 3, 3, 3),
        "one_w": (10, 12, 3, 3),
        "two_w": (12, 10, 3, 3),
        "three_w": (10, 12, 3, 3),
        "four_w": (16, 10, 3, 3),
        "side_w": (16, 12, 1, 1),
        "head_w": (4, 16),
        **bn,
    }
    return make_model(body, "float[N,3,6,6] x", weights=weights)


@pytest.fixture(scope="module")
def samples(residual_proto, tmp_path_factory):
    """150 random images; the network is right on three of four."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(150, *SHAPE)).astype(np.float32)
    logits = classify(open_session(residual_proto), x)
    y = (logits - logits.mean(0)).argmax(1)
    y = np.where(rng.random(150) < 0.75, logits.argmax(1), y)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=x, y=y)
    return Npz(path), x, y


@pytest.fixture(scope="module")
def residual(residual_proto):
    return from_proto(residual_proto)


# Weight whose filters are on trial -> the weights that read them, with the inputs per filter. Written by hand: nothing
# of the code under test takes part in the brute force.
RESIDUAL_READERS = {
    "stem_w": [("one_w", 1), ("three_w", 1), ("side_w", 1)],
    "one_w": [("two_w", 1)],
    "three_w": [("four_w", 1)],
    "four_w": [("head_w", 1)],
}
DIGITS_READERS = {"conv1.weight": [("conv2.weight", 1)], "conv2.weight": [("fc1.weight", 4)]}


class BruteForce:
    """Edit the graph, make a session, run all images: for every network anew."""

    def __init__(self, proto, readers, x, y):
        self.readers, self.x, self.y = readers, x, y
        self.weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.proto = proto

    def score(self, gone):
        """Correct samples and mean cross-entropy without the filters (weight, index): their readers read zeros."""
        edited = {name: self.weights[name].copy() for name in {r for name, _ in gone for r, _ in self.readers[name]}}
        for name, index in gone:
            for reader, n in self.readers[name]:
                edited[reader][:, index * n : (index + 1) * n] = 0
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            if tensor.name in edited:
                tensor.CopyFrom(onnx.numpy_helper.from_array(edited[tensor.name], tensor.name))
        logits = classify(open_session(proto), self.x)
        return int((logits.argmax(1) == self.y).sum()), cross_entropy(logits, self.y)

    def check(self, space, record, *, everywhere=False):
        """Every step took the candidate of lowest CAR (per MAC, where all layers compete) of lowest loss.

        Gives the number of steps at which there was anything to choose.
        """
        ids = {group.filters[0]: group.id for group in space.groups if group.filters[0][0] in self.readers}
        gone: list[tuple[str, int]] = []
        correct, _ = self.score(gone)
        assert correct == record["base"]["correct"]
        contested = 0
        for step in record["steps"]:
            pick = (step["filters"][0][0], step["filters"][0][1])
            removed = {ids[f] for f in gone}
            rivals = [f for f in ids if f not in gone and (everywhere or f[0] == pick[0])]
            rivals = [f for f in rivals if space.allows(ids[f], removed)]
            found = {f: self.score([*gone, f]) for f in rivals}
            lost = {f: correct - found[f][0] for f in rivals}
            key = {f: lost[f] / space.saved_macs(ids[f], removed) if everywhere else lost[f] for f in rivals}
            assert key[pick] == min(key.values())
            # Of equals the lowest loss goes; removing and masking round differently.
            assert found[pick][1] <= min(found[f][1] for f in rivals if key[f] == key[pick]) + 1e-6
            assert step["correct"] == found[pick][0]
            assert step["importance"] == lost[pick] / len(self.y)
            contested += len(set(lost.values())) > 1
            gone.append(pick)
            correct = found[pick][0]
            cost = space.cost({ids[f] for f in gone})
            assert (step["macs"], step["params"]) == (cost.macs, cost.params)
        assert record["final"]["correct"] == correct
        return contested


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_picks_equal_brute_force_on_a_residual_net(residual, samples, scope):
    data, x, y = samples
    run = prune(residual, data, stop=Stop(steps=31, ratio=0.7), scope=scope, provider="cpu", threads=1)
    assert len(run.steps) >= 30
    brute = BruteForce(residual.proto, RESIDUAL_READERS, x, y)
    assert brute.check(analyze(residual), run.record, everywhere=scope == "global") >= 25


def test_picks_equal_brute_force_on_digits():
    model = load(DIGITS / "model.onnx")
    pre = Preprocess.preset("unit").override(channels="gray", layout="nchw")
    data = open_dataset(DIGITS / "select.npz", preprocess=pre).limit(100).for_input((None, 1, 8, 8))
    x, y = data.inputs(np.arange(100))[""], data.labels
    run = prune(model, data, stop=Stop(ratio=0.5, steps=31), provider="cpu", threads=1)
    assert len(run.steps) == 31
    assert BruteForce(model.proto, DIGITS_READERS, x, y).check(analyze(model), run.record) >= 20


def test_several_groups_a_step_are_the_lowest_of_one_scoring(residual, samples):
    data, x, y = samples
    layers = ["one_w"]
    run = prune(residual, data, stop=Stop(ratio=0.4), layers=layers, per_step=4, provider="cpu", threads=1)
    one = prune(residual, data, stop=Stop(steps=1), layers=layers, per_step=1, provider="cpu", threads=1)
    assert [step.step for step in run.steps] == [1, 1, 1, 1]
    assert run.steps[0].group == one.steps[0].group
    space = analyze(residual)
    base = run.record["base"]["correct"]
    found = {}
    for group in (g for g in space.groups if g.filters[0][0] == "one_w"):
        logits = classify(open_session(surgery.remove(space, Plan([group.id])).proto), x)
        found[group.id] = int((logits.argmax(1) == y).sum())
    assert len(set(found.values())) > 3
    picks = [step.group for step in run.steps]
    assert [(base - found[g]) / 150 for g in picks] == [step.importance for step in run.steps]
    assert sorted(found.values(), reverse=True)[:4] == [found[g] for g in picks]
    logits = classify(open_session(run.model.proto), x)
    assert {step.mark.correct for step in run.steps} == {int((logits.argmax(1) == y).sum())}


@pytest.mark.parametrize("metric", ["loss", "balanced"])
def test_other_metrics_choose_by_their_own_reduction(residual, samples, metric):
    data, x, y = samples
    run = prune(residual, data, metric=metric, stop=Stop(steps=3), layers=["one_w"], provider="cpu", threads=1)
    space = analyze(residual)

    def value(groups):
        logits = classify(open_session(surgery.remove(space, Plan(groups)).proto), x)
        if metric == "loss":
            return cross_entropy(logits, y)
        right = logits.argmax(1) == y
        return -float(np.mean([right[y == c].mean() for c in np.unique(y)]))

    gone: set[int] = set()
    for step in run.steps:
        found = {g.id: value(gone | {g.id}) for g in space.groups if g.filters[0][0] == "one_w" and g.id not in gone}
        assert found[step.group] == pytest.approx(min(found.values()), abs=1e-6)
        assert step.importance == pytest.approx(found[step.group] - value(gone), abs=1e-6)
        gone.add(step.group)


def test_the_drop_on_what_is_shipped_stays_within_bounds(residual, samples):
    data, x, y = samples
    run = prune(residual, data, stop=Stop(max_drop=0.06), multiple_of=2, provider="cpu", threads=1)
    logits = classify(open_session(run.model.proto), x)
    correct = int((logits.argmax(1) == y).sum())
    assert run.record["final"]["correct"] == correct
    assert (run.record["base"]["correct"] - correct) / 150 <= 0.06
    assert run.record["removed"]
    shapes = {t.name: t.dims[0] for t in run.model.proto.graph.initializer}
    for name in run.record["removed"]:
        assert shapes[name] % 2 == 0


def test_no_rule_means_one_point_and_aligned_counts(residual, samples):
    run = prune(residual, samples[0], layers=["one_w"], provider="cpu", threads=1)
    assert run.record["arguments"]["max_drop"] == 0.01
    assert run.record["arguments"]["multiple_of"] == "auto"
    assert 10 - len(run.record["removed"].get("one_w", [])) in (4, 8, 10)


@pytest.mark.parametrize("criterion", ["l1", "l2", "outgoing", "random"])
def test_weights_alone_need_no_data(residual, criterion):
    run = prune(residual, criterion=criterion, stop=Stop(ratio=0.5), provider="cpu", threads=1)
    record = run.record
    assert [len(record["removed"][name]) for name in ("stem_w", "one_w", "three_w", "four_w")] == [6, 5, 5, 8]
    assert record["data"] is record["base"] is record["final"] is None
    assert all(step["value"] is step["correct"] is None for step in record["steps"])
    assert record["verify"]["max_rel_error"] < 1e-5


@pytest.mark.parametrize("criterion", ["class-car", "variance", "apoz", "l2"])
def test_every_criterion_prunes_with_data(residual, samples, criterion):
    run = prune(
        residual, samples[0], criterion=criterion, stop=Stop(ratio=0.3), layers=["one_w"], provider="cpu", threads=1
    )
    assert len(run.steps) == 3
    assert run.record["criterion"] == criterion
    assert run.steps[-1].mark.correct == run.record["final"]["correct"]


def test_class_car_protects_what_one_class_needs(residual, samples):
    data, x, y = samples
    run = prune(residual, data, criterion="class-car", stop=Stop(steps=1), layers=["one_w"], provider="cpu", threads=1)
    space = analyze(residual)

    def per_class(groups):
        right = classify(open_session(surgery.remove(space, Plan(groups)).proto), x).argmax(1) == y
        return np.asarray([right[y == c].mean() for c in np.unique(y)])

    base = per_class(())
    worst = {g.id: float((base - per_class([g.id])).max()) for g in space.groups if g.filters[0][0] == "one_w"}
    assert len(set(worst.values())) > 3
    assert worst[run.steps[0].group] == min(worst.values())
    assert run.steps[0].importance == pytest.approx(min(worst.values()), abs=1e-12)


def test_data_is_asked_for_where_it_is_needed(residual):
    with pytest.raises(DataError, match="Criterion 'car'"):
        prune(residual, stop=Stop(ratio=0.5), provider="cpu")
    with pytest.raises(DataError, match=r"max_drop=0\.01"):
        prune(residual, criterion="l2", provider="cpu")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"scope": "network"}, "no scope 'network'"),
        ({"per_step": 0}, "per_step is 0"),
        ({"min_filters": 0}, "min_filters is 0"),
        ({"multiple_of": "all"}, "multiple_of is 'all'"),
        ({"criterion": "l3"}, "no criterion 'l3'"),
        ({"layers": ["nowhere"]}, "matches no layer"),
    ],
)
def test_bad_arguments_are_refused(residual, bad, text):
    with pytest.raises(PlanError, match=text):
        prune(residual, **{"criterion": "l2", "stop": Stop(ratio=0.5), "provider": "cpu", **bad})


# --- plans and files ------------------------------------------------------------------------------------------------


def written(model, out, **options):
    run = prune(model, provider="cpu", threads=1, **options)
    return run, write(run, out)


def test_a_record_is_a_plan_and_gives_the_same_model(residual, samples, tmp_path):
    run, record = written(residual, tmp_path / "a.onnx", data=samples[0], stop=Stop(ratio=0.4))
    again, _ = written(residual, tmp_path / "b.onnx", plan=tmp_path / "a.json")
    assert again.plan == run.plan
    assert again.stopped == "plan"
    assert again.record["steps"] == []
    a, b = load(tmp_path / "a.onnx").proto, load(tmp_path / "b.onnx").proto
    assert a.graph == b.graph
    assert prune(residual, plan=run.plan.to_json(analyze(residual)), provider="cpu").plan == run.plan
    assert prune(residual, plan=record, provider="cpu", verify=False).record["verify"] is None


def test_a_plan_of_another_model_is_refused(residual, tmp_path):
    plan = {"schema": 1, "model_sha256": "0" * 64, "removed": {"one_w": [1]}}
    with pytest.raises(PlanError, match="made for a"):
        prune(residual, plan=plan, provider="cpu")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="Cannot read the plan"):
        prune(residual, plan=tmp_path / "broken.json", provider="cpu")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match="no JSON object"):
        prune(residual, plan=tmp_path / "list.json", provider="cpu")


def test_the_written_record_has_every_key_and_describes_the_file(residual, samples, tmp_path):
    source = save(residual, tmp_path / "source.onnx")
    model = load(source.path)
    out = tmp_path / "out.onnx"
    _, record = written(model, out, data=samples[0], test_data=samples[0].limit(50), stop=Stop(ratio=0.4))
    back = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert back == json.loads(json.dumps(record))
    assert list(back)[:3] == ["onnxcar", "schema", "command"]
    interface = (
        "onnxcar schema command model result data test_data optimistic metric provider seconds base final test_base"
    )
    interface += " test_final criterion recover arguments steps removed protected verify"
    assert set(interface.split()) <= set(back)
    file = load(out)
    assert back["result"] == {
        "path": str(out),
        "sha256": file.sha256,
        "params": onnxcar.model.count_params(file),
        "macs": analyze(file).cost(()).macs,
        "bytes": out.stat().st_size,
    }
    assert back["model"]["sha256"] == model.sha256
    assert back["optimistic"] is False
    assert back["test_final"]["samples"] == 50
    assert set(back["steps"][0]) == {"step", "group", "filters", "importance", "value", "correct", "macs", "params"}
    removed: dict[str, list[int]] = {}
    for step in back["steps"]:
        for name, index in step["filters"]:
            removed.setdefault(name, []).append(index)
    assert {name: sorted(indices) for name, indices in removed.items()} == back["removed"]
    found = {entry.key: entry.value for entry in file.proto.metadata_props}
    assert found["onnxcar.source_sha256"] == model.sha256
    assert json.loads(found["onnxcar.removed_filters"]) == back["removed"]
    assert json.loads(found["onnxcar.final"]) == back["final"]


def test_files_that_exist_are_kept(residual, tmp_path):
    run = prune(residual, criterion="l2", stop=Stop(ratio=0.5), provider="cpu")
    (tmp_path / "m.json").write_text("mine")
    with pytest.raises(OutputError):
        write(run, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    write(run, tmp_path / "m.onnx", force=True)
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["command"] == "prune"


# --- the journal ----------------------------------------------------------------------------------------------------


def test_a_journal_of_other_arguments_is_refused(residual, samples, tmp_path):
    options = {
        "data": samples[0],
        "layers": ["one_w"],
        "journal": tmp_path / "j.jsonl",
        "provider": "cpu",
        "threads": 1,
    }
    prune(residual, stop=Stop(steps=2), **options)
    with pytest.raises(JournalError, match=r"arguments\.steps is 3 here and 2 there"):
        prune(residual, stop=Stop(steps=3), **options)
    with pytest.raises(JournalError, match="data is"):
        prune(residual, stop=Stop(steps=2), **{**options, "data": samples[0].limit(100)})
    prune(residual, stop=Stop(steps=2, time_limit=1000), **options)


SCRIPT = """
import os
import sys
from onnxcar.data import Npz
from onnxcar.greedy import Stop
from onnxcar.model import load
from onnxcar.search import prune, write

model, data, journal, out, goal, sign = sys.argv[1:]


class Kill:
    def update(self, done, total, text="", unit=""):
        if os.path.exists(journal) and os.path.getsize(journal) >= float(goal):
            os.kill(os.getpid(), int(sign))


stop, how = Stop(max_drop=0.2), {"provider": "cpu", "threads": 1, "progress": Kill()}
run = prune(load(model), Npz(data), stop=stop, per_step=2, multiple_of=2, journal=journal, **how)
write(run, out, force=True)
"""


def result(folder):
    record = json.loads((folder / "m.json").read_text(encoding="utf-8"))
    record.pop("seconds")
    record["result"].pop("path")
    return (folder / "m.onnx").read_bytes(), record


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_in_the_same_bytes(residual, samples, tmp_path):
    save(residual, tmp_path / "source.onnx")
    (tmp_path / "run.py").write_text(SCRIPT)

    def start(folder, goal=float("inf"), sign=0):
        words = [tmp_path / "run.py", tmp_path / "source.onnx", samples[0].path, folder / "j.jsonl", folder / "m.onnx"]
        command = [sys.executable, *map(str, words), str(goal), str(int(sign))]
        return subprocess.run(command, cwd=Path(onnxcar.__file__).parents[1], check=False).returncode

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    assert start(whole) == 0
    size = (whole / "j.jsonl").stat().st_size
    rng = random.Random(3)
    killed = 0
    for goal in sorted(rng.uniform(0.02, 0.98) for _ in range(4)):
        # The process kills itself once its journal is so long: however fast the machine, it has not ended by then.
        killed += start(torn, goal * size, rng.choice([signal.SIGKILL, signal.SIGINT])) != 0
        assert not (torn / "m.onnx").exists()
    assert killed == 4
    assert _size(torn / "j.jsonl") > 0.3 * size
    assert start(torn) == 0
    assert (torn / "j.jsonl").read_bytes() == (whole / "j.jsonl").read_bytes()
    assert result(torn) == result(whole)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def test_the_same_arguments_give_the_same_bytes(residual, samples, tmp_path):
    for name in ("a", "b"):
        written(residual, tmp_path / f"{name}.onnx", data=samples[0], stop=Stop(ratio=0.4), layers=["one_w"])
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_compact_model_is_a_valid_model_of_its_own(residual, samples, tmp_path):
    written(residual, tmp_path / "a.onnx", data=samples[0], stop=Stop(ratio=0.4))
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    again = prune(load(tmp_path / "a.onnx"), criterion="l2", stop=Stop(ratio=0.3), provider="cpu")
    assert again.record["removed"]


def test_an_allowed_error_is_in_the_record_and_only_for_car(residual, samples):
    run = prune(residual, samples[0], stop=Stop(steps=2), scope="global", approximate=0.05, provider="cpu")
    assert run.record["arguments"]["approximate"] == 0.05
    assert len(run.steps) == 2
    with pytest.raises(PlanError, match="approximate is about CAR"):
        prune(residual, criterion="l1", stop=Stop(steps=2), approximate=0.05)
    with pytest.raises(PlanError, match="a probability of an error"):
        prune(residual, samples[0], stop=Stop(steps=2), approximate=1.5)
