"""Other files in a run's folder: checkpoints, corrupt samples, hosts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3i_scale.checkpoint.listing import list_checkpoints
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.host.output_dir import QUARANTINE
from m3i_scale.host.rank_record import running_ranks
from m3i_scale.report.run_files import RunFiles

_LONGEST_LINE = 1 << 20
_LOG = re.compile(r"(.+)-rank(\d+)\.log")


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
    printed, begun = [*_printed(folder)], [RankSign(*sign) for sign in running_ranks(folder)]
    newest = max(printed, begun, key=lambda signs: max((sign.heard_s for sign in signs), default=0.0))
    return sorted(newest, key=lambda sign: (sign.host, sign.rank))


def _printed(folder: Path) -> Iterator[RankSign]:
    attempts = [path for path in (folder / "logs").glob("*") if path.name.isdecimal()]
    newest = max(attempts, key=lambda path: int(path.name), default=folder / "logs")
    for path in newest.glob("*.log"):
        name = _LOG.fullmatch(path.name)
        if name is not None:
            yield RankSign(name[1], int(name[2]), path.stat().st_mtime)


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
