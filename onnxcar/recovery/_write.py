"""Putting new weights and biases into a model: values in place, names kept, biases added where there were none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcar.errors import InternalError
from onnxcar.recovery._layers import Bias, Graph, Linear
from onnxcar.recovery._patches import Array


@dataclass
class Patch:
    """Changes of a model, by names, so that they fit every copy of it.

    Attributes:
        tensors: New values of constants.
        inputs: (An output of the node, which input) -> (name, values) of a new constant.
        added: Output of a node -> (name, values) of a constant to be added to it by a node of its own.
    """

    tensors: dict[str, Array] = field(default_factory=dict)
    inputs: dict[tuple[str, int], tuple[str, Array]] = field(default_factory=dict)
    added: dict[str, tuple[str, Array]] = field(default_factory=dict)


class Names:
    """Names that a model does not use yet."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self._taken = {x for n in graph.node for x in (n.name, *n.input, *n.output)}
        self._taken |= {t.name for t in graph.initializer} | {i.name for i in graph.input}
        for n in graph.node:
            for a in n.attribute:
                for g in [a.g] if a.HasField("g") else list(a.graphs):
                    self._taken |= {x for m in g.node for x in (*m.input, *m.output)}

    def fresh(self, like: str) -> str:
        """A new name that starts like an old one."""
        name, k = like, 0
        while name in self._taken:
            k += 1
            name = f"{like}{k}"
        self._taken.add(name)
        return name


def refit(layer: Linear, graph: Graph, names: Names, weights: Array, bias: Array) -> Patch:
    """The changes that give a layer these weights (blocks, d, m) and this bias (m,)."""
    patch = Patch()
    tensor = layer.tensor(weights)
    if not np.array_equal(layer.matrix(tensor), layer.matrix(_weights(graph, layer))):
        patch.tensors[layer.weight] = tensor
    put_bias(patch, layer.bias, graph, names, layer, bias)
    return patch


def put_bias(patch: Patch, at: Bias, graph: Graph, names: Names, layer: Linear, bias: Array) -> None:
    """Add the change of a layer's bias to a patch."""
    if np.array_equal(bias, at.values):
        return
    values = np.ascontiguousarray((at.sign * bias / at.factor).reshape(at.shape).astype(at.dtype))
    if at.added:
        patch.added[at.output] = (names.fresh(f"{at.output}_bias"), values)
    elif at.name and graph.own(at.name):
        patch.tensors[at.name] = values
    else:
        patch.inputs[at.output, at.input] = (names.fresh(f"{at.name or layer.weight + '_bias'}"), values)


def _weights(graph: Graph, layer: Linear) -> Array:
    found = graph.floats(layer.weight)
    if found is None:
        raise InternalError(f"Weights '{layer.weight}' are gone.")
    return found


def apply(proto: onnx.ModelProto, patch: Patch) -> None:
    """Make the changes in a model, in place."""
    graph = proto.graph
    _set_tensors(graph, patch.tensors)
    for (output, k), (name, values) in patch.inputs.items():
        node = next(n for n in graph.node if output in n.output)
        node.input.extend([""] * (k + 1 - len(node.input)))
        node.input[k] = name
        _add(proto, name, values)
    for output, (name, values) in patch.added.items():
        at = next(i for i, n in enumerate(graph.node) if output in n.output)
        inner = f"{name}_sum"
        node = graph.node[at]
        node.output[list(node.output).index(output)] = inner
        graph.node.insert(at + 1, helper.make_node("Add", [inner, name], [output], name))
        _add(proto, name, values)


def _set_tensors(graph: onnx.GraphProto, tensors: Mapping[str, Array]) -> None:
    left = dict(tensors)
    for t in graph.initializer:
        if t.name in left:
            made = numpy_helper.from_array(left.pop(t.name), t.name)
            made.doc_string = t.doc_string
            t.CopyFrom(made)
    for node in graph.node if left else ():
        if node.output and node.output[0] in left and not node.input:
            values = left.pop(node.output[0])
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(values)))
    if left:
        raise InternalError(f"Constants {sorted(left)} are gone.")


def _add(proto: onnx.ModelProto, name: str, values: Array) -> None:
    t = numpy_helper.from_array(values, name)
    proto.graph.initializer.append(t)
    if proto.ir_version < 4:
        proto.graph.input.append(helper.make_tensor_value_info(name, t.data_type, list(t.dims)))
