"""The judge as a graph against the judge on the host: equal to the last count, whatever the outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcar import runtime
from onnxcar._device import Buffer
from onnxcar._judge import Judge
from onnxcar.metrics import METRICS
from onnxcar.scoring._verdict import open_verdicts
from tests.test_held import HELD, held

__all__ = ["held"]
FIELDS = ("cost", "loss", "top1", "top5", "margin")


@pytest.fixture
def like(held, cnn):
    """A session on the device."""
    return runtime.session(cnn, provider=held, threads=1)


@pytest.fixture(scope="module")
def cpu_like(make_model):
    proto = make_model("y = Relu (x)", "float[N,4] x", "float[N,4] y")
    return runtime.session(proto, provider=HELD, threads=1)


def outputs_of(rng, n, classes, dtype, odd, softmax):
    """Outputs with ties, and where `odd` with numbers that are none."""
    values = np.round(rng.normal(size=(n, classes)) * rng.choice([0.5, 4, 40], (n, 1)), rng.integers(0, 4))
    if softmax:
        values = np.exp(values - values.max(1, keepdims=True))
        values /= values.sum(1, keepdims=True)
        if odd:
            values[rng.random((n, classes)) < 0.05] = np.nan
        return values.astype(dtype)
    if odd:
        where = rng.random((n, classes)) < 0.05
        values[where] = rng.choice([np.nan, np.inf, -np.inf, 1e4, -0.0, 6e-8], where.sum())
        values[rng.integers(n)] = rng.choice([0.0, -np.inf, np.nan])
    with np.errstate(over="ignore"):
        return values.astype(dtype)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(["top1", "top5", "balanced", "loss"]),
    classes=st.sampled_from([2, 3, 5, 6, 10, 1000]),
    dtype=st.sampled_from([np.float32, np.float16, np.float64]),
    odd=st.booleans(),
    softmax=st.booleans(),
    some=st.booleans(),
    trailing=st.integers(0, 2),
    distance=st.sampled_from([-1.0, 0.0, 1e-3, 0.3]),
)
def test_counts_are_the_hosts(cpu_like, **drawn):
    compare(cpu_like, **drawn)


def test_counts_are_the_hosts_on_any_device(like):
    rng = np.random.default_rng(0)
    for seed in range(40):
        compare(
            like,
            seed=seed,
            metric=str(rng.choice(["top1", "top5", "balanced", "loss"])),
            classes=int(rng.choice([2, 3, 5, 6, 10, 1000])),
            dtype=[np.float32, np.float16, np.float64][seed % 3],
            odd=bool(seed % 2),
            softmax=seed % 5 == 0,
            some=seed % 7 == 0,
            trailing=seed % 3,
            distance=[-1.0, 0.0, 1e-3, 0.3][seed % 4],
        )


def compare(like, *, seed, metric, classes, dtype, odd, softmax, some, trailing, distance):
    """Results of one set of outputs, by graph and by host."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    values = outputs_of(rng, n, classes, dtype, odd, softmax).reshape(n, classes, *(1,) * trailing)
    columns = np.sort(rng.choice(classes, max(2, classes // 2), replace=False)) if some and classes > 2 else None
    targets = rng.integers(0, classes if columns is None else len(columns), n)
    few = outputs_of(np.random.default_rng(0), 3, classes, dtype, False, softmax).reshape(3, *values.shape[1:])
    judge = Judge(METRICS[metric], targets, few, softmax=softmax, columns=columns)
    assert judge.probabilities == softmax
    verdicts = open_verdicts(judge, few, like)
    assert verdicts is not None
    images = rng.permutation(n)
    with np.errstate(invalid="ignore", over="ignore"):
        got, near = verdicts.rows(Buffer.of(like.provider.device, values), images, distance)
        want = judge.rows(values, images)
        doubt = judge.doubtful(values, images, distance) if distance >= 0 else np.zeros(n, bool)
    for name in FIELDS:
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    np.testing.assert_array_equal(near, doubt)


def test_nearly_all_rows_are_judged_on_the_device(like):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 1000)).astype(np.float32) * 3
    labels = np.argsort(-values, 1)[np.arange(500), rng.integers(0, 9, 500)]  # among the nine largest
    judge = Judge(METRICS["top1"], labels, values[:4])
    verdicts = open_verdicts(judge, values[:4], like)
    on = like.provider.device
    got, near = verdicts.rows(Buffer.of(on, values), np.arange(500), 0.05)
    rest = verdicts._session.run(
        {"outputs": values, "images": np.arange(500), "distance": np.asarray(0.05, np.float32)}
    )[1]
    assert rest.shape[1] == 1000
    assert len(rest) <= 5  # of 1,000 classes about one row in 500 comes back whole
    want = judge.rows(values, np.arange(500))
    assert all(np.array_equal(getattr(got, name), getattr(want, name)) for name in FIELDS)
    assert 0 < want.top1.sum() < want.top5.sum() < 500
    assert 0 < near.sum() < 100


def test_a_loss_near_a_half_unit_is_the_hosts(like, monkeypatch):
    # With an error bound this wide every row is in doubt, and the host judges them all.
    import onnxcar.scoring._verdict as module

    monkeypatch.setattr(module, "LOSS_ONE", 1 << 62)
    values = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    judge = Judge(METRICS["loss"], np.arange(20) % 10, values[:4])
    got, _ = open_verdicts(judge, values[:4], like).rows(Buffer.of(like.provider.device, values), np.arange(20))
    np.testing.assert_array_equal(got.loss, judge.rows(values, np.arange(20)).loss)


def test_what_a_graph_cannot_judge_stays_with_the_host(like):
    rng = np.random.default_rng(0)
    flat, maps = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(4, 6, 2, 1)).astype(np.float32)
    numbers = rng.normal(size=(9, 6))
    assert open_verdicts(Judge(METRICS["mse"], numbers, flat), flat, like) is None
    assert open_verdicts(Judge(METRICS["r2"], numbers, flat), flat, like) is None
    assert open_verdicts(Judge(METRICS["pearson"], numbers, flat), flat, like) is None
    judge = Judge(METRICS["top1"], np.arange(4), flat)
    assert open_verdicts(judge, flat, like) is not None
    assert open_verdicts(judge, maps, like) is None
    assert open_verdicts(judge, flat.astype(np.int32), like) is None
