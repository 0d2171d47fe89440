"""Recovery without training, in closed form where there is one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcar.channels import ChannelSpace
from onnxcar.data import Dataset, Preprocess
from onnxcar.data._sources import ArraySource
from onnxcar.errors import DataError, PlanError
from onnxcar.model import Model, from_proto
from onnxcar.recovery import METHODS, LayerFit, Recovered, recover
from onnxcar.recovery._stream import Stream
from onnxcar.rules import analyze
from onnxcar.runtime import open_network
from onnxcar.surgery import Plan, remove
from tests.graphs import Net, assert_valid, feeds, run, weights_of


def samples(model: Model, n: int = 80, seed: int = 1) -> Dataset:
    """Random inputs for a model, without labels."""
    given = feeds(model, n, seed)
    arrays = {"": next(iter(given.values()))} if len(given) == 1 else given
    return Dataset(ArraySource(arrays, "noise"), None, path="noise", preprocess=Preprocess.preset("raw"))


def groups_of(space: ChannelSpace, node: str, filters: list[int]) -> Plan:
    """The groups of these filters of a layer."""
    layer = next(x for x in space.layers if x.node == node)
    return Plan(int(layer.groups[i]) for i in filters)


def recovered(model: Model, node: str, filters: list[int], method: str, n: int = 80, **options: object) -> Recovered:
    """The model without these filters of a layer, repaired."""
    space = analyze(model)
    plan = groups_of(space, node, filters)
    return recover(space, plan, remove(space, plan), samples(model, n), method=method, **options)  # type: ignore[arg-type]


def fit_of(found: Recovered, node: str) -> LayerFit:
    return next(f for f in found.layers if f.node == node)


def distance(a: Model, b: Model, seed: int = 5) -> float:
    """Largest difference of two models' outputs on new inputs."""
    given = feeds(a, 20, seed)
    return max(float(np.abs(x - y).max()) for x, y in zip(run(a, given), run(b, given), strict=True))


def value_of(proto: onnx.ModelProto, name: str, inputs: np.ndarray) -> np.ndarray:
    """A value inside a network."""
    watch = onnx.ModelProto()
    watch.CopyFrom(proto)
    watch.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list("abcd")))
    return run(from_proto(watch), {"x": inputs})[-1]


def redundant(kind: str, repeat: int = 2) -> Model:
    """A layer whose last two filters are sums of the others, in front of a reader of some kind."""
    net = Net()
    x = net.input(shape=("N", 3, 7, 7))
    w, b = net.random(6, 3, 3, 3, scale=0.3), net.random(6, scale=0.3)
    for k, mix in enumerate(np.eye(4)[:repeat] if kind == "duplicates" else net.random(2, 4)):
        w[4 + k], b[4 + k] = np.tensordot(mix, w[:4], 1), mix @ b[:4]
    y = net.conv(x, 6, 3, name="first", weight=net.const(w, "first_w"), bias=False)
    net.nodes[-1].input.append(net.const(b, "first_b"))
    if kind == "duplicates":
        y = net.op("Relu", y)
    if kind == "gemm" or kind == "matmul":
        y = net.op("Flatten", y)
        units = net.random(6 * 49, 3, scale=0.1)
        y = (
            net.op("MatMul", y, net.const(units, "m"), name="reader")
            if kind == "matmul"
            else net.gemm(y, 3, name="reader")
        )
    elif kind == "transposed":
        weight = net.const(net.random(6, 2, 3, 3, scale=0.3), "t")
        y = net.op("ConvTranspose", y, weight, name="reader", strides=[2, 2], pads=[1, 0, 1, 0], dilations=[1, 2])
    elif kind == "strided":
        y = net.conv(y, 3, 3, name="reader", strides=[2, 1], dilations=[1, 2], pads=[1, 0, 2, 3], bias=False)
    elif kind == "same":
        weight = net.const(net.random(3, 6, 2, 2, scale=0.3), "s")
        y = net.op("Conv", y, weight, name="reader", auto_pad="SAME_LOWER", kernel_shape=[2, 2])
    else:
        y = net.conv(y, 3, 3, name="reader")
    return net.model(y)


