"""Whoever reads a checkpoint holds a shared lock on its manifest; whoever removes it wants the lock alone.

The kernel lets go of the lock however a process ends, and no file of the committed folder changes. Where a file system
has no `flock`, no run starts and nothing is pruned (see `lock_directory`), so a reader needs no lock there.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.manifest import MANIFEST

_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed while it is read, on this host and wherever `flock` reaches.

    Raises:
        CheckpointError: it is gone, or is just being removed.
    """
    path = folder / MANIFEST
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error.strerror}", where=str(path)) from None
    try:
        taken = _take(descriptor, fcntl.LOCK_SH)
        if not taken or not _still_there(path, descriptor):
            raise CheckpointError(
                "the checkpoint is being removed by another process",
                where=str(folder),
                fix="take a newer checkpoint of the run",
            )
        yield
    finally:
        _let_go(descriptor)


@contextmanager
def alone_with(folder: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint; while the block runs, nobody begins to.

    Raises:
        OSError: the manifest cannot be opened, or cannot be locked.
    """
    try:
        descriptor = _open_to_lock(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        yield True  # without a manifest it is no checkpoint, and nobody takes it
        return
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        yield True  # a link or a folder in the place of a manifest: no checkpoint either
        return
    try:
        yield _take(descriptor, fcntl.LOCK_EX)
    finally:
        _let_go(descriptor)


def _open_to_lock(path: Path) -> int:
    """NFS locks alone only what is open for writing; a manifest that is read-only can be locked everywhere else."""
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    return True


def _let_go(descriptor: int) -> None:
    try:
        # Said, not left to the closing: processes forked meanwhile share the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    finally:
        os.close(descriptor)


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
