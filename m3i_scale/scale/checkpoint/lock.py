"""One job per output directory; who it is, and how it is asked to stop."""

from __future__ import annotations

import fcntl
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
_STOP = ".stop-request.json"
LOOKED_AT_S, POLL_S = 1.0, 0.05
"""So long a lock is asked for, again and again: somebody who looks who holds it has it for an instant."""


@dataclass(frozen=True)
class Holder:
    """The process that holds an output directory."""

    pid: int
    host: str
    since: str
    trains: bool
    """Whether it looks for requests to stop; one that prunes does not."""

    def __str__(self) -> str:
        ended = self.host == socket.gethostname() and _ended(self.pid)
        gone = " (it has ended, but a process that it started has not)" if ended else ""
        return f"pid {self.pid} on host {self.host} since {self.since}{gone}"


@dataclass
class DirectoryLock:
    """Proof that this process holds an output directory. Made by `lock_directory`."""

    output_dir: Path
    is_held: bool = True

    def covers(self, path: Path) -> bool:
        """Whether `path` lies in the directory and the lock is still held."""
        return self.is_held and path.resolve().is_relative_to(self.output_dir)


@contextmanager
def lock_directory(output_dir: Path, *, trains: bool = False) -> Iterator[DirectoryLock]:
    """Hold `output_dir` (created where missing) against other jobs. Call it on rank 0 only.

    Args:
        output_dir: of the run.
        trains: whether this process asks `stop_requested` from time to time.

    The kernel holds the lock for the process and lets go of it however the process ends, kill -9 included. Across
    hosts it is as good as the `flock` of the shared file system (NFS v4, Lustre with `-o flock`, BeeGFS, GPFS: yes).

    Raises:
        CheckpointError: another job holds it (named by pid and host), it cannot be written, or it has no `flock`.
    """
    lock = _acquire(output_dir)
    held = DirectoryLock(output_dir.resolve())
    try:
        _remove_notes(output_dir)  # of a process that was killed
        _write_holder(output_dir, trains=trains)
        yield held
    finally:
        held.is_held = False
        _remove_notes(output_dir)
        lock.release()


def _remove_notes(output_dir: Path) -> None:
    with suppress(OSError):  # the lock itself must be released whatever becomes of them
        (output_dir / _STOP).unlink(missing_ok=True)
        (output_dir / _HOLDER).unlink(missing_ok=True)


def is_run_folder(folder: Path) -> bool:
    """Return whether a run has begun in it."""
    return any((folder / name).exists() for name in (_LOCK, "run.yaml", "checkpoints"))


def holder_of(output_dir: Path) -> Holder | None:
    """Return who holds `output_dir`; None: nobody.

    Raises:
        CheckpointError: the lock cannot be looked at, or whoever holds it has not yet said who it is.
    """
    try:
        with (output_dir / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        holder = _read_holder(output_dir)
    except OSError as error:
        raise CheckpointError(f"cannot look at the lock: {error.strerror}", where=str(output_dir / _LOCK)) from None
    if holder is None:
        raise CheckpointError("a job that is just starting holds the output directory", where=str(output_dir))
    return holder


def request_stop(output_dir: Path, holder: Holder) -> None:
    """Ask the run that holds `output_dir`, on whichever host it is: rank 0 looks for the file after every step.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    beside = output_dir / f"{_STOP}.{os.getpid()}"
    try:
        beside.write_text(json.dumps({"pid": holder.pid, "host": holder.host}) + "\n", encoding="utf-8")
        beside.replace(output_dir / _STOP)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the request to stop: {error.strerror}",
            where=str(output_dir / _STOP),
            fix="as a user who may write there",
        ) from None


def stop_requested(output_dir: Path) -> bool:
    """Return whether somebody has asked this process, which holds `output_dir`, to stop."""
    try:
        request = json.loads((output_dir / _STOP).read_text(encoding="utf-8"))
        return bool((request["pid"], request["host"]) == (os.getpid(), socket.gethostname()))
    except (OSError, ValueError, KeyError, TypeError):  # no request, or none of ours
        return False


def _acquire(output_dir: Path) -> FileLock:
    lock = FileLock(output_dir / _LOCK, timeout=LOOKED_AT_S, poll_interval=POLL_S, thread_local=False)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = _read_holder(output_dir) or "a job that is just starting"
        raise CheckpointError(
            "another job is writing to this output directory",
            where=str(output_dir),
            why=f"the lock is held by {holder}; two writers would mix their checkpoints",
            fix=f"m3i-scale stop {output_dir}, or set another output_dir",
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


def _write_holder(output_dir: Path, *, trains: bool) -> None:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": started, "trains": trains}
    try:
        (output_dir / _HOLDER).write_text(json.dumps(note) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the output directory: {error.strerror}",
            where=str(output_dir / _HOLDER),
            fix="free space and make it writable, or set another output_dir",
        ) from None


def _read_holder(output_dir: Path) -> Holder | None:
    try:
        note = json.loads((output_dir / _HOLDER).read_text(encoding="utf-8"))
        return Holder(int(note["pid"]), str(note["host"]), str(note["since"]), note.get("trains") is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
