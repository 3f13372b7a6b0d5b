"""Indices of remote shards, downloaded from their folder or built by one scan, and cached with the shard versions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fsspec.spec import AbstractBufferedFile

from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.address import Address, Url
from m3i_scale.data.remote.faults import FaultError, bad_shard, start_fix
from m3i_scale.data.remote.fetch import Facts, facts, read_file, read_range
from m3i_scale.data.scan import ShardIndex, cached, lists_all, load_saved, parse_index, save_index, scan_stream
from m3i_scale.errors import DataError

THREADS = 16
"""Concurrent requests, which mostly wait."""
SCAN_BLOCK_BYTES = 1 << 20


def index_remote(shards: Sequence[Url], cache_dir: Path, access: Access) -> dict[Address, ShardIndex]:
    """Return the indices of remote shards, and save them in `cache_dir`."""
    sums = _checksums(shards, access.at_start())
    # Check one shard of every folder first, so that a server that is down is reported once and early.
    for url in {url.parent: url for url in reversed(shards)}.values():
        _check_server(url, access)
    with ThreadPoolExecutor(min(THREADS, len(shards))) as pool:
        indices = pool.map(lambda url: _index(url, cached(url, cache_dir), sums.get(url, ""), access), shards)
        return {index.path: index for index in indices}


def _check_server(url: Url, access: Access) -> None:
    try:
        if facts(url, access.at_start()).size:
            read_range(url, 0, 1, access.at_start())
    except FaultError as fault:
        raise bad_shard(url, fault, at_start=True) from None


def _index(url: Url, saved: Path, sha256: str, access: Access) -> ShardIndex:
    try:
        known = load_saved(url, saved)
        now = facts(url, access.at_start())
        if known is not None:
            _check_same_version(known, now, saved)
            return known
        index = _from_beside(url, now, access) or _scan(url, now, access)
        return _save(dataclasses.replace(index, version=now.version, sha256=sha256 or now.sha256), saved)
    except FaultError as fault:
        raise bad_shard(url, fault, at_start=True) from None


def _check_same_version(known: ShardIndex, now: Facts, saved: Path) -> None:
    if (known.size, known.version) == (now.size, now.version):
        return
    raise DataError(
        f"the shard was replaced since it was indexed: {known.size} bytes, version {known.version or 'unknown'}; "
        f"now {now.size} bytes, version {now.version or 'unknown'}",
        where=str(known.path),
        why="a run that goes on with other samples would not say so",
        fix=f"bring the shard back; if the new one is meant, remove {saved}",
    )


def _save(index: ShardIndex, path: Path) -> ShardIndex:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(index, path)
    except OSError as error:
        raise DataError(f"cannot write the index: {error}", where=str(path)) from None
    return index


def _from_beside(url: Url, now: Facts, access: Access) -> ShardIndex | None:
    place = url.parent / "index" / f"{url.name}.npz"
    try:
        index = parse_index(url, read_file(place, access.at_start()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fix = start_fix(error) or "remove or renew it"
        raise DataError(f"cannot read the index: {error}", where=str(place), fix=fix) from None
    if index is None or index.size != now.size:
        return None
    return index if lists_all(index, lambda: _BufferedShard(url, now.size, access)) else None


def _scan(url: Url, now: Facts, access: Access) -> ShardIndex:
    """Build the index from the tar headers of a shard. The data of files larger than a block is skipped."""
    return ShardIndex(url, now.size, *scan_stream(_BufferedShard(url, now.size, access), now.size, url))


class _BufferedShard(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """Remote shard as a buffered file: fsspec caches its blocks, and each block is checked and retried."""

    def __init__(self, url: Url, size: int, access: Access) -> None:
        self._url, self._access = url, access
        kept = {"maxblocks": 2}  # the headers of a sample may span two blocks
        blocks = {"block_size": SCAN_BLOCK_BYTES, "cache_type": "blockcache", "cache_options": kept}
        super().__init__(None, str(url), size=size, **blocks)  # name for logs, without credentials

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self._url, start, min(end, self.size), self._access)  # the last block is shorter


def _checksums(shards: Sequence[Url], access: Access) -> dict[Url, str]:
    """Return the SHA-256 of shards, from the manifests in their folders."""
    sums = {}
    for folder in sorted({url.parent for url in shards}):
        place = folder / "manifest.json"
        try:
            entries = json.loads(read_file(place, access))["shards"].items()
            known = {folder / name: str(entry.get("sha256", "")) for name, entry in entries}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fix = start_fix(error) or "renew or remove it"
            raise DataError(f"cannot read the manifest: {error}", where=str(place), fix=fix) from None
        sums.update(known)
    return sums
