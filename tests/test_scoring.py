"""Scores and picks against loops that edit weights, make a session and run all samples."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxcar.data import FromCallable
from onnxcar.errors import DataError, MetricError
from onnxcar.model import from_proto
from onnxcar.rules import analyze
from onnxcar.scoring import Scorer, evaluate, reliability


class Samples:
    """Arrays as a data set, without the detour over a file."""

    classes = None
    path = "memory"
    has_labels = True
    outputs = None

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def inputs(self, indices):
        return {"": self.x[np.asarray(indices)]}


def run(proto, x, batch=50):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    made = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    out = np.concatenate([made.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)])
    return out.reshape(len(x), -1).astype(np.float64)


def trained(proto, head, n=240, size=8, seed=0, classes=4):
    """Samples of noisy templates, and the net with its last layer fitted to them: errors, but not chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    templates = rng.normal(size=(classes, 3, size, size))
    x = (templates[labels] + 1.7 * rng.normal(size=(n, 3, size, size))).astype(np.float32)
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    last = next(node for node in cut.graph.node if head in node.input)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_tensor_value_info(last.input[0], 1, None))
    features = np.hstack([run(cut, x), np.ones((n, 1))])
    weights = np.linalg.lstsq(features, 4.0 * np.eye(classes)[labels], rcond=None)[0].astype(np.float32)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for tensor in made.graph.initializer:
        if tensor.name == head:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[:-1].T), head))
        if tensor.name == head.replace("_w", "_b"):
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[-1]), tensor.name))
    return made, Samples(x, labels.astype(np.int64))


PLAIN = """
    [conv1] a = Conv <pads = [1, 1, 1, 1]> (x, conv1_w, conv1_b)
    [relu1] b = Relu (a)
    [conv2] c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (b, conv2_w, conv2_b)
    [relu2] d = Relu (c)
    [pool] e = GlobalAveragePool (d)
    [flat] f = Flatten (e)
    [fc] y = Gemm <transB = 1> (f, fc_w, fc_b)
"""
RESIDUAL = """
    [stem] a = Conv <pads = [1, 1, 1, 1]> (x, stem_w)
    [relu0] b = Relu (a)
    [conv1] c = Conv <pads = [1, 1, 1, 1]> (b, conv1_w, conv1_b)
    [relu1] d = Relu (c)
    [conv2] e = Conv <pads = [1, 1, 1, 1]> (d, conv2_w, conv2_b)
    [add] f = Add (e, b)
    [relu2] g = Relu (f)
    [pool] h = GlobalAveragePool (g)
    [flat] i = Flatten (h)
    [fc] y = Gemm <transB = 1> (i, fc_w, fc_b)
"""


def plain_net(make_model, first=12, second=10, seed=0):
    shapes = {"conv1_w": (first, 3, 3, 3), "conv1_b": (first,), "conv2_w": (second, first, 3, 3), "conv2_b": (second,)}
    proto = make_model(PLAIN, weights=shapes | {"fc_w": (4, second), "fc_b": (4,)}, seed=seed)
    # The weights that read channel c of each layer.
    return proto, {"conv1_w": ["conv2_w"], "conv2_w": ["fc_w"]}


def residual_net(make_model, stem=8, inner=26, seed=0):
    shapes = {"stem_w": (stem, 3, 3, 3), "conv1_w": (inner, stem, 3, 3), "conv1_b": (inner,)}
    shapes |= {"conv2_w": (stem, inner, 3, 3), "conv2_b": (stem,), "fc_w": (4, stem), "fc_b": (4,)}
    proto = make_model(RESIDUAL, weights=shapes, seed=seed)
    return proto, {"stem_w": ["conv1_w", "fc_w"], "conv1_w": ["conv2_w"]}


