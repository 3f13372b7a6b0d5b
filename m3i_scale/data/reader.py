"""Read single samples out of shards by byte range."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import OrderedDict
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_iterator

from m3i_scale.data.index import ShardIndex
from m3i_scale.errors import DataError

OPEN_SHARDS = 32
NOT_A_MEMBER = "not a tar member"
"""Reason of a bad sample: the bytes are not what the index says, so one of the two is of another time."""
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
_COMPRESSED = re.compile(rb"\x1f\x8b\x08|BZh.1AY&SY|\xfd7zXZ|\]\0\0\x80|\x28\xb5\x2f\xfd", re.DOTALL)
"""Beginnings by which tarfile would unpack: a member's name can be made to look so, and to unpack to gigabytes."""


class BadSampleError(Exception):
    """A sample that cannot be used; it is left out, counted and written to the quarantine file."""

    def __init__(self, reason: str, detail: str = "", key: str = "?") -> None:
        self.reason, self.detail, self.key = reason, detail, key
        super().__init__(reason, detail, key)


class ShardReader:
    """Samples by (shard, number). Keeps the last few shards open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def members(self, index: ShardIndex, number: int) -> dict[str, bytes]:
        """Members of a sample by extension, and its `__key__`.

        Raises:
            BadSampleError: the bytes are no sample.
            DataError: the shard cannot be read any more.
        """
        start, end = (int(value) for value in index.ranges_N2[number])
        try:
            data = os.pread(self._descriptor(index.path), end - start, start)
        except OSError as error:
            raise DataError(f"cannot read the shard: {error}", where=str(index.path)) from None
        if len(data) < end - start:
            raise BadSampleError(NOT_A_MEMBER, f"{len(data)} of {end - start} bytes")
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        return parse_members(data + padding + _END_OF_TAR, str(index.path))

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def parse_members(data: bytes, url: str) -> dict[str, bytes]:
    """The one sample in a piece of tar, read by webdataset.

    Raises:
        BadSampleError: no sample, several, or a member twice.
    """
    if _COMPRESSED.match(data):
        raise BadSampleError(NOT_A_MEMBER, "compressed")
    try:
        files = ({**file, "__url__": url} for file in tar_file_iterator(io.BytesIO(data)))
        samples = list(group_by_keys(files))
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise BadSampleError(NOT_A_MEMBER, str(error)) from None
    if len(samples) != 1:
        raise BadSampleError(NOT_A_MEMBER, f"{len(samples)} samples where the index says one")
    sample: dict[str, bytes] = samples[0]
    return sample
