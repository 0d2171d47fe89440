import io

import pytest
from rich.console import Console

from onnxcar.progress import Meter, duration


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def log(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def test_log_gets_a_plain_line_now_and_then():
    console, clock = log(), Clock()
    with Meter(console, "pruning", "evaluations", clock) as meter:
        for second in range(61):
            clock.now = float(second)
            meter.update(second * 2, 240, "conv1: 3 groups removed")
    lines = console.file.getvalue().splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[0] == "pruning: 10/240 evaluations (4%), conv1: 3 groups removed, 2/s, 1 min 55 s left"


def test_short_work_leaves_a_log_empty():
    console, clock = log(), Clock()
    with Meter(console, "pruning", "evaluations", clock) as meter:
        for i in range(100):
            clock.now = i / 100
            meter.update(i, 100)
    assert console.file.getvalue() == ""


def test_terminal_gets_a_bar_with_rate_and_eta_and_is_left_clean():
    clock = Clock()
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None, legacy_windows=False)
    with Meter(console, "pruning", "evaluations", clock) as meter:
        for i in range(5):
            clock.now = float(i)
            meter.update(i * 10, 100, "conv1")
        meter._bar.refresh()
    shown = console.file.getvalue()
    assert "40%" in shown
    assert "10/s, 6.0 s left" in shown
    assert shown.endswith("\x1b[?25h\r\x1b[1A\x1b[2K") or shown.endswith("\x1b[2K")


def test_replayed_work_does_not_count_as_pace():
    clock = Clock()
    meter = Meter(None, "pruning", "evaluations", clock)
    with meter:
        meter.update(900, 1000)  # from a journal, in no time
        clock.now = 10.0
        meter.update(910, 1000)
    assert meter.pace(10.0) == "1/s, 1 min 30 s left"


def test_every_part_of_the_work_has_a_pace_and_a_unit_of_its_own():
    console, clock = log(), Clock()
    with Meter(console, "pruning", "evaluations", clock) as meter:
        meter.update(0, 100, "conv1")
        clock.now = 1000.0
        meter.update(100, 100)
        meter.update(0, 10, "recovery", "layers")
        clock.now = 1002.0
        meter.update(1, 10, "recovery, fc", "layers")
        assert meter.line(1002.0) == "pruning: 1/10 layers (10%), recovery, fc, 2 s each, 18 s left"
        meter.update(2, 10, "testing", "models")  # further on, but of something else
        clock.now = 1003.0
        meter.update(3, 10, "testing", "models")
        assert meter.line(1003.0) == "pruning: 3/10 models (30%), testing, 1/s, 7.0 s left"
        meter.update(0, 10, "testing", "models")
        assert meter.pace(1004.0) == ""


def test_unknown_total_has_no_eta():
    console, clock = log(), Clock()
    with Meter(console, "scoring", "groups", clock) as meter:
        meter.update(0, None)
        clock.now = 20.0
        meter.update(5, None)
    assert console.file.getvalue() == "scoring: 5, 4 s each\n"


def test_reports_between_lines_are_cheap():
    calls = []
    console = log()
    console.print = lambda *a, **k: calls.append(a)
    clock = Clock()
    with Meter(console, "pruning", "evaluations", clock) as meter:
        clock.now = 6.0
        for i in range(10_000):
            meter.update(i, 10_000)
    assert len(calls) == 1


def test_silent_meter_still_knows_where_it_is():
    with Meter(None, "pruning", "evaluations") as meter:
        meter.update(3, 9, "conv2")
    assert (meter.done, meter.total, meter.text) == (3, 9, "conv2")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "1 min 0 s"), (3599.6, "1 h 0 min"), (90000, "1 d 1 h")]
)
def test_duration_rounds_up_to_the_next_unit(seconds, text):
    assert duration(seconds) == text
