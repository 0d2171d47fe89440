"""Graphs that no rule was written for: what is prunable in them is counted, and every removal stays exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxcar.rules import analyze
from tests.graphs import Net, assert_exact, prunable

C = 6


def start(filters: int = C, **options) -> tuple[Net, str]:
    net = Net(**options)
    return net, net.op("Relu", net.conv(net.input(), filters))


def fix_batch(net: Net, n: int) -> None:
    net.inputs[0].type.tensor_type.shape.dim[0].dim_value = n


def selective_kernel():
    net, a = start()
    b = net.conv("x", C, name="other")
    s = net.op("GlobalAveragePool", net.op("Add", a, b))
    weights = net.conv(net.conv(s, 4, 1, name="squeeze"), 2 * C, 1, name="select")
    weights = net.op("Softmax", net.reshape(weights, -1, 2, C, 1, 1), axis=1)
    both = net.op("Concat", net.op("Unsqueeze", a, net.ints(1)), net.op("Unsqueeze", b, net.ints(1)), axis=1)
    y = net.op("ReduceSum", net.op("Mul", both, weights), net.ints(1), keepdims=0)
    return net, [net.head(y)], {"conv": C, "other": C, "squeeze": 4, "select": 2 * C}


def cascade_of_splits():
    net, a = start(8)
    parts = net.op("Split", a, net.ints(2, 2, 2, 2), n=4, axis=1)
    out, last = [parts[0]], None
    for i in range(1, 4):
        v = parts[i] if last is None else net.op("Add", parts[i], last)
        last = net.op("Relu", net.conv(v, 2, name=f"scale{i}"))
        out.append(last)
    return net, [net.head(net.op("Concat", *out, axis=1))], {"conv": 8, "scale1": 2, "scale2": 2, "scale3": 2}


def split_across_a_concat():
    net, a = start()
    c = net.op("Concat", a, net.conv(a, C, name="other"), axis=1)
    p, q = net.op("Split", c, net.ints(4, 8), n=2, axis=1)
    y = net.op("Concat", net.conv(p, 3, name="left"), net.conv(q, 3, name="right"), a, axis=1)
    return net, [net.head(y)], {"conv": C, "other": C, "left": 3, "right": 3}


def uneven_split():
    net, a = start(7, opset=18)
    p, q = net.op("Split", a, n=2, axis=1, num_outputs=2)
    return net, [net.head(net.op("Concat", net.op("Tanh", p), q, axis=1))], {"conv": 7}


def grouped_convs_of_other_counts():
    net, a = start(8)
    y = net.op("Relu", net.conv(a, 16, group=4, name="four"))
    y = net.op("Add", net.conv(y, 8, group=2, name="two"), a)
    return net, [net.head(y)], {"conv": 8, "four": 16, "two": 8}


def channels_softly_chosen():
    # a Softmax over joint channels: whole rows may go, single entries may not
    net, a = start(12)
    y = net.op("Softmax", net.reshape(net.op("GlobalMaxPool", a), 0, 3, 4), axis=2)
    return net, [net.head(net.reshape(y, 0, 12, 1, 1))], {"conv": 12}


def sums_of_joint_channels():
    net, a = start(12)
    y = net.op("ReduceSum", net.reshape(a, 0, 3, 4, 8, 8), net.ints(2), keepdims=0)
    return net, [net.head(y)], {"conv": 12}


def maxout():
    net, a = start(12)
    y = net.op("ReduceMax", net.reshape(a, 0, 3, 4, 8, 8), axes=[2], keepdims=0)
    return net, [net.head(y)], {"conv": 12}


def reshaped_through_positions():
    net, a = start(12)
    y = net.op("Tanh", net.reshape(a, 0, 3, 32, 8))
    return net, [net.head(net.reshape(y, 0, 12, 8, 8))], {"conv": 12}


def gram_matrix():
    net, a = start()
    f = net.reshape(a, 0, C, 64)
    y = net.op("Mul", net.op("MatMul", f, net.op("Transpose", f, perm=[0, 2, 1])), np.float32(0.05))
    return net, [net.gemm(net.op("Tanh", net.op("Flatten", y)), 4), net.head(a)], {"tail": 5}


def bilinear_pooling():
    net, a = start()
    f, g = net.reshape(a, 0, C, 64), net.reshape(net.conv("x", 4, name="other"), 0, 4, 64)
    y = net.op("Mul", net.op("MatMul", f, net.op("Transpose", g, perm=[0, 2, 1])), np.float32(0.05))
    return net, [net.gemm(net.op("Tanh", net.op("Flatten", y)), 4)], {"conv": C, "other": 0}


def states_of_a_recurrent_layer():
    net, a = start()
    steps = net.op("Transpose", net.op("ReduceMax", a, axes=[3], keepdims=0), perm=[2, 0, 1])
    w, r = net.random(2, 20, C, scale=0.4), net.random(2, 20, 5, scale=0.4)
    _, h, _ = net.op("LSTM", steps, w, r, n=3, hidden_size=5, direction="bidirectional")
    return net, [net.head(net.reshape(net.op("Transpose", h, perm=[1, 0, 2]), 0, 10))], {"conv": C}


def embeddings_shared_with_the_head():
    net = Net()
    ids, table = net.input("ids", ("N", 4), np.int64), net.const(net.random(10, 7), "table")
    h = net.op("Tanh", net.op("MatMul", net.op("Gather", table, ids), net.random(7, 6, scale=0.4), name="down"))
    h = net.op("MatMul", h, net.random(6, 7, scale=0.4), name="up")
    return net, [net.op("MatMul", h, net.op("Transpose", table, perm=[1, 0]), name="out")], {"down": 6, "up": 7}


def weights_made_from_the_input():
    net, a = start()
    fix_batch(net, 1)
    made = net.op("AveragePool", net.conv("x", 4, name="maker"), kernel_shape=[3, 3])
    made = net.op("Expand", net.op("Transpose", made, perm=[1, 0, 2, 3]), net.ints(4, C, 1, 1))
    made = net.op("Slice", made, net.ints(0, 0), net.ints(3, 3), net.ints(2, 3))
    return net, [net.head(net.op("Conv", a, made, name="odd"))], {"conv": 0, "maker": 0, "tail": 5}


def values_in_a_sequence():
    net, a = start()
    parts = net.op("SplitToSequence", a, np.asarray(3, np.int64), axis=1)
    y = net.declare(net.op("SequenceAt", parts, np.asarray(0, np.int64)), ["N", 3, 8, 8])
    return net, [net.head(y)], {"conv": 0, "tail": 5}


def scattered_updates():
    net, a = start()
    fix_batch(net, 1)
    y = net.op("ScatterND", a, np.asarray([[0, 1]], np.int64), net.random(1, 8, 8))
    return net, [net.head(y)], {"conv": 0, "tail": 5}


def an_input_that_is_an_output():
    net, a = start()
    return net, [net.head(a), net.op("Identity", "x")], {"conv": C, "tail": 5}


def a_bias_for_each_sample():
    net = Net()
    a = net.gemm(net.input("x", (2, 9)), C)
    b = net.op("Tanh", net.op("Gemm", a, net.random(C, 5), net.random(2, 5), name="dense"))
    return net, [net.gemm(b, 4)], {"fc": C, "dense": 5}


def an_integer_network_in_front():
    net = Net(opset=13)
    y = net.op("ConvInteger", net.input(dtype=np.uint8), net.rng.integers(0, 60, (6, 3, 3, 3)).astype(np.uint8))
    return net, [net.head(net.op("Mul", net.op("Cast", y, to=1), np.float32(0.1)))], {"tail": 5}


Odd = Callable[[], tuple[Net, list[str], dict[str, int]]]
CASES: list[Odd] = [
    selective_kernel,
    cascade_of_splits,
    split_across_a_concat,
    uneven_split,
    grouped_convs_of_other_counts,
    channels_softly_chosen,
    sums_of_joint_channels,
    maxout,
    reshaped_through_positions,
    gram_matrix,
    bilinear_pooling,
    states_of_a_recurrent_layer,
    embeddings_shared_with_the_head,
    weights_made_from_the_input,
    values_in_a_sequence,
    scattered_updates,
    an_input_that_is_an_output,
    a_bias_for_each_sample,
    an_integer_network_in_front,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_odd_graphs_stay_exact(case):
    net, outputs, expected = case()
    model = net.model(*outputs)
    space = analyze(model)
    assert {node: prunable(space, node) for node in expected} == expected
    assert_exact(model, batches=(1, 2, 3))