KINDS = ["conv", "strided", "same", "transposed", "gemm", "matmul", "duplicates"]


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_follow_from_the_rest_cost_nothing(kind: str) -> None:
    model = redundant(kind)
    space = analyze(model)
    plan = groups_of(space, "first", [4, 5])
    compact = remove(space, plan)
    assert distance(model, compact) > 0.1
    found = recover(space, plan, compact, samples(model, 400), method="least-squares")
    assert_valid(found.model)
    # the weakest ridge tried, 1e-5, and float32 leave a trace
    assert distance(model, found.model) < 2e-3
    assert found.after < 1e-5 < found.before
    assert fit_of(found, "reader").method == "least-squares"


@pytest.mark.parametrize("spatial", [1, 3])
def test_any_number_of_axes(spatial: int) -> None:
    net = Net()
    w, b = net.random(5, 2, *(3,) * spatial, scale=0.3), net.random(5, scale=0.3)
    w[4], b[4] = w[0] - w[2], b[0] - b[2]
    y = net.conv(net.input(shape=("N", 2, *(6,) * spatial)), 5, name="first", weight=net.const(w, "w"), bias=False)
    net.nodes[-1].input.append(net.const(b, "b"))
    model = net.model(net.conv(y, 3, name="reader", strides=[2] * spatial))
    found = recovered(model, "first", [4], "least-squares", n=200)
    assert found.after < 1e-5 < found.before


def test_weights_are_those_of_lstsq() -> None:
    net = Net(dtype=np.float64)
    x = net.input(shape=("N", 6))
    y = net.gemm(net.op("Tanh", net.gemm(x, 8, name="first")), 3, name="reader")
    model = net.model(y)
    space = analyze(model)
    plan = groups_of(space, "first", [1, 6])
    data = samples(model, 400)
    found = recover(space, plan, remove(space, plan), data, method="least-squares")
    held = weights_of(model)
    inputs = data.inputs(np.arange(400))[""].astype(np.float64)
    hidden = np.tanh(inputs @ held["first_w"].T + held["first_b"])
    want = hidden @ held["reader_w"].T + held["reader_b"]
    order = np.random.default_rng(0).permutation(400)
    fit = np.sort(order[40:])
    kept = np.delete(hidden, [1, 6], axis=1)
    solved = np.linalg.lstsq(np.c_[kept, np.ones(400)][fit], want[fit], rcond=None)[0]
    ridge = fit_of(found, "reader").ridge
    assert ridge is not None
    if ridge > 1e-5:  # the same with the rows that a ridge adds
        near = np.delete(held["reader_w"], [1, 6], axis=1).T
        centred = kept[fit] - kept[fit].mean(0)
        scale = np.sqrt(ridge * np.square(centred).sum() / kept.shape[1])
        rows = np.r_[centred, scale * np.eye(6)]
        right = np.r_[want[fit] - want[fit].mean(0), scale * near]
        weights = np.linalg.lstsq(rows, right, rcond=None)[0]
        solved = np.r_[weights, [want[fit].mean(0) - kept[fit].mean(0) @ weights]]
    new = weights_of(found.model)
    np.testing.assert_allclose(new["reader_w"].T, solved[:-1], atol=1e-4 if ridge <= 1e-5 else 1e-7)
    np.testing.assert_allclose(new["reader_b"], solved[-1], atol=1e-4 if ridge <= 1e-5 else 1e-7)


