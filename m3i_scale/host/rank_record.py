"""Heartbeats and error reports of ranks, for their launcher.

Heartbeats are small files that ranks map into memory and their host's agent reads, even after a kill. A beat needs no
system call and no thread that could starve: the kernel keeps the page of a killed process.

A failing rank records when, where and why it failed. Agents detect ranks killed by a signal. Other launchers do not, so
without an agent a rank also records its start and its end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import socket
import struct
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_scale.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, MissingRanksError, UserError
from m3i_scale.files import json_line, read_json, read_json_lines, write_json
from m3i_scale.host.failures import COLLECTIVES, Failure, Kind
from m3i_scale.host.output_dir import RANK_RECORDS
from m3i_scale.output import print_line
from m3i_scale.rank_variables import adopt_rank_variables

PHASES = ("data", "forward", "teacher", "heads", "backward", "reduce", "optimizer", "ema", "other")
"""In the order of a step; `other` is the remaining time."""

RECORDS = "M3I_SCALE_RECORDS"
"""Environment variable: this host's folder for heartbeats and error files of its ranks."""

_LAYOUT = struct.Struct("<qqdd16s")

RECORD_FILES = ("rank-*.json", "host-*.jsonl", f"{COLLECTIVES}*")
"""Errors of failed ranks, starts and ends of a host's ranks, and recorded collectives."""
_TRACE = 30
_SILENT = "the rank ended without an error report: killed (for want of memory, most often), or its host is gone"


@dataclass(frozen=True)
class RankState:
    """State of a rank, as read by an agent."""

    step: int
    """Completed optimizer steps; −1 before the loop."""
    began: int
    """Step at which the loop began; −1 before."""
    phase: str
    """A phase of the step, or the activity outside of steps (start, open, resume, save, evaluate …)."""
    changed: float
    """Unix time of the last change."""
    timeout_s: float
    """Collective timeout of this phase; 0 before the training loop sets one."""


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank in its host's folder for records."""
    return folder / f"rank-{rank:05d}.heartbeat"


class Heartbeat:
    """Heartbeat of this rank. If `path` is None, step and phase are tracked for its error record, but not written."""

    def __init__(self, path: Path | None) -> None:
        self.step, self.phase = -1, "start"
        self.timeout_s = 0.0
        """Written with the next beat."""
        self._began = -1
        self._map: mmap.mmap | None = None
        if path is not None:
            path.write_bytes(bytes(_LAYOUT.size))  # a sparse file would cause SIGBUS on a full disk
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._write()

    def at(self, phase: str, step: int | None = None) -> None:
        """Record that the rank begins `phase` (at most 16 letters); `step`: completed steps, if they have changed
        too."""
        self.phase = phase
        if step is not None:
            self.step = step
            self._began = step if self._began < 0 else self._began
        self._write()

    def _write(self) -> None:
        if self._map is not None:
            name = self.phase.encode()[:16]
            self._map[:] = _LAYOUT.pack(self.step, self._began, time.time(), self.timeout_s, name)


def read_heartbeat(path: Path) -> RankState | None:
    """Read a rank's heartbeat; None before its first beat."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != _LAYOUT.size:
        return None
    step, began, changed, timeout_s, name = _LAYOUT.unpack(raw)
    if not changed:
        return None
    return RankState(step, began, name.rstrip(b"\0").decode(errors="replace"), changed, timeout_s)


@contextlib.contextmanager
def recorded(output_dir: Path) -> Iterator[Heartbeat]:
    """Write an error report if the code inside fails; yield the heartbeat of this rank, which the code updates.

    The launch agent determines the folder of reports; other launchers use OUTPUT/failure. A rank without a launcher
    prints its error instead.
    """
    adopt_rank_variables(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    agent_folder = os.environ.get(RECORDS)
    folder = Path(agent_folder) if agent_folder else None
    heartbeat = Heartbeat(heartbeat_file(folder, rank) if folder is not None else None)
    if folder is None and "WORLD_SIZE" in os.environ:
        folder = output_dir / RANK_RECORDS
    if folder is not None:
        with contextlib.suppress(OSError):  # errors of the folder are reported when the run opens it
            _begin(folder, rank)
        if not faulthandler.is_enabled():
            faulthandler.enable()  # shows at least the Python lines of a crash in native code
    try:
        yield heartbeat
    except BaseException as error:
        is_normal_end = isinstance(error, SystemExit) and error.code in (None, 0, EXIT_PREEMPTED)
        if folder is not None and not is_normal_end:
            failure = _failure(error, rank, heartbeat)
            try:
                write_record(folder, failure)
            except OSError as cause:  # it must not hide why the rank failed
                print_line(f"no record of this failure ({cause}): {failure.where()}: {failure.message}", stderr=True)
        elif folder is not None:
            _end(folder, rank)
        raise
    if folder is not None:
        _end(folder, rank)


def _failure(error: BaseException, rank: int, heartbeat: Heartbeat) -> Failure:
    explained = error if isinstance(error, UserError) else None
    kind: Kind = "user_error" if explained and explained.exit_code == EXIT_USER_ERROR else "exception"
    trace = [] if explained else traceback.format_exception(error)
    return Failure(
        time=time.time(),
        host=socket.gethostname(),
        rank=rank,
        step=heartbeat.step,
        phase=heartbeat.phase,
        kind="missing" if isinstance(error, MissingRanksError) else kind,
        message=str(error) if explained else f"{type(error).__name__}: {error}",
        trace="".join(trace).splitlines()[-_TRACE:],
    )


def record_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's error file."""
    return folder / f"rank-{rank:05d}.json"


