"""The obvious loop in PyTorch: the graph's nodes called one by one, the weights that read a group set to zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from onnxcar.channels import ChannelSpace
from onnxcar.surgery import Plan, mask


class Net(torch.nn.Module):
    """A graph of the ops that CIFAR ResNets, SqueezeNets and LeNets are made of."""

    def __init__(self, proto: Any) -> None:
        super().__init__()
        self.graph = proto.graph
        self.known = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in self.graph.initializer}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """First output of the graph."""
        fed = next(i.name for i in self.graph.input if i.name not in self.known)
        values: dict[str, Any] = self.known | {fed: x}
        for node in self.graph.node:
            a = {x.name: helper.get_attribute_value(x) for x in node.attribute}
            values[node.output[0]] = _run(node.op_type, [values[i] if i else None for i in node.input], a)
        return values[self.graph.output[0].name]


def _run(op: str, v: list[Any], a: dict[str, Any]) -> Any:
    match op:
        case "Conv":
            pads = a.get("pads", [0, 0, 0, 0])
            if pads[:2] != pads[2:]:
                v[0], pads = F.pad(v[0], (pads[1], pads[3], pads[0], pads[2])), [0, 0]
            bias = v[2] if len(v) > 2 else None
            stride, dilation = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
            return F.conv2d(v[0], v[1], bias, stride, pads[:2], dilation, a.get("group", 1))
        case "Relu":
            return F.relu(v[0])
        case "Add":
            return v[0] + v[1]
        case "Mul":
            return v[0] * v[1]
        case "Gemm":
            weight = v[1] if a.get("transB", 0) else v[1].T
            return F.linear(v[0], weight, v[2] if len(v) > 2 else None)
        case "GlobalAveragePool":
            return v[0].mean((2, 3), keepdim=True)
        case "ReduceMean":
            axes = a["axes"] if "axes" in a else v[1].tolist()
            return v[0].mean(tuple(axes), keepdim=bool(a.get("keepdims", 1)))
        case "MaxPool":
            return F.max_pool2d(
                v[0], a["kernel_shape"], a.get("strides"), a.get("pads", [0])[0], ceil_mode=bool(a.get("ceil_mode", 0))
            )
        case "AveragePool":
            return F.avg_pool2d(v[0], a["kernel_shape"], a.get("strides"), a.get("pads", [0])[0])
        case "Flatten":
            return v[0].flatten(a.get("axis", 1))
        case "Reshape":
            shape = [v[0].shape[i] if s == 0 else s for i, s in enumerate(v[1].tolist())]
            return v[0].reshape(shape)
        case "Concat":
            return torch.cat(v, a["axis"])
        case "Constant":
            return torch.from_numpy(numpy_helper.to_array(a["value"]).copy())
        case "Slice":
            starts, ends, axes = (v[i].tolist() for i in (1, 2, 3))
            steps = v[4].tolist() if len(v) > 4 else [1] * len(axes)
            where: list[Any] = [slice(None)] * v[0].dim()
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                where[axis] = slice(start, end, step)
            if min(steps) > 0:
                return v[0][tuple(where)]
            return torch.from_numpy(v[0].numpy()[tuple(where)].copy())
        case "Pad":
            pads = (v[1].tolist() if len(v) > 1 else a["pads"]) if v else []
            rank = len(pads) // 2
            order = [x for axis in reversed(range(rank)) for x in (pads[axis], pads[rank + axis])]
            return F.pad(v[0], order)
        case "Shape":
            return torch.tensor(v[0].shape)
        case "ConstantOfShape":
            value = numpy_helper.to_array(a["value"]) if "value" in a else np.zeros(1, np.float32)
            return torch.full(tuple(v[0].tolist()), value.item(), dtype=torch.from_numpy(value.copy()).dtype)
        case "Cast":
            kind = helper.tensor_dtype_to_np_dtype(a["to"])
            return v[0].to(torch.from_numpy(np.zeros(1, kind)).dtype)
        case "Gather":
            axis = a.get("axis", 0)
            shape = (*v[0].shape[:axis], *v[1].shape, *v[0].shape[axis + 1 :])
            return torch.index_select(v[0], axis, v[1].reshape(-1)).reshape(shape)
        case "Transpose":
            return v[0].permute(a["perm"]) if "perm" in a else v[0].T
        case "Unsqueeze":
            for axis in sorted(a["axes"] if "axes" in a else v[1].tolist()):
                v[0] = v[0].unsqueeze(axis)
            return v[0]
        case "Softmax":
            return F.softmax(v[0], a.get("axis", -1))
        case "Identity" | "Dropout":
            return v[0]
    raise SystemExit(f"The PyTorch loop does not know {op}; leave it out.")


def torch_loop(
    space: ChannelSpace,
    groups: frozenset[int],
    images: np.ndarray,
    labels: np.ndarray,
    batch: int,
    threads: int | None = None,
) -> int:
    """Correct samples without these groups, the obvious way; by PyTorch's own default threads if None."""
    if threads is not None:
        torch.set_num_threads(threads)
    net = Net(mask(space, Plan(groups)).proto).eval()
    right = 0
    with torch.inference_mode():
        for i in range(0, len(images), batch):
            out = net(torch.from_numpy(images[i : i + batch])).flatten(1)
            right += int((out.argmax(1).numpy() == labels[i : i + batch]).sum())
    return right
