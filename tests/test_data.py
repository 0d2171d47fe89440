"""Opening data: what is accepted, what is refused and how, bounds on memory and disk, real figures."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcar.data import (
    DataWarning,
    FromCallable,
    ImageFolder,
    ListFile,
    Npz,
    Preprocess,
    _dataset,
    _files,
    _pixel_cache,
    open_dataset,
    overlap,
)
from onnxcar.data._sources import FileSource
from onnxcar.errors import ConfigError, DataError

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (6, 8, 7, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
RAW = Preprocess.preset("raw")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ONNXCAR_CACHE", str(folder))
    return folder


def save(path: Path, pixels: np.ndarray = PIXELS[0]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "d.npz", **arrays)
    return folder / "d.npz"


def listed(folder: Path, text: str, name: str = "list.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


# --- folders ---


def test_sorted_folder_names_are_the_ids(tmp_path: Path) -> None:
    for k, name in enumerate(["owl", "cat", "b/../dog"]):
        save(tmp_path / name / "deep" / "1.PNG", PIXELS[k])
    save(tmp_path / "cat" / "0.png", PIXELS[5])
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "b").rmdir()
    data = ImageFolder(tmp_path, RAW)
    assert data.classes == ("cat", "dog", "owl")
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert [Path(data.name(i)).name for i in range(4)] == ["0.png", "1.PNG", "1.PNG", "1.PNG"]
    np.testing.assert_array_equal(data.inputs([0])[""][0], PIXELS[5].transpose(2, 0, 1))


def test_classes_txt_overrides_and_may_name_absent_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / name / "1.png")
    (tmp_path / "classes.txt").write_text("owl\ndog\ncat\n")
    data = ImageFolder(tmp_path, RAW)
    assert data.classes == ("owl", "dog", "cat")
    assert data.labels.tolist() == [1, 2]
    (tmp_path / "classes.txt").write_text("cat big soft one\ndog barks\n")
    assert ImageFolder(tmp_path, RAW).labels.tolist() == [0, 1]
    assert ImageFolder(tmp_path, RAW, label_offset=1).classes == ("(0)", "cat big soft one", "dog barks")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: None, "no sub-folders"),
        (lambda p: save(p / "1.png"), "no sub-folders"),
        (lambda p: (save(p / "a" / "1.png"), (p / "b").mkdir()), "'.*b' holds no images"),
        (lambda p: (save(p / "a" / "1.png"), (p / "classes.txt").write_text("b\n")), "no line for 'a'"),
        (lambda p: (save(p / "a" / "1.png"), (p / "classes.txt").write_text("a\na\n")), "'a' twice, in lines 1 and 2"),
        (lambda p: (save(p / "a" / "1.png"), (p / "classes.txt").write_bytes(b"\xff")), "UTF-8"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, build: Callable[[Path], Any], words: str) -> None:
    build(tmp_path)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path)


def test_calibration_needs_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    data = open_dataset(tmp_path, labelled=False)
    assert (len(data), data.has_labels, data.labels.tolist()) == (1, False, [-1])
    with pytest.raises(DataError, match="has no labels"):
        data.check_labels(3)
    assert not open_dataset(npz(tmp_path, images=PIXELS), labelled=False).has_labels
    assert len(open_dataset(listed(tmp_path, "1.png\n"), labelled=False)) == 1
    assert len(open_dataset(npz(tmp_path, images=PIXELS), labelled=False).limit(4)) == 4


# --- lists ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "a b.png 2\nc,d.png 0\n"),
        ("l.txt", "a b.png\t2\n\n# note\nc,d.png\t0\n"),
        ("l.txt", "path label\na b.png 2\nc,d.png 0"),
        ("l.csv", 'path,label\na b.png,2\n"c,d.png",0\n'),
        ("l.csv", '\ufeffa b.png, 2\r\n"c,d.png", 0\r\n'),
        ("l.txt", "a b.png,2\nc,d.png 0\n"),
    ],
)
def test_forms_of_a_list(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path / "a b.png", PIXELS[0])
    save(tmp_path / "c,d.png", PIXELS[1])
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    data = ListFile(path, RAW)
    assert data.labels.tolist() == [2, 0]
    np.testing.assert_array_equal(data.inputs([1])[""][0], PIXELS[1].transpose(2, 0, 1))


def test_class_names_and_regression_targets(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("great white shark\ncat\n")
    data = ListFile(listed(tmp_path, "a.png,cat\nb.png,great white shark\n"), RAW)
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("great white shark", "cat"))
    targets = ListFile(listed(tmp_path, "a.png,1.5,2\nb.png,-3,4e1\n", "t.csv"), RAW)
    assert targets.labels.tolist() == [[1.5, 2.0], [-3.0, 40.0]]
    with pytest.raises(DataError, match="--metric r2"):
        targets.check_labels(2)
    assert len(targets.limit(1)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no images"),
        ("path label\n", "names no images"),
        ("a.png 0\nb.png\n", "Line 2 .* no label"),
        ("a.png 0\nb.png cat\n", "'cat' in line 2"),
        ("a.png,0\nb.png,1,2\n", "Line 2 .* has 2 labels"),
        ("a.png 0\nb.png 1\na.png 1\n", "different labels in lines 1 and 3"),
        ("a.png 0\nb.png nan\n", "target of sample 1 .* NaN"),
        ("a.png 0\nb.png 99999999999999999999\n", "too large"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(listed(tmp_path, text))


def test_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"a\xff,1")
    with pytest.raises(DataError, match="UTF-8"):
        open_dataset(tmp_path / "l.csv")


def test_missing_and_damaged_images_are_named(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
    data = open_dataset(listed(tmp_path, "good.png 0\nbad.png 1\ngone.png 2\n"), threads=2)
    assert data.inputs([0])[""].shape == (1, 3, 8, 7)
    with pytest.raises(DataError, match=r"bad\.png.*(Replace|take)") as e:
        data.inputs([0, 1, 2])
    assert e.value.sample.endswith("bad.png")
    with pytest.raises(DataError, match=r"gone\.png.*No such file"):
        data.inputs([2])
    with pytest.raises(DataError, match=r"gone\.png"):
        data.sha256  # noqa: B018 -- reading it is what fails


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    save(tmp_path / "2.png", PIXELS[1, :5])
    data = open_dataset(listed(tmp_path, "1.png 0\n2.png 1\n"))
    with pytest.raises(DataError, match=r"8x7x3, .* 5x7x3.* --size"):
        data.inputs([0, 1])
    assert data.for_input(("N", 3, 6, 6)).inputs([0, 1])[""].shape == (2, 3, 6, 6)
    assert data.for_input(("N", 6, 6, 3)).inputs([0, 1])[""].shape == (2, 6, 6, 3)
    assert data.for_input(("N", 1, 6, 6)).inputs([0, 1])[""].shape == (2, 1, 6, 6)
    with pytest.raises(DataError, match="2 axes instead of 4"):
        data.for_input(("N", 10))
    with pytest.raises(ConfigError, match="--size"):
        open_dataset(tmp_path / "list.txt", preprocess=Preprocess(size=5)).for_input((1, 3, 6, 6))


# --- npz ---


@pytest.mark.parametrize(
    "images", [PIXELS, PIXELS.transpose(0, 3, 1, 2), np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1)]
)
def test_layouts_of_pixels(tmp_path: Path, images: np.ndarray) -> None:
    data = Npz(npz(tmp_path, images=images, labels=LABELS), RAW)
    np.testing.assert_array_equal(data.inputs([4])[""][0], PIXELS[4].transpose(2, 0, 1).astype(np.float32))
    one = Npz(npz(tmp_path, images=images, labels=LABELS), RAW.override(size=6, channels="gray"))
    assert one.inputs([4])[""].shape == (1, 1, 6, 6)


def test_gray_pixels_serve_gray_and_colour_networks(tmp_path: Path) -> None:
    data = Npz(npz(tmp_path, x=PIXELS[..., 0], y=LABELS[:, None]), RAW)
    gray = data.for_input(("N", 1, 8, 7)).inputs([0])[""]
    np.testing.assert_array_equal(gray[0, 0], PIXELS[0, :, :, 0].astype(np.float32))
    np.testing.assert_array_equal(data.for_input(("N", 3, 8, 7)).inputs([0])[""], np.repeat(gray, 3, axis=1))


def test_prepared_inputs_keep_their_values(tmp_path: Path) -> None:
    floats = RNG.standard_normal((6, 3, 8, 7))
    path = npz(tmp_path, images=floats, labels=LABELS)
    np.testing.assert_array_equal(Npz(path).inputs([3])[""][0], floats[3].astype(np.float32))
    last = Npz(npz(tmp_path, images=floats.transpose(0, 2, 3, 1), labels=LABELS))
    np.testing.assert_array_equal(last.for_input(("N", 3, 8, 7)).inputs([3])[""][0], floats[3].astype(np.float32))
    flat = Npz(npz(tmp_path, images=floats[:, 0], labels=LABELS))
    assert flat.for_input(("N", 1, 8, 7)).inputs([3])[""].shape == (1, 1, 8, 7)
    assert flat.for_input(("N", 8, 7, 1)).inputs([3])[""].shape == (1, 8, 7, 1)
    assert flat.for_input(("N", 8, 7)).inputs([3])[""].shape == (1, 8, 7)
    with pytest.raises(DataError, match=r"\(8, 7\) .* \('\?', 3, 8, 8\)"):
        flat.for_input(("N", 3, 8, 8))
    int8 = Npz(npz(tmp_path, images=(PIXELS.astype(int) - 128).astype(np.int8), labels=LABELS))
    assert int8.inputs([0])[""].dtype == np.int8


def test_mean_and_std_for_prepared_inputs_are_a_warning(tmp_path: Path) -> None:
    path = npz(tmp_path, images=PIXELS / 255.0, labels=LABELS)
    with pytest.warns(DataWarning, match="not applied.*uint8"):
        open_dataset(path, preprocess=Preprocess.preset("imagenet"))
    open_dataset(path, preprocess=RAW)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": PIXELS}, "no array 'labels'"),
        ({"labels": LABELS}, "no array 'images'.* it has labels"),
        ({"images": PIXELS, "labels": LABELS[:3]}, "6 samples but labels of shape"),
        ({"images": PIXELS, "labels": np.eye(6, dtype=int)}, r"argmax\(axis=1\)"),
        ({"images": PIXELS, "labels": np.array(list("abcdef"))}, "integers"),
        ({"images": PIXELS, "labels": np.array([0, 1, np.nan, 0, 1, 2])}, "target of sample 2"),
        ({"images": PIXELS, "labels": np.array(3)}, "labels of shape"),
        ({"images": PIXELS.astype(np.int64), "labels": LABELS}, "int64.*uint8"),
        ({"images": PIXELS[..., :2], "labels": LABELS}, r"\(n, h, w, 3\)"),
        ({"images": PIXELS[:, :3], "labels": LABELS}, "which may be"),
        ({"images": PIXELS[:, 0, 0], "labels": LABELS}, "images of shape"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, "no samples"),
        ({"images": PIXELS[:, :0], "labels": LABELS}, "samples are empty"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(npz(tmp_path, **arrays))


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_pickled_npz_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = np.empty(2, object)
    evil[:] = [_Evil(), _Evil()]
    for arrays in ({"images": evil, "labels": LABELS}, {"images": PIXELS, "labels": evil}):
        path = npz(tmp_path, **arrays)
        with pytest.raises(DataError, match="Python objects"):
            open_dataset(path)
    path = npz(tmp_path, images=PIXELS, labels=LABELS, classes=evil)
    with pytest.raises(DataError, match="Python objects"):
        open_dataset(path)
    assert not Path("touched").exists()
    with np.load(path, allow_pickle=True) as loaded:  # the file really is one that would have run it
        loaded["classes"]
    assert Path("touched").exists()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "header", "pickle", "huge"])
def test_damaged_npz_is_one_message(tmp_path: Path, damage: str) -> None:
    path = npz(tmp_path, images=PIXELS, labels=LABELS)
    raw = path.read_bytes()
    if damage in ("header", "huge"):
        shape = b"(6, 8, 7, 9)" if damage == "header" else b"(10000000000000,)"
        content = (
            b"\x93NUMPY\x01\x00\x76\x00"
            + (b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b"}").ljust(117)
            + b"\n"
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content + bytes(100))
            archive.writestr("labels.npy", content)
    else:
        at = raw.index(b"labels") - 60
        path.write_bytes(
            {
                "empty": b"",
                "text": b"hello",
                "truncated": raw[: len(raw) // 2],
                "flipped": raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :],
                "pickle": pickle.dumps([1, 2]),
            }[damage]
        )
    with pytest.raises(DataError, match=r"d\.npz"):
        open_dataset(path)


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_to_a_compressed_npz_is_a_data_error(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, images=PIXELS // 64, labels=LABELS)
    raw = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(raw), 3):
        raw[at] = rng.integers(0, 256)
    path.write_bytes(raw)
    with contextlib.suppress(DataError):  # bits that matter to no one may flip
        assert len(open_dataset(path)) == 6


def test_large_npz_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path, images=PIXELS, labels=LABELS)
    whole = open_dataset(path)
    monkeypatch.setattr(_files, "_MAPPED_BYTES", 100)
    images, _, _ = _files.read_npz(path)
    assert isinstance(images, np.memmap)
    assert open_dataset(path).sha256 == whole.sha256
    np.testing.assert_array_equal(open_dataset(path).inputs([0, 5])[""], whole.inputs([0, 5])[""])


def test_nan_in_an_input_names_the_sample(tmp_path: Path) -> None:
    images = RNG.random((6, 3, 4, 4), np.float32)
    images[4, 1, 2, 3] = np.nan
    data = Npz(npz(tmp_path, images=images, labels=LABELS))
    assert data.inputs([0, 1, 2, 3, 5])[""].shape[0] == 5
    with pytest.raises(DataError, match=r"d\.npz\[4\] holds NaN"):
        data.inputs(np.arange(6))


# --- labels ---


def test_labels_outside_the_classes_advise_the_offset(tmp_path: Path) -> None:
    path = npz(tmp_path, images=PIXELS, labels=LABELS + 1)
    open_dataset(path).check_labels(4)
    with pytest.raises(DataError, match=r"Label 3 of sample .*d\.npz\[2\].* 3 classes \(0\.\.2\).*--label-offset"):
        open_dataset(path).check_labels(3)
    open_dataset(path, label_offset=-1).check_labels(3)
    with pytest.raises(DataError, match="Label -1"):
        open_dataset(path, label_offset=-2).check_labels(3)


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    data = open_dataset(npz(tmp_path, images=PIXELS, labels=LABELS * 0 + 2))
    with pytest.raises(DataError, match=r"All 6 samples .* label 2"):
        data.check_labels(10)
    with pytest.raises(DataError, match="No samples"):
        data.subset([]).check_labels(10)
    with pytest.raises(DataError, match="--limit 1"):
        data.limit(0)


def test_negative_offset_drops_names(tmp_path: Path) -> None:
    path = npz(tmp_path, images=PIXELS, labels=LABELS, classes=np.array(["none", "cat", "dog"]))
    assert open_dataset(path).classes == ("none", "cat", "dog")
    assert open_dataset(path, label_offset=-1).classes == ("cat", "dog")


# --- callables ---


def batches() -> Iterator[Any]:
    for k in range(3):
        yield PIXELS[2 * k : 2 * k + 2], LABELS[2 * k : 2 * k + 2]


def test_pixels_of_a_callable_are_preprocessed() -> None:
    data = open_dataset(batches, preprocess=Preprocess(size=4))
    assert data.inputs([0, 5])[""].shape == (2, 3, 4, 4)
    assert data.labels.tolist() == LABELS.tolist()
    assert "batches" in data.path


def test_module_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnxcar_test_mod.py").write_text(
        "import numpy as np\nclass A:\n    @staticmethod\n    def f():\n        return [(np.eye(4, 5), [0, 1, 1, 0])]\n"
    )
    before = list(sys.path)
    assert len(open_dataset("onnxcar_test_mod:A.f")) == 4
    assert sys.path == before
    sys.modules.pop("onnxcar_test_mod")


def test_several_inputs_by_name_or_place() -> None:
    def pairs() -> Iterator[Any]:
        yield (np.ones((2, 3)), np.zeros((2, 1), np.int64)), [0, 1]

    data = open_dataset(pairs, input_names=("a", "b"))
    assert {k: v.dtype for k, v in data.inputs([0]).items()} == {"a": np.float32, "b": np.int64}
    with pytest.raises(DataError, match="has 2 inputs, the network has"):
        open_dataset(pairs)


@pytest.mark.parametrize(
    ("yields", "words"),
    [
        ([], "yields no batches"),
        (3, "failed: TypeError"),
        ([PIXELS], "not a pair"),
        ([(PIXELS, None)], "no labels"),
        ([(PIXELS, LABELS[:2])], "must agree"),
        ([([np.array([None])], [0])], "no array of numbers"),
        ([({}, [0])], "no inputs"),
        ([(PIXELS, LABELS), (PIXELS[:, :4], LABELS)], "Batch 1 .* earlier ones"),
        ([(PIXELS, LABELS), ({"a": PIXELS}, LABELS)], "Batch 1 .* the first has"),
        ([(PIXELS, LABELS), (PIXELS, LABELS * 1.0)], "different shapes or dtypes"),
        ([({"a": PIXELS, "b": PIXELS[:1]}, LABELS)], "must agree"),
    ],
)
def test_callables_that_are_refused(yields: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        FromCallable(lambda: yields)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_such_module_x:f", "no module 'no_such_module_x'"),
        ("nowhere.py:f", "no file"),
        ("bad.py:f", "ZeroDivisionError"),
        ("good.py:g", "has no 'g'"),
        ("good.py:value", "is a int, not a function"),
        ("good.py:fails", "failed: RuntimeError: boom"),
        ("needs.py:f", "No module named 'no_such_module_y'"),
        ("x:", "names no function"),
    ],
)
def test_code_that_cannot_be_used_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "needs.py").write_text("import no_such_module_y\n")
    (tmp_path / "good.py").write_text("value = 1\ndef fails():\n    raise RuntimeError('boom')\n")
    with pytest.raises(DataError, match=words):
        open_dataset(spec)


def test_endless_callable_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcar.data._open.DISK_BYTES", 10_000)

    def endless() -> Iterator[Any]:
        while True:
            yield PIXELS, LABELS

    with pytest.raises(DataError, match="does not end"):
        FromCallable(endless, memory_bytes=5_000)


def test_user_buffers_may_be_reused() -> None:
    def same_buffer() -> Iterator[Any]:
        buffer = np.zeros((1, 3), np.float32)
        for k in range(4):
            buffer[:] = k
            yield buffer, [k]

    for memory in (1 << 20, 24):
        got = FromCallable(same_buffer, memory_bytes=memory).inputs(np.arange(4))[""]
        assert got[:, 0].tolist() == [0, 1, 2, 3]


# --- what --data may be ---


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "does not exist"),
        ("README.md", "is no data set"),
        ("d.npy", "is no data set"),
        ("x" * 5000, "does not exist"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    np.save(tmp_path / "d.npy", PIXELS)
    with pytest.raises(DataError, match=words):
        open_dataset(source)


def test_a_data_set_is_passed_through() -> None:
    data = open_dataset(batches)
    assert open_dataset(data) is data
    assert len(open_dataset(data, limit=3)) == 3


# --- every image once, within bounds ---


class _Counted(FileSource):
    """Counts the images that are decoded."""

    decoded = 0

    def pixels(self, indices: Any, pre: Preprocess, threads: int) -> Any:
        self.decoded += len(indices)
        return super().pixels(indices, pre, threads)


def counted(folder: Path, n: int, memory_bytes: int) -> tuple[_Counted, _dataset.Dataset]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 10, 10, 3), np.uint8)
    source = _Counted([save(folder / f"{i}.png", image) for i, image in enumerate(pixels)])
    return source, _dataset.Dataset(
        source, np.arange(n) % 3, path="x", preprocess=Preprocess(size=8), memory_bytes=memory_bytes
    )


def test_images_are_decoded_once_in_memory(tmp_path: Path, cache: Path) -> None:
    source, data = counted(tmp_path, 10, 1 << 20)
    want = data.inputs(np.arange(10))[""]
    part = data.subset([9, 1])
    np.testing.assert_array_equal(part.inputs([0, 1, 0])[""], want[[9, 1, 9]])
    data.limit(4).inputs([0, 1, 2, 3])
    assert source.decoded == 10
    assert not list(cache.iterdir())


def test_what_exceeds_memory_goes_to_disk_and_is_found_again(tmp_path: Path, cache: Path) -> None:
    one = 8 * 8 * 3
    source, data = counted(tmp_path, 10, 3 * one)
    want = data.inputs(np.arange(10))[""]
    for _ in range(2):
        np.testing.assert_array_equal(data.inputs(np.arange(10)[::-1])[""], want[::-1])
    assert source.decoded == 10
    files = [p for p in cache.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) == 10 * one
    again, same = counted(tmp_path, 10, 3 * one)  # as in a later run: three in memory, opening the file at the fourth
    np.testing.assert_array_equal(same.inputs(np.arange(4))[""], want[:4])
    np.testing.assert_array_equal(same.inputs(np.arange(4, 10))[""], want[4:])
    assert again.decoded == 4
    save(tmp_path / "9.png", PIXELS[0])  # other content is another key
    other, changed = counted(tmp_path, 9, 0)
    assert not np.array_equal(changed.inputs([0])[""], want[9:])
    assert other.decoded == 1


def test_a_set_that_is_worth_it_is_found_by_the_next_process(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pixel_cache, "WORTH_BYTES", 6 * 8 * 8 * 3)
    source, data = counted(tmp_path, 6, 1 << 20)
    want = data.inputs(np.arange(6))[""]
    assert len([p for p in cache.rglob("*") if p.is_file()]) == 2
    other, again = counted(tmp_path, 6, 1 << 20)
    np.testing.assert_array_equal(again.inputs([0])[""], want[:1])  # the size of a row is known from now on
    np.testing.assert_array_equal(again.inputs(np.arange(6))[""], want)
    np.testing.assert_array_equal(again.inputs(np.arange(6))[""], want)
    assert (source.decoded, other.decoded) == (6, 1)


def test_a_small_part_of_a_set_leaves_nothing_on_disk(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pixel_cache, "WORTH_BYTES", 0)
    _, data = counted(tmp_path, 6, 1 << 20)
    data.subset([0, 1]).inputs(np.arange(2))
    assert not list(cache.iterdir())


def test_damaged_cache_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    source, data = counted(tmp_path, 4, 0)
    want = data.inputs(np.arange(4))[""]
    (pixels,) = cache.rglob("pixels")
    raw = bytearray(pixels.read_bytes())
    raw[8 * 8 * 3 * 2] ^= 1
    pixels.write_bytes(raw)
    np.testing.assert_array_equal(data.inputs(np.arange(4))[""], want)
    assert source.decoded == 4 + 1


def test_beyond_the_disk_bound_images_are_decoded_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 8 * 8 * 3
    monkeypatch.setattr(_dataset, "DISK_BYTES", 4 * one)
    source, data = counted(tmp_path, 10, one)
    want = data.inputs(np.arange(10))[""]
    np.testing.assert_array_equal(data.inputs(np.arange(10))[""], want)
    assert source.decoded == 10 + 5
    del data
    kept = sum(f.stat().st_blocks * 512 for f in cache.rglob("*") if f.is_file()) if sys.platform == "linux" else 0
    assert kept <= 3 * 4096  # blocks of the two sparse files


def test_unusable_cache_folder_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ONNXCAR_CACHE", str(tmp_path / "file" / "below"))
    source, data = counted(tmp_path / "images", 5, 0)
    want = data.inputs(np.arange(5))[""]
    np.testing.assert_array_equal(data.inputs(np.arange(5))[""], want)
    assert source.decoded == 10


def test_old_caches_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = cache / "old"
    old.mkdir()
    (old / "pixels").write_bytes(bytes(100_000))
    monkeypatch.setattr(_dataset, "DISK_BYTES", 50_000)
    _, data = counted(tmp_path, 3, 0)
    data.inputs([0])
    assert not old.exists() or sys.platform == "win32"
    assert [p.is_dir() for p in cache.iterdir()] == [True]


def test_preprocessing_is_part_of_what_is_kept(tmp_path: Path) -> None:
    _, data = counted(tmp_path, 4, 0)
    small = data.for_input(("N", 3, 8, 8)).inputs([0])[""]
    other = _dataset.Dataset(
        data._source, data.labels, path="x", preprocess=Preprocess(size=8, crop_pct=0.5), memory_bytes=0
    )
    assert not np.array_equal(other.inputs([0])[""], small)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_many_images_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    """3,000 images of 224 x 224, 450 MB of pixels, under a bound of 64 MiB."""
    save(tmp_path / "1.jpg", RNG.integers(0, 256, (224, 224, 3), np.uint8))
    (tmp_path / "l.txt").write_text("1.jpg 0\n" * 3_000)
    code = (
        "import numpy as np, resource\n"
        "from onnxcar.data import open_dataset, Preprocess\n"
        "d = open_dataset('l.txt', preprocess=Preprocess(size=224), memory_bytes=64 << 20, threads=2)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for k in range(0, 3000, 100): d.inputs(np.arange(k, k + 100))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    # KiB: the bound, and a batch of 100 images as lists, pixels and twice float32
    assert int(out.stdout) < 300_000


# --- two sets ---


def test_overlap_of_folders_and_lists(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / "f" / f"c{k % 2}" / f"{k}.png", PIXELS[k])
    save(tmp_path / "copy.png", PIXELS[2])
    save(tmp_path / "new.png", PIXELS[5])
    a = open_dataset(tmp_path / "f")
    b = open_dataset(listed(tmp_path, "copy.png 0\nnew.png 1\n"))
    assert (overlap(a, b), overlap(b, a)) == (1, 1)


# --- the networks people bring ---

CIFAR = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}
SQUEEZE = {"mean": "103.939,116.779,123.68", "channels": "bgr"}


@pytest.mark.parametrize(
    ("net", "data", "name", "parts", "offset", "correct"),
    [
        ("cifar10_resnet20", "cifar10/test.npz", "cifar10", CIFAR, 0, 932),
        ("cifar10_resnet8_tfnhwc", "cifar10/test.npz", "raw", {}, 0, 895),
        ("cifar10_resnet8_tf_qdq", "cifar10/test.npz", "raw", {"mean": 128, "std": 1}, 0, 891),
        ("cifar10_winml_tutorial", "cifar10/test.npz", "tf", {}, 0, 669),
        ("mnist_lenet_caffe", "mnist/test.npz", "mnist", {"mean": 0, "std": 256}, 0, 9916),
        pytest.param(
            "imagenet_mobilenetv1_050_160",
            "imagenet/val.txt",
            "tf",
            {"mean": 128, "std": 128},
            1,
            468,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "imagenet_squeezenet11",
            "imagenet/val.txt",
            "raw",
            {**SQUEEZE, "crop_pct": "224/227"},
            0,
            476,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_top1_of_real_networks_is_reproduced(
    shared: Path, net: str, data: str, name: str, parts: dict[str, Any], offset: int, correct: int
) -> None:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(shared / "models" / f"{net}.onnx", options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    dtype = {"tensor(float)": np.float32, "tensor(int8)": np.int8}[entry.type]
    samples = open_dataset(shared / "data" / data, preprocess=Preprocess.resolve(name, **parts), label_offset=offset)
    samples = samples.for_input(entry.shape)
    samples.check_labels(1001)
    got = 0
    for k in range(0, len(samples), 100):
        at = np.arange(k, min(k + 100, len(samples)))
        (out,) = session.run(None, {entry.name: samples.inputs(at)[""].astype(dtype)})
        got += int((out.reshape(len(at), -1).argmax(1) == samples.labels[at]).sum())
    assert got == correct
