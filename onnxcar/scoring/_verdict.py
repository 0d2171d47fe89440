"""The judge as a graph: outputs stay on the device, three numbers a row come back.

It gives exactly what `Judge` gives. Ranks and margins are comparisons and one subtraction of the same float64 numbers,
so they are equal anyway. The loss takes exp and log, whose last bits differ from library to library; it is counted in
whole units of 2^-30 nats, and the rounding to units hides that unless the value lies within the error bound of a
half. Such rows, and rows with anything that is not finite, come back as outputs and are judged on the host (the test
of correct rounding by Ziv, ACM TOMS 17 (1991), 410-423).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcar._device import Buffer
from onnxcar._judge import Judge
from onnxcar.errors import ModelError
from onnxcar.metrics import LOSS_ONE, TOP, Rows
from onnxcar.runtime import Session, session

__all__ = ["Verdicts", "open_verdicts"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
OPSET, IR = 17, 8
HUGE = 1e300  # outputs beyond are judged on the host
UNSURE, NEAR, RANK = 1, 2, 4  # bits of the code of a row; the label's rank is what is left above them


class Verdicts:
    """Judges rows of outputs where they lie; `open_verdicts` makes it."""

    def __init__(self, judge: Judge, inner: Session) -> None:
        """Hold the session."""
        self._judge, self._session = judge, inner

    def rows(self, outputs: Buffer, images: Indices, distance: float = -1.0) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Results of rows, and which of them are `Judge.doubtful` at this distance.

        Args:
            outputs: First output of the network, (k, ...), on the device.
            images: Which image each row is, (k,).
            distance: Of outputs that are not told apart; negative: none are doubtful.
        """
        kind = np.float16 if outputs.dtype == np.float16 else outputs.dtype
        told, rest = self._session.run({"outputs": outputs, "images": images, "distance": np.asarray(distance, kind)})
        code = told[:, 0].astype(np.int64)
        unsure = np.flatnonzero(code & UNSURE)
        near, ahead = (code & NEAR) > 0, code // RANK
        loss, margin = told[:, 1].astype(np.int64), told[:, 2].astype(np.float32)
        top1, top5 = ahead == 0, ahead < TOP
        if len(unsure):
            at = images[unsure]
            host = self._judge.rows(rest, at)
            loss[unsure], margin[unsure], top1[unsure], top5[unsure] = host.loss, host.margin, host.top1, host.top5
            near[unsure] = self._judge.doubtful(rest, at, distance) if distance >= 0 else False
        return self._judge.counted(top1, top5, margin, loss, images), near


def open_verdicts(judge: Judge, outputs: Array, like: Session) -> Verdicts | None:
    """The judge where a session runs.

    Args:
        judge: The metric. Only its counts of classes and its loss can be graphs.
        outputs: The network's first output on a few samples.
        like: A session on the device.

    Returns:
        None where the host has to judge.
    """
    covered = judge.labelled and judge.metric.classes and judge.metric.additive
    if not covered or outputs.dtype.kind != "f" or any(size != 1 for size in outputs.shape[2:]):
        return None
    try:
        made = session(_graph(judge, outputs), provider=like.provider.exact, threads=like.threads)
        found = Verdicts(judge, made)
        few = np.arange(min(len(outputs), len(judge.targets)), dtype=np.int64)
        found.rows(Buffer.of(like.provider.device, outputs[: len(few)]), few)
    except ModelError:
        return None  # a build of ONNX Runtime without one of the operators
    return found


class _Graph:
    """Nodes and constants in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def put(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its output."""
        name = f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, values: Any, dtype: npt.DTypeLike) -> str:
        """An initializer; its name."""
        name = f"constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def total(self, flags: str) -> str:
        """How many of each row's flags are set, (k, 1) double."""
        # Float32 counts exactly up to 2^24 classes, and every provider sums it.
        sums = self.put("ReduceSum", self.put("Cast", flags, to=TensorProto.FLOAT), self.constant([1], np.int64))
        return self.put("Cast", sums, to=TensorProto.DOUBLE)

    def flag(self, condition: str, bit: int) -> str:
        """A bit of the code, (k, 1) double."""
        return self.put("Mul", self.put("Cast", condition, to=TensorProto.DOUBLE), self.constant(bit, np.float64))


