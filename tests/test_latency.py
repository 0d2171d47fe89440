import pytest

from onnxcar.latency import Latency, interleave, ratio


class Machine:
    """A clock that work moves forward: a fake that makes the whole pipeline exact."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def work(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


def test_runs_are_interleaved_and_take_turns_in_being_first():
    machine = Machine()
    runs = [machine.work("a", 1.0), machine.work("b", 2.0), machine.work("c", 3.0)]
    found = interleave(runs, 3, lambda: machine.now)
    assert machine.order[9:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]  # after three warm-up runs each
    assert [latency.seconds for latency in found] == [(1.0,) * 3, (2.0,) * 3, (3.0,) * 3]


def test_rounds_follow_the_time_there_is():
    fast, slow = Machine(), Machine()
    n_fast = len(interleave([fast.work("a", 0.001)], None, lambda: fast.now)[0].seconds)
    n_slow = len(interleave([slow.work("a", 5.0)], None, lambda: slow.now)[0].seconds)
    assert (n_fast, n_slow) == (300, 15)


def test_ratio_is_immune_to_a_machine_that_slows_down():
    machine = Machine()
    load = [1.0]

    def loaded(seconds):
        def now():
            load[0] += 0.05
            return seconds * load[0]

        return now

    runs = [machine.work("a", loaded(1.0)), machine.work("b", loaded(0.5))]
    base, candidate = interleave(runs, 40, lambda: machine.now)
    assert base.seconds[-1] > 2 * base.seconds[0]
    median, interval = ratio(base, candidate)
    assert median == pytest.approx(0.5, abs=0.02)
    assert 0.5 in interval


def test_ratio_of_a_latency_with_itself_is_one():
    latency = Latency((1.0, 3.0, 2.0))
    median, interval = ratio(latency, latency)
    assert (median, interval.low, interval.high) == (1.0, 1.0, 1.0)
    assert latency.spread.median == 2.0