@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_constant_channels_go_into_the_bias(method: str) -> None:
    net = Net()
    x = net.input(shape=("N", 3, 7, 7))
    w, b = net.random(6, 3, 3, 3, scale=0.3), net.random(6, scale=0.3)
    w[[2, 5]] = 0
    y = net.conv(x, 6, 3, name="first", weight=net.const(w, "first_w"), bias=False)
    net.nodes[-1].input.append(net.const(b, "first_b"))
    model = net.model(net.conv(y, 3, 3, name="reader", pads=[0] * 4, bias=False))
    found = recovered(model, "first", [2, 5], method)
    assert_valid(found.model)
    assert distance(model, found.model) < 1e-4 < found.before
    reader = next(n for n in found.model.proto.graph.node if n.name == "reader")
    assert len(reader.input) == 3


def test_the_mean_of_a_removed_channel_counts_padding() -> None:
    net = Net()
    x = net.input(shape=("N", 3, 4, 4))
    w, b = net.random(4, 3, 3, 3, scale=0.3), net.random(4, scale=0.3)
    w[3], b[3] = 0, 1
    y = net.conv(x, 4, 3, name="first", weight=net.const(w, "first_w"), bias=False)
    net.nodes[-1].input.append(net.const(b, "first_b"))
    model = net.model(net.conv(y, 3, 3, name="reader"))
    found = recovered(model, "first", [3], "bias")
    kernel, old = weights_of(model)["reader_w"][:, 3], weights_of(model)["reader_b"]
    # of 4 x 4 positions, 16 see the centre, 12 each neighbour on a side, 9 each corner
    share = np.array([[9, 12, 9], [12, 16, 12], [9, 12, 9]]) / 16
    np.testing.assert_allclose(weights_of(found.model)["reader_b"], old + (kernel * share).sum((1, 2)), atol=1e-5)


def test_a_matmul_without_bias_gets_one() -> None:
    model = redundant("matmul")
    space = analyze(model)
    plan = groups_of(space, "first", [0])
    found = recover(space, plan, remove(space, plan), samples(model, 400), method="least-squares")
    assert_valid(found.model)
    assert [n.op_type for n in found.model.proto.graph.node][-2:] == ["MatMul", "Add"]
    assert not found.kept


def test_an_old_file_lists_the_new_bias_among_its_inputs() -> None:
    net = Net(opset=9, ir=3)
    y = net.conv(net.input(), 6, name="first")
    model = net.model(net.conv(net.op("Relu", y), 4, name="reader", bias=False))
    found = recovered(model, "first", [0, 1], "bias")
    assert_valid(found.model)
    reader = next(n for n in found.model.proto.graph.node if n.name == "reader")
    assert reader.input[2] in {i.name for i in found.model.proto.graph.input}
    assert reader.input[2] not in weights_of(model)


def with_norms(seed: int = 0, *, head: bool = True) -> Model:
    net = Net(seed=seed)
    y = net.norm(net.conv(net.input(), 6, name="first", bias=False), "norm1")
    y = net.norm(net.conv(net.op("Relu", y), 5, name="reader", bias=False), "norm2")
    return net.model(net.head(net.op("Relu", y)) if head else y)


