"""Supervision of data loader workers: their signals, their deaths, and a timeout for their results.

A scheduler that preempts a job signals all its processes. The training process then finishes its step and saves, for
which it needs its workers; a dead worker would turn this into an error. So a worker obeys SIGTERM, SIGUSR2 and SIGINT
only if its parent sends them (multiprocessing stops workers this way at exit, and waits for them). It exits when its
parent is gone.

Readers record their activity in shared memory, so that a timeout can name the shard that is read.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray, RawValue
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from torch.utils.data import dataloader

from m3i_scale.errors import LostWorkerError

Item = TypeVar("Item")

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
START_METHOD = "fork"
"""Workers inherit the signal mask of the process that forks them; with a fork server they would not."""
_LOOK_AFTER_PARENT_S = 1.0
POLL_S = 2.0
_NAME_BYTES = 1_024


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
            if not isinstance(error, RuntimeError):
                self._await_exit()
            self._check_worker(str(error))
            raise
        finally:
            _WAITING.remove(self)

    def stop(self, iterator: object) -> None:
        """Terminate the workers of the iterator of a DataLoader."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join(POLL_S)
        if isinstance(iterator, dataloader._MultiProcessingDataLoaderIter):
            # A worker that was killed may hold the lock of this event, and torch would wait for the lock without limit.
            iterator._workers_done_event = multiprocessing.Event()

    def _await_exit(self) -> None:
        """Wait until a worker has an exit code, at most `POLL_S`: the kernel closes its connections before it exits."""
        end = time.monotonic() + POLL_S
        while self.workers and not any(worker.exitcode for worker in self.workers) and time.monotonic() < end:
            time.sleep(0.01)

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
    """Return the temporary folder of this worker; None if it shares the folder of its parent."""
    parent = Path(tempfile.gettempdir())
    before = os.listdir(parent)
    folder = Path(get_temp_dir())
    return folder if folder.parent == parent and folder.name not in before else None


class NotYetError(Exception):
    """Raised if an item is not yet available. Not a TimeoutError, because the work itself may raise one."""


class Activity:
    """Activity of one reader, in memory shared across a fork: the reader writes it, the waiting process reads it."""

    def __init__(self) -> None:
        self._place = RawArray("c", _NAME_BYTES)
        self._since = RawValue("d", time.monotonic())
        self._progress = RawValue("d", time.monotonic())

    def begin(self, place: object) -> None:
        """Record that the reader starts reading a shard."""
        self._place.value = str(place).encode()[: _NAME_BYTES - 1]
        self._since.value = time.monotonic()

    def end(self) -> None:
        """Record that the reader has finished reading."""
        self._place.value = b""
        self._progress.value = time.monotonic()

    def reset(self) -> None:
        """Record that waiting starts now."""
        self._progress.value = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Return the seconds since the last sample was read, or since waiting started."""
        return time.monotonic() - float(self._progress.value)

    def describe(self) -> str:
        """Describe which shard is being read and for how long."""
        place = self._place.value.decode(errors="replace")
        if not place:
            return "reading no shard: the previous sample is not finished"
        return f"reading {place} for {time.monotonic() - float(self._since.value):.0f} s"


class InThread(Generic[Item]):
    """Iterator in a background thread, so that waiting for an item can time out; it prefetches `ahead` items."""

    def __init__(self, items: Generator[Item], ahead: int = 0) -> None:
        self._items = items
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Item | Exception] = queue.SimpleQueue()
        self._waiting = False
        self._closed = False
        for _ in range(ahead):
            self._asked.put(True)
        threading.Thread(target=self._make, daemon=True, name="load").start()

    def next(self, timeout_s: float) -> Item:
        """Return the next item. Raise `NotYetError` if it is not available within the timeout; call again."""
        if not self._waiting:
            self._asked.put(True)
            self._waiting = True
        try:
            made = self._made.get(timeout=timeout_s)
        except queue.Empty:
            raise NotYetError from None
        self._waiting = False
        if isinstance(made, Exception):
            raise made
        return made

    def close(self) -> None:
        """Stop the thread after its current item."""
        self._closed = True  # takes effect before requests that are still queued
        self._asked.put(False)

    def _make(self) -> None:
        while self._asked.get() and not self._closed:
            try:
                self._made.put(next(self._items))
            except Exception as error:  # any exception is raised again in `next`
                self._made.put(error)
        self._items.close()


def await_item(items: InThread[Item] | Iterator[Item], activity: Activity, limit_s: float) -> Item:
    """Wait for the next item as long as its reader makes progress, and return it. Raise `NotYetError` once the reader
    has made no progress for `limit_s`.

    `items` is a thread, or the iterator of a DataLoader that was created with `timeout=POLL_S`.
    """
    activity.reset()
    while True:
        try:
            return items.next(min(POLL_S, limit_s)) if isinstance(items, InThread) else next(items)
        except NotYetError:
            pass
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
        if activity.idle_s > limit_s:
            raise NotYetError
