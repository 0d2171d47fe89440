"""The journal: what survives a crash, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from onnxcar.errors import JournalError, OutputError
from onnxcar.journal import Journal

HEADER = {"model": "abc", "arguments": {"ratio": 0.5, "layers": ["conv1"]}}


def never():
    raise AssertionError("the file knows the answer")


def fill(path: Path, n: int) -> list[dict]:
    with Journal(path, HEADER) as journal:
        return [journal.ask({"lowest": i}, lambda i=i: {"group": i, "value": 0.1 * i}) for i in range(n)]


def test_answers_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "run.jsonl"
    wrote = fill(path, 5)
    with Journal(path, HEADER) as journal:
        assert journal.replayed == 5
        assert [journal.ask({"lowest": i}, never) for i in range(5)] == wrote
        assert not journal.replaying


def test_a_live_answer_is_what_a_replay_reads(tmp_path):
    def live():
        return (1, 2.5, None)

    with Journal(tmp_path / "run.jsonl", HEADER) as journal:
        assert journal.ask({}, live) == [1, 2.5, None]
    assert Journal(None, HEADER).ask({}, live) == [1, 2.5, None]


def test_a_run_goes_on_after_the_last_answer(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(path, 3)
    asked = []
    with Journal(path, HEADER) as journal:
        for i in range(5):
            journal.ask({"lowest": i}, lambda i=i: asked.append(i) or {"group": i, "value": 0.1 * i})
    whole = tmp_path / "whole.jsonl"
    fill(whole, 5)
    assert asked == [3, 4]
    assert path.read_bytes() == whole.read_bytes()


def test_every_torn_end_is_taken_up(tmp_path):
    path, whole = tmp_path / "run.jsonl", tmp_path / "whole.jsonl"
    wrote = fill(whole, 3)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        with Journal(path, HEADER) as journal:
            assert journal.replayed == max(0, content[:size].count(b"\n") - 1)
            assert [journal.ask({"lowest": i}, lambda i=i: {"group": i, "value": 0.1 * i}) for i in range(3)] == wrote
        assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_refused_by_its_number(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b"{\n", b"\xff\xfe\n", b"[1]\n", b'{"ask":1}\n', b"\n"):
        path.write_bytes(b"".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(JournalError, match="line 3 is corrupt") as caught:
            Journal(path, HEADER)
        assert caught.value.line == 3


@pytest.mark.parametrize(
    ("field", "header"),
    [
        ("model", {**HEADER, "model": "xyz"}),
        ("arguments.ratio", {"model": "abc", "arguments": {"ratio": 0.3, "layers": ["conv1"]}}),
        ("arguments.layers", {"model": "abc", "arguments": {"ratio": 0.5, "layers": ["conv2"]}}),
        ("data", {**HEADER, "data": "new"}),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path, field, header):
    path = tmp_path / "run.jsonl"
    fill(path, 1)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="of another run") as caught:
        Journal(path, header)
    assert caught.value.field == field
    assert caught.value.ours != caught.value.theirs
    assert "--journal" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"notes of mine\n", b"no newline", b"[]\n", b'{"answer": 1}\n', b"\x00\x01"])
def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="is not a journal"):
        Journal(path, HEADER)
    assert path.read_bytes() == content


def test_an_answer_to_another_question_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(path, 2)
    with Journal(path, HEADER) as journal, pytest.raises(JournalError, match="line 2: this run asks") as caught:
        journal.ask({"lowest": 7}, never)
    assert caught.value.line == 2


def test_two_runs_cannot_share_a_journal(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER), pytest.raises(JournalError, match="in use by another run"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()


def test_an_answer_is_on_disk_before_the_search_goes_on(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER) as journal:
        journal.ask({"lowest": 0}, lambda: 1)
        assert json.loads(path.read_text().splitlines()[-1]) == {"ask": {"lowest": 0}, "answer": 1}


def test_every_answer_is_synced(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or real(file))
    fill(tmp_path / "run.jsonl", 3)
    assert len(synced) == 4


def test_a_failing_computation_leaves_no_line(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER) as journal, pytest.raises(KeyboardInterrupt):
        journal.ask({}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_text().count("\n") == 1


def test_deleting_removes_the_file(tmp_path):
    path = tmp_path / "run.jsonl"
    journal = Journal(path, HEADER)
    journal.delete()
    assert not path.exists()
    journal.delete()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OutputError, match="Cannot open the journal"):
        Journal(tmp_path / "none" / "run.jsonl", HEADER)


def test_infinite_scores_survive(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER) as journal:
        journal.ask({}, lambda: float("inf"))
    with Journal(path, HEADER) as journal:
        assert journal.ask({}, never) == float("inf")
