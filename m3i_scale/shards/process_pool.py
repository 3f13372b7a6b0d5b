"""Map a function over tasks in a pool of processes, whose processes end with the process that created them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import TypeVar

from m3i_scale.errors import DataError
from m3i_scale.rank_variables import usable_cores

Task = TypeVar("Task")
Result = TypeVar("Result")

DEFAULT_WORKERS = min(8, usable_cores())
"""Default number of processes of a pool."""


def map_in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Map in order, using `workers` processes; at most two tasks per process are pending or not yet consumed."""
    if workers <= 1 or (isinstance(tasks, Sized) and len(tasks) <= 1):
        yield from map(function, tasks)
        return
    # Not fork: the caller may run threads (progress bar), and the child would inherit their locks. Not spawn: every
    # process would import torch again.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # `func` of a partial
    # Ctrl-C also signals these processes. They and their parent start with the signal blocked, so that none prints a
    # traceback from its imports or loses its parent. Starting the tracker would unblock the signal.
    resource_tracker.ensure_running()
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for task in tasks:
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    waiting.append(pool.submit(function, task))
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process died", why="the machine may be out of memory", fix="use --workers 1"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _end_with_parent() -> None:
    """Exit this process when the process that created the pool ends for any reason. After Ctrl-C, exit without a
    traceback, because that process reports the interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("not a worker process")

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()
