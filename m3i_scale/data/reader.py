"""Read single samples out of shards by byte range."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_iterator

from m3i_scale.data.plain_tar import plain_members
from m3i_scale.data.remote.access import Access, retried
from m3i_scale.data.remote.faults import FaultError, bad_shard
from m3i_scale.data.remote.prefetch import RemoteShards
from m3i_scale.data.scan import ShardIndex, head_of
from m3i_scale.data.watchdog import Activity

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


def refuse_large_sample(size: int, limit: int) -> None:
    """Refuse a sample before it is read.

    Args:
        size: bytes of its members in the shard.
        limit: data.max_sample_bytes.

    Raises:
        BadSampleError: it is larger.
    """
    if size > limit:
        raise BadSampleError("sample too large", f"{size} bytes, data.max_sample_bytes is {limit}")


class ShardReader:
    """Samples by (shard, number). Keeps the last few shards open.

    Args:
        access: how remote shards are read; of local ones, how often.
        activity: is told which shard is being read.
    """

    def __init__(self, access: Access | None = None, activity: Activity | None = None) -> None:
        self._access = access or Access()
        self._activity = activity or Activity()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._remote = RemoteShards(self._access)

    def members(self, index: ShardIndex, number: int) -> dict[str, bytes]:
        """Members of a sample by extension, and its `__key__`.

        Raises:
            BadSampleError: the bytes are too many, no sample, or another one than was indexed.
            BadShardError: the shard cannot be read any more, after all attempts.
        """
        start, end = (int(value) for value in index.ranges_N2[number])
        refuse_large_sample(end - start, self._access.max_sample_bytes)
        self._activity.begin(index.path)
        if isinstance(index.path, Path):
            data = self._read(index, index.path, start, end)
        else:
            data = self._remote.read(index, start, end)
        self._activity.end()
        if head_of(data) != index.heads_N[number]:
            raise BadSampleError(NOT_A_MEMBER, "not what was indexed")
        return parse_members(data, str(index.path))

    def expect(self, reader: Hashable, now: Sequence[ShardIndex], then: Sequence[ShardIndex]) -> None:
        """Tell which remote shards a stream reads now and next; see `RemoteShards`."""
        self._remote.expect(reader, now, then)

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._remote.close()

    def _read(self, index: ShardIndex, path: Path, start: int, end: int) -> bytes:
        try:
            data = os.pread(self._descriptor(path), end - start, start)
        except OSError:
            data = self._read_again(index, path, start, end)
        if len(data) < end - start:
            size = os.fstat(self._descriptor(path)).st_size
            raise bad_shard(path, FaultError("cut off", f"{index.size} bytes were indexed, now it has {size}"))
        return data

    def _read_again(self, index: ShardIndex, path: Path, start: int, end: int) -> bytes:
        """Open anew: a network path may fail for a moment."""

        def once() -> bytes:
            if path in self._open:
                os.close(self._open.pop(path))
            return os.pread(self._descriptor(path), end - start, start)

        try:
            return retried(once, self._access, lasting=(FileNotFoundError, PermissionError))
        except FaultError as fault:
            raise bad_shard(path, fault) from None

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def parse_members(data: bytes, url: str) -> dict[str, bytes]:
    """Return the one sample in a piece of tar, grouped as webdataset does it.

    Args:
        data: whole members, whose headers are those of the index.
        url: the shard.

    Raises:
        BadSampleError: no sample, several, or a member twice.
    """
    if _COMPRESSED.match(data):
        raise BadSampleError(NOT_A_MEMBER, "compressed")
    try:
        plain = plain_members(data)
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        files = plain if plain is not None else tar_file_iterator(io.BytesIO(data + padding + _END_OF_TAR))
        samples = list(group_by_keys({**file, "__url__": url} for file in files))
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise BadSampleError(NOT_A_MEMBER, str(error)) from None
    if len(samples) != 1:
        raise BadSampleError(NOT_A_MEMBER, f"{len(samples)} samples where the index says one")
    sample: dict[str, bytes] = samples[0]
    try:
        str(sample["__key__"]).encode()
    except UnicodeEncodeError:
        key = str(sample["__key__"]).encode("utf-8", "backslashreplace").decode()
        raise BadSampleError("key is not UTF-8", key=key) from None
    return sample
