"""Which layers are searched, what competes with what, and what every layer keeps."""

import numpy as np
import pytest

from onnxcar.errors import PlanError
from onnxcar.model import from_proto
from onnxcar.rules import analyze
from onnxcar.scope import Keep, fields, select_layers, vector_width, whole_layers
from tests.graphs import Net


@pytest.fixture
def chain(make_model):
    """Two Convs of 12 and 8 filters and two dense layers of 6 and 4 units; the last one's are protected."""
    return analyze(
        from_proto(
            make_model(
                """a = Conv <pads = [1,1,1,1]> (x, stem_w)
                   b = Relu(a)
                   c = Conv <pads = [1,1,1,1]> (b, body_w)
                   d = Relu(c)
                   e = GlobalAveragePool(d)
                   f = Flatten(e)
                   g = Gemm <transB = 1> (f, hidden_w)
                   h = Relu(g)
                   y = Gemm <transB = 1> (h, head_w)""",
                weights={"stem_w": (12, 3, 3, 3), "body_w": (8, 12, 3, 3), "hidden_w": (6, 8), "head_w": (4, 6)},
            )
        )
    )


@pytest.fixture
def residual(make_model):
    """Stem and the block's end tied by an Add (8 groups), inner Conv of 6 filters in between."""
    return analyze(
        from_proto(
            make_model(
                """a = Conv <pads = [1,1,1,1]> (x, stem_w)
                   b = Relu(a)
                   c = Conv <pads = [1,1,1,1]> (b, inner_w)
                   d = Relu(c)
                   e = Conv <pads = [1,1,1,1]> (d, end_w)
                   f = Add(e, b)
                   g = Relu(f)
                   h = GlobalAveragePool(g)
                   i = Flatten(h)
                   y = Gemm <transB = 1> (i, head_w)""",
                weights={"stem_w": (8, 3, 3, 3), "inner_w": (6, 8, 3, 3), "end_w": (8, 6, 3, 3), "head_w": (4, 8)},
            )
        )
    )


def weights(layers):
    return [layer.weight for layer in layers]


def test_convolutions_are_selected_by_default_and_dense_layers_when_asked(chain):
    assert weights(select_layers(chain)) == ["stem_w", "body_w"]
    assert weights(select_layers(chain, dense=True)) == ["stem_w", "body_w", "hidden_w", "head_w"]
    assert weights(select_layers(chain, ["hidden*"])) == ["hidden_w"]


def test_patterns_select_in_graph_order_and_exclude_wins(chain):
    assert weights(select_layers(chain, ["hidden_w", "stem_w"])) == ["stem_w", "hidden_w"]
    assert weights(select_layers(chain, ["*"], ["b*", "stem_w"])) == ["hidden_w", "head_w"]


def test_a_name_with_brackets_matches_itself(make_model):
    body = "a = Conv(x, w) b = Relu(a) c = GlobalAveragePool(b) d = Flatten(c) y = Gemm <transB = 1> (d, head_w)"
    proto = make_model(body, weights={"w": (6, 3, 3, 3), "head_w": (4, 6)})
    proto.graph.node[0].name = "features[0]"
    assert weights(select_layers(analyze(from_proto(proto)), ["features[0]"])) == ["w"]


def test_a_pattern_without_a_match_names_near_ones(chain):
    with pytest.raises(PlanError, match="'bodi' matches no layer") as caught:
        select_layers(chain, ["bodi"])
    assert "body_w" in caught.value.near
    with pytest.raises(PlanError, match="--exclude 'nope\\*' matches no layer"):
        select_layers(chain, exclude=["nope*"])


def test_nothing_to_remove_is_said_with_the_reason(chain):
    with pytest.raises(PlanError, match="No filter of the 1 selected layers can go"):
        select_layers(chain, ["head_w"])
    with pytest.raises(PlanError, match="leave no layer to prune"):
        select_layers(chain, ["stem_w"], ["stem_w"])


def test_a_model_without_convolutions_points_to_layers(make_model):
    body = "a = Gemm <transB = 1> (x, hidden_w) b = Relu(a) y = Gemm <transB = 1> (b, head_w)"
    proto = make_model(body, "float[N,3] x", weights={"hidden_w": (6, 3), "head_w": (4, 6)})
    with pytest.raises(PlanError, match="no convolution to prune, only dense layers"):
        select_layers(analyze(from_proto(proto)))


