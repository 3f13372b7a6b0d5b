"""Read the headers of a tar that may be damaged or hostile: what can be read is returned, what cannot is a fault.

`data.index` refuses a shard at its first fault; here the rest is still looked at. Python's tarfile finds the members.
It is kept on a short leash: it may read headers only, none of them large, and must move forward (some versions follow
a negative size backwards, for ever).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from m3i_scale.data.scan import MAX_HEADER_BYTES, MAX_NAME, headers_of

RESERVED = frozenset({"__key__", "__url__", "__local_path__"})
"""What webdataset calls its own fields of a sample."""
UNREADABLE = "shard cannot be read"
SCATTERED = "members do not lie together"
"""The one fault of a sample that can be mended without loss."""
TWICE = "key stands twice in the shard"
_BLOCK = tarfile.BLOCKSIZE
_TAR_FAULTS = (tarfile.TarError, OSError, EOFError, ValueError, IndexError, OverflowError, RecursionError)
"""What tarfile raises on damaged headers; not all of it is a TarError."""
_RENAMING = ("path", "size", "GNU.sparse.name", "GNU.sparse.size", "GNU.sparse.realsize")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a sample, or (without key) with its shard."""

    reason: str
    detail: str = ""
    key: str = "?"
    offset: int = 0
    """First byte of the sample in the shard."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    extension: str
    """Lower case, as webdataset sees it."""
    start: int
    """First byte of the first header."""
    data: int
    """First byte of the content."""
    size: int
    """Bytes of the content."""

    @property
    def stop(self) -> int:
        """The byte after the content and its padding."""
        return self.data + -(-self.size // _BLOCK) * _BLOCK


@dataclass
class RawSample:
    """The members of one key."""

    key: str
    members: list[Member] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    scattered: bool = False
    """Members of other samples lie between."""

    @property
    def start(self) -> int:
        """First byte of the first header."""
        return self.members[0].start

    @property
    def size(self) -> int:
        """Return the bytes of its members, headers included."""
        return sum(member.stop - member.start for member in self.members)

    def blame(self, reason: str, detail: str = "") -> None:
        """Add a fault."""
        self.faults.append(Fault(reason, detail, printable(self.key), self.start))

    def pieces(self) -> list[tuple[int, int]]:
        """Byte ranges of the members, headers and padding included; neighbours joined."""
        joined: list[tuple[int, int]] = []
        for member in self.members:
            if joined and joined[-1][1] == member.start:
                joined[-1] = (joined[-1][0], member.stop)
            else:
                joined.append((member.start, member.stop))
        return joined


@dataclass
class RawShard:
    """What the headers of a shard tell."""

    path: Path
    size: int = 0
    """Bytes of the file."""
    samples: list[RawSample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """Of the shard and of members that belong to no sample."""
    others: int = 0
    """Folders, and files that webdataset skips."""


def read_shard(path: Path) -> RawShard:
    """Group the members of a tar into samples. Faults are values, also a file that cannot be read at all."""
    shard = RawShard(path)
    try:
        shard.size = path.stat().st_size
        with path.open("rb") as stream:
            _read(shard, stream)
    except OSError as error:
        shard.faults.append(Fault(UNREADABLE, str(error.strerror or error)))
    if not shard.samples and not shard.faults:
        shard.faults.append(Fault("shard holds no samples"))
    return shard


def read_members(stream: BinaryIO, sample: RawSample) -> dict[str, bytes]:
    """Contents of a sample's members by extension.

    Raises:
        OSError: the file is shorter than it was.
    """
    contents = {}
    for member in sample.members:
        stream.seek(member.data)
        data = stream.read(member.size)
        if len(data) < member.size:
            raise OSError(f"{len(data)} of {member.size} bytes of a member")
        contents[member.extension] = data
    return contents


def key_at(path: Path, offset: int) -> str:
    """The key of the member whose header begins at `offset`."""
    with path.open("rb") as stream:
        stream.seek(offset)
        head = io.BytesIO(stream.read(MAX_HEADER_BYTES + 4 * _BLOCK))
    with _tar(head) as tar:
        member = tar.next()
    key = None if member is None else base_plus_ext(member.name)[0]
    return "?" if key is None else printable(key)


def printable(text: str) -> str:
    """Text of others that any terminal and any UTF-8 file can take: what is not text is written as an escape."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in safe
    )