class Loop:
    """The obvious way: zero the reading weights, make a session, run everything."""

    def __init__(self, proto, readers, space, samples):
        self.proto, self.readers, self.space, self.samples = proto, readers, space, samples

    def outputs(self, groups, batch=50):
        made = onnx.ModelProto()
        made.CopyFrom(self.proto)
        zero = {}
        for group in groups:
            weight, index = self.space.groups[group].filters[0]
            for reader in self.readers[weight]:
                zero.setdefault(reader, []).append(index)
        for tensor in made.graph.initializer:
            if tensor.name in zero:
                values = numpy_helper.to_array(tensor).copy()
                values[:, zero[tensor.name]] = 0
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return run(made, self.samples.x, batch)

    def result(self, groups):
        out, labels = self.outputs(groups), self.samples.labels
        right = out.argmax(1) == labels
        own = out[np.arange(len(out)), labels]
        loss = np.log(np.exp(out - out.max(1, keepdims=True)).sum(1)) + out.max(1) - own
        counts = np.bincount(labels, minlength=4)
        return {
            "correct": int(right.sum()),
            "loss": float(loss.mean()),
            "per_class": np.bincount(labels[right], minlength=4),
            "balanced": float(np.mean(np.bincount(labels[right], minlength=4) / counts)),
        }

    def key(self, removed, group, metric):
        found = self.result([*removed, group])
        return (self.cost(found, metric), found["loss"], -self.space.saved_macs(group, removed), group)

    @staticmethod
    def cost(found, metric):
        return {"top1": -found["correct"], "loss": found["loss"], "balanced": -round(found["balanced"], 9)}[metric]


def opened(build, make_model, metric="top1", seed=0, n=240, **options):
    proto, readers = build(make_model, seed=seed)
    proto, samples = trained(proto, "fc_w", seed=seed, n=n)
    space = analyze(from_proto(proto))
    scorer = Scorer(space, samples, metric=metric, **{"provider": "cpu", "threads": 1, **options})
    return scorer, Loop(proto, readers, space, samples)


# --- whole greedy searches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["top1", "loss", "balanced"])
@pytest.mark.parametrize("build", [plain_net, residual_net])
def test_greedy_picks_are_those_of_the_obvious_loop(build, metric, make_model):
    scorer, loop = opened(build, make_model, metric)
    space, removed, steps, ties = scorer.space, [], 0, 0
    base = loop.result([])
    assert 0.5 * len(scorer.data) < base["correct"] < len(scorer.data)
    for layer in [layer for layer in space.layers if (layer.groups >= 0).any()]:
        own = sorted({g for g in layer.groups.tolist() if g >= 0 and space.groups[g].layer == layer.index})
        for _ in range(len(own) - 1):
            left = [g for g in own if g not in removed]
            keys = {g: loop.key(removed, g, metric) for g in left}
            ties += len({k[0] for k in keys.values()}) < len(left)
            pick = scorer.lowest(frozenset(removed), left)[0]
            assert pick.group == min(keys, key=keys.__getitem__)
            assert pick.score.correct == loop.result([*removed, pick.group])["correct"]
            assert pick.score.loss == pytest.approx(keys[pick.group][1], abs=1e-5)
            removed.append(pick.group)
            steps += 1
    assert steps >= 20 if build is plain_net else steps >= 30
    assert ties > 0 or metric == "loss"
    # A search that never got better or worse would prove nothing, and one that runs everything would not be one.
    assert loop.result(removed)["correct"] < base["correct"]
    assert scorer.work.rows < scorer.work.pairs


def test_groups_of_all_layers_compete(make_model):
    scorer, loop = opened(plain_net, make_model)
    removed = []
    for _ in range(14):
        left = [g.id for g in scorer.space.groups if g.id not in removed and scorer.space.allows(g.id, removed)]
        keys = {g: loop.key(removed, g, "top1") for g in left}
        pick = scorer.lowest(frozenset(removed), left)[0]
        assert pick.group == min(keys, key=keys.__getitem__)
        removed.append(pick.group)
    assert len({scorer.space.groups[g].layer for g in removed}) > 1


def test_four_at_a_time_are_the_four_lowest(make_model):
    scorer, loop = opened(residual_net, make_model)
    left = [g for g in scorer.space.layers[1].groups.tolist()]
    for removed in ([], left[:3]):
        rest = [g for g in left if g not in removed]
        keys = {g: loop.key(removed, g, "top1") for g in rest}
        want = sorted(keys, key=keys.__getitem__)
        assert [pick.group for pick in scorer.lowest(frozenset(removed), rest, k=4)] == want[:4]
    assert [pick.group for pick in scorer.lowest(frozenset(removed), rest, k=99)] == want