def _graph(judge: Judge, outputs: Array) -> onnx.ModelProto:
    """Inputs: outputs (k, ...), images (k,), distance (). Outputs: (k, 3) code, loss, margin; unsure rows' outputs."""
    g = _Graph()
    kind = helper.np_dtype_to_tensor_dtype(outputs.dtype)
    flat = g.put("Reshape", "outputs", g.constant([0, -1], np.int64))
    given = flat if judge.columns is None else g.put("Gather", flat, g.constant(judge.columns, np.int64), axis=1)
    x = g.put("Cast", given, to=TensorProto.DOUBLE)
    label = g.put("Unsqueeze", g.put("Gather", g.constant(judge.targets, np.int64), "images"), g.constant([1], "int64"))
    classes = g.constant(np.arange(judge.n_classes)[None], np.int64)
    own = g.put("GatherElements", x, label, axis=1)
    rank = _rank(g, x, own, classes, label)
    others = g.put("Where", g.put("Equal", classes, label), g.constant(-np.inf, np.float64), x)
    best = g.put("ReduceMax", others, axes=[1])
    margin = g.put("Sub", own, best)
    loss, error = _loss(g, judge, x, own, best)
    units = g.put("Mul", loss, g.constant(LOSS_ONE, np.float64))
    units = g.put("Min", g.put("Max", units, g.constant(0, np.float64)), g.constant(judge.loss_cap, np.float64))
    whole = g.put("Round", units)
    # How far from a half, where rounding turns.
    room = g.put("Sub", g.constant(0.5, np.float64), g.put("Abs", g.put("Sub", units, whole)))
    sure = g.put("Less", g.put("Mul", error, g.constant(LOSS_ONE, np.float64)), room)
    finite = g.put("Less", g.put("Abs", x), g.constant(HUGE, np.float64))
    all_finite = g.put("Equal", g.total(finite), g.constant(judge.n_classes, np.float64))
    unsure = g.put("Not", g.put("And", sure, all_finite))
    # What is not a number must not get into the code.
    clean = g.put("Where", unsure, g.constant(0, np.float64), whole)
    near = _near(g, judge, given, label)
    code = g.put("Add", g.put("Mul", rank, g.constant(RANK, np.float64)), g.flag(unsure, UNSURE))
    code = g.put("Add", code, g.flag(near, NEAR))
    told = g.put("Concat", code, clean, margin, axis=1)
    rest = g.put("Compress", flat, g.put("Reshape", unsure, g.constant([-1], np.int64)), axis=0)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        g.nodes,
        "judge",
        [
            value("outputs", kind, None),
            value("images", TensorProto.INT64, None),
            value("distance", kind, []),
        ],
        [value(told, TensorProto.DOUBLE, None), value(rest, kind, None)],
        g.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _rank(g: _Graph, x: str, own: str, classes: str, label: str) -> str:
    """Outputs above the label's, and equal ones of lower index."""
    above = g.put("Greater", x, own)
    tied = g.put("And", g.put("Equal", x, own), g.put("Less", classes, label))
    return g.total(g.put("Or", above, tied))


def _loss(g: _Graph, judge: Judge, x: str, own: str, best: str) -> tuple[str, str]:
    """Cross-entropy in nats, (k, 1), and a bound of how far apart any two good libraries' values are."""
    if judge.probabilities:
        least = g.constant(1e-45, np.float64)
        share = own
        if judge.columns is not None:
            all_of_them = g.put("ReduceSum", x, g.constant([1], np.int64))
            share = g.put("Div", own, g.put("Max", all_of_them, least))
        loss = g.put("Neg", g.put("Log", g.put("Max", share, least)))
        size = g.put("Abs", loss)
    else:
        high = g.put("Max", best, own)
        sums = g.put("ReduceSum", g.put("Exp", g.put("Sub", x, high)), g.constant([1], np.int64))
        below = g.put("Sub", own, high)
        loss = g.put("Sub", g.put("Log", sums), below)
        size = g.put("Add", g.put("Abs", loss), g.put("Abs", below))
    # Sums of n terms are off by n units in the last place at most, exp, log and differences by a few of their size;
    # both sides err, and a factor of two is for good measure.
    unit = np.finfo(np.float64).eps
    error = g.put("Mul", size, g.constant(16 * unit, np.float64))
    return loss, g.put("Add", error, g.constant((4 * judge.n_classes + 64) * unit, np.float64))


def _near(g: _Graph, judge: Judge, given: str, label: str) -> str:
    """`Judge.doubtful`, (k, 1), in the outputs' own type; nothing for a negative distance."""
    own = g.put("GatherElements", given, label, axis=1)
    above = g.total(g.put("Greater", given, g.put("Add", own, "distance")))
    reached = g.total(g.put("Not", g.put("Less", given, g.put("Sub", own, "distance"))))
    top = g.constant(TOP if judge.metric.name == "top5" else 1, np.float64)
    # `reached` counts those above, those near, and the label itself.
    more = g.put("Greater", reached, top)
    asked = g.put("Not", g.put("Less", g.put("Cast", "distance", to=TensorProto.DOUBLE), g.constant(0, np.float64)))
    return g.put("And", g.put("And", g.put("Less", above, top), more), asked)
