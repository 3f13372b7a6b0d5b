"""The members of a piece of tar, where all of them are plain: the case of nearly every shard, read without `tarfile`.

`tarfile` builds a file object, a stream and an object per member, which costs about as much as decoding a small image.
Plain are regular members, and those with a pax header that only tells times: webdataset's own writer puts one before
every member. Whatever is not plain (long names, other pax headers, links, sparse files, binary sizes) is left to it.
"""

from __future__ import annotations

import re
from typing import Any

BLOCK = 512
_NAME, _SIZE = slice(0, 100), slice(124, 136)
_TYPE, _MAGIC, _PREFIX = 156, slice(257, 263), 345
_REGULAR, _PAX = ord("0"), ord("x")
_TIMES = re.compile(rb"(?:\d{1,9} [amc]time=\d{1,20}(?:\.\d{1,20})?\n)+")
_TIME = re.compile(rb"(\d+) [^\n]*\n")
_MAGICS = (b"ustar\0", b"ustar ")


def plain_members(data: bytes) -> list[dict[str, Any]] | None:
    """Return files in order, as webdataset's `tar_file_iterator` gives them; None where a member is not plain.

    Args:
        data: whole members, the last one's padding and the end of the archive included or not. Their headers are those
            of the index, whose checksums held when it was made, and are not looked at again.
    """
    files: list[dict[str, Any]] = []
    offset, times_before = 0, False
    while offset < len(data):
        header = data[offset : offset + BLOCK]
        if not header[0]:
            return None if times_before or data[offset:].rstrip(b"\0") else files
        size = _size_of_plain(header)
        start = offset + BLOCK
        if size is None or start + size > len(data):
            return None
        if header[_TYPE] == _PAX:
            if times_before or not _tells_times(data[start : start + size]):
                return None
            times_before = True
        else:
            name = _name_of_plain(header)
            if name is None:
                return None
            files.append({"fname": name, "data": data[start : start + size]})
            times_before = False
        offset = start + size + -size % BLOCK
    return None if times_before else files


def _tells_times(records: bytes) -> bool:
    """Return whether a pax header says nothing that matters here, in records of the length that each of them names."""
    if not _TIMES.fullmatch(records):
        return False
    return all(int(record[1]) == len(record[0]) for record in _TIME.finditer(records))


def _size_of_plain(header: bytes) -> int | None:
    """Return the bytes of a regular member, or of a pax header; None for every other."""
    if len(header) < BLOCK or header[_TYPE] not in (_REGULAR, _PAX) or header[_MAGIC] not in _MAGICS or header[_PREFIX]:
        return None
    digits = header[_SIZE].rstrip(b"\0 ")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _name_of_plain(header: bytes) -> str | None:
    """Return the name; None where it means more than a file, or something to webdataset."""
    raw = header[_NAME].split(b"\0", 1)[0]
    if not raw or raw.startswith(b"__") or raw.endswith(b"/"):
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
