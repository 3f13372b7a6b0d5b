"""Prefetching of remote shards: samples are read from the cache, or by range request until their shard is cached.

Rules for every shard that is read:

- Threads download it into the cache, up to one window ahead, if the cache has room for it and the shards in use.
- Until then, and if there is no room, single samples are read by range request.
- A failed download decides nothing: a shard is corrupt only if it cannot be read when it is needed. Otherwise a
  transient error would lose a shard in one process but not in another, and their sample orders would diverge.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import BinaryIO

from m3i_scale.data.remote.access import Access, Address, Url
from m3i_scale.data.remote.fetch import facts, read_parts, read_range
from m3i_scale.data.remote.read_errors import ReadError, bad_shard
from m3i_scale.data.scan import ShardIndex

FETCHERS = 4
"""Download threads per process."""

Fetch = Future[int | None]
"""Descriptor of the shard in the cache; None if there was no room for it."""


class RemoteShards:
    """Prefetcher of remote shards for one process; its threads start with the first expected shard."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._cache = access.cache
        self._expected: dict[Hashable, tuple[Sequence[ShardIndex], Sequence[ShardIndex]]] = {}
        self._wanted: dict[Address, ShardIndex] = {}
        """All expected shards, the most urgent first."""
        self._fetches: dict[Address, Fetch] = {}
        """Downloads of all expected shards; their descriptors lock the shards in the cache."""
        self._same_version: set[Address] = set()
        """Shards of current windows with a checked version."""
        self._changed = threading.Condition()
        self._fetchers: list[threading.Thread] = []
        self._closed = False

    def expect(self, reader: Hashable, now: Sequence[ShardIndex], then: Sequence[ShardIndex] = ()) -> None:
        """Announce the shards that a stream reads now and next; release the shards that it announced before."""
        begin = {index.path for index in now}
        self._same_version -= begin
        if self._cache is None:
            return
        with self._changed:
            self._expected[reader] = (now, then)
            pairs = self._expected.values()
            self._wanted = {index.path: index for turn in (0, 1) for pair in pairs for index in pair[turn]}
            for path, future in list(self._fetches.items()):
                # Downloads that failed in the previous epoch or ahead of need are retried when the shard is needed.
                if path not in self._wanted or _had_no_room(future) or (path in begin and _failed(future)):
                    self._let_go(path)
            for path in self._wanted:
                self._fetches.setdefault(path, Future())
            self._changed.notify_all()
        if not self._fetchers:
            self._fetchers = [threading.Thread(target=self._work, daemon=True, name="fetch") for _ in range(FETCHERS)]
            for fetcher in self._fetchers:
                fetcher.start()

    def read(self, index: ShardIndex, start: int, end: int) -> bytes:
        """Read bytes [start, end) of a shard. Raise `BadShardError` if it cannot be read after all attempts, DataError
        if the cache fails."""
        url, descriptor = _url(index), self._descriptor(index)
        try:
            if descriptor is not None:
                return os.pread(descriptor, end - start, start)
        except OSError as error:
            raise bad_shard(url, ReadError("the cache fails", str(error))) from None
        try:
            if url not in self._same_version:
                check_version(index, self._access)
                self._same_version.add(url)
            return read_range(url, start, end, self._access, index.version)
        except ReadError as error:
            raise bad_shard(url, error) from None

    def close(self) -> None:
        """Release all shards; threads end after their current download."""
        with self._changed:
            self._closed = True
            for path in list(self._fetches):
                self._let_go(path)
            self._changed.notify_all()

    def _descriptor(self, index: ShardIndex) -> int | None:
        """Return the descriptor of the shard in the cache; None if it must be read by range request."""
        if self._cache is None:
            return None
        if index.path not in self._wanted:
            self.expect(None, [index])
        future = self._fetches[index.path]
        if not future.done() or isinstance(future.exception(), ReadError):
            return None
        return future.result()

    def _let_go(self, path: Address) -> None:
        future = self._fetches.pop(path)
        if not future.cancel():
            future.add_done_callback(_close)

    def _work(self) -> None:
        """Download the most urgent shard that no other thread downloads, in a loop."""
        while True:
            with self._changed:
                while not self._closed and (index := self._next()) is None:
                    self._changed.wait()
                if self._closed or index is None:
                    return
                future = self._fetches[index.path]
                future.set_running_or_notify_cancel()
            try:
                future.set_result(self._fetch(index))
            except Exception as error:  # raised again when the shard is read
                future.set_exception(error)

    def _next(self) -> ShardIndex | None:
        futures = ((index, self._fetches[path]) for path, index in self._wanted.items())
        return next((index for index, future in futures if not (future.running() or future.done())), None)

    def _fetch(self, index: ShardIndex) -> int | None:
        """Return a descriptor of the shard in the cache, downloaded if missing; None if there is no room."""
        if self._cache is None:
            raise RuntimeError("no cache")
        named = f"{_url(index).address}\0{index.version or index.digest}\0{index.size}"
        key = hashlib.sha256(named.encode()).hexdigest()[:32]
        descriptor = self._cache.open(key)
        if descriptor is None and self._cache.add(key, index.size, lambda out: self._download(index, out)):
            descriptor = self._cache.open(key)
        return descriptor

    def _download(self, index: ShardIndex, out: BinaryIO) -> None:
        check_version(index, self._access)
        for part in read_parts(_url(index), index.size, self._access, index.version):
            out.write(part)
        check_version(index, self._access)


def check_version(index: ShardIndex, access: Access) -> None:
    """Check that the server still has the indexed version; otherwise raise `ReadError`."""
    now = facts(_url(index), access)
    if now.size != index.size:
        raise ReadError("replaced", f"{index.size} bytes were indexed, the server has {now.size}", lasting=True)
    if index.version and now.version != index.version:
        raise ReadError("replaced", f"version {index.version} was indexed, the server has {now.version}", lasting=True)


def _failed(future: Fetch) -> bool:
    return future.done() and future.exception() is not None


def _had_no_room(future: Fetch) -> bool:
    return future.done() and future.exception() is None and future.result() is None


def _close(future: Fetch) -> None:
    if future.exception() is None and (descriptor := future.result()) is not None:
        os.close(descriptor)


def _url(index: ShardIndex) -> Url:
    if not isinstance(index.path, Url):
        raise TypeError(f"not remote: {index.path}")
    return index.path
