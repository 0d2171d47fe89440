"""What every data source must keep: subclass :class:`DataSourceTestCase`, give it `open`, and pytest runs the rest."""

from __future__ import annotations

import abc
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from onnxcar.data import Dataset, overlap

__all__ = ["DataSourceTestCase"]


class DataSourceTestCase(abc.ABC):
    """Tests of one kind of source; `self.open` is called with a fresh folder and must give the same data each time."""

    @abc.abstractmethod
    def open(self, folder: Path, **options: Any) -> Dataset:
        """At least 12 distinct samples of 3 or more unevenly filled classes.

        Args:
            folder: To write files into, the same one in all calls of a test.
            options: `label_offset`, `memory_bytes` and `threads`, to be passed on.
        """

    def test_labels_are_one_class_id_a_sample(self, tmp_path: Path) -> None:
        """Shape (n,), int64, several classes."""
        data = self.open(tmp_path)
        assert data.has_labels
        assert data.labels.shape == (len(data),)
        assert data.labels.dtype == np.int64
        assert len(data) >= 12
        assert len(set(data.labels.tolist())) >= 3
        data.check_labels(int(data.labels.max()) + 1)

    def test_inputs_are_float32_batches(self, tmp_path: Path) -> None:
        """Batch first, contiguous, and no two samples alike."""
        data = self.open(tmp_path)
        inputs = data.inputs(np.arange(len(data)))
        assert tuple(inputs) == data.input_names
        for value in inputs.values():
            assert value.shape[0] == len(data)
            assert value.dtype == np.float32
            assert value.flags["C_CONTIGUOUS"]
        rows = {b"".join(value[i].tobytes() for value in inputs.values()) for i in range(len(data))}
        assert len(rows) == len(data)

    def test_a_sample_is_the_same_in_every_batch(self, tmp_path: Path) -> None:
        """Order and repetition are the caller's, the values the source's."""
        data = self.open(tmp_path)
        mixed = data.inputs([5, 0, 5, 11])
        for row, index in enumerate([5, 0, 5, 11]):
            for key, value in data.inputs([index]).items():
                np.testing.assert_array_equal(mixed[key][row], value[0])

    def test_no_samples_give_an_empty_batch(self, tmp_path: Path) -> None:
        """Zero rows of the same rank."""
        data = self.open(tmp_path)
        whole = data.inputs([0])
        for key, value in data.inputs([]).items():
            assert value.shape[0] == 0
            assert value.ndim == whole[key].ndim

    def test_opening_again_gives_the_same_bits(self, tmp_path: Path) -> None:
        """Inputs, labels and hash."""
        one, other = self.open(tmp_path), self.open(tmp_path)
        assert one.sha256 == other.sha256
        assert len(one.sha256) == 64
        np.testing.assert_array_equal(one.labels, other.labels)
        _assert_same(one.inputs(np.arange(12)), other.inputs(np.arange(12)))

    def test_threads_and_memory_do_not_change_the_inputs(self, tmp_path: Path) -> None:
        """No memory and one thread, plenty of both, and callers in parallel."""
        plenty = self.open(tmp_path, threads=4)
        scarce = self.open(tmp_path, threads=1, memory_bytes=0)
        indices = np.arange(len(plenty))
        want = plenty.inputs(indices)
        for _ in range(2):  # the second time from whatever is kept
            _assert_same(scarce.inputs(indices), want)
            _assert_same(plenty.inputs(indices), want)
        fresh = self.open(tmp_path)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(fresh.inputs, [indices] * 8):
                _assert_same(got, want)

    def test_hash_depends_on_samples_labels_and_order(self, tmp_path: Path) -> None:
        """And on nothing that the content does not have."""
        data = self.open(tmp_path)
        n = len(data)
        assert data.subset(np.arange(n)).sha256 == data.sha256
        others = [data.subset(np.arange(n - 1)), data.subset(np.arange(n)[::-1]), self.open(tmp_path, label_offset=1)]
        assert len({data.sha256, *(other.sha256 for other in others)}) == 4

    def test_subset_takes_samples_with_their_labels(self, tmp_path: Path) -> None:
        """By position or by mask, also of a subset."""
        data = self.open(tmp_path)
        part = data.subset([7, 2, 9]).subset([2, 0])
        np.testing.assert_array_equal(part.labels, data.labels[[9, 7]])
        assert part.name(0) == data.name(9)
        _assert_same(part.inputs([0, 1]), data.inputs([9, 7]))
        mask = data.labels == data.labels[0]
        assert not mask.all()
        np.testing.assert_array_equal(data.subset(mask).labels, data.labels[mask])

    def test_limit_is_balanced_seeded_and_nested(self, tmp_path: Path) -> None:
        """Each class gets its even share, or all it has."""
        data = self.open(tmp_path)
        classes, available = np.unique(data.labels, return_counts=True)
        assert available.min() < available.max()
        for n in range(1, len(data)):
            taken = data.limit(n, seed=1)
            counts = np.array([np.count_nonzero(taken.labels == c) for c in classes])
            assert counts.sum() == n
            assert (counts[counts < available] >= counts.max() - 1).all()
            assert taken.sha256 == data.limit(n, seed=1).sha256
            assert overlap(data.limit(n + 1, seed=1), taken) == n
        assert len({data.limit(4, seed=s).sha256 for s in range(5)}) > 1
        assert data.limit(None) is data

    def test_label_offset_moves_every_label(self, tmp_path: Path) -> None:
        """And leaves the inputs as they are."""
        data, moved = self.open(tmp_path), self.open(tmp_path, label_offset=1)
        np.testing.assert_array_equal(moved.labels, data.labels + 1)
        if data.classes is not None and moved.classes is not None:
            assert moved.classes[int(moved.labels[0])] == data.classes[int(data.labels[0])]
        _assert_same(moved.inputs([0, 3]), data.inputs([0, 3]))

    def test_a_copy_in_another_process_reads_the_same(self, tmp_path: Path) -> None:
        """By way of pickle."""
        data = self.open(tmp_path).subset([3, 1, 8])
        copy = pickle.loads(pickle.dumps(data))
        assert copy.sha256 == data.sha256
        _assert_same(copy.inputs([0, 1, 2]), data.inputs([0, 1, 2]))

    def test_overlap_counts_shared_samples(self, tmp_path: Path) -> None:
        """All of itself, none of a disjoint part."""
        data = self.open(tmp_path)
        assert overlap(data, self.open(tmp_path)) == len(data)
        assert overlap(data.subset([0, 1, 2]), data.subset([3, 4, 5])) == 0
        assert overlap(data.subset([0, 1, 2]), data.subset([2, 3])) == 1


def _assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key])
