"""Reader of tar headers of damaged and malicious files: returns readable samples and reports the rest as errors.

Training is strict: the first error of a tar is raised. Tools continue and read the rest. Python's tarfile parses the
headers, within limits: it may read only headers of limited size, and must move forward, because some versions follow a
negative size backwards and loop forever.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from webdataset.tariterators import base_plus_ext

from m3i_scale.errors import DataError
from m3i_scale.text import printable

MAX_NAME = 1_024
"""Longer names are an error: webdataset's pattern for keys takes quadratic time."""
MAX_HEADER_BYTES = 16_384
"""Larger extended headers (long names, attributes) are an error; tarfile would read gigabytes."""
RESERVED = frozenset({"__key__", "__url__", "__local_path__"})
"""Names of webdataset's internal fields of a sample."""
CUT_OFF = "cut off"
DAMAGED = "damaged header"
AFTER_END = "data after the end of the tar"
EMPTY = "shard holds no samples"
SCATTERED = "members are not consecutive"
"""The only error of a sample that can be repaired without loss."""
TWICE = "duplicate key in the shard"
_BLOCK = tarfile.BLOCKSIZE
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, IndexError, OverflowError, RecursionError)
"""Errors that tarfile raises on damaged headers; not all of them are TarErrors."""
_RENAMING = {"path", "size", "GNU.sparse.name", "GNU.sparse.size", "GNU.sparse.realsize"}
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_HOSTILE = "get the shard from a source you trust, or create it again"
_COPY = "copy it again; or `m3i-scale shards check SHARDS --repair FOLDER --link` leaves out corrupt samples"
_FIXES = {
    "name is too long": _HOSTILE,
    "path leaves the folder": _HOSTILE,
    "member is sparse": _HOSTILE,
    "link or device": _HOSTILE,
    "global header renames members": _HOSTILE,
    EMPTY: "remove it, or create it again",
    AFTER_END: "use separate tars, or join them with `tar --concatenate`; `tar --ignore-zeros -x` unpacks this one",
    CUT_OFF: _COPY,
    DAMAGED: _COPY,
}


@dataclass(frozen=True)
class Problem:
    """An error of a sample, or of its shard if it has no key."""

    reason: str
    detail: str = ""
    key: str = "?"
    offset: int = 0
    """Offset of the sample's first byte in the shard."""


