"""Failures of ranks and their root cause; what a launch writes about them, and its readers."""

from __future__ import annotations

import contextlib
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from m3i_scale.errors import EXIT_USER_ERROR, ConfigError
from m3i_scale.files import write_json
from m3i_scale.host.output_dir import ATTEMPTS, FAILURE, RANK_RECORDS
from m3i_scale.text import redact

Kind = Literal["exception", "user_error", "signal", "exit", "host", "hang", "silent", "ended", "missing"]
"""`silent`: no error report, so it was ended from outside, unobserved; `ended`: by its launch, after another rank
failed; `missing`: it waited for ranks that did not join."""
LAST_LINES = 20
COLLECTIVES = "collectives-rank-"
"""PyTorch appends the rank."""
Document = TypeVar("Document")

# Error messages of a rank that only noticed the loss of another one: of gloo, of NCCL's watchdog and communicator, of
# the store, and of the sockets below them.
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
    """The failure of one rank, or one host."""

    time: float
    """Unix seconds, on the supervisor's clock if known."""
    host: str
    rank: int | None
    """None for the complete host, or if the rank is unknown."""
    step: int | None
    """Completed optimizer steps."""
    phase: str | None
    kind: Kind
    message: str
    exit_code: int | None = None
    """As `subprocess` returns it; negative: the signal that ended the process."""
    lines: list[str] = field(default_factory=list)
    """The last lines of its log."""
    trace: list[str] = field(default_factory=list)
    """Traceback of an exception that is not a user error."""

    def __post_init__(self) -> None:
        """Redact logins and tokens, because these texts are saved and printed."""
        for name in ("message", "lines", "trace"):
            object.__setattr__(self, name, redact(getattr(self, name)))

    @property
    def is_consequence(self) -> bool:
        """Return whether this failure is only a consequence of another rank's failure."""
        # A user error describes something that users can fix, even if a shard server closed its connection.
        if self.kind in ("host", "hang", "signal", "silent", "user_error"):
            return False
        if self.kind in ("ended", "missing"):
            return True
        text = self.message if self.kind == "exception" else "\n".join(self.lines[-5:])
        return _CONSEQUENCES.search(text) is not None

    @property
    def user_error(self) -> bool:
        """Return whether a restart would fail in the same way."""
        return self.kind == "user_error" or self.exit_code == EXIT_USER_ERROR

    def where(self) -> str:
        """Return host, rank, step and phase, as far as known."""
        parts = [f"host {self.host}"]
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self.step is not None and self.step >= 0:
            parts.append(f"after step {self.step}")
        if self.phase:
            parts.append(f"in {self.phase}")
        return ", ".join(parts)


def explain_exit_code(code: int) -> tuple[Kind, str]:
    """Return kind and message of a failure by exit code; a negative code is a signal."""
    if code >= 0:
        return "exit", f"the rank ended with exit code {code}"
    names = {int(number): f" ({number.name})" for number in signal.Signals}
    return "signal", f"the rank was ended by signal {-code}{names.get(-code, '')}"


def root_cause(failures: Iterable[Failure]) -> Failure | None:
    """Return the earliest known cause. Otherwise return the earliest rank with an unknown reason, because launchers end
    the others after a failure; otherwise the earliest consequence."""
    ordered = sorted(failures, key=lambda failure: (failure.is_consequence, failure.kind == "silent", failure.time))
    return ordered[0] if ordered else None


def failure_text(cause: Failure, others: Sequence[Failure], output_dir: Path) -> str:
    """Return the final failure message for the user, independent of the number of ranks."""
    lines = [f"root cause: {cause.message}", f"  where: {cause.where()}"]
    if cause.lines:
        lines.append("  its last lines:")
        lines += [f"    {line}" for line in cause.lines[-LAST_LINES:]]
    if others:
        lines.append(f"  after it: {_counted(others)}")
    folder = output_dir / RANK_RECORDS
    if count := len(list(folder.glob(f"{COLLECTIVES}*"))):
        who = "1 rank wrote down its" if count == 1 else f"{count} ranks wrote down their"
        lines.append(f"  {who} last collectives: torchfrtrace {folder} -p {COLLECTIVES}")
    return "\n".join(lines)


def _counted(others: Sequence[Failure]) -> str:
    words = Counter(other.message.splitlines()[0][:100] if other.message else other.kind for other in others)
    texts = [f"{count} × {message}" for message, count in list(words.items())[:3]]
    return "; ".join(texts) + (" …" if len(words) > 3 else "")


def write_failure(output_dir: Path, cause: Failure, others: Sequence[Failure], **more: Any) -> Path:
    """Write OUTPUT/failure.json atomically; `more` are further fields, such as the attempt."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / FAILURE
    write_json(path, {"cause": asdict(cause), "others": [asdict(other) for other in others], **more})
    return path


@dataclass(frozen=True)
class _FailureFile:
    cause: Failure


def read_failure(output_dir: Path) -> Failure | None:
    """Return the root cause of the last failure; None if the run has not failed, or no launcher recorded it."""
    document = _read(output_dir / FAILURE, _FailureFile)
    return None if document is None else document.cause


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt of the elastic launcher."""

    attempt: int
    hosts: list[str]
    ranks: int
    micro_batch_size: int
    left_out: dict[str, str]
    """Hosts that did not take part, and why."""
    status: Literal["finished", "preempted", "failed"]
    first_step: int | None
    last_step: int | None
    started: float
    ended: float
    """Unix seconds."""
    logs: str
    lost: list[str]
    """Hosts that became unreachable or went down."""
    came_back: list[str]
    left: dict[str, list[int]]
    """By host, processes that could not be ended."""
    cause: Failure | None


def write_attempts(output_dir: Path, attempts: Sequence[AttemptRecord]) -> None:
    """Write OUTPUT/attempts.json atomically."""
    documents = [asdict(attempt) for attempt in attempts]
    for document, attempt in zip(documents, attempts, strict=True):
        if attempt.cause is not None:
            document["cause"]["where"] = attempt.cause.where()
    write_json(output_dir / ATTEMPTS, documents)


def read_attempts(output_dir: Path) -> list[AttemptRecord]:
    """Return the finished attempts of the last launch by `launch --with elastic`, in order."""
    return _read(output_dir / ATTEMPTS, list[AttemptRecord]) or []


def _read(path: Path, kind: type[Document]) -> Document | None:
    """Return a validated document; None if the file does not exist."""
    from pydantic import TypeAdapter, ValidationError  # not needed to write

    from m3i_scale.config.explain import reason_of

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"a file of the run is invalid: {reason_of(error)}",
            where=str(path),
            fix="move the file to another folder; nothing else is read from it",
        ) from None


@contextlib.contextmanager
def record_collectives(folder: Path, environment: MutableMapping[str, str]) -> Iterator[None]:
    """Make an accelerator rank write its last collectives into `folder` when a collective times out.

    PyTorch's flight recorder keeps them, but by default writes them to a local file, which is lost with a container. A
    path that is already set in `environment`, under either name, is kept. The folder is created now, and removed after
    a normal end.
    """
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:  # the name in earlier versions of torch
        environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / COLLECTIVES))
    with contextlib.suppress(OSError):  # errors of the output folder are reported when the run opens it
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{COLLECTIVES}{environment['RANK']}").unlink(missing_ok=True)  # from an earlier attempt
    yield
    with contextlib.suppress(OSError):  # not after an error, because other ranks may still write
        folder.rmdir()
