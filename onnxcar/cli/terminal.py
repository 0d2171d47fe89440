"""Where words go: data on stdout, progress and advice on stderr."""

from __future__ import annotations

import os
import sys
import warnings
from typing import IO, TYPE_CHECKING, Any

from onnxcar.errors import OnnxcarWarning

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Terminal"]

# A log or a pipe has no width of its own; tables must not be squeezed into 80 columns there.
_PIPE_WIDTH = 110


class Terminal:
    """Standard output and error of one command, and how talkative it is."""

    def __init__(self) -> None:
        self.quiet = False
        self.traceback = False

    @property
    def out(self) -> Console:
        """Standard output, for data."""
        return _console(sys.stdout)

    @property
    def err(self) -> Console:
        """Standard error, for progress, advice and errors."""
        return _console(sys.stderr)

    def data(self, *parts: RenderableType) -> None:
        """Tables and lines that are the command's result; a line may head the table after it."""
        console = self.out
        for i, part in enumerate(parts):
            if i and not isinstance(parts[i - 1], str):
                sys.stdout.write("\n")
            if isinstance(part, str):
                sys.stdout.write(f"{part}\n")
                continue
            with console.capture() as shown:
                console.print(part)
            # Tables pad their lines to one length; who copies or greps them wants no blanks at the end.
            for line in shown.get().splitlines():
                sys.stdout.write(f"{line.rstrip()}\n")
        if console.is_terminal and not self.quiet:
            sys.stdout.write("\n")  # advice follows
        sys.stdout.flush()

    def note(self, text: str, *, command: bool = False) -> None:
        """Something worth knowing; silent with ``--quiet``.

        Args:
            text: A sentence or more.
            command: It ends in a command to copy, so it is not broken into lines.
        """
        if not self.quiet:
            self._say(text, "", unbroken=command)

    def warn(self, text: str) -> None:
        """A doubtful result; said even with ``--quiet``."""
        self._say(f"Warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """Why the command ends here."""
        self._say(f"Error: {text}", "red")

    def _say(self, text: str, style: str, *, unbroken: bool = False) -> None:
        console = self.err
        # A log gets one line a message; a terminal would break words in two.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=unbroken or not console.is_terminal)

    def show_warnings(self) -> None:
        """Say our own warnings in our own form; those of libraries only with ``--traceback``."""

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: IO[str] | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, OnnxcarWarning):
                self.warn(str(message))
            elif self.traceback:
                self._say(warnings.formatwarning(message, category, filename, lineno, line).rstrip(), "")

        warnings.showwarning = show
        warnings.filterwarnings("always", category=OnnxcarWarning)


def _console(stream: Any) -> Console:
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=width, emoji=False, highlight=False)
