"""The judge is judged: it must say `exact` of a right removal and catch every kind of wrong one."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcar.model import from_proto
from onnxcar.rules import analyze
from onnxcar.surgery import Plan, remove
from tests import oracle
from tests.graphs import Net


def network(gain: float = 1.0) -> onnx.ModelProto:
    """Two Convs with BatchNormalization between, a grouped Conv, a dense layer and a Softmax."""
    net = Net(seed=3)
    x = net.input("x", ("N", 3, 8, 8))
    y = net.op("Relu", net.norm(net.conv(x, 8, name="first")))
    y = net.op("Relu", net.conv(y, 12, name="second"))
    y = net.op("Relu", net.conv(y, 16, group=4, name="grouped"))
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    y = net.op("Mul", net.gemm(y, 5), np.float32(gain))
    return net.proto(net.op("Softmax", y, axis=-1))


def pruned(original: onnx.ModelProto, every: int = 3) -> tuple[onnx.ModelProto, int]:
    """A right removal, and how many filters are gone."""
    space = analyze(from_proto(original))
    gone: set[int] = set()
    for group in range(0, len(space.groups), every):
        if space.allows(group, gone):
            gone.add(group)
    filters = sum(len(space.groups[g].filters) for g in gone)
    assert filters > 4
    out = onnx.ModelProto()
    out.CopyFrom(remove(space, Plan(gone)).proto)
    return out, filters


def tensor(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def put(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    held = next(t for t in model.graph.initializer if t.name == name)
    held.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))


@pytest.fixture(scope="module")
def original() -> onnx.ModelProto:
    return network()


@pytest.fixture
def right(original: onnx.ModelProto) -> onnx.ModelProto:
    return pruned(original)[0]


def test_right_removal_is_exact(original: onnx.ModelProto) -> None:
    made, filters = pruned(original)
    result = oracle.judge(original, made)
    assert result.verdict == "exact", result.text
    assert result.removed == filters
    assert result.convs == 3
    assert result.filters == 36
    assert result.moved > 1e-2


def test_same_file_is_untouched(original: onnx.ModelProto) -> None:
    result = oracle.judge(original, original)
    assert result.verdict == "untouched"
    assert result.removed == 0
    assert result.error == 0


@pytest.mark.parametrize("name", ["first_w", "first_b", "norm_scale", "second_b", "grouped_w"])
def test_shifted_rows_are_caught(original: onnx.ModelProto, right: onnx.ModelProto, name: str) -> None:
    name = (
        next(iter(n.input[1] for n in right.graph.node if n.op_type == "BatchNormalization"))
        if "norm" in name
        else name
    )
    put(right, name, np.roll(tensor(right, name), 1, axis=0))
    assert oracle.judge(original, right).verdict == "differs"


def test_swapped_rows_are_caught(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    values = tensor(right, "second_w").copy()
    values[[0, 1]] = values[[1, 0]]
    put(right, "second_w", values)
    result = oracle.judge(original, right)
    assert result.verdict == "differs"
    assert not result.unmatched  # found where they came from, and still wrong


def test_wrong_columns_are_caught(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    full, cut = tensor(original, "second_w"), tensor(right, "second_w")
    rows, columns, *_ = oracle.matched(full, cut)
    wrong = sorted({*range(full.shape[1])} - {*columns[1:].tolist()})[:1] + columns[1:].tolist()
    assert sorted(wrong) != columns.tolist()
    put(right, "second_w", full[rows][:, sorted(wrong)])
    result = oracle.judge(original, right)
    assert result.verdict == "differs"
    assert not result.unmatched


def test_rows_of_another_filter_are_caught(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    full, cut = tensor(original, "first_w"), tensor(right, "first_w")
    put(right, "first_w", full[: len(cut)])
    assert oracle.judge(original, right).verdict == "differs"


def test_changed_weight_is_caught(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    values = tensor(right, "second_w").copy()
    values[0, 0, 0, 0] += 1e-6  # no output shows it
    put(right, "second_w", values)
    result = oracle.judge(original, right)
    assert result.verdict == "differs"
    assert result.unmatched == ["second"]


def test_reader_that_was_not_cut_is_broken(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    put(right, "second_w", tensor(original, "second_w"))
    result = oracle.judge(original, right)
    assert result.verdict == "broken"
    assert result.text


def test_dangling_input_is_broken(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    right.graph.node[2].input[0] = "nowhere"
    assert oracle.judge(original, right).verdict == "broken"


def test_stale_shape_that_still_runs_is_broken(original: onnx.ModelProto, right: onnx.ModelProto) -> None:
    first = next(n for n in right.graph.node if n.name == "first")
    del right.graph.value_info[:]
    right.graph.value_info.append(
        helper.make_tensor_value_info(first.output[0], onnx.TensorProto.FLOAT, ["N", 8, 8, 8])
    )
    result = oracle.judge(original, right)
    assert result.verdict == "broken"
    assert "fails" in result.text


def test_one_hot_softmax_hides_nothing() -> None:
    original = network(gain=1e4)
    right, _ = pruned(original)
    assert oracle.judge(original, right).verdict == "exact"
    bias = next(t.name for t in right.graph.initializer if t.name.endswith("_b") and list(t.dims) == [5])
    put(right, bias, tensor(right, bias) + np.float32(1e-3))  # the same for all classes: Softmax cannot see it
    assert oracle.judge(original, right).verdict == "differs"


def test_counted_classes_hide_nothing() -> None:
    """An integer made of the largest outputs: what they were chosen from is compared."""
    net = Net(seed=7)
    y = net.op("Relu", net.conv(net.input("x", ("N", 3, 6, 6)), 8, name="first"))
    y = net.op("Softmax", net.conv(y, 4, name="second"), axis=1)
    y = net.op("Cast", net.op("ArgMax", y, axis=1, keepdims=0), to=onnx.TensorProto.INT32)
    original = net.proto(net.op("Clip", net.op("Mul", y, np.int32(0)), np.int32(0), np.int32(9)))
    right, _ = pruned(original, every=1)
    assert oracle.judge(original, right).verdict == "exact"
    assert oracle.judge(original, right).moved > 1e-2
    put(right, "first_b", tensor(right, "first_b") + np.float32(0.5))
    assert oracle.judge(original, right).verdict == "differs"


def test_original_that_does_not_run_is_no_verdict() -> None:
    bad = network()
    put(bad, "second_w", tensor(bad, "second_w")[:, :-1])
    with pytest.raises(oracle.OriginalError, match="does not run"):
        oracle.judge(bad, bad)


def test_removed_mean_over_channels_is_caught() -> None:
    """Dropping channels under a mean changes the divisor: a plausible tool gets that wrong."""
    net = Net(seed=5)
    y = net.conv(net.input("x", ("N", 3, 6, 6)), 8, name="first", bias=False)
    y = net.op("Concat", net.conv(y, 4, name="second"), net.reduce("ReduceMean", y, [1]), axis=1)
    original = net.proto(y)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(original)
    put(wrong, "first_w", tensor(original, "first_w")[[0, 1, 3, 4, 6]])
    put(wrong, "second_w", tensor(original, "second_w")[:, [0, 1, 3, 4, 6]])
    assert oracle.judge(original, wrong).verdict == "differs"


# --- matching by value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("shape", [(40, 30, 3, 3), (64, 48)])
def test_kept_positions_are_found(dtype: type, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    full = (rng.standard_normal(shape) * 40).astype(dtype)
    for _ in range(5):
        index = [np.sort(rng.permutation(n)[: n * 2 // 3]) if a < 2 else np.arange(n) for a, n in enumerate(shape)]
        found = oracle.matched(full, full[np.ix_(*index)])
        assert found is not None
        assert all(np.array_equal(a, b) for a, b in zip(found, index, strict=True))


def test_reordered_positions_are_found() -> None:
    full = np.random.default_rng(1).standard_normal((9, 7))
    found = oracle.matched(full, full[[5, 2, 8]][:, [6, 0, 3, 1]])
    assert found is not None
    assert [f.tolist() for f in found] == [[5, 2, 8], [6, 0, 3, 1]]


def test_equal_rows_are_taken_in_order() -> None:
    full = np.zeros((6, 4))
    full[3] = 1
    found = oracle.matched(full, full[[0, 3, 4]])
    assert found is not None
    assert found[0].tolist() == [0, 3, 4]


def test_foreign_values_match_nothing() -> None:
    rng = np.random.default_rng(2)
    full = rng.standard_normal((8, 8))
    cut = full[1:, 1:].copy()
    cut[3, 3] += 1
    assert oracle.matched(full, cut) is None
    assert oracle.matched(full, rng.standard_normal((9, 8))) is None


@pytest.mark.parametrize("blocks", [[0, 1, 2, 3], [0, 2, 3]])
def test_grouped_blocks_lose_other_positions_each(blocks: list[int]) -> None:
    rng = np.random.default_rng(4)
    full = rng.standard_normal((16, 6, 3, 3))
    keep = np.zeros(full.shape, bool)
    parts = []
    for b in blocks:
        rows, columns = 4 * b + np.sort(rng.permutation(4)[:3]), np.sort(rng.permutation(6)[:4])
        parts.append(full[rows][:, columns])
        keep[np.ix_(rows, columns)] = True
    found = oracle.kept_mask(full, np.concatenate(parts), 4, len(blocks))
    assert found is not None
    assert np.array_equal(found, keep)


def test_weight_behind_other_nodes_is_found() -> None:
    """Weights come through Identity, Transpose and DequantizeLinear; each layer is judged by what reaches it."""
    net = Net(seed=6, opset=13)
    x = net.input("x", (1, 3, 6, 6))
    codes = net.rng.integers(-90, 90, (10, 3, 3, 3)).astype(np.int8)
    scales = net.positive(10) * np.float32(0.01)
    weight = net.op("DequantizeLinear", codes, scales, np.zeros(10, np.int8), axis=0)
    y = net.op("Relu", net.conv(x, 10, weight=weight, name="first"))
    y = net.conv(y, 6, weight=net.op("Identity", net.random(6, 10, 3, 3, scale=0.2)), name="second")
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", y)))
    original = net.proto(net.op("MatMul", y, net.op("Transpose", net.random(4, 6), perm=[1, 0])))
    made, filters = pruned(original, every=3)
    result = oracle.judge(original, made)
    assert result.verdict == "exact", result.text
    assert result.removed == filters
    assert result.cut == 3


# --- as a program ---------------------------------------------------------------------------------------------------


def test_program_prints_json_and_its_status_is_the_verdict(
    original: onnx.ModelProto, right: onnx.ModelProto, tmp_path, capsys
) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(original, a)
    onnx.save(right, b)
    assert oracle.main([str(a), str(b)]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "exact"
    assert oracle.main([str(a), str(a)]) == 1
