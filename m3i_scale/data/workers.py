"""Loader processes and signals: who may end a worker.

A scheduler that preempts a job signals every process of it. The training process then finishes its step and saves, for
which it needs its workers; a worker that died would end the run with an error instead. So a worker obeys SIGTERM,
SIGUSR2 and SIGINT only when its parent sends them (multiprocessing ends workers so at exit, and waits for them), and it
ends when its parent is gone.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from m3i_scale.errors import LostWorkerError

Handler = Callable[[int, FrameType | None], Any]

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
START_METHOD = "fork"
"""Workers inherit the signal mask of the process that forks them, which a fork server would not have."""
_LOOK_AFTER_PARENT_S = 1.0


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals back while workers are started, so that these are born with them blocked. None is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DeathWatch:
    """Worker processes of a parent that may be killed, and how it gets to know.

    torch raises from its SIGCHLD handler, wherever the parent happens to be. Under this watch it does so only while the
    parent waits for workers, which such a death could otherwise block for ever; one that died before is seen then.
    """

    def __init__(self) -> None:
        self._workers: list[BaseProcess] = []

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """For the code that starts the workers."""
        earlier, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        yield
        self._workers = [child for child in multiprocessing.active_children() if child not in earlier]
        torchs = signal.getsignal(signal.SIGCHLD)
        if torchs is not handler and callable(torchs):  # torch sets it once in a process
            signal.signal(signal.SIGCHLD, functools.partial(_relay, torchs, handler))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the code that waits for workers.

        Raises:
            LostWorkerError: a worker was killed.
        """
        _WAITING.append(self)
        try:
            self._look(None)
            yield
        except (RuntimeError, OSError, EOFError) as error:  # what a death breaks in the parent has many names
            self._look(str(error))
            raise
        finally:
            _WAITING.remove(self)

    def _look(self, told: str | None) -> None:
        dead = [worker.exitcode for worker in self._workers if worker.exitcode]
        if not dead:
            return
        end = signal.Signals(-dead[0]).name if dead[0] < 0 else f"exit code {dead[0]}"
        raise LostWorkerError(
            f"a loader process has died ({end})",
            where=f"data.workers: {len(self._workers)}",
            why="most often the machine had no memory left for it" + (f"; torch says: {told.strip()}" if told else ""),
            fix="lower data.workers, or give the job more memory; the run goes on from its last checkpoint",
        ) from None


_WAITING: list[DeathWatch] = []


def _relay(torchs: Handler, other: Any, number: int, frame: FrameType | None) -> None:
    if _WAITING:
        torchs(number, frame)
    elif callable(other):
        other(number, frame)


def leave_signals_to_parent() -> None:
    """In a worker that was started under `signals_held`: from now on obey the parent, and nobody else."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        raise RuntimeError("not a worker process")
    threading.Thread(target=_obey, args=(parent.pid,), daemon=True, name="signals").start()


def _obey(parent: int) -> None:
    while os.getppid() == parent:
        heard = signal.sigtimedwait(PREEMPTION_SIGNALS, _LOOK_AFTER_PARENT_S)
        if heard is not None and heard.si_pid == parent:
            break
    os._exit(0)