def test_per_mac_divides_by_what_is_saved(make_model):
    scorer, loop = opened(residual_net, make_model)
    space, base = scorer.space, loop.result([])["correct"]
    lost = {g.id: base - loop.result([g.id])["correct"] for g in space.groups}
    assert any(lost.values())
    want = min(lost, key=lambda g: (lost[g] / space.saved_macs(g), loop.result([g])["loss"], -space.saved_macs(g), g))
    assert scorer.lowest(frozenset(), list(lost), per_mac=True)[0].group == want


# --- elimination against full scores --------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(["top1", "top5", "balanced", "loss"]),
    k=st.integers(1, 6),
    build=st.sampled_from([plain_net, residual_net]),
    n=st.integers(2, 60),
    batch=st.sampled_from([None, 1, 7]),
    per_mac=st.booleans(),
)
def test_lowest_is_what_full_scores_give(make_model, seed, metric, k, build, n, batch, per_mac):
    scorer, _ = opened(build, make_model, metric, seed=seed, n=n, batch_size=batch)
    space, rng = scorer.space, np.random.default_rng(seed)
    removed = set()
    for _ in range(4):
        left = [g.id for g in space.groups if g.id not in removed and space.allows(g.id, removed)]
        left = sorted(rng.choice(left, size=min(len(left), int(rng.integers(1, 20))), replace=False).tolist())
        base = scorer.base(removed)
        full = dict(zip(left, scorer.score(frozenset(removed), left), strict=True))

        def key(g, base=base, full=full, removed=frozenset(removed)):
            lost, saved = full[g].cost - base.cost, space.saved_macs(g, removed)
            return (lost / saved if per_mac else lost, full[g].loss_units, -saved, g)

        picks = scorer.lowest(frozenset(removed), left, k=k, per_mac=per_mac)
        assert [p.group for p in picks] == sorted(left, key=key)[:k]
        for pick in picks:
            assert pick.score.cost == full[pick.group].cost
            assert pick.score.correct == full[pick.group].correct
            assert pick.score.loss_units == full[pick.group].loss_units
            assert pick.score.per_class.tolist() == full[pick.group].per_class.tolist()
        removed.add(picks[0].group)


def test_a_hint_changes_no_pick(make_model):
    scorer, _ = opened(residual_net, make_model)
    left = scorer.space.layers[1].groups.tolist()
    want = [p.group for p in scorer.lowest(frozenset(), left, k=2)]
    for hint in (left, left[::-1], [left[3]]):
        assert [p.group for p in scorer.lowest(frozenset(), left, hint, k=2)] == want


def test_answers_do_not_depend_on_what_was_asked_before(make_model):
    scorer, _ = opened(residual_net, make_model)
    fresh, _ = opened(residual_net, make_model)
    left = scorer.space.layers[1].groups.tolist()
    removed = []
    for _ in range(5):
        pick = scorer.lowest(frozenset(removed), [g for g in left if g not in removed])[0]
        before = list(removed)
        removed.append(pick.group)
    again = fresh.lowest(frozenset(before), [g for g in left if g not in before])[0]
    assert again.group == pick.group
    assert again.score.loss_units == pick.score.loss_units


# --- full scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [plain_net, residual_net])
def test_full_scores_are_those_of_the_obvious_loop(build, make_model):
    scorer, loop = opened(build, make_model)
    groups = [g.id for g in scorer.space.groups]
    removed = frozenset([1, groups[-1]])
    left = [g for g in groups if g not in removed]
    base = scorer.base(removed)
    for group, score in zip(left, scorer.score(removed, left), strict=True):
        want = loop.result([*removed, group])
        assert score.correct == want["correct"]
        assert score.per_class.tolist() == want["per_class"].tolist()
        assert score.loss == pytest.approx(want["loss"], abs=1e-5)
        assert base.reduction(score) == (base.correct - want["correct"]) / len(scorer.data)
    assert base.correct == loop.result(removed)["correct"]


