"""Indices of the shards of a dataset: loaded from `index/` next to the shards or from a cache, and built if missing.

Indices of remote shards are downloaded from their folder or built by one scan, and cached with the shard versions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fsspec.spec import AbstractBufferedFile

from m3i_scale.data.remote.access import Access, Address, Url
from m3i_scale.data.remote.fetch import Facts, facts, read_file, read_range
from m3i_scale.data.remote.read_errors import ReadError, bad_shard, start_fix
from m3i_scale.data.scan import (
    ShardIndex,
    cached,
    load_saved,
    parse_index,
    save_index,
    scan_shard,
    scan_stream,
)
from m3i_scale.errors import DataError

WAIT_TIMEOUT_S = 3_600.0
"""Timeout of ranks that wait for rank 0 to build indices."""
THREADS = 16
"""Concurrent requests, which mostly wait."""
SCAN_BLOCK_BYTES = 1 << 20


def build_index(shards: Sequence[Path], folder: Path, threads: int = 4) -> list[ShardIndex]:
    """Scan shards and save their indices in `folder`. `shards.folder.index_folder` writes their categories, too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            indices = list(pool.map(scan_shard, shards))
        for path, index in zip(shards, indices, strict=True):
            save_index(index, folder / f"{path.name}.npz")
    except OSError as error:
        raise DataError(
            f"cannot write the index: {error}", where=str(folder), fix="free space and make the folder writable"
        ) from None
    return indices


def load_index(
    shards: Sequence[Address],
    cache_dir: Path,
    *,
    rank: int = 0,
    wait_timeout_s: float = WAIT_TIMEOUT_S,
    access: Access | None = None,
) -> list[ShardIndex]:
    """Return the indices of the shards: from `index/` next to them, from the cache, or built into the cache by rank 0.

    Only rank 0 queries remote shards, so that starting a thousand ranks does not overload the server. It stores their
    version; a different version later is an error. The other ranks wait up to `wait_timeout_s` seconds until rank 0 has
    filled `cache_dir`, which all ranks of the node or job share.
    """
    indices: dict[Address, ShardIndex] = {}
    absent: dict[Path, list[Path]] = {}
    for path in shards:
        if isinstance(path, Url):
            continue
        index = load_sidecar_index(path) or load_saved(path, cached(path, cache_dir))
        if index is None:
            absent.setdefault(path.parent, []).append(path)
        else:
            indices[path] = index
    if rank == 0:
        for members in absent.values():
            indices |= {index.path: index for index in build_index(members, cached(members[0], cache_dir).parent)}
        remote = [path for path in shards if isinstance(path, Url)]
        if remote:
            indices |= _index_remote(remote, cache_dir, access or Access())
    else:
        end = time.monotonic() + wait_timeout_s
        waiting = [path for path in shards if path not in indices]
        indices |= {path: _await(path, cached(path, cache_dir), end, wait_timeout_s) for path in waiting}
    return [indices[path] for path in shards]


def load_sidecar_index(path: Path) -> ShardIndex | None:
    """Return the index in `index/` next to a shard; None if it is missing, or the shard has changed since."""
    return load_saved(path, path.parent / "index" / f"{path.name}.npz")


def _await(path: Address, saved: Path, deadline: float, timeout_s: float) -> ShardIndex:
    while (index := load_saved(path, saved)) is None:
        if time.monotonic() > deadline:
            raise DataError(
                f"rank 0 did not index the shard within {timeout_s:g} s",
                where=str(path),
                fix="run `m3i-scale shards index` beforehand, and mount the cache folder on all hosts",
            )
        time.sleep(0.05)
    return index


def _index_remote(shards: Sequence[Url], cache_dir: Path, access: Access) -> dict[Address, ShardIndex]:
    """Return the indices of remote shards, and save them in `cache_dir`."""
    # Check one shard of every folder first, so that a server that is down is reported once and early.
    for url in {url.parent: url for url in reversed(shards)}.values():
        try:
            if facts(url, access.at_start()).size:
                read_range(url, 0, 1, access.at_start())
        except ReadError as error:
            raise bad_shard(url, error, at_start=True) from None
    with ThreadPoolExecutor(min(THREADS, len(shards))) as pool:
        indices = pool.map(lambda url: _index(url, cached(url, cache_dir), access), shards)
        return {index.path: index for index in indices}


def _index(url: Url, saved: Path, access: Access) -> ShardIndex:
    try:
        known = load_saved(url, saved)
        now = facts(url, access.at_start())
        if known is not None:
            if (known.size, known.version) != (now.size, now.version):
                raise DataError(
                    f"the shard changed since it was indexed: {known.size} bytes, version "
                    f"{known.version or 'unknown'}; now {now.size} bytes, version {now.version or 'unknown'}",
                    where=str(url),
                    why="a resumed run would silently train on other samples",
                    fix=f"restore the indexed shard; to use the new one, remove {saved}",
                )
            return known
        index = _load_remote_sidecar(url, now, access)
        if index is None:
            index = ShardIndex(url, now.size, *scan_stream(_BufferedShard(url, now.size, access), now.size, url))
    except ReadError as error:
        raise bad_shard(url, error, at_start=True) from None
    index = dataclasses.replace(index, version=now.version)
    try:
        saved.parent.mkdir(parents=True, exist_ok=True)
        save_index(index, saved)
    except OSError as error:
        raise DataError(
            f"cannot write the index: {error}", where=str(saved), fix="free space and make the folder writable"
        ) from None
    return index


def _load_remote_sidecar(url: Url, now: Facts, access: Access) -> ShardIndex | None:
    place = url.parent / "index" / f"{url.name}.npz"
    try:
        index = parse_index(url, read_file(place, access.at_start()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fix = start_fix(error) or "remove it, or rebuild it with `m3i-scale shards index`"
        raise DataError(f"cannot read the index: {error}", where=str(place), fix=fix) from None
    return index if index is not None and index.size == now.size else None


class _BufferedShard(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """Remote shard as a buffered file: fsspec caches its blocks, and each block is checked and retried."""

    def __init__(self, url: Url, size: int, access: Access) -> None:
        self._url, self._access = url, access
        kept = {"maxblocks": 2}  # the headers of a sample may span two blocks
        blocks = {"block_size": SCAN_BLOCK_BYTES, "cache_type": "blockcache", "cache_options": kept}
        super().__init__(None, str(url), size=size, **blocks)  # name for logs, without credentials

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self._url, start, min(end, self.size), self._access)  # the last block is shorter