@dataclass(frozen=True, slots=True)
class Member:
    """Location of a regular file in a tar."""

    extension: str
    """Lowercase, as webdataset parses it."""
    start: int
    """Offset of the first header."""
    data: int
    """Offset of the content."""
    size: int

    @property
    def stop(self) -> int:
        """Return the offset of the byte after the content and its padding."""
        return self.data + -(-self.size // _BLOCK) * _BLOCK


@dataclass(slots=True)
class RawSample:
    """The files of one key, with their errors."""

    key: str
    members: list[Member] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    head: int = 0
    """CRC-32 of the headers of all files."""

    @property
    def start(self) -> int:
        """Return the offset of the first header."""
        return self.members[0].start

    @property
    def end(self) -> int:
        """Return the offset of the byte after the last file's content."""
        return self.members[-1].data + self.members[-1].size

    @property
    def size(self) -> int:
        """Return the size in bytes, headers included."""
        return sum(member.stop - member.start for member in self.members)

    def blame(self, reason: str, detail: str = "") -> None:
        """Add an error of this sample."""
        self.problems.append(Problem(reason, detail, printable(self.key), self.start))


@dataclass
class RawShard:
    """Samples and errors of a shard, according to its tar headers."""

    size: int = 0
    """Size of the file in bytes."""
    samples: list[RawSample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """Errors of the shard, and of files that belong to no sample."""
    others: int = 0
    """Number of folders and of files that webdataset skips."""


def read_strictly(stream: BinaryIO, size: int, where: str) -> RawShard:
    """Group the files of a tar of `size` bytes into samples. Errors in file contents appear only when a sample is read.

    Raise a DataError for the first error of the tar: not a tar, truncated, no samples, a duplicate key, data after the
    end, or files that a shard must not have (absolute paths, `..`, links, devices). OSErrors are passed on.
    """
    shard = RawShard(size)
    TarHeaders(stream, shard, where).read()
    return shard


def shard_error(where: str, problem: Problem, count: int = 1) -> DataError:
    """Return the exception for an error of a shard, the first of `count`."""
    detail = f"byte {problem.offset}, key '{problem.key}': {problem.detail}".removesuffix(": ")
    return DataError(
        f"cannot read the shard: {problem.reason}",
        where=where,
        why=detail + (f"; it has {count} errors" if count > 1 else ""),
        fix=_FIXES.get(
            problem.reason, "m3i-scale shards check SHARDS --repair FOLDER --link leaves out corrupt samples"
        ),
    )


class _HeaderFile:
    """File object that lets tarfile read only headers, in short reads."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._stream.read(size)


class TarHeaders:
    """Parser that groups the files of a tar into the samples of `shard`, which already has its size.

    With `strict`, which names the tar, the first error is raised; with None, errors are collected.
    """

    def __init__(self, stream: BinaryIO, shard: RawShard, strict: str | None) -> None:
        self._stream, self._shard, self._strict = stream, shard, strict
        self._by_key: dict[str, RawSample] = {}
        self._current: str | None = None
        self._newest: RawSample | None = None

    def read(self) -> None:
        """Read all headers and check the end of the tar."""
        end, damage = 0, None
        try:
            with tarfile.open(fileobj=cast(BinaryIO, _HeaderFile(self._stream)), mode="r:") as tar:
                for member in _forward(tar):
                    self._add(member, renamed=not _RENAMING.isdisjoint(tar.pax_headers))
                    end = tar.offset
                    if end > self._shard.size:
                        break
                end = tar.offset
        except TAR_ERRORS as error:
            damage = printable(str(error) or type(error).__name__)
        if end == 0:
            self._no_tar(damage)
        self._end(end, damage)
        if not self._shard.samples and not self._shard.problems:
            self._problem(EMPTY)

    def _checked(self, problem: Problem) -> Problem:
        if self._strict is not None:
            raise shard_error(self._strict, problem)
        return problem

    def _problem(self, reason: str, detail: str = "", offset: int = 0) -> None:
        self._shard.problems.append(self._checked(Problem(reason, detail, offset=offset)))

    def _add(self, member: tarfile.TarInfo, *, renamed: bool) -> None:
        name = printable(member.name[:MAX_NAME])
        reason = _hostile(member) or ("global header renames members" if renamed else None)
        if reason:
            self._problem(reason, name, member.offset)
        key, extension = (None, None) if reason else _split(member)
        if key is None or extension is None:
            self._shard.others += reason is None
            self._current = None
            return
        extension = extension.lower()
        self._newest = sample = self._sample(key, extension, member.offset)
        self._stream.seek(member.offset)  # just read, so still buffered
        sample.head = zlib.crc32(self._stream.read(member.offset_data - member.offset), sample.head)
        sample.members.append(Member(extension, member.offset, member.offset_data, member.size))
        self._current = key
        if extension in RESERVED:
            sample.blame("member has a reserved name", name)

    def _sample(self, key: str, extension: str, offset: int) -> RawSample:
        sample = self._by_key.get(key)
        again = sample is not None and any(member.extension == extension for member in sample.members)
        if sample is not None and key == self._current:
            if again:
                sample.blame("duplicate member", extension)
            return sample
        if sample is not None and not again:
            if not any(problem.reason == SCATTERED for problem in sample.problems):
                detail = f"'{extension}' is at byte {offset}"
                sample.problems.append(self._checked(Problem(SCATTERED, detail, printable(key), sample.start)))
            return sample
        fresh = RawSample(key)
        if sample is not None:
            twice = Problem(TWICE, f"first at byte {sample.start}", printable(key), offset)
            fresh.problems.append(self._checked(twice))
        if key.encode("utf-8", "replace").decode("utf-8") != key:
            fresh.problems.append(Problem("name is not UTF-8", "", printable(key), offset))
        self._by_key[key] = fresh
        self._shard.samples.append(fresh)
        return fresh

    def _no_tar(self, damage: str | None) -> None:
        self._stream.seek(0)
        head = self._stream.read(6)
        packed = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        if packed:
            self._problem("shard is compressed", f"by {packed}; loaders seek in plain tars: unpack it")
        elif damage:
            self._problem("shard is not a tar", damage)

    def _end(self, end: int, damage: str | None) -> None:
        if end == 0 and self._shard.problems:
            return
        size, stream = self._shard.size, self._stream
        stream.seek(min(end, size))
        block = stream.read(_BLOCK)
        whole = False
        if damage is None and len(block) == _BLOCK and not any(block):
            whole = True
            if any(any(piece) for piece in iter(lambda: stream.read(1 << 20), b"")):
                detail = "readers stop at the first end: are these several tars in one file?"
                self._problem(AFTER_END, detail, end)
        elif damage is None and len(block) == _BLOCK:
            self._problem(DAMAGED, f"the remaining {size - end} bytes cannot be read", end)
        elif damage is not None and end < size:
            self._problem(DAMAGED, damage, end)
        else:
            self._problem(CUT_OFF, f"at byte {size}", min(end, size))
        if self._newest is not None and (not whole or self._newest.end > size):
            self._newest.blame(CUT_OFF, "the last sample before the error: members may be missing")


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    last = -1
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= last or member.offset <= last:
            raise tarfile.ReadError("a header points backwards")
        last = member.offset
        vars(tar)["members"].clear()  # otherwise tarfile would keep all headers in memory
        yield member


def _hostile(member: tarfile.TarInfo) -> str | None:
    name = PurePosixPath(member.name)
    if len(member.name) > MAX_NAME:
        return "name is too long"
    if name.is_absolute() or ".." in name.parts:
        return "path leaves the folder"
    if member.issparse():
        return "member is sparse"
    if not (member.isreg() or member.isdir()):
        return "link or device"
    return None


def _split(member: tarfile.TarInfo) -> tuple[str | None, str | None]:
    """Return key and extension as webdataset parses them; None for files that it skips."""
    if not member.isreg() or member.name.startswith("__"):
        return None, None
    key, extension = base_plus_ext(member.name)
    return key, extension