def write_record(folder: Path, failure: Failure) -> None:
    """Write a rank's error file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record_file(folder, failure.rank or 0), asdict(failure))


def _begin(folder: Path, rank: int) -> None:
    record_file(folder, rank).unlink(missing_ok=True)  # from an earlier attempt
    if not os.environ.get(RECORDS):
        folder.mkdir(parents=True, exist_ok=True)
        _note(folder, {"rank": rank, "began": time.time()})


def _end(folder: Path, rank: int) -> None:
    """Record a normal end; the last rank of the host removes its file, the last host the folder."""
    if os.environ.get(RECORDS):
        return
    with contextlib.suppress(OSError):  # a folder lost in the meantime is reported by the code that writes into it
        notes = _note(folder, {"rank": rank, "ended": time.time()})
        if not _running(notes):
            notes.unlink(missing_ok=True)
            folder.rmdir()


def _note(folder: Path, value: dict[str, Any]) -> Path:
    """Append to this host's file. One file per rank would be a thousand files at every start."""
    notes = folder / f"host-{socket.gethostname()}.jsonl"
    with notes.open("a", encoding="utf-8") as file:
        file.write(json_line(value))  # one appending write: lines of several ranks do not mix
    return notes


def _running(notes: Path) -> dict[int, float]:
    """Return start times by rank of the ranks that have not ended normally."""
    began: dict[int, float] = {}
    with contextlib.suppress(FileNotFoundError):
        for note in read_json_lines(notes):
            rank, started = note.get("rank"), note.get("began")
            if type(rank) is int and isinstance(started, float):
                began[rank] = started
            elif type(rank) is int:
                began.pop(rank, None)
    return began


def running_ranks(output_dir: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (host, rank, start time) of the ranks without an agent that have started and not ended normally."""
    for notes in sorted((output_dir / RANK_RECORDS).glob("host-*.jsonl")):
        try:
            running = _running(notes)
        except PermissionError:  # of another user
            continue
        for rank, began in running.items():
            yield notes.stem.removeprefix("host-"), rank, began


def read_record(path: Path) -> Failure | None:
    """Return a rank's error record; None if it is missing or unreadable."""
    try:
        return Failure(**read_json(path))
    except (OSError, ValueError, TypeError):  # TypeError: from another version of this package
        return None


def read_records(output_dir: Path) -> list[Failure]:
    """Return the error records in OUTPUT/failure of ranks without an agent. A rank that started and left no record
    counts as a silent failure."""
    folder = output_dir / RANK_RECORDS
    records = [record for path in sorted(folder.glob("rank-*.json")) if (record := read_record(path)) is not None]
    reported = {record.rank for record in records}
    return records + [
        Failure(began, host, rank, None, None, "silent", _SILENT)
        for host, rank, began in running_ranks(output_dir)
        if rank not in reported
    ]


def forget_records(output_dir: Path) -> None:
    """Remove the error files of an earlier launch."""
    try:
        for pattern in RECORD_FILES:
            for path in (output_dir / RANK_RECORDS).glob(pattern):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot remove the rank files of an earlier launch: {error.strerror}",
            where=str(error.filename),
            fix="remove the file, or set another output_dir",
        ) from None
