"""Work in processes, results in order, a few tasks ahead."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from m3i_scale.data.workers import end_with_parent
from m3i_scale.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Do as `map`, in `workers` processes; no more than two tasks a process are under way or waiting to be taken.

    Raises:
        DataError: a process died.
    """
    if workers <= 1 or (isinstance(tasks, Sized) and len(tasks) <= 1):
        yield from map(function, tasks)
        return
    # Not fork: the caller may run threads (progress bar), which a child would inherit half-locked. Not spawn: every
    # process would import torch for itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process died", fix="is memory short? try --workers 1") from None
        finally:
            for future in waiting:
                future.cancel()
