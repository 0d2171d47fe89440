"""Progress of long work: a bar with rate and ETA on a terminal, a plain line now and then in a log.

Workers report what is done as often as they like: a report costs a clock read and a comparison
until it is time to say something.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["Meter", "Report", "duration", "open_meter"]

# On a terminal: redraws per second. In a log: seconds until the first line, and until each later one.
_REDRAWS = 8
_FIRST_LINE_S, _LATER_LINES_S = 5.0, (10.0, 20.0, 30.0, 60.0)


class Report(Protocol):
    """Who workers tell how far they are."""

    def update(self, done: float, total: float | None, text: str = "", unit: str = "") -> None:
        """Take a report.

        Args:
            done: Work done, in any unit; less than before where another part of the work begins.
            total: Work in all, in the same unit; may change as more is known. None: unknown.
            text: What is being done, a few words.
            unit: What is counted, plural, where that is not what the work as a whole is counted in.
        """


class Meter:
    """Shows reports on a console; used as a context manager, it leaves a terminal as it was.

    Args:
        console: Where to; None shows nothing.
        title: What the work is, in one word.
        unit: What the work is counted in, plural.
        clock: Seconds; a test gives its own.
    """

    def __init__(
        self, console: Console | None, title: str, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.done, self.total, self.text = 0.0, None, ""  # type: float, float | None, str
        self._console, self._title, self._unit, self._clock = console, title, unit, clock
        self._started = self._next = 0.0
        self._lines = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first_done: float | None = None
        self._other = ""  # unit of a part of the work that is counted in another

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._console is not None and self._console.is_terminal:
            self._bar, self._task = _bar(self._console, self._title)
            self._bar.start()
        else:
            self._next = self._started + _FIRST_LINE_S
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, total: float | None, text: str = "", unit: str = "") -> None:
        """Take a report; see `Report`."""
        if done < self.done or unit != self._other:
            self._first_done = None  # another part of the work has a pace of its own
        self.done, self.total, self.text, self._other = done, total, text or self.text, unit
        if self._first_done is None:
            self._first_done, self._started = done, self._clock()  # replayed steps are no measure of the rate
        if self._console is None:
            return
        now = self._clock()
        if now < self._next:
            return
        if self._bar is not None and self._task is not None:
            self._next = now + 1 / _REDRAWS
            self._bar.update(self._task, completed=done, total=total, text=self.text, pace=self.pace(now))
        else:
            self._next = now + _LATER_LINES_S[min(self._lines, len(_LATER_LINES_S) - 1)]
            self._lines += 1
            self._console.print(self.line(now), markup=False, highlight=False, soft_wrap=True)

    def pace(self, now: float) -> str:
        """Rate and time left, in words; empty until something is known."""
        worked, elapsed = self.done - (self._first_done or 0.0), now - self._started
        if worked <= 0 or elapsed <= 0:
            return ""
        rate = worked / elapsed
        shown = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        if self.total is None:
            return shown
        return f"{shown}, {duration(max(self.total - self.done, 0) / rate)} left"

    def line(self, now: float) -> str:
        """The state as one line of a log."""
        share = f" {self.done:.0f}" if self.total is None else f" {self.done:.0f}/{self.total:.0f}"
        if self.total:
            share += f" {self._other or self._unit} ({self.done / self.total:.0%})"
        parts = [f"{self._title}:{share}", self.text, self.pace(now)]
        return ", ".join(part for part in parts if part)


def open_meter(console: Console, title: str, unit: str, *, quiet: bool = False) -> Meter:
    """A meter on ``console``, or a silent one."""
    return Meter(None if quiet else console, title, unit)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(3.21), duration(75), duration(3725), duration(200000)
    ('3.2 s', '1 min 15 s', '1 h 2 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {part}"
    return f"{whole} s"


def _bar(console: Console, title: str) -> tuple[Progress, TaskID]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12 if console.width < 100 else 24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}", markup=False, table_column=Column(no_wrap=True)),
        # The one part that may be cut: a terminal is as wide as it is.
        TextColumn(
            "{task.fields[text]}",
            markup=False,
            style="dim",
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        transient=True,
        expand=True,
        refresh_per_second=_REDRAWS,
    )
    return bar, bar.add_task(title, total=None, text="", pace="")
