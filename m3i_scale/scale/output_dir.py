"""Name the files of a run's output directory, lock it, so that one job at a time uses it, say which one, and ask it to
stop.

The kernel holds a lock for its process and lets go of it however the process ends, kill -9 included. Across hosts it is
as good as the `flock` of the shared file system (NFS v4, Lustre with `-o flock`, BeeGFS, GPFS: yes).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from m3i_scale.destination import check_destination
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import has_ended, read_json, write_json

METRICS = "metrics.jsonl"
RUN_FILE = "run.yaml"
QUARANTINE, QUARANTINE_VALIDATION = "quarantine.jsonl", "quarantine_validation.jsonl"
FAILURE = "failure.json"
RANK_RECORDS = "failure"
"""Folder where ranks leave their records when no agent has given them another one."""
ATTEMPTS = "attempts.json"
PICTURES, PICTURE_LIST = "pictures", "pictures.json"
"""Folder of a folder a step, and what lists the pictures in each."""
_STOP = ".stop-request.json"
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
ACQUIRE_S, POLL_S = 1.0, 0.05
"""A lock is tried for so long: whoever looks who holds it has it for an instant."""


@dataclass(frozen=True)
class LockFile:
    """Names a lock in an output directory. A note beside it says who holds it."""

    name: str
    busy: str
    """The error of the second one who wants it."""
    why: str

    @property
    def note(self) -> str:
        """Return the name of the file that says who holds the lock."""
        return f"{self.name}-holder.json"


RUN = LockFile(".lock", "another job is writing to this output directory", "two writers would mix their checkpoints")


@dataclass(frozen=True)
class Holder:
    """Describes the process that holds a lock."""

    pid: int
    host: str
    since: str
    trains: bool = False
    """Whether it looks for requests to stop; one that prunes does not."""

    def __str__(self) -> str:
        ended = self.host == socket.gethostname() and has_ended(self.pid)
        orphan = " (it has ended, but a process that it started has not)" if ended else ""
        return f"pid {self.pid} on host {self.host} since {self.since}{orphan}"


class UnknownHolderError(CheckpointError):
    """Says that a lock is held by a process that has not yet written its note."""


@contextmanager
def lock_directory(output_dir: Path, *, lock: LockFile = RUN, trains: bool = False) -> Iterator[None]:
    """Hold a lock of `output_dir` (created where missing) against other jobs. Call it on one rank only.

    Args:
        output_dir: of the run.
        lock: against whom.
        trains: whether this process asks `stop_requested` from time to time.
    """
    held = _acquire(output_dir, lock)
    try:
        _remove_notes(output_dir, lock)  # of a process that was killed
        _write_note(output_dir, lock, trains)
        yield
    finally:
        _remove_notes(output_dir, lock)
        held.release()


def holder_of(output_dir: Path, lock: LockFile = RUN) -> Holder | None:
    """Return who holds a lock of `output_dir`; None: nobody.

    Raises:
        UnknownHolderError: somebody holds it.
        CheckpointError: the lock cannot be looked at.
    """
    path = output_dir / lock.name
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        holder = _read_note(output_dir, lock)
    except OSError as error:
        raise CheckpointError(f"cannot look at the lock: {error.strerror}", where=str(path)) from None
    if holder is None:
        raise UnknownHolderError("a job that is just starting holds the output directory", where=str(output_dir))
    return holder


def is_run_folder(folder: Path) -> bool:
    """Return whether a run has begun in a folder."""
    return any((folder / name).exists() for name in (RUN.name, RUN_FILE, "checkpoints"))


def check_output_dir(output_dir: Path) -> Path:
    """Return the output directory of a run; refuse a file, and a folder that holds shards and no run."""
    place = f"output_dir: {output_dir}"
    try:
        if not is_run_folder(output_dir):
            check_destination(output_dir, place)
        above = next((path for path in (output_dir, *output_dir.parents) if path.exists()), output_dir)
    except OSError as error:
        raise ConfigError(
            f"output_dir cannot be opened: {error.strerror}", where=place, fix="name another folder"
        ) from None
    if not above.is_dir():
        raise ConfigError(
            f"output_dir must be a folder, but '{above}' is a file", where=place, fix="name another folder"
        )
    return output_dir


def request_stop(output_dir: Path, holder: Holder) -> None:
    """Ask the run that holds `output_dir`, on whichever host it is: rank 0 looks for the file after every step."""
    try:
        write_json(output_dir / _STOP, {"pid": holder.pid, "host": holder.host}, durable=False)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the request to stop: {error.strerror}",
            where=str(output_dir / _STOP),
            fix="as a user who may write there",
        ) from None


def stop_requested(output_dir: Path) -> bool:
    """Return whether somebody has asked this process, which holds `output_dir`, to stop."""
    try:
        request = read_json(output_dir / _STOP)
        return bool((request["pid"], request["host"]) == (os.getpid(), socket.gethostname()))
    except (OSError, ValueError, KeyError, TypeError):  # no request, or one to another process
        return False


def _acquire(output_dir: Path, lock: LockFile) -> FileLock:
    # A marker in the place of `flock`, which the library would fall back to, outlives a killed process.
    held = FileLock(
        output_dir / lock.name,
        timeout=ACQUIRE_S,
        poll_interval=POLL_S,
        thread_local=False,
        fallback_to_soft=False,
    )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        holder = _read_note(output_dir, lock) or "a job that is just starting"
        raise CheckpointError(
            lock.busy,
            where=str(output_dir),
            why=f"the lock is held by {holder}; {lock.why}",
            fix=f"wait for it or m3i-scale stop {output_dir}; a run may also take another output_dir",
        ) from None
    except OSError as error:
        if error.errno in _NO_FLOCK:
            raise CheckpointError(
                "the file system of the output directory has no flock, so two jobs could not be kept apart",
                where=str(output_dir),
                fix="set output_dir to a file system that has it (for Lustre: mount with -o flock)",
            ) from None
        raise CheckpointError(
            f"cannot lock the output directory: {error.strerror or error}",
            where=str(output_dir),
            fix="make it writable, or set another output_dir",
        ) from None
    return held


def _write_note(output_dir: Path, lock: LockFile, trains: bool) -> None:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    holder = Holder(os.getpid(), socket.gethostname(), since, trains)
    try:
        write_json(output_dir / lock.note, asdict(holder), durable=False)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the output directory: {error.strerror}",
            where=str(output_dir / lock.note),
            fix="free space and make it writable, or set another output_dir",
        ) from None


def _read_note(output_dir: Path, lock: LockFile) -> Holder | None:
    try:
        note = read_json(output_dir / lock.note)
        return Holder(int(note["pid"]), str(note["host"]), str(note["since"]), note.get("trains") is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remove_notes(output_dir: Path, lock: LockFile) -> None:
    names = (lock.note, _STOP) if lock is RUN else (lock.note,)
    with suppress(OSError):  # the lock itself must be released whatever becomes of them
        for name in names:
            (output_dir / name).unlink(missing_ok=True)
