"""Runs jobs; knows nothing of pruning. Threads are enough: ONNX Runtime lets go of the interpreter while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["Pool"]

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """A few threads that run jobs side by side; with one worker a job runs where it is submitted.

    Attributes:
        workers: How many jobs run at a time.
    """

    def __init__(self, workers: int) -> None:
        """Start no thread before the first job."""
        self.workers = max(1, workers)
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="onnxcar") if self.workers > 1 else None

    def submit(self, job: Callable[[], R]) -> Future[R]:
        """The job's future; its exception is raised by `result`."""
        if self._threads is not None:
            return self._threads.submit(job)
        done: Future[Any] = Future()
        try:
            done.set_result(job())
        except BaseException as exc:
            done.set_exception(exc)
        return done

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items; no more jobs are begun after one has failed."""
        if self._threads is None:
            yield from (job(item) for item in items)
            return
        futures: list[Future[R]] = []
        try:
            for item in items:
                futures.append(self._threads.submit(job, item))
                # Twice the workers under way at most, so that results do not pile up.
                if len(futures) >= 2 * self.workers:
                    yield futures.pop(0).result()
            while futures:
                yield futures.pop(0).result()
        finally:
            for future in futures:
                future.cancel()
