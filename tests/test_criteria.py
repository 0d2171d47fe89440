"""Importances against numbers worked out by hand or by plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.criteria import CRITERIA, Context, Criterion, find, per_layer_unit
from onnxcar.data import Npz
from onnxcar.errors import DataError, PlanError
from onnxcar.model import from_proto
from onnxcar.rules import analyze


def values(*rows):
    return np.asarray(rows, np.float32)


@pytest.fixture
def dense(make_model):
    """Two 1x1 Convs of 3 and 2 filters on 2 inputs, weights small whole numbers; groups 0-2 and 3-4."""
    one = values([1, -2], [3, 0], [-1, 1]).reshape(3, 2, 1, 1)
    two = values([1, 0, -4], [-2, 1, 0]).reshape(2, 3, 1, 1)
    head = values([1, -1], [0, 3])
    body = """a = Conv(x, one_w) b = Relu(a) c = Conv(b, two_w) d = Relu(c)
              e = GlobalAveragePool(d) f = Flatten(e) y = Gemm <transB = 1> (f, head_w)"""
    weights = {"one_w": one, "two_w": two, "head_w": head}
    return analyze(from_proto(make_model(body, "float[N,2,2,2] x", "float[N,2] y", weights)))


@pytest.fixture
def residual(make_model):
    """Stem and end tied by an Add; the first of 2 stem filters has norm 5, its partner in the end 1."""
    stem = values([3, 4], [0, 1]).reshape(2, 2, 1, 1)
    end = values([1, 0], [0, 7]).reshape(2, 2, 1, 1)
    body = """b = Conv(x, stem_w) c = Relu(b) d = Conv(c, inner_w) e = Relu(d) f = Conv(e, end_w) g = Add(f, c)
              h = Relu(g) i = GlobalAveragePool(h) j = Flatten(i) y = Gemm <transB = 1> (j, head_w)"""
    weights = {"stem_w": stem, "inner_w": values([2, 2], [5, 1]).reshape(2, 2, 1, 1), "end_w": end}
    weights["head_w"] = values([10, 1], [-10, 1])
    return analyze(from_proto(make_model(body, "float[N,2,2,2] x", "float[N,2] y", weights)))


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(37, 2, 2, 2)).astype(np.float32), rng.integers(0, 2, 37)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return Npz(tmp_path / "data.npz"), x, y


def importances(name, space, **context):
    return CRITERIA[name](space, Context(**context))


def test_l1_sums_absolute_weights(dense):
    assert importances("l1", dense).tolist() == [3, 3, 2, 5, 3]


def test_l2_is_the_euclidean_norm(dense):
    np.testing.assert_allclose(importances("l2", dense), np.sqrt([5, 9, 2, 17, 5]), rtol=1e-12)


def test_a_group_of_several_filters_has_their_mean_norm(residual):
    # Groups: (stem 0, end 0), (stem 1, end 1), inner 0, inner 1.
    assert importances("l2", residual)[:2].tolist() == [(5 + 1) / 2, (1 + 7) / 2]
    assert importances("l1", residual).tolist() == [(7 + 1) / 2, (1 + 7) / 2, 4, 6]


def test_outgoing_is_the_mean_over_all_reading_weights(dense, residual):
    np.testing.assert_allclose(importances("outgoing", dense), [1.5, 0.5, 2, 0.5, 2], rtol=1e-12)
    # The stem is read by the inner Conv (2 and 5; 2 and 1) and, after the Add, by the head (10 and 10; 1 and 1).
    np.testing.assert_allclose(importances("outgoing", residual), [27 / 4, 5 / 4, 0.5, 3.5], rtol=1e-12)


def test_random_follows_the_seed_alone(dense):
    first = importances("random", dense, seed=1)
    assert first.tolist() == importances("random", dense, seed=1).tolist()
    assert first.tolist() != importances("random", dense, seed=2).tolist()
    assert len(set(first.tolist())) == 5


def activations(x):
    """What the second Conv and the head of `dense` read."""
    one = np.maximum(np.einsum("fi,nihw->nfhw", values([1, -2], [3, 0], [-1, 1]), x), 0)
    two = np.maximum(np.einsum("fi,nihw->nfhw", values([1, 0, -4], [-2, 1, 0]), one), 0)
    return one, two.mean((2, 3))


@pytest.mark.parametrize("batch_bytes", [1, 200, 1 << 20])
def test_apoz_counts_what_is_not_zero_where_it_is_read(dense, samples, batch_bytes):
    data, x, _ = samples
    one, two = activations(x)
    want = [*(one != 0).mean((0, 2, 3)), *(two != 0).mean(0)]
    assert 0 < min(want) < max(want) < 1
    found = importances("apoz", dense, data=data, batch_bytes=batch_bytes)
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("batch_bytes", [1, 200, 1 << 20])
def test_variance_is_that_of_the_contribution_to_the_reader(dense, samples, batch_bytes):
    data, x, _ = samples
    one, two = activations(x)
    spread = [*one.var((0, 2, 3), dtype=np.float64), *two.var(0, dtype=np.float64)]
    squares = [(1 + 4) / 2, 1 / 2, 16 / 2, 1 / 2, (1 + 9) / 2]
    found = importances("variance", dense, data=data, batch_bytes=batch_bytes)
    np.testing.assert_allclose(found, np.multiply(spread, squares), rtol=1e-5)  # float32 activations


def test_a_constant_channel_has_no_contribution_variance(make_model, samples):
    """Its mean can go into the reader's bias: the case that magnitude gets wrong."""
    one = values([1, 1], [0, 0]).reshape(2, 2, 1, 1)
    body = """b = Conv(x, one_w, one_b) c = Relu(b) d = GlobalAveragePool(c) e = Flatten(d)
              y = Gemm <transB = 1> (e, head_w)"""
    weights = {"one_w": one, "one_b": values(0.0, 9.0), "head_w": values([1, 50], [1, -50])}
    space = analyze(from_proto(make_model(body, "float[N,2,2,2] x", "float[N,2] y", weights)))
    live, constant = importances("variance", space, data=samples[0])
    assert constant == 0 < live


