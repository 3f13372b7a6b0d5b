"""The quarantine file: one line per corrupt sample or lost shard, no matter how often it is read."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
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
    """Quarantine file of a run, with the counts of this rank's entries.

    Several ranks may read a shard, but only the first one writes and counts an entry: before writing, a rank locks the
    file and reads new entries of other ranks. Every rank reads all earlier entries when it opens its data, because a
    later read error would stop a single rank.

    Args:
        path: JSON lines file to append to; None writes none.
        sizes: number of samples of every shard of this rank, by address.
        counted: addresses of the shards whose earlier entries this rank counts; each shard belongs to one rank.
    """

    def __init__(self, path: Path | None, sizes: Mapping[str, int], counted: Collection[str] = ()) -> None:
        self.path = path
        self._sizes = sizes
        self._known: set[int] = set()
        self._samples: Counter[str] = Counter()
        self._read_bytes = 0
        self._read(set(counted))

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append the entries that are not yet in the file."""
        new = [entry for entry in entries if _digest(entry) not in self._known]
        if not new or self.path is None:
            self._count(new)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                torn = self._read_on(stream)
                new = self._count(new)
                lines = [json_line(entry) for entry in new]
                stream.write("".join(["\n" if torn and new else "", *lines]).encode())
                self._read_bytes = stream.tell()
        except OSError as error:
            raise DataError(f"cannot write the quarantine file: {error}", where=str(self.path)) from None

    @property
    def samples(self) -> dict[str, int]:
        """Count distinct corrupt samples by reason, in lost shards all samples; the total is the sum over ranks."""
        return dict(self._samples)

    def _read(self, counted: Collection[str]) -> None:
        try:
            if self.path is not None:
                with self.path.open("rb") as stream:
                    self._read_on(stream, counted)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"cannot read the quarantine file: {error}", where=str(self.path)) from None

    def _read_on(self, stream: BinaryIO, counted: Collection[str] = ()) -> bool:
        """Read new entries; return whether the file ends with an incomplete line. Such a line of a killed process is
        ignored, and the next entry starts on a new line."""
        begin = stream.seek(max(0, self._read_bytes - 1))  # one known byte, to detect an incomplete line
        content = stream.read()
        self._read_bytes = begin + content.rfind(b"\n") + 1  # another rank may still be writing the rest
        for entry in filter(None, map(_parsed, content.splitlines())):
            if entry["url"] in counted:
                self._count([entry])
            self._known.add(_digest(entry))
        return bool(content) and not content.endswith(b"\n")

    def _count(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        new = []
        for entry in entries:
            digest = _digest(entry)
            if digest not in self._known:
                self._known.add(digest)
                new.append(entry)
                whole = entry["key"] == WHOLE_SHARD
                self._samples[entry["reason"]] += self._sizes.get(entry["url"], 0) if whole else 1
        return new


def _digest(entry: Mapping[str, Any]) -> int:
    return seed_of(*(entry[name] for name in _SAME))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _SAME.items())
    return entry if known else None
