"""The journal of a search: append-only JSON lines, so that an interrupted run goes on where it stopped.

Line 1 is the header: everything that must be the same when the run is started again. Every other line is one question
the search asked (which group is lowest? what is the score?) with its answer. The search itself is deterministic, so a
resumed run asks the same questions in the same order; those in the file are answered from it, the rest are computed and
appended. Each line is flushed and synced before the search goes on. A line torn by a crash can only be the last one: it
is dropped. A broken line anywhere else is an error, never guessed around.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from onnxcar.errors import InternalError, JournalError, OutputError

__all__ = ["Journal"]

SCHEMA = 1


class Journal:
    """Answers of an earlier run, then a log of the new ones; a context manager that closes the file.

    Args:
        path: The file, created when missing. None keeps nothing: every question is computed.
        header: What must match on resume; JSON values by name.

    Raises:
        JournalError: The file belongs to another run (``field``, ``ours``, ``theirs``), has a corrupt line (``line``),
            is no journal, or is in use by another run.
        OutputError: The file cannot be read or written.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._file: BinaryIO | None = None
        self._answers: list[tuple[int, Any, Any]] = []
        self._next = 0
        self._asked = 0
        if self.path is not None:
            ours = _normal({"journal": SCHEMA, **header})
            self._file = _open(self.path)
            try:
                self._replay(self.path, ours)
            except BaseException:
                self.close()
                raise

    @property
    def replaying(self) -> bool:
        """Whether the next question is answered from the file."""
        return self._next < len(self._answers)

    @property
    def replayed(self) -> int:
        """Answers that the file held when it was opened."""
        return len(self._answers)

    def ask(self, question: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The answer to a question, from the file or by ``compute``; a JSON value either way.

        Args:
            question: What is asked; JSON values, equal in every run that gets here.
            compute: Called when the file does not know; its answer is on disk when this returns.

        Raises:
            JournalError: The file answers another question at this point.
            OutputError: The disk is full, or the file cannot be written.
        """
        asked = _normal(dict(question))
        self._asked += 1
        if self.replaying:
            line, theirs, answer = self._answers[self._next]
            if theirs != asked:
                raise JournalError(
                    f"{self.path}, line {line}: this run asks {_text(asked)}, but the journal answers {_text(theirs)}. "
                    "The file was edited, or the run is not the one that wrote it. Move it away, or name another file "
                    "with --journal, to start from the beginning.",
                    path=self.path,
                    line=line,
                    ours=asked,
                    theirs=theirs,
                )
            self._next += 1
            return answer
        # Through JSON, so that a live run computes with the very values a resumed run will read.
        answer = _normal(compute())
        self._append({"ask": asked, "answer": answer})
        return answer

    def close(self) -> None:
        """Close the file and let others use it; closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def delete(self) -> None:
        """Close the file and remove it: the run it belongs to is done."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _replay(self, path: Path, ours: dict[str, Any]) -> None:
        """Read what the file holds, check its header, and leave it open at its end."""
        assert self._file is not None
        content = self._file.read()
        end = content.rfind(b"\n") + 1  # what follows the last newline is a torn line
        lines = content[:end].splitlines()
        if not lines:
            if not (_text(ours) + "\n").encode().startswith(content):
                raise _no_journal(path)
            self._truncate(0)
            self._append(ours)
            return
        _check_header(path, ours, _parse(path, 1, lines[0]))
        for number, line in enumerate(lines[1:], start=2):
            entry = _parse(path, number, line)
            if set(entry) != {"ask", "answer"}:
                raise _corrupt(path, number, "it has not the keys 'ask' and 'answer'")
            self._answers.append((number, entry["ask"], entry["answer"]))
        self._truncate(end)

    def _truncate(self, size: int) -> None:
        assert self._file is not None
        self._file.truncate(size)
        self._file.seek(size)

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            if self.path is not None:
                raise InternalError(f"journal {self.path} was written to after it was closed")
            return
        try:
            self._file.write((_text(entry) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise OutputError(
                f"Cannot write the journal {self.path}: {exc.strerror or exc}. Free some space, or name a file on "
                "another disk with --journal; what the file holds so far is used when the run is started again.",
                path=self.path,
            ) from exc


def _open(path: Path) -> BinaryIO:
    """The file, open for reading and appending, locked against other runs."""
    try:
        file = path.open("r+b") if path.exists() else path.open("x+b")
    except OSError as exc:
        raise OutputError(
            f"Cannot open the journal {path}: {exc.strerror or exc}. Name a file in a folder that can be written with "
            "--journal.",
            path=path,
        ) from exc
    try:
        _lock(file)
    except OSError as exc:
        file.close()
        raise JournalError(
            f"The journal {path} is in use by another run. Wait for it, or name another file with --journal.", path=path
        ) from exc
    return file


def _lock(file: BinaryIO) -> None:
    """Take the file for this process until it is closed; raises OSError where another holds it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 40)  # a byte that is never written: Windows locks hinder reading, too
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_header(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if "journal" not in theirs:
        raise _no_journal(path)
    mismatch = _difference(ours, theirs)
    if mismatch is None:
        return
    field, mine, other = mismatch
    raise JournalError(
        f"The journal {path} is of another run: {field} is {_text(mine)} here and {_text(other)} there. Start with "
        "what it was written with to continue it; move it away, or name another file with --journal, to start anew.",
        path=path,
        field=field,
        ours=mine,
        theirs=other,
    )


def _difference(ours: Any, theirs: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field, dotted, in which two JSON values differ, with both values; None when they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            found = _difference(ours.get(key), theirs.get(key), f"{field}.{key}" if field else key)
            if found is not None:
                return found
        return None
    return None if ours == theirs else (field, ours, theirs)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as exc:  # UnicodeDecodeError is one, too
        if number == 1:
            raise _no_journal(path) from exc
        raise _corrupt(path, number, f"it is not JSON ({exc})") from exc
    if not isinstance(entry, dict):
        raise _no_journal(path) if number == 1 else _corrupt(path, number, "it is not a JSON object")
    return entry


def _corrupt(path: Path, number: int, why: str) -> JournalError:
    return JournalError(
        f"{path}, line {number} is corrupt: {why}. Delete that line and all that follow to continue from the step "
        "before it, or move the file away to start from the beginning.",
        path=path,
        line=number,
    )


def _no_journal(path: Path) -> JournalError:
    return JournalError(
        f"{path} is not a journal of onnxcar, line 1 has no header. It was left as it is: name another file with "
        "--journal, or move this one away.",
        path=path,
        line=1,
    )


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _normal(value: Any) -> Any:
    """The value as it comes back from the file: tuples are lists, floats keep every bit."""
    return json.loads(_text(value))