def test_little_memory_gives_the_same_scores(make_model):
    scorer, _ = opened(residual_net, make_model)
    tight, _ = opened(residual_net, make_model, memory_bytes=300_000)
    left = [g.id for g in scorer.space.groups]
    assert [s.loss_units for s in scorer.score((), left)] == [s.loss_units for s in tight.score((), left)]
    inner = scorer.space.layers[1].groups.tolist()
    assert [p.group for p in scorer.lowest((), inner, k=3)] == [p.group for p in tight.lowest((), inner, k=3)]
    assert tight.work.prefixes > 0


def test_dead_channels_are_not_run(make_model):
    proto, _ = residual_net(make_model)
    proto, samples = trained(proto, "fc_w")
    for tensor in proto.graph.initializer:
        if tensor.name in ("conv1_w", "conv1_b"):
            values = numpy_helper.to_array(tensor).copy()
            values[5] = 0 if tensor.name == "conv1_w" else -1.0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    space = analyze(from_proto(proto))
    scorer = Scorer(space, samples, provider="cpu", threads=1)
    inner = space.layers[1].groups.tolist()
    pick = scorer.lowest((), inner)[0]
    base, dead = scorer.base(), scorer.score((), [inner[5]])[0]
    assert dead.correct == base.correct
    assert dead.loss == pytest.approx(base.loss, abs=1e-6)
    assert scorer.work.rows <= len(samples) * len(inner)
    assert pick.score.correct >= base.correct


def test_the_next_layer_starts_with_what_the_last_winner_said(make_model):
    one, _ = opened(plain_net, make_model)
    fresh, _ = opened(plain_net, make_model)
    first, second = (layer.groups.tolist() for layer in one.space.layers[:2])
    gone = frozenset([one.lowest((), first)[0].group])
    rows = one.work.rows
    after, anew = one.lowest(gone, second)[0], fresh.lowest(gone, second)[0]
    assert (after.group, after.score.loss_units) == (anew.group, anew.score.loss_units)
    # The base need not be run on images that would rule nobody out.
    assert one.work.rows - rows < fresh.work.rows


@pytest.mark.parametrize("size", [1, 4])
def test_a_fixed_batch_changes_no_score(size, make_model):
    proto, _ = residual_net(make_model)
    proto, samples = trained(proto, "fc_w", n=30)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for info in (fixed.graph.input[0], fixed.graph.output[0]):
        info.type.tensor_type.shape.dim[0].Clear()
        info.type.tensor_type.shape.dim[0].dim_value = size
    found = []
    for made in (proto, fixed):
        space = analyze(from_proto(made))
        scorer = Scorer(space, samples, provider="cpu", threads=1)
        inner = space.layers[1].groups.tolist()
        found.append(([s.correct for s in scorer.score((), inner)], scorer.lowest((), inner)[0].group))
    assert found[0] == found[1]


def test_a_batch_that_cannot_be_freed_runs_in_pieces(make_model):
    # Adding a (2, 4) constant to the logits ties the graph to two samples for good.
    body = RESIDUAL.replace("[fc] y =", "[fc] z =") + "[tie] y = Add (z, both)"
    weights = {"stem_w": (10, 3, 3, 3), "conv1_w": (9, 10, 3, 3), "conv1_b": (9,), "conv2_w": (10, 9, 3, 3)}
    weights |= {"conv2_b": (10,), "fc_w": (4, 10), "fc_b": (4,), "both": np.zeros((2, 4), np.float32)}
    proto = make_model(body, "float[2,3,8,8] x", "float[2,4] y", weights)
    rng = np.random.default_rng(0)
    samples = Samples(rng.normal(size=(31, 3, 8, 8)).astype(np.float32), rng.integers(0, 4, 31))
    space = analyze(from_proto(proto))
    scorer = Scorer(space, samples, provider="cpu", threads=1)
    even = Samples(np.concatenate([samples.x, samples.x[-1:]]), samples.labels)
    loop = Loop(proto, {"conv1_w": ["conv2_w"]}, space, even)
    inner = space.layers[1].groups.tolist()
    want = []
    for group in inner:
        out = loop.outputs([group], batch=2)[:31]
        want.append(float(np.mean(np.log(np.exp(out).sum(1)) - out[np.arange(31), samples.labels])))
    assert max(want) - min(want) > 1e-3
    assert [s.loss for s in scorer.score((), inner)] == pytest.approx(want, abs=1e-6)
    best = scorer.lowest((), inner)[0].score
    assert best.correct == max(s.correct for s in scorer.score((), inner))


