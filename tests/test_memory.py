"""Memory follows the bound, not the data: measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onnxcar.scoring import _lowest, _wide
from tests.test_scoring import opened, residual_net

# A search step over synthetic images that exist only while they are asked for; prints the peak in MiB.
STEP = """
import resource, sys
import numpy as np, onnx, onnx.parser
from onnx import numpy_helper
from onnxcar.model import from_proto
from onnxcar.rules import analyze
from onnxcar.scoring import Scorer

n, bound = int(sys.argv[1]), int(sys.argv[2]) << 20
rng = np.random.default_rng(0)
net = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
tiny (float[N,1,8,8] x) => (float[N,2] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w)
    b = Relu (a)
    c = GlobalAveragePool (b)
    d = Flatten (c)
    y = Gemm <transB = 1> (d, v, u)
}''')
weights = {"w": rng.normal(size=(6, 1, 3, 3)), "v": rng.normal(size=(2, 6)), "u": np.zeros(2)}
net.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())


class Stream:
    classes, path, has_labels, outputs = None, "stream", True, None
    labels = (np.arange(n) % 7 < 4).astype(np.int64)

    def __len__(self):
        return n

    def inputs(self, at):
        at = np.asarray(at, np.float32)[:, None]
        return {"": np.sin(at * np.arange(1, 65, dtype=np.float32)).reshape(-1, 1, 8, 8)}


scorer = Scorer(analyze(from_proto(net)), Stream(), provider="cpu", threads=1, memory_bytes=bound)
picks = scorer.lowest((), [0, 1, 2, 3, 4, 5])
assert picks[0].score.samples == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak(n, bound_mib):
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(n), str(bound_mib)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_ten_times_the_images_take_hardly_more_memory():
    few, many = peak(1_000, 1), peak(10_000, 1)
    assert many <= 1.1 * few


@pytest.mark.slow
def test_half_a_million_images_stream():
    # 3 KiB of cut values an image, 1.5 GiB in all; results of six candidates and their order are all that stays.
    assert peak(500_000, 64) <= peak(1_000, 64) + 500


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("images_fit", [False, True])
def test_candidates_whose_tables_do_not_fit_run_in_parts_with_the_same_picks(
    everywhere, images_fit, make_model, monkeypatch
):
    whole, _ = opened(residual_net, make_model, n=60)
    parts, _ = opened(residual_net, make_model, n=60)
    for scorer in (whole, parts):
        scorer.all_sites = everywhere
    if not images_fit:
        parts._budget = 60_000
    seen = []
    few_at_a_time = _lowest.few_at_a_time

    def counted(*given):
        seen.append(max(map(len, made)) if (made := few_at_a_time(*given)) else 0)
        return made

    monkeypatch.setattr(_lowest, "few_at_a_time", counted)
    monkeypatch.setattr(_wide, "few_at_a_time", counted)
    groups = [g.id for g in whole.space.groups]
    own = groups if everywhere else [g for g in whole.space.layers[0].groups.tolist() if g >= 0]
    for removed in (frozenset(), frozenset(own[:1])):
        left = [g for g in own if g not in removed]
        want = whole.lowest(removed, left, k=2, per_mac=everywhere)
        assert seen.pop() == len(left)
        monkeypatch.setattr(_lowest, "RACING_BYTES", 1 << 40)
        monkeypatch.setattr(_lowest, "KEPT_BYTES", 1 << 40)
        got = parts.lowest(removed, left, k=2, per_mac=everywhere)
        assert seen.pop() == 4
        monkeypatch.undo()
        monkeypatch.setattr(_lowest, "few_at_a_time", counted)
        monkeypatch.setattr(_wide, "few_at_a_time", counted)
        assert [(p.group, p.score.cost) for p in got] == [(p.group, p.score.cost) for p in want]
    assert not parts._shifts
