"""Record how ranks have failed, and find the first cause among them."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from m3i_scale.errors import EXIT_USER_ERROR, UserError
from m3i_scale.files import json_line, read_json, read_json_lines, write_json
from m3i_scale.launch.flight_recorder import FILES, recorded_text
from m3i_scale.scale.output_dir import FAILURE, RANK_RECORDS
from m3i_scale.text import redact

Kind = Literal["exception", "user_error", "signal", "exit", "host", "hang", "silent", "ended", "missing"]
"""`silent`: it left no word, so something ended it from outside, and nobody saw what; `ended`: by its launch, after
another one had failed; `missing`: it waited for ranks that did not come."""
LAST_LINES = 20
RECORD_FILES = ("rank-*.json", "host-*.jsonl", FILES)
"""In that folder: of ranks that have failed, of which ranks of a host have begun and ended, and of collectives."""
_SILENT = "the rank ended without a word: killed (for want of memory, most often), or its host is gone"

# Words of a rank that only noticed that another one was gone. Of gloo, of NCCL's watchdog and communicator, of the
# store, and of sockets below them.
_CONSEQUENCES = re.compile(
    r"connection (was )?(closed|reset)( by peer)?|connection refused|socket (timeout|closed)|broken pipe"
    r"|timed out waiting|wait timeout|timed? ?out after|watchdog caught collective|remote process exited"
    r"|ncclRemoteError|NCCL communicator was aborted|failed to recv|recvValue failed|sendBytes failed"
    r"|Transport endpoint is not connected|no route to host|network is unreachable|DistNetworkError"
    r"|DistStoreError|gloo.*(timeout|error)|read error|process group.*(abort|timeout)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """Says how one rank, or one host, has ended."""

    time: float
    """Unix seconds, by the clock of the host that supervises where that is known."""
    host: str
    rank: int | None
    """None: the host as a whole."""
    step: int | None
    """Optimizer steps that were done."""
    phase: str | None
    kind: Kind
    message: str
    exit_code: int | None = None
    """As a shell tells it; negative: the signal that ended it."""
    lines: list[str] = field(default_factory=list)
    """The last ones of its log."""
    trace: list[str] = field(default_factory=list)
    """Of an exception that is no message to users."""

    def __post_init__(self) -> None:
        """Cut out logins and tokens: these texts are written and shown to others."""
        for name in ("message", "lines", "trace"):
            object.__setattr__(self, name, redact(getattr(self, name)))

    @property
    def is_consequence(self) -> bool:
        """Return whether this end only follows from that of another rank."""
        # A message to users tells of what they can mend, also where a server of shards has closed its connection.
        if self.kind in ("host", "hang", "signal", "silent", "user_error"):
            return False
        if self.kind in ("ended", "missing"):
            return True
        text = self.message if self.kind == "exception" else "\n".join(self.lines[-5:])
        return _CONSEQUENCES.search(text) is not None

    @property
    def user_error(self) -> bool:
        """Return whether starting again would end in the same way."""
        return self.kind == "user_error" or self.exit_code == EXIT_USER_ERROR

    def where(self) -> str:
        """Return host, rank, step and phase, as far as they are known."""
        parts = [f"host {self.host}"]
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self.step is not None and self.step >= 0:
            parts.append(f"after step {self.step}")
        if self.phase:
            parts.append(f"in {self.phase}")
        return ", ".join(parts)


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """Return the earliest cause that is known; else the earliest rank that ended for no known reason, as launchers
    end the others when one has failed; else the earliest consequence.
    """
    ordered = sorted(failures, key=lambda failure: (failure.is_consequence, failure.kind == "silent", failure.time))
    return ordered[0] if ordered else None


def failure_text(cause: Failure, others: Sequence[Failure], output_dir: Path) -> str:
    """Return the text that a person reads at the end: once, whatever the number of ranks.

    Args:
        cause: the first one.
        others: what followed.
        output_dir: of the run.
    """
    lines = [f"first cause: {cause.message}", f"  where: {cause.where()}"]
    if cause.lines:
        lines.append("  its last lines:")
        lines += [f"    {line}" for line in cause.lines[-LAST_LINES:]]
    if others:
        lines.append(f"  after it: {_counted(others)}")
    if (collectives := recorded_text(output_dir / RANK_RECORDS)) is not None:
        lines.append(f"  {collectives}")
    return "\n".join(lines)


def _counted(others: Sequence[Failure]) -> str:
    """Return one line for all that followed."""
    words: dict[str, int] = {}
    for other in others:
        message = other.message.splitlines()[0][:100] if other.message else other.kind
        words[message] = words.get(message, 0) + 1
    shown = [f"{count} × {message}" for message, count in list(words.items())[:3]]
    return "; ".join(shown) + (" …" if len(words) > 3 else "")


def write_failure(output_dir: Path, cause: Failure, others: Sequence[Failure], **more: Any) -> Path:
    """Write OUTPUT/failure.json, whole or not at all.

    Args:
        output_dir: of the run.
        cause: the first one.
        others: what followed.
        more: further fields, such as the attempt.

    Raises:
        OSError: the disk refused.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / FAILURE
    content = {"cause": asdict(cause), "others": [asdict(other) for other in others], **more}
    write_json(path, content)
    return path


