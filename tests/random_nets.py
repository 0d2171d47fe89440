"""Random graphs for the property test: a list of numbers is read as steps, each adds an op to a pool of values.

Every list gives a valid network, so that a failing one shrinks to a short list of simple steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcar.model import Model
from tests.graphs import Net, feeds, run

Steps = Sequence[tuple[int, int, int]]  # (which op, which value, the op's own choice)


@dataclass(frozen=True)
class Value:
    """A value (N, c, h, h) of the pool."""

    name: str
    c: int
    h: int


class Garden:
    """A network growing step by step."""

    def __init__(self, seed: int, opset: int, dynamic: bool) -> None:
        self.net = Net(opset=opset, ir=8 if opset < 19 else 10, seed=seed)
        size = 8
        x = self.net.input("x", ("N" if dynamic else 2, 3, size, size))
        self.pool = [self.conv(Value(x, 3, size), 6, 3)]
        self.used: set[str] = {x}

    # --- helpers --------------------------------------------------------------------------------------------------

    def conv(self, v: Value, c: int, k: int = 1, group: int = 1, stride: int = 1, bias: bool = True) -> Value:
        scale = (1.5 / (v.c // group * k * k)) ** 0.5
        w = self.net.random(c, v.c // group, k, k, scale=scale)
        inputs = [v.name, w] + ([self.net.random(c, scale=0.3)] if bias else [])
        y = self.net.op("Conv", *inputs, group=group, strides=[stride] * 2, pads=[k // 2] * 4, kernel_shape=[k, k])
        return Value(y, c, (v.h + 2 * (k // 2) - k) // stride + 1)

    def op(self, v: Value, op: str, *inputs: str | np.ndarray, **attributes: object) -> Value:
        return Value(self.net.op(op, v.name, *inputs, **attributes), v.c, v.h)

    def tamed(self, v: Value) -> Value:
        return self.op(v, "Tanh")

    def partner(self, v: Value, k: int, c: int | None = None) -> Value:
        """Another value of the size of `v`: from the pool, or a new branch."""
        found = [p for p in self.pool if p.h == v.h and p.name != v.name and (c is None or p.c == c)]
        if found and k % 3:
            p = found[k % len(found)]
            self.used.add(p.name)
            return p
        return self.conv(v, c if c is not None else 2 + k % 5, 1)

    def divisor(self, n: int, k: int, low: int = 2) -> int | None:
        found = [d for d in range(low, n) if n % d == 0]
        return found[k % len(found)] if found else None

    # --- steps ----------------------------------------------------------------------------------------------------

    def step(self, which: int, where: int, k: int) -> None:
        v = self.pool[-1 - where % min(len(self.pool), 3)]
        self.used.add(v.name)
        made = STEPS[which % len(STEPS)](self, v, k)
        for value in made if isinstance(made, list) else [made]:
            # shape inference does not follow every computed size
            self.net.declare(value.name, [*_batch(self.net), value.c, value.h, value.h])
            self.pool.append(value)

    def finish(self, hidden: int = 5) -> Model:
        """All leaves pooled, joined, scaled to order one, and a dense head with a hidden layer."""
        net = self.net
        leaves = [v for v in self.pool if v.name not in self.used][-6:] or self.pool[-1:]
        parts = []
        for i, v in enumerate(leaves):
            if i % 2 and v.h % 2 == 0:
                name = net.op("AveragePool", v.name, kernel_shape=[v.h // 2] * 2, strides=[v.h // 2] * 2)
            else:
                name = net.op("GlobalAveragePool", v.name)
            parts.append(net.op("Flatten", name))
        joined = net.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        probe = net.model(joined)
        values = run(probe, feeds(probe, 2, seed=99))[0]
        scale = 1 / np.maximum(np.abs(values).max(axis=0), 1e-3)
        joined = net.op("Mul", joined, scale.astype(np.float32))
        y = net.op("Tanh", net.gemm(joined, hidden))
        return net.model(net.gemm(y, 4))


def _activation(g: Garden, v: Value, k: int) -> Value:
    op = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "HardSwish", "Softplus", "Identity", "Dropout")[k % 9]
    return g.op(v, op)


def _conv(g: Garden, v: Value, k: int) -> Value:
    return g.conv(v, 2 + k % 9, (1, 3)[k % 2], stride=2 if k % 5 == 0 and v.h >= 4 else 1, bias=bool(k % 4))


def _grouped(g: Garden, v: Value, k: int) -> Value:
    groups = g.divisor(v.c, k) or v.c
    return g.conv(v, groups * (1 + k % 3), 3, group=groups)


def _depthwise(g: Garden, v: Value, k: int) -> Value:
    return g.conv(v, v.c * (1 + k % 2), 3, group=v.c)


def _transposed(g: Garden, v: Value, k: int) -> Value:
    groups = (g.divisor(v.c, k) or 1) if k % 3 == 0 else 1
    per = 1 + k % 4
    w = g.net.random(v.c, per, 2, 2, scale=(1.5 / v.c) ** 0.5)
    c = groups * per
    if v.h > 8:
        return g.conv(v, c, 1)
    y = g.net.op("ConvTranspose", v.name, w, g.net.random(c), strides=[2, 2], group=groups)
    return Value(y, c, 2 * v.h)


def _norm(g: Garden, v: Value, k: int) -> Value:
    net, c = g.net, v.c
    if k % 5 == 0:
        return g.op(v, "InstanceNormalization", net.positive(c), net.random(c), epsilon=0.1) if v.h > 1 else v
    if k % 5 == 1:
        return g.op(v, "LRN", size=3 + k % 2 * 2, alpha=0.8)
    if k % 5 == 2:
        return g.op(v, "LpNormalization", axis=1, p=2)
    if k % 5 == 3 and v.h > 1:
        n = g.divisor(c, k) or 1
        y = net.reshape(v.name, 0, n, -1)
        y = net.op("InstanceNormalization", y, np.ones(n, np.float32), np.zeros(n, np.float32), epsilon=0.1)
        y = net.op("Reshape", y, net.op("Shape", v.name))
        return g.op(Value(y, c, v.h), "Mul", net.positive(c, 1, 1))
    return Value(net.norm(v.name), c, v.h)


def _layer_norm(g: Garden, v: Value, k: int) -> Value:
    net = g.net
    if net.opset < 17:
        return _norm(g, v, k)
    y = net.op("Transpose", v.name, perm=[0, 2, 3, 1])
    y = net.op("LayerNormalization", y, net.positive(v.c), net.random(v.c), axis=-1, epsilon=0.1)
    return Value(net.op("Transpose", y, perm=[0, 3, 1, 2]), v.c, v.h)


def _pool(g: Garden, v: Value, k: int) -> Value:
    if v.h < 2 or v.h % 2:
        return g.op(v, "MaxPool", kernel_shape=[1, 1])
    y = g.net.op(("MaxPool", "AveragePool")[k % 2], v.name, kernel_shape=[2, 2], strides=[2, 2])
    return Value(y, v.c, v.h // 2)


def _resize(g: Garden, v: Value, k: int) -> Value:
    if v.h > 8:
        return _pool(g, v, k)
    if k % 2:
        y = g.net.op("Resize", v.name, np.zeros(0, np.float32), np.asarray([1, 1, 2, 2], np.float32))
    else:
        n = g.net.op("Slice", g.net.op("Shape", v.name), g.net.ints(0), g.net.ints(2))
        sizes = g.net.op("Concat", n, g.net.ints(2 * v.h, 2 * v.h), axis=0)
        y = g.net.op("Resize", v.name, np.zeros(0, np.float32), np.zeros(0, np.float32), sizes)
    return Value(y, v.c, 2 * v.h)


def _join(g: Garden, v: Value, k: int) -> Value:
    """A residual or a gate from a branch of equal channels."""
    p = g.partner(v, k, v.c)
    op = ("Add", "Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")[k % 8]
    out = Value(g.net.op(op, v.name, p.name), v.c, v.h)
    return g.tamed(out) if op == "Mul" else out


def _constant(g: Garden, v: Value, k: int) -> Value:
    shape = [(v.c, 1, 1), (1, v.c, 1, 1), (v.c, v.h, v.h), (1,), (v.h, v.h)][k % 5]
    op = ("Add", "Mul", "Sub", "Div")[k % 4]
    return g.op(v, op, g.net.positive(*shape))


def _excite(g: Garden, v: Value, k: int) -> Value:
    s = g.conv(Value(g.net.op("GlobalAveragePool", v.name), v.c, 1), 2 + k % 4)
    gate = g.conv(g.op(s, "Relu"), v.c)
    return g.op(v, "Mul", g.net.op("Sigmoid", gate.name))


def _line_gate(g: Garden, v: Value, k: int) -> Value:
    """A gate by a Conv along the channels."""
    line = g.net.reshape(g.net.op("GlobalAveragePool", v.name), -1, 1, v.c)
    line = g.net.op("Sigmoid", g.net.op("Conv", line, g.net.random(1, 1, 3), pads=[1, 1]))
    return g.op(v, "Mul", g.net.reshape(line, -1, v.c, 1, 1))


def _dense_gate(g: Garden, v: Value, k: int) -> Value:
    net = g.net
    s = net.op("Flatten", net.op("GlobalAveragePool", v.name))
    s = net.op("Sigmoid", net.gemm(net.op("Relu", net.gemm(s, 2 + k % 4)), v.c))
    if k % 2:
        return g.op(v, "Mul", net.reshape(s, -1, v.c, 1, 1))
    return g.op(v, "Mul", net.op("Unsqueeze", s, net.ints(2, 3)))


def _concat(g: Garden, v: Value, k: int) -> Value:
    p = g.partner(v, k)
    parts = [v, p, v][: 2 + (k % 7 == 0)]
    return Value(g.net.op("Concat", *(x.name for x in parts), axis=1), sum(x.c for x in parts), v.h)


def _concat_positions(g: Garden, v: Value, k: int) -> Value:
    if v.h > 6:
        return _pool(g, v, k)
    p = g.partner(v, k, v.c)
    wide = g.net.op("Concat", v.name, p.name, axis=2)
    both = g.net.op("Concat", wide, wide, axis=3)
    return Value(both, v.c, 2 * v.h)


def _split(g: Garden, v: Value, k: int) -> list[Value] | Value:
    if v.c < 4:
        return g.conv(v, 4)
    a = 2 + k % (v.c - 3)
    net = g.net
    p, q = net.op("Split", v.name, net.ints(a, v.c - a), n=2, axis=1)
    return [Value(net.op("Sigmoid", p), a, v.h), Value(q, v.c - a, v.h)]


def _glu(g: Garden, v: Value, k: int) -> Value:
    if v.c % 2:
        return _activation(g, v, k)
    options = {"num_outputs": 2} if g.net.opset >= 18 else {}
    p, q = g.net.op("Split", v.name, n=2, axis=1, **options)
    return Value(g.net.op("Mul", g.net.op("Tanh", p), g.net.op("Sigmoid", q)), v.c // 2, v.h)


def _slice(g: Garden, v: Value, k: int) -> Value:
    start, stop, step = [(0, v.c, 2), (-1, -(2**31), -1), (1, v.c, 1), (0, -1, 1), (v.c - 1, -v.c - 1, -2)][k % 5]
    taken = list(range(v.c))[slice(start, None if stop < -v.c else stop, step)]
    if len(taken) < 2:
        return g.op(v, "Identity")
    y = g.net.op("Slice", v.name, *(g.net.ints(n) for n in (start, stop, 1, step)))
    return Value(y, len(taken), v.h)


def _gather(g: Garden, v: Value, k: int) -> Value:
    rng = np.random.default_rng(k)
    order = rng.permutation(v.c) if k % 2 else rng.integers(-v.c, v.c, max(2, v.c))
    return Value(g.net.op("Gather", v.name, order.astype(np.int64), axis=1), len(order), v.h)


def _shuffle(g: Garden, v: Value, k: int) -> Value:
    n = g.divisor(v.c, k)
    if n is None:
        return g.conv(v, 8)
    net = g.net
    y = net.reshape(v.name, -1, n, v.c // n, v.h, v.h)
    y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    return Value(net.reshape(y, -1, v.c, v.h, v.h), v.c, v.h)


def _depth_space(g: Garden, v: Value, k: int) -> Value:
    if k % 2 and v.h % 2 == 0:
        return Value(g.net.op("SpaceToDepth", v.name, blocksize=2), 4 * v.c, v.h // 2)
    if v.c % 4 or v.c < 8 or v.h > 8:
        v = g.conv(v, 12)
        if v.h > 8:
            return v
    return Value(g.net.op("DepthToSpace", v.name, blocksize=2, mode=("DCR", "CRD")[k // 2 % 2]), v.c // 4, 2 * v.h)


def _pad(g: Garden, v: Value, k: int) -> Value:
    before, after = k % 3, k // 3 % 3
    pads = [0, before, 0, 0, 0, after, 0, 0]
    number = np.float32(0.5 if k % 4 == 0 else 0)
    return Value(g.net.op("Pad", v.name, g.net.ints(*pads), number), v.c + before + after, v.h)


def _pad_positions(g: Garden, v: Value, k: int) -> Value:
    if v.h > 8:
        return v
    # a number other than 0: ONNX Runtime folds zeros into a pooling behind it, and fails where its window is smaller
    y = g.net.op("Pad", v.name, g.net.ints(0, 0, 1, 0, 0, 0, 0, 1), np.float32(0.25))
    return Value(y, v.c, v.h + 1)


def _dense(g: Garden, v: Value, k: int) -> Value:
    net, n = g.net, 2 + k % 6
    y = net.op("Transpose", v.name, perm=[0, 2, 3, 1])
    y = net.op("Add", net.op("MatMul", y, net.random(v.c, n, scale=v.c**-0.5)), net.random(n))
    return Value(net.op("Transpose", y, perm=[0, 3, 1, 2]), n, v.h)


def _einsum(g: Garden, v: Value, k: int) -> Value:
    n = 2 + k % 4
    y = g.net.op("Einsum", v.name, g.net.random(n, v.c, scale=v.c**-0.5), equation="nchw,oc->nohw")
    return Value(y, n, v.h)


def _attention(g: Garden, v: Value, k: int) -> Value:
    """Heads over positions; sizes given, with -1, or read from the shape."""
    net = g.net
    heads, size = 1 + k % 3, 2 + k % 2
    n, length = heads * size, v.h * v.h
    tokens = net.op("Transpose", net.reshape(v.name, 0, v.c, length), perm=[0, 2, 1])

    def project(perm: list[int]) -> str:
        y = net.op("Add", net.op("MatMul", tokens, net.random(v.c, n, scale=v.c**-0.5)), net.random(n, scale=0.3))
        if k % 4 == 0:
            first = net.op("Slice", net.op("Shape", y), net.ints(0), net.ints(2))
            y = net.op("Reshape", y, net.op("Concat", first, net.ints(heads, size), axis=0))
            y = net.declare(y, [*_batch(net), length, heads, size])
        else:
            y = net.reshape(y, 0, 0 if k % 2 else length, heads, -1 if k % 4 == 1 else size)
        return net.op("Transpose", y, perm=perm)

    q, key, value = project([0, 2, 1, 3]), project([0, 2, 3, 1]), project([0, 2, 1, 3])
    y = net.op("MatMul", net.op("Softmax", net.op("Mul", net.op("MatMul", q, key), np.float32(0.3)), axis=-1), value)
    y = net.reshape(net.op("Transpose", y, perm=[0, 2, 1, 3]), 0, length, n)
    y = net.reshape(net.op("Transpose", y, perm=[0, 2, 1]), 0, n, v.h, v.h)
    return Value(y, n, v.h)


def _batch(net: Net) -> list[int | str]:
    dim = net.inputs[0].type.tensor_type.shape.dim[0]
    return [dim.dim_param or dim.dim_value]


def _computed(g: Garden, v: Value, k: int) -> Value:
    """(N, C, H, W) -> (N, C, H * W) -> back, every size from the shape of the value."""
    net = g.net
    shape = net.op("Shape", v.name)
    n, c, h, w = (net.op("Gather", shape, net.ints(i), axis=0) for i in range(4))
    y = net.op("Reshape", v.name, net.op("Concat", n, c, net.op("Mul", h, w), axis=0))
    y = net.op("Relu", y) if k % 2 else y
    sizes = shape if k % 3 else net.op("Concat", n, net.ints(v.c), h, w, axis=0)
    return Value(net.op("Reshape", y, sizes), v.c, v.h)


def _sum_gate(g: Garden, v: Value, k: int) -> Value:
    net = g.net
    if k % 3 == 0:
        s = net.reduce("ReduceSum", v.name, [1])
    elif k % 3 == 1:
        s = net.reduce("ReduceMean", v.name, [1])
    else:
        s = net.reduce("ReduceMax", v.name, [2, 3])
    return g.op(v, "Mul", net.op("Sigmoid", s))


def _softmax(g: Garden, v: Value, k: int) -> Value:
    return g.op(v, "Softmax", axis=(1, 2, 3)[k % 3])


def _where(g: Garden, v: Value, k: int) -> Value:
    p = g.partner(v, k, v.c)
    if v.c % 2 or v.c > 8:
        return Value(g.net.op("Max", v.name, p.name), v.c, v.h)
    choice = np.asarray([[[True]], [[False]]] * 4)[: v.c]
    return Value(g.net.op("Max", g.net.op("Where", choice, v.name, p.name), p.name), v.c, v.h)


def _tile(g: Garden, v: Value, k: int) -> Value:
    if v.c > 8:
        return g.conv(v, 4)
    return Value(g.net.op("Tile", v.name, g.net.ints(1, 2, 1, 1)), 2 * v.c, v.h)


def _expand(g: Garden, v: Value, k: int) -> Value:
    net = g.net
    s = net.op("GlobalMaxPool", v.name)
    y = net.op("Expand", s, net.op("Shape", v.name)) if k % 2 else net.op("Expand", s, net.ints(1, v.c, v.h, v.h))
    return Value(net.op("Add", y, v.name), v.c, v.h)


def _prelu(g: Garden, v: Value, k: int) -> Value:
    return g.op(v, "PRelu", g.net.positive(*((v.c, 1, 1) if k % 2 else (1, 1, 1))))


def _shared(g: Garden, v: Value, k: int) -> Value:
    """One weight read by two Convs: a siamese branch."""
    p = g.partner(v, k, v.c)
    w = g.net.const(g.net.random(4, v.c, 1, 1, scale=v.c**-0.5))
    a, b = (g.net.op("Conv", x.name, w) for x in (v, p))
    return Value(g.net.op("Concat", a, g.net.op("Sigmoid", b), axis=1), 8, v.h)


def _unknown(g: Garden, v: Value, k: int) -> Value:
    """An op of another domain, which protects what enters."""
    return Value(g.net.op("QuickGelu", v.name, domain="com.microsoft"), v.c, v.h)


STEPS: list[Callable[[Garden, Value, int], Value | list[Value]]] = [
    _conv,
    _activation,
    _join,
    _concat,
    _split,
    _grouped,
    _depthwise,
    _norm,
    _constant,
    _excite,
    _shuffle,
    _pad,
    _slice,
    _gather,
    _glu,
    _pool,
    _transposed,
    _resize,
    _dense_gate,
    _concat_positions,
    _depth_space,
    _pad_positions,
    _dense,
    _einsum,
    _attention,
    _computed,
    _sum_gate,
    _softmax,
    _where,
    _tile,
    _expand,
    _prelu,
    _shared,
    _line_gate,
    _layer_norm,
    _unknown,
]


def grow(steps: Steps, *, seed: int = 0, opset: int = 17, dynamic: bool = True) -> Model:
    """The network that `steps` describe."""
    garden = Garden(seed, opset, dynamic)
    for which, where, k in steps:
        garden.step(which, where, k)
    return garden.finish()
