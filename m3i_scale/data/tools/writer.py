"""Write samples into many shards at once, in any order of the input, holding none of them."""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from m3i_scale.data.records import MASK
from m3i_scale.data.tools.layout import WHOLE, Layout
from m3i_scale.data.whole import finish_folder, sha256_of
from m3i_scale.errors import DataError

OPEN_SHARDS = 64
_MODE = 0o444
"""As webdataset's writer."""


class ShardWriter:
    """Appends samples to the shards that a layout names; a context manager.

    Args:
        folder: where splits, or shards without splits, go.
        name: beginning of the shards' file names.
        layout: where every sample goes.
    """

    def __init__(self, folder: Path, name: str, layout: Layout) -> None:
        self._folder, self._name, self._layout = folder, name, layout
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()
        self._facts: dict[tuple[str, int], dict[str, int]] = {}
        for split in layout.splits:
            (folder / split).mkdir(exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *rest: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def add(self, number: int, key: str, members: Mapping[str, bytes]) -> None:
        """Append the sample with this number of the input."""
        split, shard = self._layout.place(number)
        stream = self._stream(self._path(split, shard))
        for extension in sorted(members):
            stream.write(tar_member(f"{key}.{extension}", members[extension]))
        facts = self._facts.setdefault((split, shard), {"samples": 0, "label": 0, "caption": 0, "mask": 0})
        facts["samples"] += 1
        for fact, extension in (("label", "cls"), ("caption", "txt"), ("mask", MASK)):
            facts[fact] += extension in members

    def finish(self, labels: Sequence[str] | None, info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Close all shards and write what lies beside them; returns the counts of every split.

        Raises:
            DataError: a split without samples.
        """
        for stream in self._open.values():
            stream.close()
        self._open.clear()
        sums = {}
        for split in sorted(self._layout.splits):
            shards = {}
            for own, shard in sorted(place for place in self._facts if place[0] == split):
                path = self._path(own, shard)
                _close(path)
                shards[path.name] = _facts(self._facts[own, shard], path)
            if not shards:
                raise DataError(f"no sample of split '{split}' can be used", fix="see the reasons without --skip-bad")
            head = {"name": self._name, **({} if split == WHOLE else {"split": split}), **info}
            sums[split] = finish_folder(self._folder / split, shards, labels, head)
        return sums

    def _path(self, split: str, shard: int) -> Path:
        return self._folder / split / f"{self._name}-{shard:06d}.tar"

    def _stream(self, path: Path) -> BinaryIO:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        self._open[path] = path.open("ab")
        return self._open[path]


def tar_member(name: str, data: bytes) -> bytes:
    """Header, content and padding of a member, the same whenever it is written."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), _MODE, 0
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _close(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
        stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))


def _facts(counts: Mapping[str, int], path: Path) -> dict[str, Any]:
    return {
        "samples": counts["samples"],
        "with_label": counts["label"],
        "with_caption": counts["caption"],
        "with_mask": counts["mask"],
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
