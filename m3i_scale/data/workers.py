"""Workers of the loader obey their parent alone, and what a killed one leaves is removed; pools are made here too.

A scheduler that preempts a job signals every process of it. The training process then finishes its step and saves, for
which it needs its workers; a worker that died would end the run with an error instead. So a worker obeys SIGTERM,
SIGUSR2 and SIGINT only when its parent sends them (multiprocessing ends workers so at exit, and waits for them), and it
ends when its parent is gone. Processes of a pool (`map_in_processes`) do the latter alone.

A worker sends tensors through a socket in a temporary folder. It holds a lock there: a folder without one has lost its
worker, and is removed when workers are started next.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from m3i_scale.cores import usable_cores
from m3i_scale.errors import DataError, LostWorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

DEFAULT_WORKERS = min(8, usable_cores())
"""Of a pool, where nobody says how many."""
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
START_METHOD = "fork"
"""Workers inherit the signal mask of the process that forks them, which a fork server would not have."""
_LOOK_AFTER_PARENT_S = 1.0
_HELD = "m3i-scale-worker"
"""A file in the temporary folder of a worker, which holds a lock on it as long as it lives."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block the signals while workers are started, so that workers begin with them blocked. No signal is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DeathWatch:
    """Tells the parent of worker processes when one of them was killed.

    torch raises from its SIGCHLD handler, wherever the parent happens to be. Under this watch an error is raised only
    while the parent waits for the worker, whose death could otherwise block it for ever; one that died before is seen
    then.
    """

    def __init__(self) -> None:
        self.workers: list[BaseProcess] = []

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Watch the worker processes that the code inside starts."""
        _sweep_temporary_folders()
        earlier, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        yield
        self.workers = [child for child in multiprocessing.active_children() if child not in earlier]
        if signal.getsignal(signal.SIGCHLD) is not handler:  # torch sets its own, once in a process
            signal.signal(signal.SIGCHLD, functools.partial(_relay, handler))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the code inside wait for workers, and end the wait when one of them dies."""
        _WAITING.append(self)
        try:
            self._check_worker(None)
            yield
        except (RuntimeError, OSError, EOFError) as error:  # what a death breaks in the parent has many names
            self._check_worker(str(error))
            raise
        finally:
            _WAITING.remove(self)

    def _check_worker(self, torchs: str | None) -> None:
        dead = [worker.exitcode for worker in self.workers if worker.exitcode]
        if not dead:
            return
        end = signal.Signals(-dead[0]).name if dead[0] < 0 else f"exit code {dead[0]}"
        raise LostWorkerError(
            f"a loader process has died ({end})",
            where=f"data.workers: {len(self.workers)}",
            why="most often the machine had no memory left for it"
            + (f"; torch says: {torchs.strip()}" if torchs else ""),
            fix="lower data.workers, or give the job more memory; the run goes on from its last checkpoint",
        ) from None


_WAITING: list[DeathWatch] = []


def _relay(earlier: Any, number: int, frame: FrameType | None) -> None:
    for watch in _WAITING:
        watch._check_worker(None)
    if callable(earlier):
        earlier(number, frame)


def leave_signals_to_parent() -> None:
    """Obey signals of the parent alone from now on; called in a worker that was started under `signals_held`."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        raise RuntimeError("not a worker process")
    folder = _own_temporary_folder()
    threading.Thread(target=_obey, args=(parent.pid, folder), daemon=True, name="signals").start()


def _obey(parent: int, folder: Path | None) -> None:
    while os.getppid() == parent:
        heard = signal.sigtimedwait(PREEMPTION_SIGNALS, _LOOK_AFTER_PARENT_S)
        if heard is not None and heard.si_pid == parent:
            break
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _own_temporary_folder() -> Path | None:
    """Make the temporary folder of this worker, held until it ends; None where it shares that of its parent."""
    parent = Path(tempfile.gettempdir())
    before = set(os.listdir(parent))
    folder = Path(get_temp_dir())
    if folder.parent != parent or folder.name in before:
        return None
    descriptor = os.open(folder / f"{_HELD}.partial", os.O_RDWR | os.O_CREAT, 0o600)  # never closed
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(folder / f"{_HELD}.partial", folder / _HELD)
    return folder


def _sweep_temporary_folders() -> None:
    """Remove the folders of workers that were killed. A lock is seen from any container that shares the folder."""
    for held in Path(tempfile.gettempdir()).glob(f"pymp-*/{_HELD}"):
        try:
            descriptor = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe of another user would wait
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its worker lives
            continue
        else:
            shutil.rmtree(held.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


def map_in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Do as `map` does, in `workers` processes; at most two tasks a process are under way or wait to be taken."""
    if workers <= 1 or (isinstance(tasks, Sized) and len(tasks) <= 1):
        yield from map(function, tasks)
        return
    # Not fork: the caller may run threads (progress bar), which a child would inherit half-locked. Not spawn: every
    # process would import torch for itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    # Ctrl-C reaches these processes too. They start with the signal blocked, and so does their parent, so that none
    # prints a traceback out of its imports or finds its parent gone. Starting the tracker would unblock the signal.
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
            raise DataError("a worker process died", fix="is memory short? try --workers 1") from None
        finally:
            for future in waiting:
                future.cancel()


def _end_with_parent() -> None:
    """End this process as soon as the one that started the pool has ended, in whatever way; after Ctrl-C without a
    traceback, which is for the one that started the pool to tell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("not a worker process")

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()
