"""Loader processes and signals: who may end a worker."""

from __future__ import annotations

import os
import signal
import threading

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def leave_signals_to_parent() -> None:
    """Let SIGTERM and SIGUSR2 end this worker only when its parent sends them; call it in the worker's main thread.

    A scheduler that preempts a job signals every process of it. The training process then finishes its step and saves,
    for which it needs its workers; a worker that died would end the run with an error instead. The parent's own SIGTERM
    must still work: multiprocessing ends workers with it at exit and waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True, name="signals").start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo(PREEMPTION_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
