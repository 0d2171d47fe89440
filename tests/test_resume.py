"""A search that goes on from any point of its journal gives the answers of one that was never stopped."""

from __future__ import annotations

import json

import pytest

from onnxcar.choosers import CarChooser
from onnxcar.greedy import walk
from onnxcar.journal import Journal
from onnxcar.scope import Keep, fields, select_layers
from onnxcar.shrinking import Shrinking, every_groups
from onnxcar.steps import Stop
from tests.test_scoring import opened, residual_net


def search(space, data, metric, scope, per_step, path):
    scorer = Shrinking(space, data, metric=metric, provider="cpu", threads=1, due=every_groups(3))
    layers = select_layers(space)
    with Journal(path, {}) as journal:
        return walk(
            space,
            fields(space, layers, (), scope),
            CarChooser(scorer, per_mac=scope == "global"),
            stop=Stop(ratio=0.4),
            keep=Keep(space, 1, 1),
            per_step=per_step,
            journal=journal,
        )


@pytest.mark.parametrize("metric", ["top1", "loss"])
@pytest.mark.parametrize(("scope", "per_step"), [("layer", 1), ("global", 1), ("global", 3)])
def test_every_line_of_a_journal_is_a_place_to_go_on_from(make_model, tmp_path, metric, scope, per_step):
    scorer, _ = opened(lambda m, seed: residual_net(m, 4, 9, seed=seed), make_model, metric, n=80)
    whole = search(scorer.space, scorer.data, metric, scope, per_step, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len(whole.steps) >= 5
    for cut in range(2, len(lines)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_text("".join(lines[:cut]))
        again = search(scorer.space, scorer.data, metric, scope, per_step, path)
        assert again.steps == whole.steps
        assert [json.loads(x) for x in path.read_text().splitlines()] == [json.loads(x) for x in lines]