def record_file(folder: Path, rank: int) -> Path:
    """Return the file in which a rank leaves its record."""
    return folder / f"rank-{rank:05d}.json"


def write_record(folder: Path, failure: Failure) -> None:
    """Write a rank's record.

    Raises:
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record_file(folder, failure.rank or 0), asdict(failure))


def begin_rank(folder: Path, rank: int) -> None:
    """Note that a rank of this host has begun: in one file a host, since a thousand files would be made at every start.

    Raises:
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _note(folder, {"rank": rank, "began": time.time()})


def end_rank(folder: Path, rank: int) -> None:
    """Note that a rank of this host has ended as it should; the last one removes what is left of all of them.

    Raises:
        OSError: the disk refused, or other hosts have ranks that run.
    """
    _note(folder, {"rank": rank, "ended": time.time()})
    if not _unended(_notes_of(folder, socket.gethostname())):
        _notes_of(folder, socket.gethostname()).unlink(missing_ok=True)
        folder.rmdir()


def _note(folder: Path, value: dict[str, Any]) -> None:
    with _notes_of(folder, socket.gethostname()).open("a", encoding="utf-8") as file:
        file.write(json_line(value))  # one write, at the end of the file: ranks do not tear each other's lines


def _notes_of(folder: Path, host: str) -> Path:
    return folder / f"host-{host}.jsonl"


def _unended(notes: Path) -> dict[int, float]:
    """Return, by rank, when those began that have not ended as they should."""
    began: dict[int, float] = {}
    with contextlib.suppress(FileNotFoundError):
        for note in read_json_lines(notes):
            if "began" in note:
                began[int(note["rank"])] = float(note["began"])
            else:
                began.pop(int(note["rank"]), None)
    return began


def read_record(path: Path) -> Failure | None:
    """Return the record that a rank has left; None where there is none that can be read."""
    try:
        return Failure(**read_json(path))
    except (OSError, ValueError, TypeError):  # TypeError: of another version of this package
        return None


def read_records(output_dir: Path) -> list[Failure]:
    """Return the records that ranks without an agent have left in OUTPUT/failure; where one has begun and left none, it
    is one of a silent end."""
    folder = output_dir / RANK_RECORDS
    records = [record for path in sorted(folder.glob("rank-*.json")) if (record := read_record(path)) is not None]
    heard = {record.rank for record in records}
    for notes in sorted(folder.glob("host-*.jsonl")):
        host = notes.stem.removeprefix("host-")
        records += [
            Failure(began, host, rank, None, None, "silent", _SILENT)
            for rank, began in _unended(notes).items()
            if rank not in heard
        ]
    return records


def forget_records(output_dir: Path) -> None:
    """Remove the records of an earlier launch, before another one."""
    try:
        for pattern in RECORD_FILES:
            for path in (output_dir / RANK_RECORDS).glob(pattern):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"what ranks of an earlier launch have left cannot be removed: {error.strerror}",
            where=str(error.filename),
            fix="remove it, or take another output_dir",
        ) from None


def on_clock(failure: Failure, offset_s: float) -> Failure:
    """Return a failure with its time on the supervisor's clock.

    Args:
        failure: with a time of its host.
        offset_s: how far the supervisor's clock is ahead of the host's.
    """
    return replace(failure, time=failure.time + offset_s)
