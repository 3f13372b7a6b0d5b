"""Remote shards as one process reads them: out of the cache where they have come whole, by range until then.

The rule, for every shard that is read:

- It is fetched whole into the cache, by threads that also look one window ahead, where the cache has room for it beside
  the shards in use.
- Until it has come, and where there is no room, single samples are read by range.
- With a checksum in manifest.json, no sample of it is used before the whole has been verified; a pipe, or a server
  without ranges, can only be read whole. These wait. A shard without room is read through once to be verified: were it
  used as it is, the room that others leave would decide whether a damaged one is lost, and orders would part.
- A fetch ahead of need that fails decides nothing: the shard is bad when it cannot be read once it is needed. Otherwise
  a fault that has passed would cost a shard in one process and not in another, and their orders would part.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Hashable, Sequence
from typing import BinaryIO

from m3i_scale.data.cache import ShardCache, arrived, key_of, note_arrived
from m3i_scale.data.faults import FaultError, bad_shard
from m3i_scale.data.places import Place, Url
from m3i_scale.data.remote import PART_BYTES, Access, facts, fetch, read_range
from m3i_scale.data.scan import ShardIndex
from m3i_scale.errors import DataError

FETCHERS = 4
"""Threads of a process that fetch shards."""
CHECKSUM_ATTEMPTS = 2
"""A wrong checksum may be a fault of the way; twice it is one of the shard."""
_NO_ROOM = "no room"
Outcome = Exception | str


class RemoteShards:
    """What one process reads of remote shards; threads start with the first shard that is expected.

    Args:
        access: time limits, attempts, cache.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._cache = ShardCache(access.cache_dir, access.cache_bytes) if access.cache_bytes else None
        self._expected: dict[Hashable, tuple[list[ShardIndex], list[ShardIndex]]] = {}
        self._now: set[Place] = set()
        self._here: dict[Place, int] = {}
        self._outcomes: dict[Place, tuple[int, Outcome]] = {}
        self._on_their_way: dict[Place, int] = {}
        self._begun = 0
        self._only_whole: set[Place] = set()
        self._checked: set[Place] = set()
        self._verified: set[Place] = set()
        self._changed = threading.Condition()
        self._fetchers: list[threading.Thread] = []
        self._closed = False

    def expect(self, reader: Hashable, now: Sequence[ShardIndex], then: Sequence[ShardIndex] = ()) -> None:
        """Tell which shards a stream reads now, and which it reads next; what it named before is let go."""
        with self._changed:
            self._expected[reader] = (list(now), list(then))
            kept = {index.path for pair in self._expected.values() for shards in pair for index in shards}
            for path in [path for path in self._here if path not in kept]:
                os.close(self._here.pop(path))
            started = {index.path for index in now}
            self._now = {index.path for shards, _ in self._expected.values() for index in shards}
            # What failed in the pass before, or ahead of its time, gets another chance when its time has come.
            self._outcomes = {
                path: (fetch, outcome)
                for path, (fetch, outcome) in self._outcomes.items()
                if path in kept and path not in started and outcome != _NO_ROOM
            }
            self._checked -= started
            self._changed.notify_all()
        if self._cache is not None and not self._fetchers:
            self._fetchers = [threading.Thread(target=self._work, daemon=True, name="fetch") for _ in range(FETCHERS)]
            for fetcher in self._fetchers:
                fetcher.start()

    def read(self, index: ShardIndex, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard.

        Raises:
            BadShardError: it cannot be read, after all attempts.
            DataError: the cache fails, or is too small for a shard that can only be read whole.
        """
        try:
            return self._read(index, start, end)
        except FaultError as fault:
            raise bad_shard(index.path, fault) from None

    def close(self) -> None:
        """Let all shards go; threads end after what they do now."""
        with self._changed:
            self._closed = True
            while self._here:
                os.close(self._here.popitem()[1])
            self._changed.notify_all()

    def _read(self, index: ShardIndex, start: int, end: int) -> bytes:
        url = _url(index)
        descriptor = self._arrived(index)
        if descriptor is not None:
            return _pread(descriptor, start, end)
        try:
            if url not in self._checked:
                check_version(index, self._access)
                self._checked.add(url)
            return read_range(url, start, end, self._access, index.version)
        except FaultError as fault:
            if not fault.not_ranged or self._cache is None:
                raise
            self._only_whole.add(url)
            return self._read(index, start, end)

    def _arrived(self, index: ShardIndex) -> int | None:
        """Where the shard lies in the cache; None where it is to be read by range."""
        if self._cache is None:
            return None
        path, asked = index.path, self._begun
        if path not in self._now:
            self.expect(None, [index])
        whole = bool(index.sha256) or path in self._only_whole or _url(index).scheme == "pipe"
        with self._changed:
            while whole and path not in self._here and not self._decided(path, asked) and not self._closed:
                self._changed.wait()
            if path in self._here:
                return self._here[path]
            outcome = self._outcomes.get(path, (0, None))[1]
        if isinstance(outcome, Exception) and (whole or not isinstance(outcome, FaultError)):
            raise outcome
        if outcome == _NO_ROOM and (path in self._only_whole or _url(index).scheme == "pipe"):
            raise DataError(
                "the shard can only be read whole, and the cache has no room for it beside the shards in use",
                where=str(path),
                fix="raise data.cache_gib, or lower data.shuffle_shards",
            )
        return None

    def _decided(self, path: Place, asked: int) -> bool:
        """Whether it is known how a fetch ended. One that failed counts if it was begun after it was asked for."""
        fetch, outcome = self._outcomes.get(path, (0, None))
        if isinstance(outcome, FaultError) and fetch <= asked:
            del self._outcomes[path]
            self._changed.notify_all()
            return False
        return outcome is not None

    def _work(self) -> None:
        """A fetcher: the most urgent shard that nobody else fetches, again and again."""
        while True:
            with self._changed:
                while not self._closed and (index := self._next()) is None:
                    self._changed.wait()
                if self._closed or index is None:
                    return
                self._begun += 1
                self._on_their_way[index.path] = self._begun
            found: int | Outcome
            try:
                found = self._fetch(index)
            except Exception as error:  # whatever it is, it is raised where the shard is read
                found = error
            self._note(index.path, found)

    def _next(self) -> ShardIndex | None:
        for turn in (0, 1):
            for pair in self._expected.values():
                for index in pair[turn]:
                    known = (self._here, self._outcomes, self._on_their_way)
                    if not any(index.path in places for places in known):
                        return index
        return None

    def _note(self, path: Place, found: int | Outcome) -> None:
        with self._changed:
            fetch = self._on_their_way.pop(path)
            kept = any(index.path == path for pair in self._expected.values() for shards in pair for index in shards)
            if not isinstance(found, int):
                self._outcomes[path] = (fetch, found)
            elif kept and not self._closed:
                self._here[path] = found
            else:
                os.close(found)
            self._changed.notify_all()

    def _fetch(self, index: ShardIndex) -> int | str:
        """A descriptor of the shard in the cache, fetched if it is not there."""
        if self._cache is None:
            raise RuntimeError("no cache")
        key = cache_key(_url(index), index.version or index.sha256 or index.digest, index.size)
        found = self._cache.open(key)
        if found is None and self._cache.add(key, index.size, functools.partial(self._fill, index)):
            found = self._cache.open(key)
        if found is not None:
            return found
        self._read_through(index)
        return _NO_ROOM

    def _read_through(self, index: ShardIndex) -> None:
        """Verify a shard that has no room, once; reads by range then see another version."""
        if not index.sha256 or index.path in self._verified:
            return
        try:
            found = _digest(index, self._access)
            if found != index.sha256:  # a fault of the way, perhaps
                found = _digest(index, self._access)
        except FaultError as fault:
            if fault.not_ranged:
                return  # it can only be read whole, and the reader will say that there is no room
            raise
        if found != index.sha256:
            raise _wrong_checksum(index, found)
        self._verified.add(index.path)

    def _fill(self, index: ShardIndex, out: BinaryIO) -> None:
        for attempt in range(CHECKSUM_ATTEMPTS):
            try:
                self._fetch_rest(index, out)
            except FaultError as fault:
                if fault.lasting:
                    note_arrived(out, 0)
                raise
            if not index.sha256:
                return
            out.flush()
            out.seek(0)
            found = sha256_of(out, index.size)
            if found == index.sha256:
                return
            note_arrived(out, 0)
            if attempt + 1 == CHECKSUM_ATTEMPTS:
                raise _wrong_checksum(index, found)

    def _fetch_rest(self, index: ShardIndex, out: BinaryIO) -> None:
        """A shard, but for what has arrived of this version before: its key in the cache holds the version."""
        url = _url(index)

        def note(count: int) -> None:
            if not index.version:
                return  # nobody could say whether the rest is of the same file
            if url.scheme not in ("http", "https"):  # whose every answer tells the version
                check_version(index, self._access)
            note_arrived(out, count)

        check_version(index, self._access)
        fetch(url, index.size, out, self._access, index.version, arrived=arrived(out), note=note)
        check_version(index, self._access)


def check_version(index: ShardIndex, access: Access) -> None:
    """See that the server still has what was indexed.

    Raises:
        FaultError: it has not, or does not answer.
    """
    url = _url(index)
    if url.scheme == "pipe":
        return
    now = facts(url, access)
    if now.size != index.size:
        raise FaultError("replaced", f"{index.size} bytes were indexed, the server has {now.size}", lasting=True)
    if index.version and now.version != index.version:
        raise FaultError("replaced", f"version {index.version} was indexed, the server has {now.version}", lasting=True)


def cache_key(url: Url, version: str, size: int) -> str:
    """The shard's name in the cache. What a pipe gives has a size only when it has been run."""
    return key_of(url.address, version, 0 if url.scheme == "pipe" else size)


def sha256_of(stream: BinaryIO, size: int) -> str:
    """Hexadecimal digest of the next `size` bytes of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(min(size, 1 << 20)):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _digest(index: ShardIndex, access: Access) -> str:
    """That of the server's bytes, none of which is kept."""
    check_version(index, access)
    digest = hashlib.sha256()
    for start in range(0, index.size, PART_BYTES):
        end = min(index.size, start + PART_BYTES)
        digest.update(read_range(_url(index), start, end, access, index.version))
    check_version(index, access)
    return digest.hexdigest()


def _wrong_checksum(index: ShardIndex, found: str) -> FaultError:
    return FaultError("wrong checksum", f"sha256 is {found}, manifest.json has {index.sha256}", lasting=True)


def _pread(descriptor: int, start: int, end: int) -> bytes:
    try:
        return os.pread(descriptor, end - start, start)
    except OSError as error:
        raise FaultError("the cache fails", str(error)) from None


def _url(index: ShardIndex) -> Url:
    if not isinstance(index.path, Url):
        raise TypeError(f"not remote: {index.path}")
    return index.path
