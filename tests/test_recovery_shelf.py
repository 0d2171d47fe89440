"""Arrays that are put away: what is held in memory, what is written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from onnxcar.errors import OutputError
from onnxcar.recovery._shelf import Shelf


def test_what_fits_is_not_written_and_the_rest_comes_back_the_same() -> None:
    rng = np.random.default_rng(0)
    values = {key: rng.standard_normal((3, 10)) for key in "abcd"}
    shelf = Shelf(2 * 240)
    shelf.put("a", {"x": values["a"]})
    shelf.put("b", {"x": values["b"]})
    assert shelf.written == 0
    for key in "cd":
        shelf.put(key, {"x": values[key]})
    assert shelf.written == 2 * 240
    for key in "abcdabcd":
        assert key in shelf
        np.testing.assert_array_equal(shelf.get(key)["x"], values[key])
    assert shelf.written == 4 * 240  # each once: what was read and not put back is not written again


def test_what_changes_and_is_put_back_is_written_again() -> None:
    shelf = Shelf(0)
    shelf.put("a", {"x": np.zeros(4)})
    held = shelf.get("a")
    held["x"] += 1
    shelf.put("a", held)
    shelf.put("b", {"x": np.zeros(4)})
    np.testing.assert_array_equal(shelf.get("a")["x"], np.ones(4))
    shelf.drop("a")
    assert "a" not in shelf
    with pytest.raises(KeyError):
        shelf.get("a")


def test_a_folder_that_cannot_be_written_is_told() -> None:
    shelf = Shelf(0)
    shelf.put("a", {"x": np.zeros(4)})
    assert shelf._folder is not None
    shutil.rmtree(shelf._folder)
    with pytest.raises(OutputError, match=r"cannot be written .*--memory"):
        shelf.put("b", {"x": np.zeros(4)})
