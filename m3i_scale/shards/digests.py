"""Digests of samples and of input files, and a search for equal digests in bounded memory: they are spilled to disk by
their first bits."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
"""128 bits: a random collision is negligible for any dataset."""
_BUCKETS = 64
INPUT_DIGEST = "input_sha256"
"""Key of the digest of the packed files in manifest.json."""
ROW = np.dtype([("high", ">u8"), ("low", ">u8"), ("shard", ">u4"), ("offset", ">u8")])


def digest_of(data: bytes) -> bytes:
    """Return a 128-bit digest of the data."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def digest_of_files(files: Iterable[tuple[str, int]]) -> str:
    """Return a digest of names and sizes."""
    digest = hashlib.sha256()
    for name, size in sorted(files):
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def rows_of(digests: Sequence[bytes], shard: int, offsets: Sequence[int]) -> NDArray[Any]:
    """Return rows for `Digests.add` from the digests of samples of one shard."""
    rows = np.zeros(len(digests), dtype=ROW)
    if not digests:
        return rows
    values = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
    rows["high"], rows["low"] = values[:, 0], values[:, 1]
    rows["shard"], rows["offset"] = shard, offsets
    return rows


class Digests:
    """On-disk store of digests with their places; a context manager that removes its files at the end."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="m3i-digests-")

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, rows: NDArray[Any]) -> None:
        """Add rows from `rows_of`."""
        buckets = (rows["high"] >> np.uint64(58)).astype(np.int64)
        for bucket in np.unique(buckets):
            with (Path(self._folder.name) / str(bucket)).open("ab") as file:
                file.write(rows[buckets == bucket].tobytes())

    def repeated(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the places (shard, offset) of every digest that occurs more than once, sorted."""
        for bucket in range(_BUCKETS):
            path = Path(self._folder.name) / str(bucket)
            if not path.exists():
                continue
            rows = np.fromfile(path, dtype=ROW)
            rows = rows[np.lexsort((rows["offset"], rows["shard"], rows["low"], rows["high"]))]
            same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
            edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                group = rows[first : last + 1]
                yield list(zip(group["shard"].tolist(), group["offset"].tolist(), strict=True))
