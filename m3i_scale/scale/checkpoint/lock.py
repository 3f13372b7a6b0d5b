"""One job per output directory."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from m3i_scale.errors import CheckpointError

_LOCK = ".lock"
_HOLDER = ".lock-holder.json"


@dataclass
class DirectoryLock:
    """Proof that this process holds an output directory. Made by `lock_directory`."""

    output_dir: Path
    is_held: bool = True

    def covers(self, path: Path) -> bool:
        """Whether `path` lies in the directory and the lock is still held."""
        return self.is_held and path.resolve().is_relative_to(self.output_dir)


@contextmanager
def lock_directory(output_dir: Path) -> Iterator[DirectoryLock]:
    """Hold `output_dir` (created where missing) against other jobs. Call it on rank 0 only.

    The kernel holds the lock for the process and lets go of it however the process ends, kill -9 included. Across
    hosts it is as good as the `flock` of the shared file system (NFS v4, Lustre with `-o flock`, BeeGFS, GPFS: yes).

    Raises:
        CheckpointError: another job holds it (named by pid and host), it cannot be written, or it has no `flock`.
    """
    lock = _acquire(output_dir)
    held = DirectoryLock(output_dir.resolve())
    try:
        _write_holder(output_dir)
        yield held
    finally:
        held.is_held = False
        with suppress(OSError):  # only a note for people; the lock itself must be released whatever becomes of it
            (output_dir / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _acquire(output_dir: Path) -> FileLock:
    lock = FileLock(output_dir / _LOCK, timeout=0, thread_local=False)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            "another job is writing to this output directory",
            where=str(output_dir),
            why=f"the lock is held by {_holder(output_dir)}; two writers would mix their checkpoints",
            fix="stop that job, or set another output_dir",
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"cannot lock the output directory: {reason}",
            where=str(output_dir),
            fix="make it writable, or set another output_dir",
        ) from None
    if isinstance(lock, SoftFileLock):
        # Newer releases of filelock turn into a lock that a killed process would leave behind.
        lock.release()
        raise CheckpointError(
            "the file system of the output directory has no flock, so two jobs could not be kept apart",
            where=str(output_dir),
            fix="set output_dir to a file system that has it (for Lustre: mount with -o flock)",
        )
    return lock


def _write_holder(output_dir: Path) -> None:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
    try:
        (output_dir / _HOLDER).write_text(json.dumps(note) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the output directory: {error.strerror}",
            where=str(output_dir / _HOLDER),
            fix="free space and make it writable, or set another output_dir",
        ) from None


def _holder(output_dir: Path) -> str:
    try:
        note = json.loads((output_dir / _HOLDER).read_text(encoding="utf-8"))
        pid, host, since = int(note["pid"]), str(note["host"]), str(note["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a job that is just starting"
    gone = (
        " (it has ended, but a process that it started has not)" if host == socket.gethostname() and _ended(pid) else ""
    )
    return f"pid {pid} on host {host} since {since}{gone}"


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
