"""Validation of user-specified output paths."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from m3i_scale.errors import ConfigError
from m3i_scale.text import redact_text

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:/+")
_SHARD = ".tar"


def local_path(place: str | Path, where: str | None = None) -> Path:
    """Return a path on this machine, with `~` expanded; errors name the setting or option `where`."""
    text = os.fspath(place)
    if (scheme := _ADDRESS.match(text)) is not None:
        address = text if "://" in text else f"{scheme[0]}/{text[scheme.end() :]}"  # Path collapses double slashes
        raise ConfigError(
            f"output must go to a local path, got the address '{redact_text(address)}'",
            where=where,
            why="a local folder of that name would be written, and lost with the machine",
            fix="a folder on a disk or on a mounted file system, e.g. /data/runs/first",
        )
    if "$" in text:
        raise ConfigError(
            f"output must go to a path without variables, got '{redact_text(text)}'",
            where=where,
            why="only a shell replaces `$NAME`: a local folder of that name would be written",
            fix="write the path out, or let the shell replace the variable (double quotes, not single ones)",
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(
            f"there is no user '{text.split('/')[0][1:]}', got '{text}'",
            where=where,
            fix="name a path from the root on",
        )
    return Path(expanded)


def check_destination(place: str | Path, where: str | None = None) -> Path:
    """Return `local_path`; raise ConfigError for a shard or a folder that contains shards."""
    path = local_path(place, where)
    shard = _shard_at(path)
    if shard is not None:
        raise ConfigError(
            f"output must not replace a shard or go into a folder of shards, got '{path}'",
            where=where,
            why=f"training data lies there: {shard.name}",
            fix="name another place",
        )
    return path


def _shard_at(path: Path) -> Path | None:
    with suppress(OSError):  # the later write reports the error
        if path.is_dir():
            with os.scandir(path) as entries:
                return next((Path(entry.path) for entry in entries if entry.name.endswith(_SHARD)), None)
        if path.suffix == _SHARD and path.exists():
            return path
    return None
