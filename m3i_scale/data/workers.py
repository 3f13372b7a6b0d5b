"""Signal handling and cleanup of data loader workers, and process pools.

A scheduler that preempts a job signals all its processes. The training process then finishes its step and saves, for
which it needs its workers; a dead worker would turn this into an error. So a worker obeys SIGTERM, SIGUSR2 and SIGINT
only if its parent sends them (multiprocessing stops workers this way at exit, and waits for them). It exits when its
parent is gone. Processes of a pool (`map_in_processes`) only do the latter.

A worker sends tensors through a socket in a temporary folder and holds a lock there. A folder without a lock was left
by a killed worker, and is removed when workers are started the next time.
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

from m3i_scale.errors import DataError, LostWorkerError
from m3i_scale.rank_variables import usable_cores

Task = TypeVar("Task")
Result = TypeVar("Result")

DEFAULT_WORKERS = min(8, usable_cores())
"""Default number of processes of a pool."""
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
START_METHOD = "fork"
"""Workers inherit the signal mask of the process that forks them; with a fork server they would not."""
_LOOK_AFTER_PARENT_S = 1.0
_HELD = "m3i-scale-worker"
"""Lock file in the temporary folder of a worker, locked as long as the worker lives."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block signals while workers start, so that workers start with them blocked. No signal is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DeathWatch:
    """Monitor that raises an error in the parent if a worker process was killed.

    torch raises from its SIGCHLD handler, at any point of the parent's code. This monitor raises only while the parent
    waits for the worker and could block forever. An earlier death is reported at the next wait.
    """

    def __init__(self) -> None:
        self.workers: list[BaseProcess] = []

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Monitor the worker processes that the enclosed code starts."""
        _sweep_temporary_folders()
        earlier, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        yield
        self.workers = [child for child in multiprocessing.active_children() if child not in earlier]
        if signal.getsignal(signal.SIGCHLD) is not handler:  # torch installs a handler once per process
            signal.signal(signal.SIGCHLD, functools.partial(_relay, handler))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the enclosed code wait for workers; raise an error if one of them dies."""
        _WAITING.append(self)
        try:
            self._check_worker(None)
            yield
        except (RuntimeError, OSError, EOFError) as error:  # a worker's death causes various errors in the parent
            self._check_worker(str(error))
            raise
        finally:
            _WAITING.remove(self)

    def _check_worker(self, torch_error: str | None) -> None:
        dead = [worker.exitcode for worker in self.workers if worker.exitcode]
        if not dead:
            return
        end = signal.Signals(-dead[0]).name if dead[0] < 0 else f"exit code {dead[0]}"
        raise LostWorkerError(
            f"a loader process has died ({end})",
            where=f"data.num_workers: {len(self.workers)}",
            why="the machine most likely ran out of memory"
            + (f"; error of torch: {torch_error.strip()}" if torch_error else ""),
            fix="lower data.num_workers, or give the job more memory; rerun the command to resume",
        ) from None


_WAITING: list[DeathWatch] = []


def _relay(earlier: Any, number: int, frame: FrameType | None) -> None:
    for watch in _WAITING:
        watch._check_worker(None)
    if callable(earlier):
        earlier(number, frame)


def leave_signals_to_parent() -> None:
    """Ignore signals from other processes than the parent; call it in a worker started under `signals_held`."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        raise RuntimeError("not a worker process")
    folder = _temporary_folder()
    threading.Thread(target=_obey, args=(parent.pid, folder), daemon=True, name="signals").start()


def _obey(parent: int, folder: Path | None) -> None:
    while os.getppid() == parent:
        heard = signal.sigtimedwait(PREEMPTION_SIGNALS, _LOOK_AFTER_PARENT_S)
        if heard is not None and heard.si_pid == parent:
            break
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _temporary_folder() -> Path | None:
    """Create and lock the temporary folder of this worker; None if it shares its parent's folder."""
    parent = Path(tempfile.gettempdir())
    before = set(os.listdir(parent))
    folder = Path(get_temp_dir())
    if folder.parent != parent or folder.name in before:
        return None
    descriptor = os.open(folder / f"{_HELD}.partial", os.O_RDWR | os.O_CREAT, 0o600)  # open until the process exits
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(folder / f"{_HELD}.partial", folder / _HELD)
    return folder


def _sweep_temporary_folders() -> None:
    """Remove the folders of killed workers. Locks are visible to all containers that share the folder."""
    for held in Path(tempfile.gettempdir()).glob(f"pymp-*/{_HELD}"):
        try:
            descriptor = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # another user's pipe would block
        except OSError:  # of another user, or already removed
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its worker is alive
            continue
        else:
            shutil.rmtree(held.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


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
            raise DataError("a worker process died", fix="the machine may be out of memory: try --workers 1") from None
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
