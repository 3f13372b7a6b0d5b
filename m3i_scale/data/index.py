"""Where every sample lies in its shard: from one scan of the tar headers, kept beside the shards or in a cache.

The index makes a seek O(1), and it is where hostile tars are stopped: after it, only byte ranges of regular members are
read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from m3i_scale.errors import DataError

INDEX_FORMAT = 1
WAIT_TIMEOUT_S = 3_600.0
"""Ranks that wait for rank 0 to build indices give up after this long."""


@dataclass(frozen=True)
class ShardIndex:
    """Byte ranges of the samples of one shard."""

    path: Path
    size: int
    """Bytes of the tar file when it was scanned."""
    ranges_N2: NDArray[np.int64]
    """(N, 2): first byte of a sample's first header, and the byte after its last member's data."""

    def __len__(self) -> int:
        return len(self.ranges_N2)


def scan_shard(path: Path) -> ShardIndex:
    """Read all headers of a tar.

    Raises:
        DataError: unreadable, truncated, no samples, a key in two places, or members that no shard should have
            (absolute paths, `..`, links, devices).
    """
    ranges: list[list[int]] = []
    keys: set[str] = set()
    current: str | None = None
    size = _size(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _refuse_hostile(member, path)
                end = member.offset_data + member.size
                if end > size:
                    raise _truncated(path)
                key = _key(member)
                if key is None:
                    current = None
                elif key == current:
                    ranges[-1][1] = end
                elif key in keys:
                    raise DataError(
                        f"members of sample '{key}' do not lie together", where=str(path), fix="make the shard anew"
                    )
                else:
                    keys.add(key)
                    current = key
                    ranges.append([member.offset, end])
            end_of_members = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"cannot read the shard: {error}", where=str(path), fix="copy or make it anew") from None
    if end_of_members > size or not _is_closed(path, end_of_members, size):
        raise _truncated(path)
    if not ranges:
        raise DataError("the shard holds no samples", where=str(path), fix="remove it, or make it anew")
    return ShardIndex(path, size, np.asarray(ranges, dtype=np.int64))


def build_index(shards: Sequence[Path], folder: Path, threads: int = 4) -> list[ShardIndex]:
    """Scan shards and save their indices as `folder/<shard>.npz`.

    Raises:
        DataError: see `scan_shard`; the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(scan_shard, shards))
        for index in found:
            _save(index, folder / f"{index.path.name}.npz")
    except OSError as error:
        raise DataError(f"cannot write the index: {error}", where=str(folder)) from None
    return found


def load_index(
    shards: Sequence[Path], cache_dir: Path, *, rank: int = 0, wait_timeout_s: float = WAIT_TIMEOUT_S
) -> list[ShardIndex]:
    """Indices of the shards: from `index/` beside them, from the cache, or built into the cache by rank 0.

    Args:
        shards: tar files.
        cache_dir: seen by all ranks of this host or job; a rank above 0 waits until rank 0 has filled it.
        rank: this process.
        wait_timeout_s: how long to wait.

    Raises:
        DataError: see `scan_shard`; rank 0 did not deliver in time.
    """
    found: dict[Path, ShardIndex] = {}
    for path in shards:
        index = _load(path, path.parent / "index" / f"{path.name}.npz") or _load(path, _cached(path, cache_dir))
        if index is not None:
            found[path] = index
    absent = [path for path in shards if path not in found]
    by_folder: dict[Path, list[Path]] = {}
    for path in absent:
        by_folder.setdefault(path.parent, []).append(path)
    for members in by_folder.values():
        if rank == 0:
            found.update({index.path: index for index in build_index(members, _cached(members[0], cache_dir).parent)})
        else:
            wait = functools.partial(_await, deadline=time.monotonic() + wait_timeout_s, timeout_s=wait_timeout_s)
            found.update({path: wait(path, _cached(path, cache_dir)) for path in members})
    return [found[path] for path in shards]


def _await(path: Path, saved: Path, *, deadline: float, timeout_s: float) -> ShardIndex:
    while (index := _load(path, saved)) is None:
        if time.monotonic() > deadline:
            raise DataError(
                f"rank 0 did not index the shard within {timeout_s:g} s",
                where=str(path),
                fix="index shards beforehand with `m3i-scale shards index`, and let all hosts see the cache folder",
            )
        time.sleep(0.05)
    return index


def _key(member: tarfile.TarInfo) -> str | None:
    """The sample a member belongs to, as webdataset sees it; None for what it skips."""
    if not member.isreg() or member.name.startswith("__"):
        return None
    key: str | None = base_plus_ext(member.name)[0]
    return key


def _refuse_hostile(member: tarfile.TarInfo, path: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        kind = "a path that leaves the folder"
    elif not (member.isreg() or member.isdir()):
        kind = "a link or a device"
    else:
        return
    raise DataError(
        f"the shard holds {kind}: {member.name!r}",
        where=str(path),
        why="no data set needs that; the file may be hostile",
        fix="take the shard from a source you trust, or make it anew",
    )


def _is_closed(path: Path, end: int, size: int) -> bool:
    """A whole tar ends in blocks of zeros; one cut between two members ends without."""
    if size - end < tarfile.BLOCKSIZE:
        return False
    with path.open("rb") as stream:
        stream.seek(end)
        return not any(stream.read(tarfile.BLOCKSIZE))


def _truncated(path: Path) -> DataError:
    return DataError("the shard is cut off", where=str(path), fix="copy it again; compare its size with manifest.json")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read the shard: {error}", where=str(path)) from None


def _cached(path: Path, cache_dir: Path) -> Path:
    folder = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:16]
    return cache_dir / "index" / folder / f"{path.name}.npz"


def _save(index: ShardIndex, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as stream:
        np.savez(stream, format=np.int64(INDEX_FORMAT), size=np.int64(index.size), ranges=index.ranges_N2)
    os.replace(temporary, path)  # readers see the whole file or none


def _load(path: Path, saved: Path) -> ShardIndex | None:
    """The saved index; None where there is none, or it is of another file than the shard is now."""
    if not saved.is_file():
        return None
    try:
        with np.load(saved, allow_pickle=False) as values:
            known, size, ranges = int(values["format"]), int(values["size"]), values["ranges"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"cannot read the index: {error}", where=str(saved), fix="remove the file") from None
    sound = ranges.ndim == 2 and ranges.shape[1] == 2 and len(ranges) and ranges.dtype == np.int64
    if known != INDEX_FORMAT or size != _size(path) or not sound:
        return None
    return ShardIndex(path, size, ranges)