def test_a_batch_fixed_in_the_file_changes_nothing(make_model, samples):
    one = values([1, -2], [3, 0], [-1, 1]).reshape(3, 2, 1, 1)
    body = """b = Conv(x, one_w) c = Relu(b) d = Reshape(c, rows) y = Gemm <transB = 1> (d, head_w)"""
    rng = np.random.default_rng(3)
    weights = {"one_w": one, "rows": np.asarray([1, 12]), "head_w": rng.normal(size=(2, 12)).astype(np.float32)}
    fixed = analyze(from_proto(make_model(body, "float[1,2,2,2] x", "float[1,2] y", weights)))
    data, x, _ = samples
    want = (activations(x)[0] != 0).mean((0, 2, 3))
    np.testing.assert_allclose(importances("apoz", fixed, data=data), want, rtol=1e-12)


def test_rows_that_fill_up_a_fixed_batch_do_not_count(make_model, samples):
    """A constant of two rows: no other batch runs, and 37 samples leave one over."""
    one = values([1, -2], [3, 0], [-1, 1]).reshape(3, 2, 1, 1)
    body = "b = Conv(x, one_w) c = Add(b, rows) d = Relu(c) e = Flatten(d) y = Gemm <transB = 1> (e, head_w)"
    weights = {"one_w": one, "rows": np.zeros((2, 3, 2, 2), np.float32), "head_w": (2, 12)}
    fixed = analyze(from_proto(make_model(body, "float[2,2,2,2] x", "float[2,2] y", weights)))
    data, x, _ = samples
    want = (activations(x)[0] != 0).mean((0, 2, 3))
    np.testing.assert_allclose(importances("apoz", fixed, data=data), want, rtol=1e-12)


def test_unit_norm_per_layer_makes_layers_comparable(dense):
    found = per_layer_unit(dense, np.asarray([3.0, 4.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(found, [0.6, 0.8, 0, 0, 0])
    scaled = per_layer_unit(dense, np.asarray([300.0, 400.0, 0.0, 1.0, 1.0]))
    np.testing.assert_allclose(scaled[:3], found[:3])


def test_a_criterion_that_looks_at_samples_says_so(dense):
    for name, row in CRITERIA.items():
        if row.needs_data:
            with pytest.raises(DataError, match=f"'{name}' looks at samples"):
                importances(name, dense)
        else:
            assert np.isfinite(importances(name, dense)).all()


def test_an_unknown_criterion_names_those_there_are():
    with pytest.raises(PlanError, match="class-car, l1, l2"):
        find("l3")


def test_a_function_is_a_criterion(dense):
    def backwards(space, context):
        return -np.arange(len(space.groups), dtype=np.float64)

    row = find(backwards)
    assert row == Criterion("backwards", backwards)
    assert row(dense, Context()).tolist() == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("name", [name for name, row in CRITERIA.items() if not row.greedy])
def test_every_criterion_gives_one_finite_number_a_group_and_the_same_one_twice(residual, samples, name):
    context = Context(data=samples[0], seed=5)
    first, second = CRITERIA[name](residual, context), CRITERIA[name](residual, context)
    assert first.shape == (len(residual.groups),)
    assert first.dtype == np.float64
    assert np.isfinite(first).all()
    assert (first >= 0).all()
    assert len(set(first.tolist())) > 1
    assert first.tolist() == second.tolist()
