"""The cache keeps whole remote shards on the host's disk for all its processes; the least recently used make room.

    DIR/shards/KEY.tar       complete, and never written again; its time is that of its last use
    DIR/shards/KEY.partial   on its way, at its full size from the start; renamed when it is complete and verified
    DIR/lock                 held while room is made

Who reads a shard holds a shared lock on it, who fetches one an exclusive lock on its partial. Both end with their
process, however it ends. So a shard under a lock is never removed, and a partial without one is what a kill left: the
first to make room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from m3i_scale.data.remote.address import Url
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.text import GIB

Fill = Callable[[BinaryIO], object]


class ShardCache:
    """Keeps a folder of shards, of at most `limit` bytes.

    Args:
        folder: made where it is absent.
        limit: in bytes; includes what is on its way.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._root, self._folder, self._limit = folder, folder / "shards", limit

    def check(self) -> None:
        """Check, before anything is read, that the cache can be used."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                free = shutil.disk_usage(self._folder).free + sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise ConfigError(
                f"cannot write the cache of shards: {error.strerror}", where=f"data.cache_dir: {self._root}"
            ) from None
        if free < self._limit:
            gib = free / GIB
            raise ConfigError(
                f"the cache of shards may take {self._limit / GIB:.4g} GiB, and there is room for {gib:.4g}",
                where=f"data.cache_dir: {self._root}",
                fix=f"data.cache_gib={int(gib * 9) / 10:g}, or another data.cache_dir",
            )

    def open(self, key: str) -> int | None:
        """Return a descriptor of a complete shard, which is kept until it is closed; None where there is none."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed("read", error) from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.fstat(descriptor).st_nlink:  # removed between the two calls
            os.close(descriptor)
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return descriptor

    def open_or_add(self, key: str, size: int, fill: Fill) -> int | None:
        """Return a descriptor as `open` does, of a shard that is fetched where there is none; see `add`.

        None where the shards in use leave no room for it.
        """
        descriptor = self.open(key)
        if descriptor is None and self.add(key, size, fill):
            descriptor = self.open(key)
        return descriptor

    def add(self, key: str, size: int, fill: Fill) -> bool:
        """Make sure that a shard is in the cache. One process fetches it, the others wait.

        Args:
            key: see `cache_key`.
            size: in bytes.
            fill: writes the shard from the beginning of a file and verifies it; what it raises is passed on.

        Returns:
            False where the shards in use leave no room for it.
        """
        path, partial = self._path(key), self._path(key, ".partial")
        try:
            with self._exclusive(partial) as out:
                if path.is_file():
                    return True
                if not self._reserve(partial, out, size):
                    return False
                fill(out)
                out.flush()
                os.fsync(out.fileno())  # else a power cut could leave zeros under the name of a complete shard
                os.replace(partial, path)
        except OSError as error:
            raise self._failed("write", error) from None
        return True

    def _failed(self, what: str, error: OSError) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return DataError(
            f"cannot {what} the cache of shards: {error.strerror or error}",
            where=f"data.cache_dir: {self._root}",
            fix="something else fills the disk: make room, or lower data.cache_gib" if full else None,
        )

    @contextlib.contextmanager
    def _exclusive(self, partial: Path) -> Iterator[BinaryIO]:
        """Open the partial of a shard, locked for this caller alone; it is removed at the end unless it was renamed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as out:
                fcntl.flock(out, fcntl.LOCK_EX)
                if not _is_at(out.fileno(), partial):  # renamed or removed while this one waited
                    continue
                try:
                    yield out
                finally:
                    if _is_at(out.fileno(), partial):
                        partial.unlink()
                    # Closing does not end it where a process that was forked meanwhile has the descriptor too.
                    fcntl.flock(out, fcntl.LOCK_UN)
                return

    def _reserve(self, partial: Path, out: BinaryIO, size: int) -> bool:
        """Take `size` bytes for a partial, removing what was used longest ago."""
        with self._lock():
            entries = [entry for entry in self._entries() if entry[2] != partial]
            entries.sort(key=lambda entry: (entry[2].suffix != ".partial", entry))
            total = size + sum(taken for _, taken, _ in entries)
            for _, taken, path in entries:
                if total > self._limit and _remove(path):
                    total -= taken
            if total > self._limit:
                return False
            os.posix_fallocate(out.fileno(), 0, max(1, size))
            out.truncate(size)
            return True

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Return the time of last use, the bytes and the path of everything in the cache."""
        entries = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                facts = entry.stat()
                entries.append((facts.st_mtime, facts.st_size, Path(entry.path)))
        return entries

    def _lock(self) -> FileLock:
        return FileLock(self._root / "lock", fallback_to_soft=False)

    def _path(self, key: str, suffix: str = ".tar") -> Path:
        return self._folder / f"{key}{suffix}"


def cache_key(url: Url, version: str, size: int) -> str:
    """Return the name of a shard in the cache, which differs for another version."""
    return hashlib.sha256(f"{url.address}\0{version}\0{size}".encode()).hexdigest()[:32]


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file, unless somebody holds a lock on it; return whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
