"""The quarantine file: one line per corrupt sample or lost shard, no matter how often it is read."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.data.order import seed_of
from m3i_scale.errors import DataError
from m3i_scale.files import json_line

WHOLE_SHARD = "*"
"""Key that represents a lost shard."""
_SAME = {"url": str, "key": str, "offset": int, "reason": str}
"""Fields that identify an entry, with their types."""


class Quarantine:
    """Quarantine file of a run: a JSON lines file to append to; with `path` None, nothing is written.

    Several ranks may read a shard, but only the first one writes an entry: before writing, a rank locks the file and
    reads new entries of other ranks. Every rank reads all earlier entries when it opens its data, because a later read
    error would stop a single rank.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: set[int] = set()
        self._read_bytes = 0
        try:
            if path is not None:
                with path.open("rb") as stream:
                    self._read_on(stream)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"cannot read the quarantine file: {error}", where=str(path)) from None

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Append the entries that are not yet in the file."""
        if self.path is None or not self._new(entries):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                torn = self._read_on(stream)
                new = self._new(entries)
                lines = [json_line(entry) for entry in new.values()]
                stream.write("".join(["\n" if torn and new else "", *lines]).encode())
                self._known.update(new)
                self._read_bytes = stream.tell()
        except OSError as error:
            raise DataError(f"cannot write the quarantine file: {error}", where=str(self.path)) from None

    def _new(self, entries: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return the entries that are not known, by digest."""
        return {digest: entry for entry in entries if (digest := _digest(entry)) not in self._known}

    def _read_on(self, stream: BinaryIO) -> bool:
        """Read new entries; return whether the file ends with an incomplete line. Such a line of a killed process is
        ignored, and the next entry starts on a new line."""
        begin = stream.seek(max(0, self._read_bytes - 1))  # one known byte, to detect an incomplete line
        content = stream.read()
        self._read_bytes = begin + content.rfind(b"\n") + 1  # another rank may still be writing the rest
        self._known.update(map(_digest, filter(None, map(_parsed, content.splitlines()))))
        return bool(content) and not content.endswith(b"\n")


def _digest(entry: Mapping[str, Any]) -> int:
    return seed_of(*(entry[name] for name in _SAME))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _SAME.items())
    return entry if known else None