def test_a_field_per_layer_or_one_for_all(chain):
    selected = select_layers(chain)
    per_layer = fields(chain, selected, (), "layer")
    assert [(len(f.groups), f.filters) for f in per_layer] == [(12, 12), (8, 8)]
    (whole,) = fields(chain, selected, (), "global")
    assert whole.groups == per_layer[0].groups + per_layer[1].groups
    assert whole.filters == 20


def test_a_group_counts_for_the_first_selected_layer(residual):
    stem, inner = fields(residual, select_layers(residual), (), "layer")
    assert (len(stem.groups), len(inner.groups)) == (8, 6)
    (end,) = fields(residual, select_layers(residual, ["end_w"]), (), "layer")
    assert end.groups == stem.groups
    assert set(end.counts.values()) == {1}


def test_global_counts_the_filters_of_all_selected_layers(residual):
    (whole,) = fields(residual, select_layers(residual), (), "global")
    assert whole.filters == 8 + 6 + 8
    assert sum(whole.counts.values()) == 22


def test_an_excluded_layer_keeps_the_groups_that_reach_into_it(residual):
    exclude = ("end_w",)
    (inner,) = fields(residual, select_layers(residual, exclude=exclude), exclude, "layer")
    assert inner.name == residual.layers[1].node


@pytest.mark.parametrize(
    ("ratio", "n", "wanted"), [(0.3, 10, 3), (0.25, 10, 3), (0.1, 20, 2), (0.7, 10, 7), (0.01, 5, 1)]
)
def test_a_ratio_is_reached_at_least(chain, ratio, n, wanted):
    (field, *_) = fields(chain, select_layers(chain), (), "layer")
    assert type(field)("f", (), n, {}, ()).wanted(ratio) == wanted


def test_whole_layers_know_all_groups_that_touch_them(residual):
    stem, inner, end = whole_layers(residual, select_layers(residual), ())
    assert end.groups == stem.groups
    assert set(stem.groups).isdisjoint(inner.groups)
    exclude = ["end_w"]
    assert [f.name for f in whole_layers(residual, select_layers(residual, exclude=exclude), exclude)] == [inner.name]


def test_every_layer_keeps_one_filter(chain):
    stem = fields(chain, select_layers(chain), (), "layer")[0].groups
    keep = Keep(chain)
    assert keep.allowed(stem, set()) == list(stem)
    assert keep.allowed(stem, set(stem[:-2])) == list(stem[-2:])
    assert keep.allowed(stem, set(stem[:-1])) == []


def test_min_filters_holds_for_every_layer_a_group_spans(residual):
    stem, inner = fields(residual, select_layers(residual), (), "layer")
    keep = Keep(residual, min_filters=6)
    assert keep.allowed(inner.groups, set()) == []
    assert keep.allowed(stem.groups, set(stem.groups[:1])) == list(stem.groups[1:])
    assert keep.allowed(stem.groups, set(stem.groups[:2])) == []


def test_the_last_removals_of_a_layer_go_back_for_a_multiple(chain):
    stem, body = fields(chain, select_layers(chain), (), "layer")
    keep = Keep(chain, multiple_of=4)
    path = [stem.groups[3], body.groups[0], stem.groups[5], stem.groups[1], stem.groups[0], stem.groups[9]]
    assert keep.given_back(path, keep.all_layers()) == {stem.groups[9], body.groups[0]}
    assert keep.given_back(path, [stem.layers[0]]) == {stem.groups[9]}
    assert keep.given_back(path[:1], keep.all_layers()) == {stem.groups[3]}


def test_a_layer_that_loses_nothing_need_not_be_a_multiple(residual):
    keep = Keep(residual, multiple_of=4)
    stem, inner = fields(residual, select_layers(residual), (), "layer")
    assert keep.given_back([], keep.all_layers()) == set()
    assert keep.given_back(stem.groups[:4], keep.all_layers()) == set()
    assert keep.given_back(inner.groups[:1], keep.all_layers()) == {inner.groups[0]}


def readers(kernel):
    """A stem of 32 filters that a Conv of this kernel reads, whose 16 a 3x3 Conv reads; then a dense layer."""
    net = Net()
    x = net.op("Relu", net.conv(net.input(), 32, 3))
    x = net.op("Relu", net.conv(x, 16, kernel))
    x = net.op("GlobalAveragePool", net.op("Relu", net.conv(x, 8, 3)))
    return analyze(net.model(net.gemm(net.op("Flatten", x), 5)))


