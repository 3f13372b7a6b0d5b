"""Index of a shard: the byte range of every sample, from one scan of the tar headers, saved in a file.

The index makes a seek O(1). It also stops malicious tars: later, only byte ranges of regular files are read.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.remote.access import Address, Url
from m3i_scale.data.tar import read_strictly
from m3i_scale.defaults import MAX_SAMPLE_BYTES
from m3i_scale.errors import DataError
from m3i_scale.files import replacing

INDEX_FORMAT = 2
PROBES = 16
"""Number of samples to compare by their headers if the modification time of a shard differs from its index."""
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_ARRAY_ERRORS = (
    *(zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error),
    *(SyntaxError, tokenize.TokenError, OverflowError, MemoryError),
)
"""Errors besides ValueError that zipfile and numpy raise for invalid files."""


@dataclass(frozen=True)
class ShardIndex:
    """Index of a shard: the byte ranges of its samples."""

    path: Address
    size: int
    """Size of the tar in bytes when it was scanned."""
    ranges_N2: NDArray[np.int64]
    """(N, 2): first byte of a sample's first header, and the byte after the data of its last file."""
    heads_N: NDArray[np.uint32]
    """(N): CRC-32 of the headers of a sample's files. It differs for another shard of the same size."""
    version: str = ""
    """Version of the scanned file: ETag or similar for a remote file, modification time for a local one."""

    def __len__(self) -> int:
        return len(self.ranges_N2)

    @property
    def digest(self) -> str:
        """Return a digest of all headers: equal for copies of the shard, different for other samples."""
        return hashlib.sha256(self.heads_N.astype("<u4").tobytes()).hexdigest()[:16]


def scan_shard(path: Path) -> ShardIndex:
    """Build the index of a local shard from its tar headers."""
    try:
        facts = path.stat()
        with path.open("rb") as stream:
            ranges, heads = scan_stream(stream, facts.st_size, path)
    except OSError as error:
        raise DataError(f"cannot read the shard: {error}", where=str(path), fix="copy or create it again") from None
    return ShardIndex(path, facts.st_size, ranges, heads, str(facts.st_mtime_ns))


def scan_stream(stream: BinaryIO, size: int, path: Address) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Build `ranges_N2` and `heads_N` of an index from the headers of a tar; errors as in `read_strictly`."""
    samples = read_strictly(stream, size, str(path)).samples
    ranges = np.asarray([[sample.start, sample.end] for sample in samples], dtype=np.int64)
    return ranges, np.asarray([sample.head for sample in samples], dtype=np.uint32)


def head_of(data: bytes) -> int | None:
    """Return the `heads_N` value of a sample from its bytes in the tar; None if these are not tar members."""
    head, offset = 0, 0
    while offset < len(data):
        header = data[offset : offset + tarfile.BLOCKSIZE]
        size = _member_size(header)
        if size is None:
            return None
        blocks = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        offset += tarfile.BLOCKSIZE
        head = zlib.crc32(header, head)
        if header[156:157] in _EXTENSIONS:  # its content belongs to the next header, e.g. a long name
            head = zlib.crc32(data[offset : offset + blocks], head)
        offset += blocks
    return head


def _member_size(header: bytes) -> int | None:
    field = header[124:136]
    if field[:1] >= b"\x80":
        return int.from_bytes(field[1:], "big")  # 8 GiB or more
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def cached(path: Address, cache_dir: Path) -> Path:
    """Return the path of a shard's index in an index cache."""
    named = str(path.parent if isinstance(path, Url) else path.parent.resolve())
    folder = hashlib.sha256(named.encode()).hexdigest()[:16]
    return cache_dir / "index" / folder / f"{path.name}.npz"


def save_index(index: ShardIndex, path: Path) -> None:
    """Write an index atomically. Raise an OSError if the folder is not writable."""
    with replacing(path, durable=False) as stream:
        np.savez(
            stream,
            format=np.int64(INDEX_FORMAT),
            size=np.int64(index.size),
            ranges=index.ranges_N2,
            heads=index.heads_N,
            version=np.str_(index.version),
        )


def load_saved(path: Address, saved: Path) -> ShardIndex | None:
    """Load a saved index; None if it is missing, or the (local) shard has changed since."""
    if not saved.is_file():
        return None
    try:
        index = parse_index(path, saved.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the index: {error}", where=str(saved), fix="remove the file; it is created again"
        ) from None
    if index is None or isinstance(path, Url):
        return index
    try:
        facts = path.stat()
        same = index.size == facts.st_size and (index.version == str(facts.st_mtime_ns) or _has_heads(path, index))
        return index if same else None
    except OSError as error:
        raise DataError(
            f"cannot read the shard: {error}", where=str(path), fix="check the storage, or copy the shard again"
        ) from None


def parse_index(path: Address, data: bytes) -> ShardIndex | None:
    """Parse an index file, which may be damaged or malicious; return None if its format differs.

    Raise a ValueError if it is not a valid index.
    """
    arrays = stored_arrays(data)
    try:
        if int(arrays["format"]) != INDEX_FORMAT:
            return None
        size, ranges, heads = int(arrays["size"]), arrays["ranges"], arrays["heads"]
        version = str(arrays["version"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a part is missing or invalid: {error}") from None
    if ranges.dtype != np.int64 or ranges.ndim != 2 or ranges.shape[1] != 2 or not len(ranges):
        raise ValueError("invalid ranges of samples")
    if heads.dtype != np.uint32 or heads.shape != (len(ranges),):
        raise ValueError("invalid checksums of samples")
    if ranges.min() < 0 or ranges.max() > size or (ranges[:, 0] >= ranges[:, 1]).any():
        raise ValueError("samples are outside of the shard")
    if (ranges[:, 0] % tarfile.BLOCKSIZE).any() or (ranges[1:, 0] < ranges[:-1, 1]).any():
        raise ValueError("samples overlap, or one is listed twice")
    return ShardIndex(path, size, ranges, heads, version)


def stored_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Read an `np.savez` file without `np.load`, which does not always verify checksums.

    Raise a ValueError if the file is damaged, or compressed and could expand.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data) for entry in entries):
                raise ValueError("it is compressed")
            files = {entry.filename.removesuffix(".npy"): io.BytesIO(archive.read(entry)) for entry in entries}
        return {name: np.lib.format.read_array(file) for name, file in files.items()}
    except _ARRAY_ERRORS as error:
        raise ValueError(str(error)) from None


def _has_heads(path: Path, index: ShardIndex) -> bool:
    """Return whether a copied or replaced file still has the indexed headers; compares samples spread over the file."""
    with path.open("rb") as stream:
        for number in np.linspace(0, len(index) - 1, PROBES, dtype=np.int64):
            start, end = (int(value) for value in index.ranges_N2[number])
            if end - start > MAX_SAMPLE_BYTES:
                continue
            stream.seek(start)
            if head_of(stream.read(end - start)) != index.heads_N[number]:
                return False
    return True
