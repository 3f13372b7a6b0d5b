"""Other files in a run's folder: checkpoints, corrupt samples, attempts, failure, hosts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from m3i_scale.checkpoint.listing import list_checkpoints
from m3i_scale.config.explain import reason_of
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.host.output_dir import ATTEMPTS, FAILURE, QUARANTINE, RANK_RECORDS
from m3i_scale.report.run_files import RunFiles

_LONGEST_LINE = 1 << 20
_LOG = re.compile(r"(.+)-rank(\d+)\.log")
Document = TypeVar("Document")


def checkpoints_of(run: RunFiles) -> dict[str, Any]:
    """Return the document of `checkpoint list`: checkpoints with step, bytes, age, validity and retention rules."""
    facts = ("kind", "step", "time")
    metrics = {
        line["step"]: {name: value for name, value in line.items() if name not in facts} for line in run.evaluations
    }
    root = run.folder / "checkpoints"
    try:
        return list_checkpoints(root, metrics)
    except OSError as error:
        raise CheckpointError(f"the checkpoints cannot be read: {error.strerror}", where=str(root)) from None


@dataclass
class Quarantined:
    """Corrupt samples with the same reason."""

    count: int = 0
    """Number of lines, each for a sample or a full shard."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first ones: `source`, `url`, `key` ("*": the full shard), `offset`, `reason`, `detail`."""


def quarantine_of(folder: Path, examples: int = 6) -> dict[str, Quarantined]:
    """Return the corrupt samples of a run by reason, with at most `examples` of each; {} if there are none."""
    found: dict[str, Quarantined] = {}
    for entry in _objects(folder / QUARANTINE):
        texts = [entry.get(name) for name in ("source", "url", "key", "reason", "detail")]
        if not all(isinstance(text, str) for text in texts) or type(entry.get("offset")) is not int:
            continue
        of_reason = found.setdefault(entry["reason"], Quarantined())
        of_reason.count += 1
        if len(of_reason.examples) < examples:
            of_reason.examples.append(entry)
    return found


class FailureNote(BaseModel):
    """Failure of a rank or a host."""

    time: float
    """Unix seconds."""
    host: str
    rank: int | None
    """None: the complete host."""
    step: int | None
    phase: str | None
    kind: str
    message: str


class AttemptNote(BaseModel):
    """One attempt of the elastic launcher."""

    attempt: int
    hosts: list[str]
    ranks: int
    status: str
    """`finished`, `preempted` or `failed`."""
    first_step: int | None
    last_step: int | None
    started: float
    ended: float
    """Unix seconds."""
    lost: list[str]
    """Hosts that became unreachable or went down."""
    came_back: list[str]
    cause: FailureNote | None


class _Failed(BaseModel):
    cause: FailureNote


def attempts_of(folder: Path) -> list[AttemptNote]:
    """Return the finished attempts of the last launch by `launch --with elastic`, in order."""
    return _document(folder / ATTEMPTS, list[AttemptNote]) or []


def failure_of(folder: Path) -> FailureNote | None:
    """Return the root cause of the last failure; None if the run has not failed, or no launcher recorded it."""
    failed = _document(folder / FAILURE, _Failed)
    return None if failed is None else failed.cause


@dataclass(frozen=True)
class RankSign:
    """Last sign of life of a rank."""

    host: str
    rank: int
    heard_s: float
    """Unix seconds of its last log line, or of its start."""


def ranks_of(folder: Path) -> list[RankSign]:
    """Return the ranks of a run by host and rank, from the source with the newest sign: logs of the elastic launcher,
    or records of ranks that other launchers started and that have not ended."""
    printed, begun = [*_printed(folder)], [*_begun(folder)]
    newest = max(printed, begun, key=lambda signs: max((sign.heard_s for sign in signs), default=0.0))
    return sorted(newest, key=lambda sign: (sign.host, sign.rank))


def _printed(folder: Path) -> Iterator[RankSign]:
    attempts = [path for path in (folder / "logs").glob("*") if path.name.isdecimal()]
    newest = max(attempts, key=lambda path: int(path.name), default=folder / "logs")
    for path in newest.glob("*.log"):
        name = _LOG.fullmatch(path.name)
        if name is not None:
            yield RankSign(name[1], int(name[2]), path.stat().st_mtime)


def _begun(folder: Path) -> Iterator[RankSign]:
    for path in (folder / RANK_RECORDS).glob("host-*.jsonl"):
        running: dict[int, float] = {}
        for note in _objects(path):
            rank, began = note.get("rank"), note.get("began")
            if type(rank) is int and isinstance(began, float):
                running[rank] = began
            elif type(rank) is int:
                running.pop(rank, None)
        host = path.stem.removeprefix("host-")
        yield from (RankSign(host, rank, began) for rank, began in running.items())


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, without truncated or invalid lines."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                with suppress(ValueError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"a file of the run cannot be read: {error.strerror}", where=str(path)) from None


def _document(path: Path, kind: type[Document]) -> Document | None:
    """Return a validated JSON document; None if the file does not exist."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"a file of the run is not what a launch writes: {reason_of(error)}",
            where=str(path),
            fix="move it away: nothing but this is read from it",
        ) from None
