"""RAR, the importance of filters for a regression: closed form, brute force, and every command."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from sklearn.datasets import load_digits

import onnxcar as car
from onnxcar.cli import app
from onnxcar.data import Npz
from onnxcar.model import from_proto
from onnxcar.search import prune
from onnxcar.steps import Stop
from onnxcar.surgery import Plan, remove

ONE = {"provider": "cpu", "threads": 1}


def run(proto, x):
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].astype(np.float64)


@pytest.fixture(scope="module")
def regression(make_model, tmp_path_factory):
    """Where the ink of a digit lies, (row, column): random filters, the head fitted by ridge regression."""
    images = (load_digits().images / 16).astype(np.float32)[:, None]
    place = np.arange(8) - 3.5
    ink = images[:, 0].sum((1, 2))
    targets = np.stack([(images[:, 0].sum(2) * place).sum(1) / ink, (images[:, 0].sum(1) * place).sum(1) / ink], 1)
    rng = np.random.default_rng(0)
    weights = {
        "one_w": (rng.normal(size=(8, 1, 3, 3)) / 2).astype(np.float32),
        "two_w": (rng.normal(size=(12, 8, 3, 3)) / 6).astype(np.float32),
    }
    convs = """[one] a = Conv <pads = [1,1,1,1]> (x, one_w) b = Relu(a)
               [two] c = Conv <pads = [1,1,1,1], strides = [2,2]> (b, two_w) d = Relu(c) """
    features = make_model(convs + "y = Flatten(d)", "float[N,1,8,8] x", "float[N,192] y", weights=weights)
    known = np.c_[run(features, images[:900]), np.ones(900)]
    head = np.linalg.solve(known.T @ known + 0.1 * np.eye(193), known.T @ targets[:900])
    weights |= {"head_w": head[:-1].T.astype(np.float32), "head_b": head[-1].astype(np.float32)}
    body = convs + "e = Flatten(d) [head] y = Gemm <transB = 1> (e, head_w, head_b)"
    proto = make_model(body, "float[N,1,8,8] x", "float[N,2] y", weights=weights)
    folder = tmp_path_factory.mktemp("regression")
    onnx.save(proto, folder / "m.onnx")
    np.savez(folder / "val.npz", x=images[900:1300], y=targets[900:1300])
    np.savez(folder / "test.npz", x=images[1300:], y=targets[1300:].astype(np.float32))
    return folder


METRICS = {
    "mse": lambda y, t: -((y - t) ** 2).mean(),
    "mae": lambda y, t: -np.abs(y - t).mean(),
    "r2": lambda y, t: np.mean(1 - ((y - t) ** 2).sum(0) / ((t - t.mean(0)) ** 2).sum(0)),
    "pearson": lambda y, t: np.mean([np.corrcoef(y[:, k], t[:, k])[0, 1] for k in range(2)]),
}


@pytest.mark.parametrize("metric", METRICS)
def test_rar_is_what_the_metric_loses_without_a_filter(regression, metric):
    model, data = car.load(regression / "m.onnx"), Npz(regression / "val.npz")
    x, targets = data.inputs(np.arange(len(data)))[""], data.labels
    found = car.importance(model, data, metric=metric, layers=["one", "two"], **ONE)
    base = METRICS[metric](run(model.proto, x), targets)
    sign = 1 if metric in ("r2", "pearson") else -1
    assert found.base.value == pytest.approx(sign * base, abs=1e-6)
    for group, value in zip(found.groups, found.values, strict=True):
        without = METRICS[metric](run(remove(found.space, Plan([group])).proto, x), targets)
        assert value == pytest.approx(base - without, abs=1e-5)
    assert np.ptp(found.values) > 1e-3


@pytest.mark.parametrize("metric", ["mae", "r2", "pearson"])
def test_greedy_picks_equal_brute_force(regression, metric):
    model, data = car.load(regression / "m.onnx"), Npz(regression / "val.npz")
    x, targets = data.inputs(np.arange(len(data)))[""], data.labels
    found = prune(model, data, metric=metric, stop=Stop(steps=4), layers=["two"], **ONE)
    space = car.analyze(model)

    def value(groups):
        return METRICS[metric](run(remove(space, Plan(groups)).proto, x), targets)

    gone: set[int] = set()
    for step in found.steps:
        rivals = {g.id: value(gone | {g.id}) for g in space.groups if g.name.startswith("two") and g.id not in gone}
        assert rivals[step.group] == pytest.approx(max(rivals.values()), abs=1e-6)
        gone.add(step.group)
    assert len(gone) == 4


def test_a_filter_that_is_only_a_copy_has_no_rar(make_model, tmp_path):
    """Closed form: y = 3 relu(x0) with filter 1 unread, so its RAR is 0 and that of filter 0 is all there is."""
    proto = make_model(
        "[conv] a = Conv(x, w) b = Relu(a) c = GlobalAveragePool(b) d = Flatten(c) y = Gemm <transB = 1> (d, h)",
        "float[N,2,1,1] x",
        "float[N,1] y",
        weights={
            "w": np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1),
            "h": np.asarray([[3.0, 0.0]], np.float32),
        },
    )
    x = np.abs(np.random.default_rng(0).normal(size=(200, 2, 1, 1))).astype(np.float32)
    y = 3 * x[:, 0, 0, 0].astype(np.float64)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    found = car.importance(from_proto(proto), Npz(tmp_path / "d.npz"), metric="r2", **ONE)
    # Without filter 0 the answer is 0: R2 = 1 - sum y^2 / sum (y - mean)^2.
    assert found.values == pytest.approx([(y**2).sum() / ((y - y.mean()) ** 2).sum(), 0.0], abs=1e-6)


def cli(*args):
    return CliRunner().invoke(app, [*map(str, args), "--threads", "1", "--provider", "cpu"])


def test_every_command_takes_a_regression(regression, tmp_path):
    model, val, test = regression / "m.onnx", regression / "val.npz", regression / "test.npz"
    out = tmp_path / "p.onnx"
    told = ("--metric", "r2", "--max-drop", "0.02", "--multiple-of", "1", "-o", out)
    done = cli("prune", model, "--data", val, "--test-data", test, *told)
    assert done.exit_code == 0, done.output
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["removed"]
    assert record["base"]["value"] - record["final"]["value"] <= 0.02
    assert record["base"]["correct"] is None
    assert record["data"]["classes"] is None
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert weights["head_w"].shape[0] == 2
    x, t = np.load(test)["x"], np.load(test)["y"]
    assert record["test_final"]["value"] == pytest.approx(METRICS["r2"](run(onnx.load(out), x), t), abs=1e-5)
    for metric in METRICS:
        said = cli("evaluate", out, "--data", test, "--metric", metric, "--json", tmp_path / "e.json")
        assert said.exit_code == 0, said.output
        want = METRICS[metric](run(onnx.load(out), x), t) * (1 if metric in ("r2", "pearson") else -1)
        told = json.loads((tmp_path / "e.json").read_text())
        assert told["value"] == pytest.approx(want, abs=1e-5)
        low, high = told["scores"][metric]["interval"]
        assert low < told["value"] < high
        assert "2,000 resamples of 497 samples, seed 0, 95 %" in told["scores"][metric]["interval_method"]
        assert "BCa bootstrap" in said.output
    found = cli(
        "compare", model, out, "--test-data", test, "--metric", "r2", "--runs", "0", "--json", tmp_path / "c.json"
    )
    change = json.loads((tmp_path / "c.json").read_text())["differences"][0]["scores"]["r2"]
    assert change["interval"][0] < change["difference"] < change["interval"][1]
    assert "the same resamples for both" in found.output
    same = ("--test-data", test, "--metric", "r2", "--runs", "0")
    assert cli("compare", model, out, *same, "--max-drop", "0.2").exit_code == 0
    assert "NOT MET" in cli("compare", model, out, *same, "--min-score", "0.9999").output
    assert cli("score", model, "--data", val, "--metric", "pearson", "--layers", "one").exit_code == 0
    assert "two" in cli("score", model, "--data", val, "--metric", "mae", "--by-layer", "--criterion", "l2").output
    mended = ("--criterion", "l2", "--ratio", "0.5", "--metric", "r2", "--recover", "least-squares")
    assert cli("prune", model, "--data", val, *mended, "-o", tmp_path / "r.onnx").exit_code == 0
    plain = cli("prune", model, "--data", val, *mended[:6], "-o", tmp_path / "s.onnx")
    assert plain.exit_code == 0, plain.output
    values = [json.loads((tmp_path / f"{name}.json").read_text())["final"]["value"] for name in "rs"]
    assert values[0] > values[1]


def test_targets_of_every_shape_and_source(regression, tmp_path, monkeypatch):
    data = np.load(regression / "val.npz")
    np.savez(tmp_path / "one.npz", x=data["x"], y=data["y"][:, 0])
    done = cli("evaluate", regression / "m.onnx", "--data", tmp_path / "one.npz", "--metric", "r2")
    assert done.exit_code == 1
    assert "outputs (2,) with targets (1,)" in str(done.exception)
    wrong = cli("evaluate", regression / "m.onnx", "--data", regression / "val.npz")
    assert wrong.exit_code == 1
    assert "needs class labels" in str(wrong.exception)
    (tmp_path / "source.py").write_text(
        f"import numpy as np\ndef batches():\n    d = np.load({str(regression / 'val.npz')!r})\n"
        "    for i in range(0, 400, 100):\n        yield d['x'][i:i + 100], d['y'][i:i + 100]\n"
    )
    results = []
    for source in (regression / "val.npz", f"{tmp_path / 'source.py'}:batches"):
        said = cli(
            "evaluate", regression / "m.onnx", "--data", source, "--metric", "mae", "--json", tmp_path / "e.json"
        )
        assert said.exit_code == 0, said.output
        results.append(json.loads((tmp_path / "e.json").read_text())["value"])
    assert results[0] == results[1] > 0


def test_images_listed_with_float_targets(regression, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i / 7},{-i / 3}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    said = cli(
        *("evaluate", regression / "m.onnx", "--data", tmp_path / "list.csv", "--channels", "gray"),
        *("--metric", "mse", "--json", tmp_path / "e.json"),
    )
    assert said.exit_code == 0, said.output
    x = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png"), np.float32)[None] / 255 for i in range(12)])
    want = np.mean((run(onnx.load(regression / "m.onnx"), x) - np.asarray([[i / 7, -i / 3] for i in range(12)])) ** 2)
    assert json.loads((tmp_path / "e.json").read_text())["value"] == pytest.approx(want, rel=1e-5)
