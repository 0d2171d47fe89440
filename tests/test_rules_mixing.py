"""Ops that mix channels: norms, reductions, softmax, LRN, contractions; protected, exact as they are, or rewritten."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcar.rules import analyze
from onnxcar.surgery import Plan
from tests.graphs import (
    Net,
    assert_exact,
    assert_protected,
    layer_of,
    n_groups,
    node_of,
    prunable,
    run_reference,
    weights_of,
)

C = 6


def start(filters: int = C, **options) -> tuple[Net, str]:
    net = Net(**options)
    return net, net.conv(net.input(), filters)


# --- LRN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_lrn_keeps_the_original_neighbours(size):
    net, a = start(8)
    y = net.op("LRN", a, size=size, alpha=0.9, beta=0.6, bias=1.1, name="lrn")
    model = net.model(net.head(y))
    space = analyze(model)
    assert n_groups(space, "conv") == 8
    assert any(r.value == a for r in space.reads)
    # ONNX Runtime takes odd sizes only; onnx's own evaluator loops over the batch where it means the 8 channels
    how = {"runner": run_reference, "batches": (8,)} if size % 2 == 0 else {}
    (done,) = assert_exact(model, Plan([1, 2, 5]), **how)
    assert not any(n.op_type == "LRN" for n in done.pruned.proto.graph.node)
    assert node_of(done.pruned, "lrn").output[0] == y
    assert_exact(model, seeds=(0, 1, 2), **how)


def test_an_lrn_that_loses_no_channel_stays():
    net, a = start()
    model = net.model(net.head(net.op("LRN", a, size=5, name="lrn")))
    space = analyze(model)
    (done,) = assert_exact(model, Plan([len(space.groups) - 1]))
    assert node_of(done.pruned, "lrn").op_type == "LRN"


# --- norms over positions ----------------------------------------------------------------------------------------


def test_instance_normalization_is_per_channel():
    net, a = start()
    y = net.op("InstanceNormalization", a, net.positive(C), net.random(C), name="norm")
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 4]))
    assert weights_of(done.pruned)["norm_c"].shape == (4,)
    assert_exact(model)


def test_instance_normalization_with_computed_parameters_protects():
    net, a = start()
    scale = net.op("Squeeze", net.reduce("ReduceMean", net.conv("x", C, name="other"), [0, 2, 3], 0))
    y = net.op("InstanceNormalization", a, scale, net.random(C), name="norm")
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "norm", "computed from the input")


def written_out(net: Net, a: str, groups: int, channels: int) -> str:
    """GroupNorm as torch exports it below opset 18."""
    y = net.reshape(a, 0, groups, -1, name="to_groups")
    y = net.op("InstanceNormalization", y, np.ones(groups, np.float32), np.zeros(groups, np.float32), name="norm")
    y = net.op("Reshape", y, net.op("Shape", a), name="back")
    y = net.op("Mul", y, net.positive(channels, 1, 1), name="scale")
    return str(net.op("Add", y, net.random(channels, 1, 1), name="shift"))


def test_a_group_norm_written_out_loses_whole_groups():
    net, a = start(12)
    model = net.model(net.head(written_out(net, a, 4, 12)))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (12, 4)
    assert space.groups[1].filters == (("conv_w", 3), ("conv_w", 4), ("conv_w", 5))
    (done,) = assert_exact(model, Plan([0, 2]), batches=(1, 2, 5))
    assert weights_of(done.pruned)["scale_c"].shape == (6, 1, 1)
    assert_exact(model)


def test_group_normalization_loses_whole_groups():  # of opset 21; that of 18 is deprecated, the checker refuses it
    net, a = start(12, opset=21, ir=10)
    y = net.op("GroupNormalization", a, net.positive(12), net.random(12), name="norm", num_groups=4)
    net.declare(y, ["N", 12, 8, 8])
    model = net.model(net.head(y))
    space = analyze(model)
    assert (prunable(space, "conv"), n_groups(space, "conv")) == (12, 4)
    (done,) = assert_exact(model, Plan([0, 2]))
    node = node_of(done.pruned, "norm")
    assert next(x.i for x in node.attribute if x.name == "num_groups") == 2
    assert weights_of(done.pruned)[node.input[1]].shape == (6,)
    assert_exact(model)


def test_mean_variance_normalization_over_positions():
    net, a = start()
    model = net.model(net.head(net.op("MeanVarianceNormalization", a, axes=[0, 2, 3])))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, batches=(2, 3))


def test_mean_variance_normalization_over_channels_protects():
    net, a = start()
    space = analyze(net.model(net.head(net.op("MeanVarianceNormalization", a, name="norm", axes=[1, 2, 3]))))
    assert_protected(space, "conv", "norm", "statistics")
    assert prunable(space, "tail") == 5


# --- norms over channels -----------------------------------------------------------------------------------------


def channels_last(net: Net, name: str = "LayerNormalization", **attributes) -> str:
    x = net.input("x", ("N", 5, 9))
    a = net.op("MatMul", x, net.random(9, 7, scale=0.4), name="embed")
    a = net.op("Add", a, net.random(7), name="shift")
    params = [net.positive(7)] + ([net.random(7)] if name == "LayerNormalization" else [])
    y = net.op(name, a, *params, name="norm", axis=-1, **attributes)
    y = net.op("Tanh", net.op("MatMul", y, net.random(7, 6, scale=0.4), name="inner"))
    return str(net.op("MatMul", y, net.random(6, 4, scale=0.4), name="out"))


def test_layer_normalization_protects_its_channels_and_not_what_is_inside():
    net = Net()
    model = net.model(channels_last(net))
    space = analyze(model)
    assert_protected(space, "embed", "norm", "statistics run over all channels")
    assert n_groups(space, "inner") == 6
    assert_exact(model)


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_norms_over_channels_may_be_rewritten(op):
    net = Net(opset=23, ir=10) if op == "RMSNormalization" else Net()
    model = net.model(channels_last(net, op))
    assert prunable(analyze(model), "embed") == 0
    space = analyze(model, norms="rewrite")
    assert (n_groups(space, "embed"), n_groups(space, "inner")) == (7, 6)
    (done,) = assert_exact(model, Plan([0, 3, 8]), norms="rewrite")
    assert not any(n.op_type == op for n in done.pruned.proto.graph.node)
    assert_exact(model, norms="rewrite", seeds=(0, 1, 2))


def test_layer_normalization_over_other_axes_lets_channels_pass():
    net, a = start()
    y = net.op("LayerNormalization", a, net.positive(8, 8), net.random(8, 8), axis=2)
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_the_mean_that_layer_normalization_gives_has_the_channels_before_its_axis():
    net, a = start()
    y, mean, _ = net.op("LayerNormalization", a, net.positive(8, 8), n=3, axis=2, name="norm")
    model = net.model(net.head(net.op("Add", y, mean)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)
    net, a = start()
    y, mean, _ = net.op("LayerNormalization", a, net.positive(8, 8), n=3, axis=2, name="norm")
    assert_protected(analyze(net.model(net.head(y), mean)), "conv", mean, "output of the network")


def test_layer_normalization_over_everything_may_be_rewritten():
    net, a = start()
    y = net.op("LayerNormalization", a, net.positive(C, 8, 8), net.random(C, 8, 8), axis=1, name="norm")
    model = net.model(net.head(y))
    assert_protected(analyze(model), "conv", "norm", "statistics")
    assert n_groups(analyze(model, norms="rewrite"), "conv") == C
    assert_exact(model, norms="rewrite")


@pytest.mark.parametrize("opset", [17, 21])
def test_a_group_norm_of_one_group_may_be_rewritten(opset):
    net, a = start(opset=opset, ir=10)
    if opset == 17:
        y = written_out(net, a, 1, C)
    else:
        y = net.op("GroupNormalization", a, net.positive(C), net.random(C), name="norm", num_groups=1)
        net.declare(y, ["N", C, 8, 8])
    model = net.model(net.head(y))
    assert prunable(analyze(model), "conv") == 0
    assert n_groups(analyze(model, norms="rewrite"), "conv") == C
    assert_exact(model, norms="rewrite", batches=(1, 2, 5))


@pytest.mark.parametrize("opset", [17, 22])
@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization_reads_its_channels(opset, p):
    net, a = start(opset=opset)
    model = net.model(net.head(net.op("LpNormalization", a, axis=1, p=p)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_lp_normalization_over_positions():
    net, a = start()
    model = net.model(net.head(net.op("LpNormalization", a, axis=-1, p=2)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


# --- reductions --------------------------------------------------------------------------------------------------

REDUCTIONS = [f"Reduce{what}" for what in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")]
REDUCTIONS.append("ReduceSumSquare")


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_over_positions_let_channels_pass(op, opset):
    net, a = start(opset=opset)
    a = net.op("AveragePool", net.op("Abs", a), kernel_shape=[4, 4], strides=[4, 4])
    y = net.reduce(op, a, [-1, 2], keepdims=opset % 2)
    model = net.model(net.head(y, filters=3))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model, Plan([0, 2]))


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_over_channels_read_them(op, keepdims):
    net, a = start(opset=18)
    y = net.reduce(op, a, [1], keepdims, name="sum")
    if not keepdims:
        y = net.op("Unsqueeze", y, net.ints(1))
    y = net.op("Mul", y, net.random(1, 2, 1, 1))  # one channel to two, so that a head can read it
    model = net.model(net.head(y))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    assert space.reads[0].value == a
    assert_exact(model)


@pytest.mark.parametrize(
    "op", ["ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp"]
)
def test_other_reductions_over_channels_protect(op):
    net, a = start(opset=18)
    y = net.op("Mul", net.reduce(op, net.op("Exp", a), [1], name="over"), net.random(1, 2, 1, 1))
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "over", "runs over all channels")
    assert prunable(space, "tail") == 5


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_channels_may_be_rewritten(keepdims):
    net, a = start()
    y = net.reduce("ReduceMean", a, [1], keepdims, name="mean")
    if not keepdims:
        y = net.op("Unsqueeze", y, net.ints(1))
    model = net.model(net.head(net.op("Mul", y, net.random(1, 2, 1, 1))))
    assert n_groups(analyze(model, norms="rewrite"), "conv") == C
    assert_exact(model, norms="rewrite")


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_bounds_over_channels_may_be_rewritten(op, keepdims):
    # masked channels are zeros, which may be the largest or the smallest of all
    net, a = start()
    shift = np.float32(-2.0 if op == "ReduceMax" else 2.0)
    y = net.reduce(op, net.op("Add", a, shift), [1], keepdims, name="bound")
    if not keepdims:
        y = net.op("Unsqueeze", y, net.ints(1))
    model = net.model(net.head(net.op("Mul", y, net.random(1, 2, 1, 1))))
    assert prunable(analyze(model), "conv") == 0
    assert n_groups(analyze(model, norms="rewrite"), "conv") == C
    assert_exact(model, Plan([0, 2, 3]), norms="rewrite")


def test_a_reduction_of_everything():
    net, a = start()
    total = net.op("ReduceSum", a, name="sum", keepdims=0)
    y = net.op("Mul", net.conv("x", 5, name="other"), net.op("Tanh", net.op("Mul", total, np.float32(0.01))))
    model = net.model(net.head(y))
    space = analyze(model)
    assert (n_groups(space, "conv"), n_groups(space, "other")) == (C, 5)
    assert_exact(model)


def test_a_reduction_without_axes_that_does_nothing():
    net, a = start()
    y = net.op("ReduceSum", a, net.const(np.zeros(0, np.int64)), noop_with_empty_axes=1)
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_spatial_attention_from_channel_statistics():
    # CBAM: a mean over channels protects them, a sum does not
    net, a = start()
    mean = net.reduce("ReduceSum", a, [1])
    gate = net.op("Sigmoid", net.conv(mean, 1, 3, name="gate"))
    model = net.model(net.head(net.op("Mul", a, gate)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


# --- softmax and choices along an axis ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [11, 13])
def test_softmax_over_channels_protects(op, opset):
    net, a = start(opset=opset)
    y = net.op(op, net.op("Flatten", net.op("GlobalAveragePool", a)), name="soft", axis=1)
    space = analyze(net.model(net.head(y)))
    assert_protected(space, "conv", "soft", "compares all channels")
    assert prunable(space, "tail") == 5


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_over_positions_lets_channels_pass(op):
    net, a = start()
    model = net.model(net.head(net.op(op, a, axis=-1)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_softmax_before_opset_13_flattens_from_its_axis_on():
    net, a = start(opset=11)
    space = analyze(net.model(net.head(net.op("Softmax", a, name="soft", axis=1))))
    assert_protected(space, "conv", "soft", "compares all channels")
    net, a = start(opset=11)
    model = net.model(net.head(net.op("Softmax", a, axis=2)))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_softmax_before_opset_13_takes_later_axes_along():
    net, a = start(opset=11)
    y = net.op("Softmax", net.op("Transpose", a, perm=[0, 2, 3, 1]), name="soft", axis=1)  # channels on axis 3
    space = analyze(net.model(net.head(net.op("Transpose", y, perm=[0, 3, 1, 2]))))
    assert_protected(space, "conv", "soft", "compares all channels")


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_arg_max_over_channels_protects_and_over_positions_does_not(op):
    net, a = start()
    space = analyze(net.model(net.op(op, a, name="arg", axis=1)))
    assert_protected(space, "conv", "arg", "works along this axis")
    for keepdims in (0, 1):
        net, a = start()
        y = net.op("Cast", net.op(op, a, axis=3, keepdims=keepdims), to=1)
        model = net.model(net.head(net.op("Mul", y, np.float32(0.2))))
        assert n_groups(analyze(model), "conv") == C
        assert_exact(model)


def test_top_k_over_channels_protects_and_over_positions_does_not():
    net, a = start()
    top, _ = net.op("TopK", a, net.ints(3), n=2, name="top", axis=1)
    assert_protected(analyze(net.model(net.head(top))), "conv", "top", "works along this axis")
    net, a = start()
    top, index = net.op("TopK", a, net.ints(3), n=2, axis=-1)
    y = net.op("Add", top, net.op("Mul", net.op("Cast", index, to=1), np.float32(0.1)))
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


def test_cumulative_sums():
    net, a = start()
    y = net.op("CumSum", a, np.asarray(1, np.int64), name="cum")
    assert_protected(analyze(net.model(net.head(y))), "conv", "cum", "works along this axis")
    net, a = start()
    model = net.model(net.head(net.op("CumSum", a, np.asarray(-1, np.int64))))
    assert n_groups(analyze(model), "conv") == C
    assert_exact(model)


# --- Einsum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "dims"),
    [("nchw,co->nohw", (C, 5)), ("nchw,oc->nohw", (5, C)), ("nchw,c->nchw", (C,)), ("nchw,c->nhw", (C,))],
)
def test_einsum_with_a_constant(equation, dims):
    net, a = start()
    y = net.op("Einsum", a, net.random(*dims, scale=0.5), equation=equation, name="sum")
    if len(net.shape(y)) == 3:
        y = net.op("Mul", net.op("Unsqueeze", y, net.ints(1)), net.random(1, 2, 1, 1))
    model = net.model(net.head(y))
    assert n_groups(analyze(model), "conv") == C
    (done,) = assert_exact(model, Plan([0, 1]))
    assert weights_of(done.pruned)["sum_c"].shape == tuple(4 if n == C else n for n in dims)
    assert_exact(model)


def test_einsum_of_two_values_ties_what_it_contracts():
    net, a = start()
    b = net.conv("x", C, name="other")
    y = net.op("Einsum", a, b, equation="nchw,nchv->nhwv", name="sum")
    model = net.model(net.head(net.op("Mul", y, np.float32(0.2))))
    space = analyze(model)
    assert np.array_equal(layer_of(space, "conv").groups, layer_of(space, "other").groups)
    assert n_groups(space, "conv") == C
    assert_exact(model)


def test_einsum_of_two_values_with_channels_on_both_sides():
    net, a = start()
    b = net.conv("x", 4, name="other")
    y = net.op("Einsum", a, b, equation="nchw,ndhw->ncd", name="gram")
    model = net.model(net.head(net.op("Mul", y, np.float32(0.1))))
    space = analyze(model)
    assert n_groups(space, "conv") == C
    assert_protected(space, "other", "gram", "two axes")
    assert_exact(model)


@pytest.mark.parametrize("equation", ["...c,co->...o", "ii->i"])
def test_other_equations_are_refused(equation):
    net = Net()
    a = net.gemm(net.input("x", (C, 9)), C, name="first")
    inputs = [a, net.random(C, 4)] if "," in equation else [a]
    space = analyze(net.model(net.op("Einsum", *inputs, equation=equation, name="sum")))
    assert_protected(space, "first", "sum", "equation")
    assert space.unsupported == {"Einsum": 1}