# --- regression and functions of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["r2", "mse", "mae", "pearson"])
def test_regression_picks_are_those_of_the_formula(metric, make_model):
    proto, readers = residual_net(make_model)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, 3, 8, 8)).astype(np.float32)
    y = run(proto, x) + 0.1 * rng.normal(size=(90, 4))
    space = analyze(from_proto(proto))
    scorer = Scorer(space, Samples(x, y), metric=metric, provider="cpu", threads=1)
    loop = Loop(proto, readers, space, scorer.data)

    def value(groups):
        out = loop.outputs(groups)
        return {
            "r2": np.mean(1 - ((y - out) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)),
            "mse": np.mean((y - out) ** 2),
            "mae": np.mean(np.abs(y - out)),
            "pearson": np.mean([np.corrcoef(y[:, j], out[:, j])[0, 1] for j in range(4)]),
        }[metric]

    inner = space.layers[1].groups.tolist()
    sign = 1 if metric in ("mse", "mae") else -1
    want = {g: value([g]) for g in inner}
    for group, score in zip(inner, scorer.score((), inner), strict=True):
        assert score.value == pytest.approx(want[group], abs=1e-5)
        assert score.correct is None
    assert scorer.base().value == pytest.approx(value([]), abs=1e-5)
    assert scorer.lowest((), inner)[0].group == min(inner, key=lambda g: sign * want[g])


def test_a_function_of_ones_own_ranks(make_model):
    proto, readers = residual_net(make_model)
    proto, samples = trained(proto, "fc_w", n=60)
    space = analyze(from_proto(proto))

    def first_class_only(outputs, targets):
        return (outputs.argmax(1) == targets)[targets == 0]

    scorer = Scorer(space, samples, metric=first_class_only, provider="cpu", threads=1)
    loop = Loop(proto, readers, space, samples)
    inner = space.layers[1].groups.tolist()
    right = {g: loop.outputs([g]).argmax(1) == samples.labels for g in inner}
    want = {g: right[g][samples.labels == 0].mean() for g in inner}
    assert [s.value for s in scorer.score((), inner)] == pytest.approx(list(want.values()))
    assert want[scorer.lowest((), inner)[0].group] == max(want.values())


# --- one whole model ------------------------------------------------------------------------------------------------


def test_evaluate_says_what_each_sample_got(make_model):
    proto, _ = plain_net(make_model)
    proto, samples = trained(proto, "fc_w")
    score = evaluate(from_proto(proto), samples, provider="cpu", threads=1, batch_size=17)
    out = run(proto, samples.x)
    assert score.outcomes.pred.tolist() == out.argmax(1).tolist()
    assert score.correct == int((out.argmax(1) == samples.labels).sum()) == int(score.outcomes.correct.sum())
    assert score.value == score.correct / len(samples)
    assert score.outcomes.confusion(4).sum(1).tolist() == np.bincount(samples.labels).tolist()
    assert np.diag(score.outcomes.confusion(4)).tolist() == score.per_class.tolist()
    assert score.loss == pytest.approx(score.outcomes.loss.mean(), abs=1e-8)


def test_evaluate_reads_a_real_data_set(make_model):
    proto, _ = plain_net(make_model)
    proto, samples = trained(proto, "fc_w", n=20)
    data = FromCallable(lambda: [(samples.x, samples.labels)])
    assert evaluate(from_proto(proto), data, provider="cpu", threads=1).samples == 20


