"""Latency of models against each other: interleaved runs at batch 1, so that what slows the machine slows all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcar import stats
from onnxcar.errors import DataError
from onnxcar.stats import Interval, Spread

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.model import Model
    from onnxcar.runtime import Input, Session

__all__ = ["Latency", "feeds_of", "interleave", "measure", "ratio"]

_WARM_UP = 3
_LEAST, _MOST = 15, 300  # rounds; the median of 15 has a 95 % interval from the 4th to the 12th
_BUDGET_S = 4.0  # per model


@dataclass(frozen=True)
class Latency:
    """Seconds of single runs at batch 1, one for each round; rounds are shared by the models measured together."""

    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Median and quartiles, in seconds."""
        return stats.spread(self.seconds)


def ratio(base: Latency, candidate: Latency) -> tuple[float, Interval]:
    """Median of candidate over base, round by round, and its 95 % interval."""
    ratios = [c / b for b, c in zip(base.seconds, candidate.seconds, strict=True)]
    return stats.spread(ratios).median, stats.median_interval(ratios)


def interleave(
    runs: Sequence[Callable[[], Any]], rounds: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> list[Latency]:
    """Time every function once a round, the first one first in turn.

    Args:
        runs: What to time.
        rounds: How often; default as many as fit into some seconds each.
        clock: Seconds; a test gives its own.
    """
    for run in runs:
        for _ in range(_WARM_UP):
            run()
    times: list[list[float]] = [[] for _ in runs]
    started, done = clock(), 0
    while done < rounds if rounds is not None else _go_on(done, clock() - started, len(runs)):
        for i in range(len(runs)):
            which = (done + i) % len(runs)  # whoever runs first after a pause must not always be the same
            begin = clock()
            runs[which]()
            times[which].append(clock() - begin)
        done += 1
    return [Latency(tuple(row)) for row in times]


def _go_on(done: int, elapsed_s: float, n_models: int) -> bool:
    return done < _LEAST or (done < _MOST and elapsed_s < _BUDGET_S * n_models)


def measure(
    models: Sequence[Model], data: Dataset | None, *, provider: str, threads: int | None, runs: int | None
) -> list[Latency]:
    """Latency of each model on the first sample of the data, or on seeded noise without data."""
    from onnxcar.runtime import resolve_provider, session

    found = resolve_provider(provider)
    timed: list[Callable[[], Any]] = []
    for model in models:
        opened = session(model, provider=found, threads=threads)
        timed.append(partial(opened.run, feeds_of(opened, data)))
    return interleave(timed, runs)


def feeds_of(opened: Session, data: Dataset | None) -> dict[str, Any]:
    """Input for one run: the first sample, repeated where the batch is fixed."""
    if data is None:
        rng = np.random.default_rng(0)
        return {i.name: _noise(rng, i) for i in opened.inputs}
    feeds = data.inputs(np.zeros(1, np.int64))
    batch = opened.inputs[0].batch or 1
    return opened.bind({name: np.repeat(array, batch, axis=0) for name, array in feeds.items()})


def _noise(rng: np.random.Generator, want: Input) -> Any:
    sizes = [want.batch or 1, *want.shape[1:]] if want.shape else []
    if None in sizes:
        raise DataError(
            f"Input {want.name!r} has shape {want.shape}: its size is open, so there is nothing to time. "
            "Give --data, or --runs 0 to leave latency out."
        )
    values = rng.standard_normal([int(n or 1) for n in sizes])
    return values.astype(want.dtype) if want.dtype.kind == "f" else np.zeros(values.shape, want.dtype)