def test_statistics_of_a_norm_are_those_of_its_new_inputs() -> None:
    # a network whose norms hold their true statistics, as a trained one does
    proto = onnx.ModelProto()
    proto.CopyFrom(with_norms(head=False).proto)
    inputs = samples(from_proto(proto), 300).inputs(np.arange(300))[""]
    for norm in ("norm1", "norm2"):
        node = next(n for n in proto.graph.node if n.name == norm)
        shift = next(t for t in proto.graph.initializer if t.name == node.input[2])  # means that are missed
        shift.CopyFrom(numpy_helper.from_array(np.full(shift.dims, 2, np.float32), shift.name))
        x = value_of(proto, node.input[0], inputs)
        for k, value in ((3, x.mean((0, 2, 3))), (4, x.var((0, 2, 3)))):
            t = next(t for t in proto.graph.initializer if t.name == node.input[k])
            t.CopyFrom(numpy_helper.from_array(value, t.name))
    model = from_proto(proto)
    space = analyze(model)
    plan = groups_of(space, "first", [0, 2, 3])
    compact = remove(space, plan)
    found = recover(space, plan, compact, samples(model, 300), method="bn")
    assert fit_of(found, "norm2").method == "bn"
    assert not any(f.node == "norm1" for f in found.layers), "its inputs did not change"
    assert found.after < found.before
    node = next(n for n in found.model.proto.graph.node if n.name == "norm2")
    fit = np.sort(np.random.default_rng(0).permutation(300)[30:])
    x = value_of(found.model.proto, node.input[0], samples(model, 300).inputs(fit)[""])
    np.testing.assert_allclose(weights_of(found.model)[node.input[3]], x.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(weights_of(found.model)[node.input[4]], x.var((0, 2, 3)), atol=1e-4)


def test_a_norm_behind_a_layer_takes_its_bias() -> None:
    model = with_norms()
    space = analyze(model)
    plan = groups_of(space, "first", [0, 2])
    compact = remove(space, plan)
    found = recover(space, plan, compact, samples(model), method="least-squares")
    assert_valid(found.model)
    assert set(weights_of(found.model)) == set(weights_of(compact))
    changed = {k for k, v in weights_of(found.model).items() if not np.array_equal(v, weights_of(compact)[k])}
    norm2 = next(n for n in compact.proto.graph.node if n.name == "norm2")
    assert {"reader_w", norm2.input[3]} <= changed
    assert fit_of(found, "reader").after < fit_of(found, "reader").before
    assert found.after < found.before


def test_bn_without_norms_is_bias() -> None:
    model = redundant("conv")
    assert recovered(model, "first", [0], "bn").method == "bias"


def test_the_sum_of_a_residual_block_is_aimed_at(residual: onnx.ModelProto) -> None:
    model = from_proto(residual)
    space = analyze(model)
    stem = groups_of(space, "conv1", [0, 3])
    found = recover(space, stem, remove(space, stem), samples(model, 300), method="least-squares")
    assert found.after < found.before / 2
    assert fit_of(found, "conv2").method == "least-squares"
    assert fit_of(found, "fc").method in ("least-squares", "kept", "bias")


def test_groups_and_depthwise_layers_are_refitted_block_by_block() -> None:
    net = Net()
    y = net.op("Tanh", net.conv(net.input(), 8, name="first"))
    y = net.op("Tanh", net.conv(y, 8, name="depthwise", group=8))
    y = net.conv(y, 8, name="grouped", group=2)
    model = net.model(net.head(net.op("Tanh", y)))
    space = analyze(model)
    grouped = next(x for x in space.layers if x.node == "depthwise").groups
    chosen = [g for g in (int(grouped[0]), int(grouped[4])) if g >= 0]
    plan = Plan(chosen)
    assert plan.groups
    found = recover(space, plan, remove(space, plan), samples(model, 300), method="least-squares")
    assert_valid(found.model)
    assert fit_of(found, "grouped").method == "least-squares"
    assert found.after < found.before


def test_shared_and_computed_weights_stay_for_a_reason() -> None:
    net = Net()
    x = net.conv(net.input(), 6, name="first")
    weight = net.const(net.random(6, 6, 1, 1), "shared")
    y = net.op("Conv", x, weight, name="one")
    y = net.op("Conv", y, weight, name="two")
    half = net.op("Cast", net.const(net.random(4, 6, 1, 1).astype(np.float16), "half"), to=onnx.TensorProto.FLOAT)
    model = net.model(net.op("Conv", y, half, name="three"))
    space = analyze(model)
    plan = Plan([next(g.id for g in space.groups)])
    compact = remove(space, plan)
    found = recover(space, plan, compact, samples(model), method="least-squares")
    assert "shared by 2 nodes" in fit_of(found, "one").reason
    assert "shared by 2 nodes" in fit_of(found, "two").reason
    assert "Cast" in fit_of(found, "three").reason
    assert all(f.method == "kept" for f in found.layers)
    assert found.model is compact


@pytest.mark.parametrize("method", METHODS)
def test_never_worse_on_held_back_samples(method: str) -> None:
    for seed in range(4):
        model = with_norms(seed)
        found = recovered(model, "first", [seed, seed + 1], method, n=24, seed=seed)
        assert found.after <= found.before
        for f in found.layers:
            if f.before is not None and f.after is not None:
                assert f.after <= f.before
                assert (f.method == "kept") == (f.after == f.before)


def test_half_precision_is_kept() -> None:
    net = Net(dtype=np.float16)
    y = net.op("Relu", net.conv(net.input(), 6, name="first"))
    model = net.model(net.conv(y, 4, name="reader"))
    found = recovered(model, "first", [0, 1], "least-squares", n=200)
    assert weights_of(found.model)["reader_w"].dtype == np.float16
    assert_valid(found.model)
    assert found.after < found.before


def test_a_batch_fixed_in_the_file() -> None:
    net = Net()
    y = net.op("Relu", net.conv(net.input(shape=(2, 3, 8, 8)), 6, name="first"))
    y = net.reshape(net.conv(y, 4, name="reader"), 2, 4 * 64)
    model = net.model(y)
    space = analyze(model)
    plan = groups_of(space, "first", [0, 1])
    given = np.random.default_rng(0).standard_normal((60, 3, 8, 8)).astype(np.float32)
    data = Dataset(ArraySource({"": given}, "noise"), None, path="noise", preprocess=Preprocess.preset("raw"))
    found = recover(space, plan, remove(space, plan), data)
    assert found.after < found.before


@pytest.mark.parametrize("memory", [0, 10_000])
def test_little_memory_changes_nothing_but_the_time(memory: int) -> None:
    model = with_norms()
    data = samples(model, 12)
    network = open_network(model)

    def inputs(chunk: int) -> dict[str, np.ndarray]:
        calls.append(chunk)
        return network.session.bind(data.inputs(np.arange(4 * chunk, 4 * chunk + 4)))

    makers = {n.name: n.output[0] for n in model.proto.graph.node}
    watched = [makers["norm1"], makers["norm2"]]
    found, asked = [], []
    for bound in (memory, 1 << 30):
        calls: list[int] = []
        stream = Stream(network, model, inputs, 3, bound, "cpu")
        parts = [list(stream.run([x], makers[y])) for x, y in zip(watched, ("reader", "head"), strict=True)]
        values = [np.concatenate([c[x] for c in part]) for part, x in zip(parts, watched, strict=True)]
        found.append(np.concatenate([v.ravel() for v in values]))
        asked.append(len(calls))
    np.testing.assert_array_equal(*found)
    assert asked[1] == 3, "values between layers are held"
    assert asked[0] > 3, "the network's inputs are asked for again"


def test_what_waits_for_its_layer_is_bounded() -> None:
    model = with_norms()
    rows = [
        fit_of(recovered(model, "first", [0, 2], "least-squares", n=200, memory_bytes=memory), "reader").rows
        for memory in (1 << 30, 1 << 17)
    ]
    assert rows[1] < rows[0]


def test_the_same_seed_gives_the_same_bytes() -> None:
    model = with_norms()
    a, b = (recovered(model, "first", [0, 2], "least-squares", seed=3) for _ in range(2))
    assert a.model.sha256 == b.model.sha256
    assert a.model.sha256 != recovered(model, "first", [0, 2], "least-squares", seed=4).model.sha256


def test_refusals() -> None:
    model = redundant("conv")
    with pytest.raises(PlanError, match="no recovery 'magic'"):
        recovered(model, "first", [0], "magic")
    with pytest.raises(DataError, match="too few to recover on"):
        recovered(model, "first", [0], "bias", n=1)
