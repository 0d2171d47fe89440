"""The record file: strict JSON, whole or not at all."""

import json
import os

import pytest

from onnxcar import record
from onnxcar.errors import OutputError

RECORD = {
    "onnxcar": "1.0",
    "model": {"path": "a.onnx", "sha256": "ab"},
    "base": {"value": 0.5, "correct": 5, "samples": 10},
    "final": {"value": 0.4, "correct": 4, "samples": 10},
    "steps": [
        {"step": 1, "group": "c:5", "filters": [["c.w", 5]], "importance": 0.1, "value": float("nan"), "correct": None},
        {"step": 2, "group": "c:7", "filters": [["c.w", 7]], "importance": 0.1, "value": float("inf"), "correct": 4},
    ],
    "removed": {"c.w": [5, 7], "größe": []},
    "protected": [],
    "verify": None,
}


def strict(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_written_is_read_back_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "m.json"
    record.write(RECORD, path)
    back = strict(path.read_text(encoding="utf-8"))
    assert [step["value"] for step in back["steps"]] == [None, None]
    steps = [{**step, "value": None} for step in RECORD["steps"]]
    assert back == {**RECORD, "steps": steps}
    assert list(back) == list(RECORD)


def test_a_step_takes_one_line(tmp_path):
    lines = record.dumps(RECORD).splitlines()
    assert sum('"step"' in line for line in lines) == 2
    assert any(line.strip().startswith('"c.w": [5, 7]') for line in lines)


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "m.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        record.write(RECORD, path)
    assert path.read_text() == "mine"
    record.write(RECORD, path, force=True)
    assert strict(path.read_text(encoding="utf-8"))["onnxcar"] == "1.0"


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        record.write(RECORD, tmp_path / "m.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(OutputError, match="folder"):
        record.write(RECORD, tmp_path / "none" / "m.json")


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_record_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    record.write(RECORD, tmp_path / "m.json")
    assert (tmp_path / "m.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_metadata_holds_the_origin_as_text():
    found = record.metadata(RECORD)
    assert found["onnxcar.source_sha256"] == "ab"
    assert strict(found["onnxcar.removed_filters"]) == RECORD["removed"]
    assert strict(found["onnxcar.base"]) == RECORD["base"]
    assert set(found) == {
        "onnxcar.version",
        "onnxcar.source_sha256",
        "onnxcar.removed_filters",
        "onnxcar.base",
        "onnxcar.final",
    }
