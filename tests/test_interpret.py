"""What filters respond to, against a network made by hand and against plain loops."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import onnxcar as car
from onnxcar import criteria, interpret
from onnxcar.interpret._fields import Field
from onnxcar.interpret._responses import response_values
from onnxcar.interpret._similar import correlation
from onnxcar.model import from_proto
from tests import known_net
from tests.graphs import Net
from tests.known_net import BLUE, BRIGHT, DEAD, RED, SAME


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    model, data = known_net.write(tmp_path_factory.mktemp("known"))
    network = car.load(model)
    images = car.Npz(data, car.Preprocess.preset("unit")).for_input((None, 3, 8, 8))
    return car.analyze(network), images


@pytest.fixture(scope="module")
def conv(known):
    return interpret.responses(*known, threads=1).layers[0]


def test_the_known_filters_are_found(known, conv):
    assert conv.dead.tolist() == [i == DEAD for i in range(5)]
    found = interpret.clusters(conv.correlation())
    assert found[RED] == found[SAME] != found[BLUE]
    assert found[DEAD] == -1
    assert len({found[RED], found[BLUE], found[BRIGHT]}) == 3
    near = interpret.twins(conv.correlation())
    assert near[RED][0] == (SAME, pytest.approx(1.0, abs=1e-9))
    assert near[SAME][0][0] == RED
    assert near[DEAD] == []


def test_colour_selectivity_is_that_of_the_weights(conv):
    found = conv.colour_selectivity()
    assert found[[RED, SAME, BLUE]] == pytest.approx(1.0, abs=1e-6)
    assert found[BRIGHT] == pytest.approx(0.0, abs=1e-5)
    assert np.isnan(found[DEAD])


def test_responses_are_those_of_the_network(known, conv):
    space, data = known
    proto = known_net.network()
    del proto.graph.output[:]
    proto.graph.output.append(proto.graph.value_info.add(name="r"))
    x = data.inputs(np.arange(len(data)))[""]
    r = np.maximum(np.einsum("nchw,fc->nfhw", x, space.weight(space.layers[0])[:, :, 0, 0]) - conv_bias(), 0)
    assert conv.value == "r"
    assert conv.high == pytest.approx(r.max(axis=(0, 2, 3)), abs=1e-6)
    assert conv.mean == pytest.approx(r.mean(axis=(0, 2, 3)), abs=1e-6)
    for c in range(3):
        assert conv.class_mean[c] == pytest.approx(r[data.labels == c].mean(axis=(0, 2, 3)), abs=1e-6)
    strongest = r.reshape(len(x), 5, -1).max(2)
    assert conv.top.shape == (9, 5)
    assert conv.top[:, BLUE] == pytest.approx(np.sort(strongest[:, BLUE])[::-1][:9], abs=1e-6)
    for k in range(9):
        row, column = divmod(int(conv.top_places[k, BLUE]), conv.width)
        assert r[conv.top_images[k, BLUE], BLUE, row, column] == pytest.approx(conv.top[k, BLUE], abs=1e-6)


def conv_bias():
    return np.asarray([0, 0, 1, 0, 0], np.float32)[None, :, None, None]


def test_batches_change_nothing(known):
    space, data = known
    a, b = (interpret.responses(space, data, threads=1, batch_bytes=n).layers[0] for n in (1, 1 << 20))
    assert a.top.tolist() == b.top.tolist()
    assert a.top_images.tolist() == b.top_images.tolist()
    assert a.correlation() == pytest.approx(b.correlation(), abs=1e-9, nan_ok=True)


def test_correlation_is_numpys():
    x = np.random.default_rng(0).normal(3, 1, (4, 200))
    x[1] = x[0] * 2 + 1
    x[3] = 7.0
    found = correlation(x @ x.T, x.sum(1), 200)
    assert found[:3, :3] == pytest.approx(np.corrcoef(x[:3]), abs=1e-9)
    assert np.isnan(found[3]).all()


def test_every_cut_of_the_tree_keeps_one_filter_of_each_cluster():
    rng = np.random.default_rng(4)
    sources = rng.normal(size=(5, 400))
    x = np.repeat(sources, [4, 1, 3, 2, 2], axis=0) + 0.3 * rng.normal(size=(12, 400))
    x = np.concatenate([x, np.zeros((1, 400))])
    corr = correlation(x @ x.T, x.sum(1), 400)
    share = rng.random(13)
    worth = interpret.redundancy(corr, share)
    assert worth[12] == -1
    kept = np.argsort(worth)[13 - 5 :]
    groups = np.repeat(np.arange(5), [4, 1, 3, 2, 2])
    assert sorted(groups[kept]) == [0, 1, 2, 3, 4]
    # In a pair the one that contributes more stays.
    assert max((8, 9), key=lambda i: share[i]) in kept
    assert max((10, 11), key=lambda i: share[i]) in kept


def test_function_prunes_dead_and_double_filters_first(known):
    space, data = known
    worth = criteria.find("function")(space, criteria.Context(data, threads=1))
    order = np.argsort(worth).tolist()
    assert order[0] == DEAD
    assert order[1] in (RED, SAME)
    assert {order[2], order[3], order[4]} >= {BLUE, BRIGHT}
    run = car.prune(space.model, data, criterion="function", stop=car.Stop(steps=2), threads=1)
    assert run.record["final"]["value"] == run.record["base"]["value"] == 1.0


# --- receptive fields -----------------------------------------------------------------------------------------------


def seen(proto, value, shape, place):
    """Bounds of the input pixels that change a position of a value, found by moving each pixel."""
    made = type(proto)()
    made.CopyFrom(proto)
    made.graph.output.append(made.graph.value_info.add(name=value))
    session = onnxruntime.InferenceSession(made.SerializeToString())
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    name = session.get_inputs()[0].name
    base = session.run([value], {name: x})[0][(0, slice(None), *place)]
    hit = []
    for row in range(shape[2]):
        for column in range(shape[3]):
            moved = x.copy()
            moved[0, :, row, column] += 10
            if not np.array_equal(session.run([value], {name: moved})[0][(0, slice(None), *place)], base):
                hit.append((row, column))
    rows, columns = zip(*hit, strict=True)
    return min(rows), min(columns), max(rows) + 1, max(columns) + 1


def test_fields_are_what_moving_pixels_finds():
    net = Net(seed=1)
    x = net.input(shape=("N", 3, 21, 21))
    a = net.op("LeakyRelu", net.conv(x, 4, 5, strides=[2, 2], pads=[1, 1, 1, 1]))
    b = net.op("AveragePool", a, kernel_shape=[3, 3], strides=[2, 2])
    c = net.conv(b, 4, 3, dilations=[1, 1])
    d = net.op("Add", c, net.conv(b, 4, 1))
    e = net.conv(net.op("Concat", c, d, axis=1), 4, 3, pads=[0, 0, 0, 0])
    proto = net.proto(e)
    fields = interpret.receptive_fields(car.analyze(from_proto(proto)))
    for value, place in ((a, (4, 4)), (b, (2, 1)), (d, (1, 2)), (a, (0, 0))):
        assert fields[value].box(*place, 21, 21) == seen(proto, value, (1, 3, 21, 21), place), value
    # The last column of pixels falls behind the last stride: nothing sees it, the rule of windows thinks it might.
    assert seen(proto, e, (1, 3, 21, 21), (0, 1)) == (0, 0, 20, 20)
    assert fields[e].box(0, 1, 21, 21) == (0, 0, 20, 21)


def test_field_of_a_transposed_convolution_covers_what_moving_pixels_finds():
    net = Net(seed=2)
    x = net.input(shape=("N", 3, 9, 9))
    up = net.op(
        "ConvTranspose", net.conv(x, 4, 3), net.random(4, 4, 3, 3), strides=[2, 2], kernel_shape=[3, 3], name="up"
    )
    proto = net.proto(up)
    field = interpret.receptive_fields(car.analyze(from_proto(proto)))[up]
    top, left, bottom, right = field.box(8, 9, 9, 9)
    found = seen(proto, up, (1, 3, 9, 9), (8, 9))
    assert top <= found[0] <= top + 1
    assert left <= found[1] <= left + 1
    assert found[2] <= bottom <= found[2] + 1
    assert found[3] <= right <= found[3] + 1


def test_behind_a_global_pool_the_field_is_the_whole_image(known):
    assert interpret.receptive_fields(known[0])["p"] is None


def test_boxes_stay_inside_the_image():
    field = Field((-2.0, -2.0), (4.0, 4.0), (5.0, 5.0))
    assert field.box(0, 0, 10, 10) == (0, 0, 3, 3)
    assert field.box(2, 2, 10, 10) == (6, 6, 10, 10)


def test_contribution_weighs_responses_with_what_reads_them(known, conv):
    found = interpret.contribution(known[0], conv)
    by_hand = conv.size * np.abs(known[0].weight(known[0].layers[1])).sum(0)
    assert found == pytest.approx(by_hand / by_hand.sum(), abs=1e-6)
    assert found[DEAD] == 0


@pytest.mark.parametrize("blocks", [1, 2])
def test_sizes_of_outgoing_weights_are_those_of_the_weights(blocks):
    net = Net(seed=6)
    x = net.input()
    a = net.op("Relu", net.conv(x, 8, 3))
    b = net.conv(net.conv(a, 6, 3, group=blocks), 4, 3)
    space = car.analyze(net.model(net.op("Concat", b, net.conv(a, 3, 1), axis=1)))
    by_group = [sum(float(np.abs(w).sum()) for w in space.outgoing(group.id)) for group in space.groups]
    assert space.outgoing_sizes() == pytest.approx(by_group, abs=1e-5)
    assert len(by_group) == 14 // blocks


# --- where responses are read ---------------------------------------------------------------------------------------


def test_activations_made_of_several_nodes_are_followed_and_sums_are_not():
    net = Net(seed=3)
    x = net.input()
    a = net.conv(x, 4, 3, name="one")
    silu = net.op("Mul", a, net.op("Sigmoid", a))
    b = net.conv(silu, 4, 3, name="two")
    total = net.op("Add", b, silu)
    space = car.analyze(net.model(net.op("Relu", total)))
    values = [response_values(space)[layer.index] for layer in space.layers]
    assert values == [silu, b]


def test_a_value_that_others_read_as_well_is_where_it_stops():
    net = Net(seed=5)
    x = net.input()
    a = net.conv(x, 4, 3, name="one")
    b = net.conv(net.op("Concat", net.op("Relu", a), a, axis=1), 4, 3, name="two")
    space = car.analyze(net.model(b))
    assert response_values(space)[0] == a


# --- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0, 30, 45, 90, 120, 165])
def test_orientation_of_a_grating(angle):
    y, x = np.mgrid[-5:6, -5:6]
    across = np.radians(angle + 90)  # stripes run along the angle, the wave across it; rows run down
    wave = np.cos(1.2 * (x * np.cos(across) - y * np.sin(across)))
    kernel = (wave * np.exp(-(x**2 + y**2) / 12))[None, :, :, None].repeat(3, 3)
    found, clear = interpret.orientation(kernel)
    assert abs((found[0] - angle + 90) % 180 - 90) < 2
    assert clear[0] > 0.8


def test_a_blob_has_no_orientation():
    y, x = np.mgrid[-5:6, -5:6]
    blob = np.exp(-(x**2 + y**2) / 6)[None, :, :, None].repeat(3, 3)
    assert interpret.orientation(blob)[1][0] < 0.01


def test_kernels_come_out_red_first_and_colour_is_energy_off_the_gray_axis(known):
    space, data = known
    kernels = interpret.image_kernels(space, space.layers[0], interpret.look(data), interpret.receptive_fields(space))
    assert kernels[BLUE, 0, 0].tolist() == pytest.approx([-0.5 / 255, -0.5 / 255, 1 / 255], abs=1e-9)
    colour = interpret.kernel_colour(kernels)
    assert colour[RED] == pytest.approx(1.0, abs=1e-9)
    assert 0 < colour[BRIGHT] < 0.5
    swapped = data._with_preprocess(data.preprocess.override(channels="bgr"))
    other = interpret.image_kernels(space, space.layers[0], interpret.look(swapped), interpret.receptive_fields(space))
    assert other[BLUE, 0, 0].tolist() == kernels[BLUE, 0, 0].tolist()[::-1]
    pictures = interpret.kernel_pictures(kernels)
    assert pictures[BLUE, 0, 0].tolist() == [64, 64, 255]
    assert interpret.image_kernels(space, space.layers[1], interpret.look(data), {}) is None


def test_pictures_are_the_pixels_that_went_in(known):
    _, data = known
    look = interpret.look(data)
    inputs = data.inputs([0, 25])[""]
    pixels = look.pixels(inputs)
    assert pixels[1, ..., 1:].max() == 0
    assert pixels[1, ..., 0].min() >= 150
    gray = look.pixels(look.gray(inputs))
    assert (gray[..., 0] == gray[..., 2]).all()
    assert gray[1, 0, 0, 0] == pytest.approx(0.299 * pixels[1, 0, 0, 0], abs=1)
