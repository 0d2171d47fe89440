"""Activations on the device: the CPU provider takes the same way as a GPU when told to keep values in buffers."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxcar import runtime
from onnxcar._device import ALIGN, Buffer, aligned
from onnxcar.errors import RuntimeMissingError
from onnxcar.scoring._evaluate import free_bytes
from onnxcar.scoring._held import Sizes, channel_sizes, filled
from tests.test_scoring import opened, plain_net, residual_net

HELD = dataclasses.replace(runtime.resolve_provider("cpu"), buffers=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def held(request):
    """A provider that leaves values on the device."""
    if request.param == "cpu":
        return HELD
    try:
        return runtime.resolve_provider("cuda")
    except RuntimeMissingError as exc:
        pytest.skip(f"no GPU: {exc}")


# --- buffers --------------------------------------------------------------------------------------------------------


def test_a_slice_is_the_same_memory(held):
    values = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    whole = Buffer.of(held.device, values)
    part = whole[1:4]
    assert (part.shape, part.nbytes, len(part)) == ((3, 3, 4), 144, 3)
    assert part.address == whole.address + 48
    np.testing.assert_array_equal(part.numpy(), values[1:4])
    np.testing.assert_array_equal(whole[2:9][1:].reshape(-1, 4).numpy(), values[3:].reshape(-1, 4))


def test_batches_begin_where_the_device_likes_them():
    assert aligned(10, [4]) == 64
    assert aligned(100, [4]) == 64
    assert aligned(100, [256, 1024]) == 100
    assert aligned(100, [40, 96]) == 96
    for batch, sizes in ((1, [12]), (7, [250, 3]), (500, [36, 400])):
        assert all(aligned(batch, sizes) * size % ALIGN == 0 for size in sizes)


def test_outputs_go_to_their_place_and_are_read_from_there(held, cnn):
    images = np.random.default_rng(0).normal(size=(150, 3, 8, 8)).astype(np.float32)
    front = runtime.session(runtime.cut(cnn, ["x"], ["b", "c"]), provider=held, threads=1)
    back = runtime.session(runtime.cut(cnn, ["b"], ["y"]), provider=held, threads=1)
    heard = {}
    made = filled(
        front,
        ["b"],
        lambda i, j: {"x": images[i:j]},
        150,
        20,
        told=lambda i, j, got: heard.update({i: (j, got[0])}),
        others=["c"],
    )
    want = runtime.session(runtime.cut(cnn, ["x"], ["b", "c"]), provider=held.name, threads=1).run({"x": images})
    np.testing.assert_allclose(made["b"].numpy(), want[0], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([heard[i][1] for i in sorted(heard)]), want[1], atol=1e-5)
    assert [j for j, _ in heard.values()][-1] == 150
    ends = back.run_held({"b": made["b"][30:70]})
    whole = runtime.session(cnn, provider=held.name, threads=1).run({"x": images[30:70]})[0]
    np.testing.assert_allclose(ends.numpy(), whole, atol=1e-5)
    # Room of an earlier fill is written over where it suffices.
    again = filled(front, ["b"], lambda i, j: {"x": -images[i:j]}, 100, 20, room=made)
    assert again["b"].address == made["b"].address
    assert not np.allclose(again["b"].numpy(), want[0][:100])


def test_a_buffer_of_a_wrong_shape_is_an_error(held, cnn):
    made = runtime.session(cnn, provider=held, threads=1)
    with pytest.raises(runtime.ModelError, match="failed to run"):
        made.run_into({"x": np.zeros((2, 3, 8, 8), np.float32)}, {"y": Buffer.empty(held.device, (3, 4), np.float32)})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rest", [(2, 3), ()])
def test_sizes_are_counted_on_the_device(held, dtype, rest):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(9, 4, 3, 3) if rest else (9, 4)).astype(dtype)
    values[2, 1] = 0
    values[3, 2] = 1e-7 if dtype == np.float16 else 1e-30  # its square is not there
    got = Sizes(np.dtype(dtype), values.ndim, rest, held, 1).of(Buffer.of(held.device, values))
    want = channel_sizes(values, rest)
    assert np.array_equal(got == 0, want == 0)
    assert got[2, 1] == 0
    assert got[3, 2] > 0
    np.testing.assert_allclose(got, want, rtol=1e-4)


# --- the search -----------------------------------------------------------------------------------------------------


def searched(scorer, steps=6):
    """Picks and their counts, of one layer and of all."""
    space, removed, found = scorer.space, [], []
    for _ in range(steps):
        left = [g.id for g in space.groups if g.id not in removed and space.allows(g.id, removed)]
        pick = scorer.lowest(frozenset(removed), left)[0]
        found.append((pick.group, pick.score.correct, pick.score.cost, pick.score.per_class.tolist()))
        removed.append(pick.group)
    return found


@pytest.mark.parametrize("metric", ["top1", "loss", "balanced"])
@pytest.mark.parametrize("build", [plain_net, residual_net])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_search_on_the_device_picks_the_same(held, build, metric, everywhere, make_model):
    scorers = [opened(build, make_model, metric, provider=where)[0] for where in ("cpu", held)]
    for scorer in scorers:
        scorer.all_sites = everywhere
    ours, theirs = searched(scorers[1]), searched(scorers[0])
    assert [found[:2] for found in ours] == [found[:2] for found in theirs]
    assert len({found[1] for found in ours}) > 1
    states = scorers[1]._wide.states.values() if everywhere else scorers[1]._states.values()
    blocks = [state.block for state in states if state.block is not None]
    assert blocks
    assert all(
        isinstance(value, Buffer) for block in blocks for value in [*block.values.values(), *block.read.values()]
    )


@pytest.mark.parametrize("everywhere", [False, True])
def test_images_that_do_not_fit_come_in_blocks(held, everywhere, make_model):
    scorers = [
        opened(residual_net, make_model, provider=where, memory_bytes=memory)[0]
        for where, memory in (("cpu", None), (held, 300_000))
    ]
    for scorer in scorers:
        scorer.all_sites = everywhere
    left = scorers[0].space.layers[1].groups.tolist()
    picks = [[(p.group, p.score.correct) for p in scorer.lowest((), left, k=5)] for scorer in scorers]
    assert picks[0] == picks[1]
    full = [[s.correct for s in scorer.score(frozenset([left[0]]), left[1:])] for scorer in scorers]
    assert full[0] == full[1]
    assert len(set(full[0])) > 1


def test_a_read_of_the_input_itself_is_held_too(held, make_model):
    body = "a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Concat <axis = 1> (x, a) c = Conv (b, v) d = Relu (c)"
    body += " e = GlobalAveragePool (d) f = Flatten (e) y = Gemm <transB = 1> (f, fc_w, fc_b)"

    def build(make, seed=0):
        shapes = {"w": (5, 3, 3, 3), "v": (8, 8, 3, 3), "fc_w": (4, 8), "fc_b": (4,)}
        return make(body, weights=shapes, seed=seed), {"w": [], "v": ["fc_w"]}

    for everywhere in (False, True):
        scorers = [opened(build, make_model, provider=where)[0] for where in ("cpu", held)]
        for scorer in scorers:
            scorer.all_sites = everywhere
        assert searched(scorers[0], 4) == searched(scorers[1], 4)


@pytest.mark.skipif(os.name != "posix", reason="shell scripts as tools")
def test_memory_on_a_gpu_is_the_gpus(tmp_path, monkeypatch):
    gpu = runtime.Provider("cuda", ("CUDAExecutionProvider",))
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for script, want in (("echo 5; echo 900", 5 << 20), ("echo '[N/A]'", None), ("exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        found = free_bytes(gpu)
        assert found == want if want else found > 5 << 20
    assert free_bytes(HELD) > 5 << 20


def test_where_the_batch_is_fixed_the_host_feeds_it(held):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, [2, 3])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    made = runtime.session(proto, provider=held, threads=1)
    x = np.asarray([[1.0, -1, 0], [-2, 3, 4]], np.float32)
    np.testing.assert_array_equal(made.run({"": x})[0], np.maximum(x, 0))
    np.testing.assert_array_equal(made.run({"": made.hold(x)})[0], np.maximum(x, 0))
