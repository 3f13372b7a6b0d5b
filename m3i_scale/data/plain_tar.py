"""The members of a piece of tar, where all of them are plain: the case of nearly every shard, read without `tarfile`.

`tarfile` builds a file object, a stream and an object per member, which costs about as much as decoding a small image.
Plain are regular members, and those with a pax header that only tells times: webdataset's own writer puts one before
every member. Whatever is not plain (long names, other pax headers, links, sparse files, binary sizes, wrong checksums)
is left to `tarfile`.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

BLOCK = 512
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
_TYPE, _MAGIC, _PREFIX = 156, slice(257, 263), 345
_REGULAR, _PAX = ord("0"), ord("x")
_TIMES = re.compile(rb"(?:\d{1,9} [amc]time=\d{1,20}(?:\.\d{1,20})?\n)+")
_TIME = re.compile(rb"(\d+) [^\n]*\n")
_MAGICS = (b"ustar\0", b"ustar ")


def plain_members(data: bytes, *, scanned: bool = False) -> list[dict[str, Any]] | None:
    """Files in order, as webdataset's `tar_file_iterator` gives them; None where a member is not plain.

    Args:
        data: whole members, the last one's padding and the end of the archive included or not.
        scanned: the headers are known to be those of the index, whose checksums held when it was made.
    """
    files: list[dict[str, Any]] = []
    offset, told = 0, False
    while offset < len(data):
        header = data[offset : offset + BLOCK]
        if not header[0]:
            return None if told or data[offset:].rstrip(b"\0") else files
        size = _size_of_plain(header, scanned)
        start = offset + BLOCK
        if size is None or start + size > len(data):
            return None
        if header[_TYPE] == _PAX:
            if told or not _tells_times(data[start : start + size]):
                return None
            told = True
        else:
            name = _name_of_plain(header)
            if name is None:
                return None
            files.append({"fname": name, "data": data[start : start + size]})
            told = False
        offset = start + size + -size % BLOCK
    return None if told else files


def _tells_times(records: bytes) -> bool:
    """Whether a pax header says nothing that matters here, in records of the length that each of them names."""
    if not _TIMES.fullmatch(records):
        return False
    return all(int(record[1]) == len(record[0]) for record in _TIME.finditer(records))


def _size_of_plain(header: bytes, scanned: bool) -> int | None:
    """Bytes of a regular member, or of a pax header, with a sound header; None for every other."""
    if len(header) < BLOCK or header[_TYPE] not in (_REGULAR, _PAX) or header[_MAGIC] not in _MAGICS or header[_PREFIX]:
        return None
    digits, wanted = header[_SIZE].rstrip(b"\0 "), header[_CHECKSUM].rstrip(b"\0 ")
    if not (digits.isdigit() and wanted.strip().isdigit()):
        return None
    try:
        size, checksum = int(digits, 8), int(wanted, 8)
    except ValueError:  # 8 or 9
        return None
    # The checksum itself counts as eight spaces.
    return size if scanned or _sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ") == checksum else None


def _sum(header: bytes) -> int:
    """The sum of 512 bytes. Half of Adler-32 is one plus the sum modulo 65,521, which 256 bytes do not reach."""
    return (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2


def _name_of_plain(header: bytes) -> str | None:
    """The name; None where it means more than a file, or something to webdataset."""
    raw = header[_NAME].split(b"\0", 1)[0]
    if not raw or raw.startswith(b"__") or raw.endswith(b"/"):
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
