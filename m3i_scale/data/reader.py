"""Reader of single samples from shards by byte range."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_iterator

from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.prefetch import RemoteShards
from m3i_scale.data.remote.read_errors import ReadError, bad_shard, retried
from m3i_scale.data.scan import ShardIndex, head_of
from m3i_scale.data.tar import MAX_HEADER_BYTES
from m3i_scale.data.workers import Activity

OPEN_SHARDS = 32
NOT_A_MEMBER = "not a tar member"
"""Reason of a corrupt sample whose bytes do not match the index, so shard or index is outdated."""
_BLOCK = tarfile.BLOCKSIZE
_END_OF_TAR = bytes(2 * _BLOCK)
_COMPRESSED = re.compile(rb"\x1f\x8b\x08|BZh.1AY&SY|\xfd7zXZ|\]\0\0\x80|\x28\xb5\x2f\xfd", re.DOTALL)
"""Signatures that make tarfile decompress: a crafted member name could match, and decompress to gigabytes."""
# Fields of a tar header.
_NAME, _SIZE = slice(0, 100), slice(124, 136)
_TYPE, _FORMAT, _PREFIX = 156, slice(257, 263), 345
_REGULAR, _PAX = ord("0"), ord("x")
_TIMES = re.compile(rb"(?:\d{1,9} [amc]time=\d{1,20}(?:\.\d{1,20})?\n)+")
_TIME = re.compile(rb"(\d+) [^\n]*\n")
_FORMATS = (b"ustar\0", b"ustar ")


class BadSampleError(Exception):
    """Raised for a corrupt sample, which is skipped, counted and written to the quarantine file."""

    def __init__(self, reason: str, detail: str = "", key: str = "?") -> None:
        self.reason, self.detail, self.key = reason, detail, key
        super().__init__(reason, detail, key)


def check_sample_size(size: int, limit: int) -> None:
    """Check the size of a sample in bytes, before reading it, against `limit` (data.max_sample_bytes)."""
    if size > limit:
        raise BadSampleError("sample too large", f"{size} bytes, data.max_sample_bytes is {limit}")


class ShardReader:
    """Reader of samples by (shard, index) that keeps the last few shards open.

    `access` has the settings for remote shards, and the number of attempts for local ones; `activity` records the shard
    that is being read.
    """

    def __init__(self, access: Access | None = None, activity: Activity | None = None) -> None:
        self._access = access or Access()
        self._activity = activity or Activity()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self.remote = RemoteShards(self._access)

    def members(self, index: ShardIndex, number: int) -> dict[str, bytes]:
        """Return the files of a sample by extension, and its `__key__`.

        Raises:
            BadSampleError: the sample is too large, not a sample, or not the indexed one.
            BadShardError: the shard cannot be read after all attempts.
        """
        start, end = (int(value) for value in index.ranges_N2[number])
        check_sample_size(end - start, self._access.max_sample_bytes)
        self._activity.begin(index.path)
        if isinstance(index.path, Path):
            data = self._read(index, index.path, start, end)
        else:
            data = self.remote.read(index, start, end)
        self._activity.end()
        return parse_members(data, str(index.path), int(index.heads_N[number]))

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            os.close(self._open.popitem()[1])
        self.remote.close()

    def _read(self, index: ShardIndex, path: Path, start: int, end: int) -> bytes:
        try:
            data = os.pread(self._descriptor(path), end - start, start)
        except OSError:
            data = self._read_again(index, path, start, end)
        if len(data) < end - start:
            size = os.fstat(self._descriptor(path)).st_size
            raise bad_shard(path, ReadError("cut off", f"{index.size} bytes were indexed, the file has {size}"))
        return data

    def _read_again(self, index: ShardIndex, path: Path, start: int, end: int) -> bytes:
        """Reopen the shard and read again: a network path may fail temporarily."""

        def once() -> bytes:
            if path in self._open:
                os.close(self._open.pop(path))
            return os.pread(self._descriptor(path), end - start, start)

        try:
            return retried(once, self._access, lasting=(FileNotFoundError, PermissionError))
        except ReadError as error:
            raise bad_shard(path, error) from None

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def parse_members(data: bytes, url: str, head: int) -> dict[str, bytes]:
    """Return the single sample in a part of a tar, grouped as in webdataset; anything else is a `BadSampleError`.

    `data` are complete tar members; `url` is the address of the shard, and `head` the sample's entry in the `heads_N`
    of the index.
    """
    plain = plain_members(data)
    if (head_of(data) if plain is None else plain[1]) != head:
        raise BadSampleError(NOT_A_MEMBER, "the tar headers differ from the index")
    if _COMPRESSED.match(data):
        raise BadSampleError(NOT_A_MEMBER, "compressed")
    try:
        padding = bytes(-len(data) % _BLOCK)
        files = plain[0] if plain is not None else tar_file_iterator(io.BytesIO(data + padding + _END_OF_TAR))
        samples = list(group_by_keys({**file, "__url__": url} for file in files))
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise BadSampleError(NOT_A_MEMBER, str(error)) from None
    if len(samples) != 1:
        raise BadSampleError(NOT_A_MEMBER, f"{len(samples)} samples where the index has one")
    sample: dict[str, bytes] = samples[0]
    try:
        str(sample["__key__"]).encode()
    except UnicodeEncodeError:
        key = str(sample["__key__"]).encode("utf-8", "backslashreplace").decode()
        raise BadSampleError("key is not UTF-8", key=key) from None
    return sample


def plain_members(data: bytes) -> tuple[list[dict[str, Any]], int] | None:
    """Parse tar members in order. Return them as webdataset's `tar_file_iterator` does, and their `head_of`; None if a
    member is not plain.

    Nearly all shards have only plain members. Parsing them without `tarfile` saves about the time of decoding a small
    image. Plain members are regular files, optionally with a pax header of timestamps only, as written by webdataset.
    Others (long names, other pax headers, links, sparse files, binary sizes) need `tarfile`.

    `data` may lack the last padding. Header checksums are not verified again: the caller compares `head_of` with that
    of verified headers.
    """
    files: list[dict[str, Any]] = []
    offset, head, times_before = 0, 0, False
    while offset < len(data):
        header = data[offset : offset + _BLOCK]
        size = _size_of_plain(header)
        start = offset + _BLOCK
        if size is None or start + size > len(data):
            return None
        offset = start + size + -size % _BLOCK
        head = zlib.crc32(header, head)
        if header[_TYPE] == _PAX:
            if times_before or size > MAX_HEADER_BYTES or not _tells_times(data[start : start + size]):
                return None
            head = zlib.crc32(data[start:offset], head)
            times_before = True
        else:
            name = _name_of_plain(header)
            if name is None:
                return None
            files.append({"fname": name, "data": data[start : start + size]})
            times_before = False
    return None if times_before else (files, head)


def _tells_times(records: bytes) -> bool:
    """Return whether a pax header has only timestamps, in records with correct lengths."""
    if not _TIMES.fullmatch(records):
        return False
    return all(int(record[1]) == len(record[0]) for record in _TIME.finditer(records))


def _size_of_plain(header: bytes) -> int | None:
    """Return the size in bytes of a regular file or a pax header; None for other members."""
    if len(header) < _BLOCK or header[_TYPE] not in (_REGULAR, _PAX):
        return None
    if header[_FORMAT] not in _FORMATS or header[_PREFIX]:
        return None
    digits = header[_SIZE].rstrip(b"\0 ")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _name_of_plain(header: bytes) -> str | None:
    """Return the file name; None if it is a folder, or if webdataset handles it specially."""
    raw = header[_NAME].split(b"\0", 1)[0]
    if not raw or raw.startswith(b"__") or raw.endswith(b"/"):
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
