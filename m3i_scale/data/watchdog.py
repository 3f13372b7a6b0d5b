"""Watchdog of the data loader: readers report their activity to the training process, and waiting has a timeout."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing.sharedctypes import RawArray, RawValue
from typing import Any, Generic, TypeVar

POLL_S = 2.0
_NAME_BYTES = 1_024
Item = TypeVar("Item")


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


class FromWorkers(Generic[Item]):
    """Adapter for the iterator of a DataLoader that was created with `timeout=POLL_S`."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items

    def next(self, timeout_s: float) -> Item:
        """Return the next item. Raise `NotYetError` after the DataLoader's timeout; call again."""
        try:
            return next(self._items)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
        raise NotYetError

    def close(self) -> None:
        """Do nothing: the workers stop with their iterator."""


def await_item(items: InThread[Any] | FromWorkers[Any], activity: Activity, limit_s: float) -> Any:
    """Wait for the next item as long as its reader makes progress, and return it. Raise `NotYetError` once the reader
    has made no progress for `limit_s`."""
    activity.reset()
    while True:
        try:
            return items.next(min(POLL_S, limit_s))
        except NotYetError:
            if activity.idle_s > limit_s:
                raise
