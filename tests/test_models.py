"""The embedded model, its data and the scripts that make such models."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "models" / "digits"
ABOUT = (ROOT / "models" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(DIGITS / "model.onnx")


def images(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(DIGITS / f"{name}.npz", allow_pickle=False) as data:
        return data["images"], data["labels"]


def test_readme_states_size_and_hash_of_every_file() -> None:
    stated = {
        name: (int(n_bytes), digest) for name, n_bytes, digest in re.findall(r"`(\S+)` \| (\d+) \| `(\w{64})`", ABOUT)
    }
    shipped = [path for path in DIGITS.iterdir() if path.suffix in {".onnx", ".npz"} and ".pruned" not in path.name]
    files = {path.name: path.read_bytes() for path in shipped}
    assert stated == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


def test_model_is_clean(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert [node.op_type for node in model.graph.node if node.op_type == "Conv"] == ["Conv", "Conv"]
    assert not any(part.doc_string for part in (model, model.graph, *model.graph.node, *model.graph.initializer))
    assert not model.metadata_props


def test_model_has_the_shapes_that_its_readme_states(model: onnx.ModelProto) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stated = re.findall(r"`(\w+\.weight)` \(([\d, ]+)\)", ABOUT)
    assert {name: tuple(map(int, shape.split(","))) for name, shape in stated} == {
        name: array.shape for name, array in weights.items() if name.endswith(".weight")
    }
    assert f"{sum(array.size for array in weights.values()):,} parameters" in ABOUT
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_stated_accuracy_is_what_onnx_runtime_measures() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(DIGITS / "model.onnx", providers=["CPUExecutionProvider"])
    for name in ("select", "test"):
        pixels, labels = images(name)
        (logits,) = session.run(None, {"input": pixels[:, None] / np.float32(255)})
        top = np.sort(logits, axis=1)
        # Another CPU may sum in another order; a label only moves where two logits nearly agree.
        assert (top[:, -1] - top[:, -2]).min() > 1e-3
        right = int((logits.argmax(axis=1) == labels).sum())
        assert f"| `{name}.npz` | {right} of {len(labels)} | {right / len(labels):.4f} |" in ABOUT


def test_sets_are_balanced_and_share_no_image() -> None:
    (chosen, chosen_labels), (held, held_labels) = images("select"), images("test")
    assert np.bincount(chosen_labels).tolist() == [40] * 10
    assert np.bincount(held_labels).tolist() == [50] * 10
    assert chosen.dtype == held.dtype == np.uint8
    every = [image.tobytes() for image in np.concatenate([chosen, held])]
    assert len(set(every)) == len(every) == 900


def test_sets_are_images_of_scikit_learn_with_their_labels() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    known = {
        np.round(image * (255 / 16)).astype(np.uint8).tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    assert len(known) == 1797
    for name in ("select", "test"):
        pixels, labels = images(name)
        assert [known[image.tobytes()] for image in pixels] == labels.tolist()


def test_config_names_files_that_exist() -> None:
    config = tomllib.loads((DIGITS / "onnxcar.toml").read_text(encoding="utf-8"))
    assert {(DIGITS / config["data"][key]).name for key in ("data", "test_data")} == {"select.npz", "test.npz"}
    assert all((DIGITS / config["data"][key]).is_file() for key in ("data", "test_data"))
    assert config["prune"]["ratio"] >= 0.5


def export(*args: str, without: str | None = None) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "export_torchvision.py"
    block = f"sys.modules[{without!r}] = None; " if without else ""
    code = f"import runpy, sys; {block}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, str(script), *args], capture_output=True, text=True, check=False)


def test_export_help_names_the_models() -> None:
    done = export("--help")
    assert done.returncode == 0
    assert "resnet50" in done.stdout
    assert "mobilenet_v2" in done.stdout


def test_export_without_torch_says_what_to_install(tmp_path: Path) -> None:
    done = export("resnet18", "--out", str(tmp_path / "out"), without="torch")
    assert done.returncode == 1
    assert "torch does not import" in done.stderr
    assert "pip install torch torchvision onnx" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_export_refuses_an_unknown_model() -> None:
    done = export("resnet19")
    assert done.returncode == 2
    assert "resnet19" in done.stderr
