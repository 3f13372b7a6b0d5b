"""Cache of complete remote shards on local disk, shared by all processes of a node, with LRU eviction.

    DIR/shards/KEY.tar       complete and never rewritten; its modification time is the time of last use
    DIR/shards/KEY.partial   being downloaded, at full size from the start; renamed once complete
    DIR/lock                 locked during eviction

Readers of a shard hold a shared lock on it; a downloader holds an exclusive lock on its partial file. Locks end with
the process, even if it is killed. So a locked shard is never evicted, and an unlocked partial file is left over from a
killed process and evicted first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.text import GIB


class ShardCache:
    """LRU cache of shards in a folder, limited to `limit` bytes, which include downloads in progress."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._root, self._folder, self._limit = folder, folder / "shards", limit

    def check(self) -> None:
        """Check that the cache is usable before any data is read."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                free = shutil.disk_usage(self._folder).free + sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise ConfigError(
                f"cannot write the shard cache: {error.strerror}",
                where=f"data.cache_dir: {self._root}",
                fix="make the folder writable, or set another data.cache_dir",
            ) from None
        if free < self._limit:
            gib = free / GIB
            raise ConfigError(
                f"the limit of the shard cache must fit the disk: {self._limit / GIB:.4g} GiB, but only {gib:.4g} GiB "
                "are free",
                where=f"data.cache_dir: {self._root}",
                fix=f"set data.cache_gib={int(gib * 9) / 10:g}, or another data.cache_dir",
            )

    def open(self, key: str) -> int | None:
        """Return a descriptor of a complete shard, or None if it is not cached. An open shard is not evicted."""
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

    def add(self, key: str, size: int, fill: Callable[[BinaryIO], object]) -> bool:
        """Make sure that a shard of `size` bytes is in the cache; return False if the shards in use leave no room.

        One process downloads it while the others wait. `fill` writes the shard from the start of a file; its
        exceptions are passed on.
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
                os.fsync(out.fileno())  # otherwise a power loss could leave zeros in a complete shard
                os.replace(partial, path)
        except OSError as error:
            raise self._failed("write", error) from None
        return True

    def _failed(self, what: str, error: OSError) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return DataError(
            f"cannot {what} the shard cache: {error.strerror or error}",
            where=f"data.cache_dir: {self._root}",
            fix="free space, or lower data.cache_gib: the disk is full"
            if full
            else "make the folder writable, or set another data.cache_dir",
        )

    @contextlib.contextmanager
    def _exclusive(self, partial: Path) -> Iterator[BinaryIO]:
        """Open and exclusively lock the partial file of a shard; remove it at the end unless it was renamed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as out:
                fcntl.flock(out, fcntl.LOCK_EX)
                if not _is_at(out.fileno(), partial):  # renamed or removed while waiting for the lock
                    continue
                try:
                    yield out
                finally:
                    if _is_at(out.fileno(), partial):
                        partial.unlink()
                    # Closing does not release the lock if a process forked meanwhile has the descriptor too.
                    fcntl.flock(out, fcntl.LOCK_UN)
                return

    def _reserve(self, partial: Path, out: BinaryIO, size: int) -> bool:
        """Reserve `size` bytes for a partial file by evicting the least recently used shards."""
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
        """Return time of last use, size in bytes and path of every file in the cache."""
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


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file unless it is locked; return whether it was removed."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