def test_auto_keeps_multiples_of_the_width_and_below_one_only_what_pays_off():
    spatial, pointwise = Keep(readers(3), 1, 16, True), Keep(readers(1), 1, 16, True)
    assert [n for n in range(1, 33) if spatial.suits(0, n)] == [4, 8, 16, 32]
    assert [n for n in range(1, 33) if pointwise.suits(0, n)] == [16, 32]  # a 1x1 Conv reads it
    assert [n for n in range(1, 17) if pointwise.suits(1, n)] == [4, 8, 16]  # a 3x3 Conv reads that
    assert [n for n in range(1, 9) if pointwise.suits(2, n)] == [4, 8]  # no Conv does
    assert [n for n in range(1, 33) if Keep(readers(3), 1, 16).suits(0, n)] == [16, 32]
    assert [n for n in range(1, 33) if Keep(readers(3), 1, 4, True).suits(0, n)] == list(range(4, 33, 4))


def test_a_depthwise_conv_between_does_not_hide_the_pointwise_one_that_reads():
    net = Net()
    x = net.op("Relu", net.conv(net.input(), 16, 3))
    x = net.op("Relu", net.conv(x, 16, 3, group=16))
    x = net.op("GlobalAveragePool", net.conv(x, 8, 1))
    space = analyze(net.model(net.gemm(net.op("Flatten", x), 5)))
    assert [layer.kind for layer in space.layers] == ["conv", "depthwise", "conv", "dense"]
    assert not Keep(space, 1, 16, True).suits(0, 8)


def test_a_width_is_halved_until_the_target_can_be_met():
    space = readers(1)
    groups, keep = [group.id for group in space.groups], Keep(space, 1, 16, True)
    least = [space.cost(Keep(space, 1, width, True)._least(groups)).macs / space.cost().macs for width in (16, 8, 4)]
    assert least[0] > least[1] > least[2]
    found = [keep.reaching(groups, share, None).multiple_of for share in (least[0], least[1], least[2], 0.001)]
    assert found == [16, 8, 4, 4]
    assert keep.reaching(groups, None, 0.9).multiple_of == 16
    assert Keep(space, 1, 16).reaching(groups, 0.001, None).multiple_of == 16  # asked for by number
    assert keep.reaching([], 0.9, None).multiple_of == 4
    assert Keep(space, 20, 16, True).reaching(groups, 0.9, None).multiple_of == 8  # 24 of 32; others have fewer than 20


def test_a_width_is_halved_where_else_next_to_nothing_of_a_path_would_stay():
    space = readers(3)
    keep, stem = Keep(space, 1, 16, True), [g.id for g in space.groups if g.layer == 0]
    few, many = stem[:5], stem[:17]
    assert keep.given_back(few, [0]) == set(few)
    held = keep.holding(few, [0])
    assert held.widths == {0: 4}
    assert held.filters(set(few) - held.given_back(few, [0]))[0] == 28
    assert held.suits(1, 8)
    assert not held.suits(1, 12)  # the other layers keep their width
    assert keep.holding(many, [0]).widths == {}
    assert held.holding(many, [0]).widths == {}
    # 13 of 32 gone: 16 more MACs would stay at 4 (20 left) than at 8 (24 left), but that is more than half of it
    assert keep.holding(stem[:13], [0]).widths == {0: 8}
    assert keep.holding([], [0]).widths == {}
    by_number = Keep(space, 1, 16)
    assert by_number.holding(few, [0]) is by_number


def test_the_width_of_the_machine_is_one_that_exists():
    assert vector_width("cpu") in (4, 8, 16)
    assert vector_width("cuda") == 8


@pytest.mark.parametrize(
    ("found", "width"), [(["AVX512F", "AVX2"], 16), (["X86_V3"], 8), (["X86_V3", "X86_V4"], 16), ([], 8)]
)
def test_the_width_follows_the_instruction_set(monkeypatch, found, width):
    features = {"SIMD Extensions": {"baseline": ["SSE"], "found": found, "not found": ["AVX512_SPR"]}}
    monkeypatch.setattr(np, "show_config", lambda mode: features)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert vector_width("cpu") == width
