"""Files of a run's output directory, its lock for one job at a time, and stop requests.

The kernel releases a process's lock whenever the process ends, including `kill -9`. Across hosts the lock is as
reliable as `flock` of the shared file system (NFS v4, Lustre with `-o flock`, BeeGFS, GPFS: yes).
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

from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.files import has_ended, read_json, write_json

METRICS = "metrics.jsonl"
RUN_FILE = "run.yaml"
QUARANTINE, QUARANTINE_VALIDATION = "quarantine.jsonl", "quarantine_validation.jsonl"
FAILURE = "failure.json"
RANK_RECORDS = "failure"
"""Folder for the error files of ranks if no agent has set another one."""
ATTEMPTS = "attempts.json"
PICTURES, PICTURE_LIST = "pictures", "pictures.json"
"""Folder with one subfolder per step, and the file that lists the pictures in each."""
_STOP = ".stop-request.json"
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
ACQUIRE_S, POLL_S = 1.0, 0.05
"""Time to retry a lock: a process that checks the holder has it for an instant."""


@dataclass(frozen=True)
class LockFile:
    """A lock in an output directory. A note file next to it describes the holder."""

    name: str
    busy: str
    """Error message for the second process."""
    why: str

    @property
    def note(self) -> str:
        """Return the name of the holder's note."""
        return f"{self.name}-holder.json"


_LAUNCH = LockFile(".launch-lock", "another launch of this run is under way", "two launches would start it twice")
RUN = LockFile(".lock", "another job is writing to this output directory", "two writers would mix their checkpoints")


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    since: str
    trains: bool = False
    """Whether it checks for stop requests; a pruning process does not."""

    def __str__(self) -> str:
        ended = self.host == socket.gethostname() and has_ended(self.pid)
        orphan = " (it has ended, but a process that it started has not)" if ended else ""
        return f"pid {self.pid} on host {self.host} since {self.since}{orphan}"


class UnknownHolderError(CheckpointError):
    """A lock is held by a process that has not yet written its note."""


@contextmanager
def lock_directory(output_dir: Path, *, lock: LockFile = RUN, trains: bool = False) -> Iterator[None]:
    """Lock `output_dir` (created if missing) against other jobs. Call it on one rank only. Set `trains` if this process
    regularly calls `stop_requested`."""
    held = _acquire(output_dir, lock)
    try:
        _remove_notes(output_dir, lock)  # left by a killed process
        _write_note(output_dir, lock, trains)
        yield
    finally:
        _remove_notes(output_dir, lock)
        held.release()


def holder_of(output_dir: Path, lock: LockFile = RUN) -> Holder | None:
    """Return the holder of a lock of `output_dir`; None if it is free. Raise UnknownHolderError if its note is not
    written yet, CheckpointError if the lock file cannot be opened."""
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
        raise CheckpointError(
            f"cannot read the lock: {error.strerror}", where=str(path), fix="make the file readable"
        ) from None
    if holder is None:
        raise UnknownHolderError(
            "a job that is starting has locked the output directory",
            where=str(output_dir),
            fix="wait a few seconds, and try again",
        )
    return holder


@contextmanager
def launch_lock(output_dir: Path) -> Iterator[None]:
    """Lock the output folder while a launch runs; another launch into it is an error."""
    with lock_directory(output_dir, lock=_LAUNCH):
        with lock_directory(output_dir):  # rank 0's lock: free unless a rank of an earlier launch still runs
            pass
        yield


def launch_of(output_dir: Path) -> str | None:
    """Return a description of the process that launches the run of an output folder; None if no launch is known."""
    try:
        holder = holder_of(output_dir, _LAUNCH)
    except UnknownHolderError as error:
        return error.what
    except CheckpointError:  # an unreadable lock counts as no launch
        return None
    return None if holder is None else str(holder)


def is_run_folder(folder: Path) -> bool:
    """Return whether a run was started in a folder."""
    return any((folder / name).exists() for name in (RUN.name, RUN_FILE, "checkpoints"))


def check_output_dir(output_dir: Path) -> Path:
    """Return the output directory of a run; raise ConfigError if it is a file, or below one."""
    place = f"output_dir: {output_dir}"
    try:
        above = next((path for path in (output_dir, *output_dir.parents) if path.exists()), output_dir)
    except OSError as error:
        raise ConfigError(
            f"output_dir cannot be opened: {error.strerror}", where=place, fix="make it readable, or use another folder"
        ) from None
    if not above.is_dir():
        raise ConfigError(
            f"output_dir must be a folder, but '{above}' is a file", where=place, fix="use another folder"
        )
    return output_dir


def request_stop(output_dir: Path, holder: Holder) -> None:
    """Request a stop of the run that holds `output_dir`, on any host: rank 0 looks for the file once a second."""
    try:
        write_json(output_dir / _STOP, {"pid": holder.pid, "host": holder.host}, durable=False)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the stop request: {error.strerror}",
            where=str(output_dir / _STOP),
            fix="run the command as a user who may write to the folder",
        ) from None


def stop_requested(output_dir: Path) -> bool:
    """Return whether this process, which holds `output_dir`, was asked to stop."""
    try:
        request = read_json(output_dir / _STOP)
        return bool((request["pid"], request["host"]) == (os.getpid(), socket.gethostname()))
    except (OSError, ValueError, KeyError, TypeError):  # no request, or one for another process
        return False


def _acquire(output_dir: Path, lock: LockFile) -> FileLock:
    # The library would fall back from `flock` to a marker file, which outlives a killed process.
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
            fix=f"wait for it, or run `m3i-scale stop {output_dir}`; for another run set another output_dir",
        ) from None
    except OSError as error:
        if error.errno in _NO_FLOCK:
            raise CheckpointError(
                "the file system of the output directory must support flock, so that only one job writes to it",
                where=str(output_dir),
                fix="set output_dir to a file system with flock (for Lustre: mount with -o flock)",
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
    with suppress(OSError):  # the lock must be released even if this fails
        for name in names:
            (output_dir / name).unlink(missing_ok=True)
