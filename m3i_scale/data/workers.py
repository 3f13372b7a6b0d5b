"""Loader processes and signals: who may end a worker.

A scheduler that preempts a job signals every process of it. The training process then finishes its step and saves, for
which it needs its workers; a worker that died would end the run with an error instead. So a worker obeys SIGTERM and
SIGUSR2 only when its parent sends them (multiprocessing ends workers so at exit, and waits for them), and it ends when
its parent is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
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
