"""The quarantine file: one line for every bad sample and every lost shard, however often they are met."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m3i_scale.data.order import seed_of
from m3i_scale.errors import DataError

WHOLE_SHARD = "*"
"""The key of a shard that was given up."""
_SAME = ("url", "key", "offset", "reason")
"""What two lines about one fault have in common."""


class Quarantine:
    """What one rank adds to the file, and how many samples of its shards stand there.

    Streams own their shards, so what one rank writes no other does in the same run. Of what ranks have written before,
    however many they were, every rank reads the whole when it opens its data: later, one that cannot would end alone.

    Args:
        path: JSON lines, added to; None writes none.
        sizes: samples of every shard of this rank, by its address.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path | None, sizes: Mapping[str, int]) -> None:
        self.path = path
        self._sizes = sizes
        self._known: set[int] = set()
        self._samples: Counter[str] = Counter()
        self._torn = False
        self._read()

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write down what does not stand there yet.

        Raises:
            DataError: the file cannot be written.
        """
        new = [entry for entry in entries if self._note(entry)]
        if not new or self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                if self._torn:
                    stream.write("\n")
                stream.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new)
                self._torn = False
        except OSError as error:
            raise DataError(f"cannot write the quarantine file: {error}", where=str(self.path)) from None

    @property
    def samples(self) -> dict[str, int]:
        """Different samples of this rank's shards that were bad in any pass, by reason; of a lost shard all."""
        return dict(self._samples)

    def _read(self) -> None:
        """What is there. A line that a kill cut short counts as none, and the next begins on a line of its own."""
        try:
            content = b"" if self.path is None else self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"cannot read the quarantine file: {error}", where=str(self.path)) from None
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            entry = _parsed(line)
            if entry is not None:
                self._note(entry)

    def _note(self, entry: Mapping[str, Any]) -> bool:
        digest = seed_of(*(entry[name] for name in _SAME))
        if digest in self._known:
            return False
        self._known.add(digest)
        size = self._sizes.get(entry["url"])
        if size is not None:
            self._samples[entry["reason"]] += size if entry["key"] == WHOLE_SHARD else 1
        return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and all(name in entry for name in _SAME) else None
