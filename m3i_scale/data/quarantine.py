"""The quarantine file has one line for every bad sample and every lost shard, however often they are met."""

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
"""The key of a shard that was given up."""
_SAME = {"url": str, "key": str, "offset": int, "reason": str}
"""What two lines about one fault have in common, and of which type it is."""


class Quarantine:
    """Adds the bad samples that one rank meets to the file, and counts those in it that are this rank's.

    A shard may be read by several ranks. What one of them has written the others do not write again, and do not count:
    they read the file on, under its lock, before they add to it. Of what ranks have written before, however many they
    were, every rank reads the whole when it opens its data: later, one that cannot would end alone.

    Args:
        path: JSON lines, added to; None writes none.
        sizes: samples of every shard of this rank, by its address.
        counted: addresses of the shards whose lines from before this rank counts; each shard is one rank's.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path | None, sizes: Mapping[str, int], counted: Collection[str] = ()) -> None:
        self.path = path
        self._sizes = sizes
        self._known: set[int] = set()
        self._samples: Counter[str] = Counter()
        self._read_bytes = 0
        self._read(set(counted))

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add the lines that are not in the file yet."""
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
        """Count different samples that were bad in any pass, by reason; of a lost shard all. Ranks' counts add up."""
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
        """Read what has been added since the last time; return whether it ends within a line.

        A line that a kill cut short counts as none, and the next begins on a line of its own.
        """
        begin = stream.seek(max(0, self._read_bytes - 1))  # one byte of what is known: does it end a line?
        content = stream.read()
        self._read_bytes = begin + content.rfind(b"\n") + 1  # the rest may still be on its way, from another rank
        for entry in filter(None, map(_parsed, content.splitlines())):
            if entry["url"] in counted:
                self._count([entry])
            self._known.add(_digest(entry))
        return bool(content) and not content.endswith(b"\n")

    def _count(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Count the records that were not known, and return them."""
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
