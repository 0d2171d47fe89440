"""Tables say what the data says, and fit into the terminals people have."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from onnxcar import report


def shown(*tables, width=100, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, force_terminal=False, color_system=None)
    for table in tables:
        console.print(table, markup=False)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


RECORD = {
    "metric": "top1",
    "optimistic": True,
    "model": {"params": 270_896, "macs": 40_551_040, "bytes": 1_092_000},
    "result": {"params": 135_000, "macs": 20_000_000, "bytes": 546_000},
    "base": {"value": 0.9164, "correct": 932, "samples": 1017},
    "final": {"value": 0.9066, "correct": 922, "samples": 1017},
    "test_base": None,
    "test_final": None,
}


def test_prune_tables_show_cut_layers_only_and_the_totals_of_all():
    layers = [
        {"node": "conv1", "kind": "conv", "before": 16, "after": 8},
        {"node": "conv2", "kind": "conv", "before": 16, "after": 16},
    ]
    text = shown(*report.prune_tables(RECORD, layers))
    assert "conv1" in text
    assert "8 (50%)" in text
    assert "conv2" not in text
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines() if line.strip()}
    assert rows["filters"].split() == ["filters", "32", "24", "-25.0%"]
    assert rows["MACs"].split() == ["MACs", "40.6", "M", "20.0", "M", "-50.7%"]
    assert rows["top1 on data (optimistic)"].split()[-3:] == ["0.9164", "0.9066", "-0.0098"]


def test_test_data_is_a_row_of_its_own_and_nothing_is_optimistic():
    record = {**RECORD, "optimistic": False, "test_base": RECORD["base"], "test_final": RECORD["final"]}
    text = shown(*report.prune_tables(record, []))
    assert "top1 on test data" in text
    assert "optimistic" not in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(width):
    name = "/backbone/layer3/layer3.1/very/long/name/of/a/node/conv1/Conv"
    layers = [{"node": name, "kind": "conv", "before": 16, "after": 8}]
    text = shown(*report.prune_tables(RECORD, layers), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert name.replace("/", "") in "".join(line.split("  ")[0].strip() for line in text.splitlines()).replace("/", "")


def test_tables_survive_a_terminal_without_unicode():
    layers = [{"node": "conv1", "kind": "conv", "before": 16, "after": 8}]
    assert "conv1" in shown(*report.prune_tables(RECORD, layers), encoding="ascii")


def score(group, importance, correct=None, per_class=None):
    return {
        "group": group,
        "filters": [["w", 0]],
        "importance": importance,
        "stderr": None if correct is None else 0.002,
        "correct": correct,
        "per_class": per_class,
        "macs": 1000,
        "params": 10,
    }


def test_score_table_has_the_least_important_first_and_elides_the_middle():
    groups = [score(f"conv:{i}", (i * 7 % 30) / 100, 100) for i in range(30)]
    text = shown(report.score_table({"groups": groups}, limit=10))
    order = [line.split()[0] for line in text.splitlines() if line.startswith("conv")]
    assert (
        order
        == [f"conv:{i}" for i in sorted(range(30), key=lambda i: i * 7 % 30)][:5]
        + [f"conv:{i}" for i in sorted(range(30), key=lambda i: i * 7 % 30)][-5:]
    )
    assert "... 20 more" in text
    assert "more" not in shown(report.score_table({"groups": groups}))


def test_score_table_names_the_class_that_needs_a_group():
    groups = [score("conv:0", 0.1, 90, {"cat": 0.3, "dog": -0.1}), score("conv:1", 0.0, 100, {"cat": 0.0, "dog": 0.0})]
    text = shown(report.score_table({"groups": groups}))
    assert "cat (-0.3000)" in text
    assert "none" in text


def comparison(n_classes=3, **changes):
    scores = {"top1": {"value": 0.9, "interval": [0.88, 0.92], "correct": 90, "samples": 100}}
    model = {"name": "m", "params": 1000, "macs": 2000, "bytes": 3000, "scores": scores, "latency": None}
    other = {**model, "name": "p", "params": 500, "macs": 800}
    top1 = {"difference": -0.02, "interval": [-0.03, -0.01], "p": 0.00001, "only_base": 4, "only_candidate": 2}
    classes = [{"class": f"c{i}", "label": i, "base": 10, "candidate": 10 - i, "samples": 20} for i in range(n_classes)]
    difference = {
        "candidate": "p",
        "scores": {"top1": top1},
        "agreement": 0.97,
        "per_class": classes,
        "latency_ratio": None,
    }
    gate = {"gate": "max-drop", "candidate": "p", "limit": 0.01, "measured": 0.02, "met": False}
    return {"models": [model, other], "differences": [difference], "gates": [gate]} | changes


def test_comparison_says_change_p_value_agreement_and_gate():
    text = shown(*report.comparison_tables(comparison()))
    for part in ("500 (-50.0%)", "-0.0200 [-0.0300, -0.0100]", "< 0.0001", "4 / 2", "0.9700", "NOT MET"):
        assert part in text, part


def test_comparison_lists_changed_classes_only_and_the_ends_of_many():
    text = shown(*report.comparison_tables(comparison()))
    assert "c2" in text
    assert "\nc0 " not in text
    many = shown(*report.comparison_tables(comparison(n_classes=40)))
    assert "39; here the 5 that lose and the 5 that gain most" in many
    assert sum(line.startswith("c") and line[1].isdigit() for line in many.splitlines()) == 10


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999_999, "1.00 M"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (4.2e9, "4.20 G"),
        (-5000, "-5.00 k"),
    ],
)
def test_counts_have_three_digits_and_a_letter(number, text):
    assert report.count(number) == text


def test_protected_filters_are_listed_with_node_and_reason():
    entry = {"layer": "fc", "filters": [0, 1, 2, 3], "of": 10, "node": "y", "reason": "is an output of the network"}
    text = shown(report.protected_table({"protected": [entry, {**entry, "layer": "all", "of": 4}]}))
    assert "4 (0-3)" in text
    assert "all 4" in text
    assert "is an output of the network" in text
