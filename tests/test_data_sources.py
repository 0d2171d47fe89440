"""Every kind of data source against the shipped conformance suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcar.data import Dataset, FromCallable, Preprocess, open_dataset
from onnxcar.testing.data_sources import DataSourceTestCase

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (15, 9, 8, 3), np.uint8)
LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2])
MIXED = RNG.permutation(15)


@pytest.fixture(autouse=True)
def _cache_in_the_test_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXCAR_CACHE", str(tmp_path_factory.mktemp("cache")))


class TestImageFolder(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        for i, label in enumerate(LABELS):
            path = folder / "val" / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(IMAGES[i]).save(path)
        return open_dataset(folder / "val", preprocess=Preprocess(size=6), **options)


class TestListFile(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        lines = []
        for i in MIXED:
            Image.fromarray(IMAGES[i]).save(folder / f"im age {i}.png")
            lines.append(f"im age {i}.png {LABELS[i]}")
        (folder / "val.txt").write_text("\n".join(lines))
        (folder / "classes.txt").write_text("cat\ndog\nowl\n")
        return open_dataset(folder / "val.txt", preprocess=Preprocess(size=(5, 7)), **options)


class TestNpzOfPixels(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        np.savez(folder / "val.npz", images=IMAGES[MIXED], labels=LABELS[MIXED])
        return open_dataset(folder / "val.npz", preprocess=Preprocess.preset("cifar10"), **options)


class TestNpzOfPixelsResized(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        np.savez_compressed(folder / "val.npz", x=IMAGES[..., 0], y=LABELS.astype(np.uint8), classes=["a", "b", "c"])
        return open_dataset(folder / "val.npz", preprocess=Preprocess(size=6, channels="rgb"), **options)


class TestNpzOfInputs(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        np.savez(folder / "val.npz", images=IMAGES.astype(np.float64) / 7, labels=LABELS)
        data = open_dataset(folder / "val.npz", **options)
        return data.for_input(("N", 3, 9, 8))


class TestCallable(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        (folder / "my_data.py").write_text(
            "import numpy as np\n"
            "def batches():\n"
            "    rng = np.random.default_rng(0)\n"
            "    for k in range(3):\n"
            "        yield rng.random((6, 2, 5), np.float32), np.array([0, 1, 1, 2, 2, 1 + k % 2])\n"
        )
        return open_dataset(f"{folder / 'my_data.py'}:batches", **options)


class TestCallableOfSeveralInputs(DataSourceTestCase):
    def open(self, folder: Path, **options: Any) -> Dataset:
        def batches() -> Iterator[Any]:
            for at in (slice(0, 4), slice(4, 15)):
                yield {"image": IMAGES[at].astype(np.float32), "place": np.arange(15)[at, None] / 4}, LABELS[at]

        return FromCallable(_Function(batches), **options)


class _Function:
    """A callable that pickles by dropping its closure: a data set does not need it any more."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self) -> Any:
        return self._function()
