"""``onnxcar inspect``: what a model consists of and what can go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcar.cli.command import Command
from onnxcar.cli.options import general_options, json_option, model_argument, norms_option, option
from onnxcar.cli.work import header, json_target, terminal, write_json

if TYPE_CHECKING:
    from onnxcar.channels import ChannelSpace
    from onnxcar.model import Model


@click.command("inspect", cls=Command, short_help="Layers, groups, what is protected and why.")
@model_argument
@option("--groups", section="Output", is_flag=True, help="List every group with its members.")
@norms_option("Structure")
@json_option
@general_options
def command(model: Path, groups: bool, norms: str, **params: Any) -> None:
    """Layers, filters, groups, params, MACs of MODEL, and what is protected and why. Needs no data."""
    from onnxcar import report
    from onnxcar.model import load
    from onnxcar.rules import analyze

    json_to = params["json"]
    json_target(json_to, [model])
    result = describe(analyze(load(model), norms=norms), groups=groups or json_to is not None)
    write_json(result, json_to)
    if json_to == "-":
        return
    out = terminal()
    out.data(f"{model}  {_sizes(result)}", report.layer_table(result))
    if result["protected"]:
        out.data(report.protected_table(result))
    if result["unsupported"]:
        names = ", ".join(f"{op} ({n})" for op, n in result["unsupported"].items())
        out.data(f"Ops without a rule; what enters them is protected: {names}")
    if groups:
        out.data(report.group_table(result))
    out.data(_summary(result))
    out.note(_next(model, result), command=True)


def _sizes(result: dict[str, Any]) -> str:
    inputs = ", ".join(f"{i['name']} {tuple(i['shape'])}" for i in result["inputs"])
    outputs = ", ".join(f"{o['name']} {tuple(o['shape'])}" for o in result["outputs"])
    return f"{inputs} -> {outputs}".replace("'", "")


def _summary(result: dict[str, Any]) -> str:
    total, units = result["filters"], result["dense_units"]
    share = f" ({total['prunable'] / total['all']:.1%})" if total["all"] else ""
    text = f"{total['prunable']} of {total['all']} filters{share}"
    if units["all"]:
        text += f" and {units['prunable']} of {units['all']} units of dense layers"
    return f"{text} can go, in {total['groups']} groups."


def _next(model: Path, result: dict[str, Any]) -> str:
    if not result["filters"]["prunable"] + result["dense_units"]["prunable"]:
        return "Nothing can be pruned here; the table above says why."
    return f"Next: onnxcar prune {model} --data PATH --preprocess NAME"


def describe(space: ChannelSpace, *, groups: bool = True) -> dict[str, Any]:
    """Everything ``inspect`` knows, as JSON types; without ``groups`` the list of them stays empty."""
    from onnxcar import record

    model, cost = space.model, space.cost()
    layer_macs = {term.node: 0 for term in space.terms}
    for term in space.terms:
        layer_macs[term.node] += round(term.scale * len(term.reads.ravel()) * len(term.writes.ravel()) / term.blocks)
    nodes = {n.name or f"{n.op_type}_{i}": i for i, n in enumerate(model.proto.graph.node)}
    layers = [
        {
            "node": x.node,
            "op": x.op_type,
            "kind": x.kind,
            "weight": x.weight,
            "filters": x.filters,
            "prunable": int((x.groups >= 0).sum()),
            "groups": len({int(g) for g in x.groups if g >= 0}),
            "params": _node_params(space, nodes[x.node]),
            "macs": layer_macs.get(nodes[x.node]),
        }
        for x in space.layers
    ]
    return {
        **header("inspect"),
        "model": record.model_entry(model.path, model.sha256, cost, model.n_bytes),
        "inputs": _values(model, model.proto.graph.input),
        "outputs": _values(model, model.proto.graph.output),
        "norms": space.norms,
        "filters": {**_totals(layers, dense=False), "groups": len(space.groups)},
        "dense_units": _totals(layers, dense=True),
        "layers": layers,
        "protected": [
            {
                "layer": p.layer,
                "weight": p.weight,
                "filters": list(p.filters),
                "of": space.by_weight[p.weight].filters,
                "node": p.node,
                "op": p.op_type,
                "reason": p.reason,
            }
            for p in space.protected
        ],
        "unsupported": dict(space.unsupported),
        "groups": [
            {
                "group": g.name,
                "filters": [list(f) for f in g.filters],
                "params": space.saved_params(g.id),
                "macs": space.saved_macs(g.id),
            }
            for g in (space.groups if groups else ())
        ],
    }


def _totals(layers: list[dict[str, Any]], *, dense: bool) -> dict[str, int]:
    """Filters of convolutions, or units of dense layers: all, and those that can go."""
    counted = [x for x in layers if (x["kind"] == "dense") is dense]
    return {"all": sum(x["filters"] for x in counted), "prunable": sum(x["prunable"] for x in counted)}


def _node_params(space: ChannelSpace, node: int) -> int:
    total = 0
    for name in space.model.proto.graph.node[node].input[1:]:
        shape = space.facts.shape(name) if space.facts.constant(name) else None
        size = 1
        for n in shape or (0,):
            size *= n
        total += size
    return total


def _values(model: Model, values: Any) -> list[dict[str, Any]]:
    weights = {tensor.name for tensor in model.proto.graph.initializer}
    return [
        {
            "name": v.name,
            "shape": [
                d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in v.type.tensor_type.shape.dim
            ],
        }
        for v in values
        if v.name not in weights
    ]