def test_labels_outside_the_classes_are_refused(make_model):
    proto, _ = plain_net(make_model)
    proto, samples = trained(proto, "fc_w", n=20)
    samples.labels[7] = 4
    with pytest.raises(DataError, match=r"Sample 7 has label 4.*4 outputs.*--label-offset"):
        evaluate(from_proto(proto), samples, provider="cpu")


def test_the_wrong_image_size_is_refused(make_model):
    proto, _ = plain_net(make_model)
    proto, samples = trained(proto, "fc_w", n=20)
    with pytest.raises(DataError, match=r"takes shape \(any, 3, 8, 8\), the data has \(\d+, 3, 9, 9\)"):
        evaluate(from_proto(proto), Samples(np.zeros((5, 3, 9, 9), np.float32), samples.labels[:5]), provider="cpu")


def test_a_metric_without_its_labels_is_refused(make_model):
    proto, _ = plain_net(make_model)
    with pytest.raises(MetricError, match="needs class labels"):
        evaluate(from_proto(proto), Samples(np.zeros((5, 3, 8, 8), np.float32), np.zeros((5, 4))), provider="cpu")


# --- reliability ----------------------------------------------------------------------------------------------------


def test_reliability_of_noise_is_near_zero_and_of_signal_near_one():
    rng = np.random.default_rng(0)
    base = np.ones(2000, bool)
    noise = {g: rng.random(2000) < 0.1 for g in range(40)}
    signal = {g: rng.random(2000) < 0.02 * g for g in range(40)}
    assert abs(reliability(base, noise).split_half) < 0.3
    assert reliability(base, signal).split_half > 0.95


def test_standard_error_is_that_of_a_paired_difference():
    rng = np.random.default_rng(1)
    base = rng.random(500) < 0.8
    flips = {3: rng.random(500) < 0.1}
    difference = base.astype(float) - (base ^ flips[3]).astype(float)
    assert reliability(base, flips).stderr[0] == pytest.approx(difference.std(ddof=1) / np.sqrt(500), rel=1e-9)


def test_scores_leave_flips_behind(make_model):
    scorer, loop = opened(plain_net, make_model)
    left = [g.id for g in scorer.space.groups]
    scores = scorer.score((), left)
    base = loop.result([])["correct"]
    for group, score in zip(left, scores, strict=True):
        lost = (scorer.flips[group] & scorer.base_correct).sum() - (scorer.flips[group] & ~scorer.base_correct).sum()
        assert base - int(lost) == score.correct
    assert reliability(scorer.base_correct, scorer.flips).stderr.shape == (len(left),)


# --- all sites at once ------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), metric=st.sampled_from(["top1", "balanced", "loss"]), k=st.sampled_from([1, 4]))
def test_searches_over_all_layers_pick_what_the_loop_picks_with_images_in_memory_or_in_blocks(
    make_model, seed, metric, k
):
    scorer, loop = opened(residual_net, make_model, metric, seed=seed, n=80)
    tight, _ = opened(residual_net, make_model, metric, seed=seed, n=80)
    tight._open_wide().fits = 23
    scorer.all_sites = tight.all_sites = True
    space, removed = scorer.space, []
    for _ in range(4):
        left = [g.id for g in space.groups if g.id not in removed and space.allows(g.id, removed)]
        base = loop.cost(loop.result(removed), metric)
        keys = {}
        for g in left:
            first, *rest = loop.key(removed, g, metric)
            keys[g] = ((first - base) / space.saved_macs(g, removed), *rest)
        picks = [pick.group for pick in scorer.lowest(frozenset(removed), left, k=k, per_mac=True)]
        assert [pick.group for pick in tight.lowest(frozenset(removed), left, k=k, per_mac=True)] == picks
        want = sorted(left, key=keys.__getitem__)[:k]
        # The loop's losses are float32 sums of another order: near ties may swap.
        assert all(
            pick == other or np.allclose(keys[pick][:2], keys[other][:2], rtol=0, atol=1e-6)
            for pick, other in zip(picks, want, strict=True)
        )
        assert scorer.base(frozenset(removed)).correct == loop.result(removed)["correct"]
        removed += picks
    assert tight.work.prefixes > scorer.work.prefixes