@contextmanager
def _tar(stream: BinaryIO) -> Iterator[tarfile.TarFile]:
    with tarfile.open(fileobj=headers_of(stream), mode="r:") as tar:
        yield tar


def _read(shard: RawShard, stream: BinaryIO) -> None:
    grouping = _Grouping(shard)
    end, fault = 0, None
    try:
        with _tar(stream) as tar:
            for member in _forward(tar):
                grouping.add(member, bool(set(_RENAMING) & set(tar.pax_headers)))
                end = tar.offset
            end = tar.offset
    except _TAR_FAULTS as error:
        fault = str(error) or type(error).__name__
    stream.seek(0)
    head = stream.read(6)
    packed = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if end == 0 and packed:
        shard.faults.append(Fault("shard is compressed", f"by {packed}; loaders seek in plain tars: unpack it"))
    elif end == 0 and fault:
        shard.faults.append(Fault("shard is no tar", printable(fault)))
    else:
        grouping.end(stream, end, fault)


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    last = -1
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= last or member.offset <= last:
            raise tarfile.ReadError("a header points backwards")
        last = member.offset
        vars(tar)["members"].clear()  # or all headers would be kept
        yield member


class _Grouping:
    """Sorts members into samples."""

    def __init__(self, shard: RawShard) -> None:
        self._shard = shard
        self._by_key: dict[str, RawSample] = {}
        self._current: str | None = None
        self._newest: RawSample | None = None

    def add(self, member: tarfile.TarInfo, renamed: bool) -> None:
        """Take one member."""
        name = printable(member.name[:MAX_NAME])
        reason = _hostile(member) or ("global header renames members" if renamed else None)
        key, extension = (None, None) if reason else _split(member)
        if reason:
            self._shard.faults.append(Fault(reason, name, offset=member.offset))
        if key is None or extension is None:
            self._shard.others += reason is None
            self._current = None
            return
        self._newest = self._sample(key, extension.lower(), member.offset)
        self._newest.members.append(Member(extension.lower(), member.offset, member.offset_data, member.size))
        self._current = key
        if extension.lower() in RESERVED:
            self._newest.blame("member has a reserved name", name)

    def end(self, stream: BinaryIO, end: int, fault: str | None) -> None:
        """Judge how the tar ends."""
        size = self._shard.size
        stream.seek(min(end, size))
        block = stream.read(_BLOCK)
        if fault is None and len(block) == _BLOCK and not any(block):
            if any(any(piece) for piece in iter(lambda: stream.read(1 << 20), b"")):
                detail = "no reader goes beyond the first end: are these several tars in one file?"
                self._shard.faults.append(Fault("data after the end of the tar", detail, offset=end))
        elif fault is None and len(block) == _BLOCK:
            lost = f"the {size - end} bytes from there on are not read"
            self._shard.faults.append(Fault("damaged header", lost, offset=end))
        elif fault is not None and end < size:
            self._shard.faults.append(Fault("damaged header", printable(fault), offset=end))
        else:
            self._shard.faults.append(Fault("cut off", f"at byte {size}", offset=min(end, size)))
        last = self._newest
        whole = not any(item.reason in ("cut off", "damaged header") for item in self._shard.faults)
        if last is not None and (not whole or last.members[-1].data + last.members[-1].size > size):
            last.blame("cut off", "the last sample before the fault: members may be missing")

    def _sample(self, key: str, extension: str, offset: int) -> RawSample:
        sample = self._by_key.get(key)
        again = sample is not None and any(member.extension == extension for member in sample.members)
        if sample is not None and key == self._current:
            if again:
                sample.blame("member stands twice", extension)
            return sample
        if sample is not None and not again:
            if not sample.scattered:
                sample.scattered = True
                sample.blame(SCATTERED, f"'{extension}' lies at byte {offset}")
            return sample
        fresh = RawSample(key)
        if sample is not None:
            fresh.faults.append(Fault(TWICE, f"first at byte {sample.start}", printable(key), offset))
        if key.encode("utf-8", "replace").decode("utf-8") != key:
            fresh.faults.append(Fault("name is not UTF-8", "", printable(key), offset))
        self._by_key[key] = fresh
        self._shard.samples.append(fresh)
        return fresh


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
    """Key and extension, as webdataset sees them; None for what it skips."""
    if not member.isreg() or member.name.startswith("__"):
        return None, None
    key, extension = base_plus_ext(member.name)
    return key, extension
