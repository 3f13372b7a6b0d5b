"""Indices of remote shards, downloaded from their folder or built by one scan, and cached with the shard versions."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fsspec.spec import AbstractBufferedFile

from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.address import Address, Url
from m3i_scale.data.remote.cache import cache_key
from m3i_scale.data.remote.faults import FaultError, bad_shard, start_fix
from m3i_scale.data.remote.fetch import Facts, facts, fetch, read_file, read_range, require_shell
from m3i_scale.data.remote.prefetch import no_room
from m3i_scale.data.scan import ShardIndex, cached, lists_all, load_saved, parse_index, save_index, scan_stream
from m3i_scale.errors import DataError

THREADS = 16
"""Concurrent requests, which mostly wait."""
SCAN_BLOCK_BYTES = 1 << 20


def index_remote(shards: Sequence[Url], cache_dir: Path, access: Access) -> dict[Address, ShardIndex]:
    """Return the indices of remote shards and save them in `cache_dir`."""
    for url in shards:
        _check_pipe(url, access)
    sums = _checksums(shards, access.at_start())
    # Query one shard per folder before all others, so that an unreachable server is reported once and early.
    for url in {url.parent: url for url in reversed(shards) if url.scheme != "pipe"}.values():
        _check_server(url, access)
    with ThreadPoolExecutor(min(THREADS, len(shards))) as pool:
        indices = pool.map(lambda url: _index(url, cached(url, cache_dir), sums.get(url, ""), access), shards)
        return {index.path: index for index in indices}


def _check_pipe(url: Url, access: Access) -> None:
    require_shell(url, access)
    if url.scheme == "pipe" and not access.cache_bytes:
        raise _needs_cache(url)


def _check_server(url: Url, access: Access) -> None:
    """Check that a server responds and, if caching is off, that it supports range requests."""
    try:
        facts(url, access.at_start())
        if not access.cache_bytes:
            read_range(url, 0, 1, access.at_start())
    except FaultError as fault:
        raise _needs_cache(url) if fault.not_ranged else bad_shard(url, fault, at_start=True) from None


def _needs_cache(url: Url) -> DataError:
    return DataError(
        "the shards can only be read whole, so they must go through the cache, which is off",
        where=str(url),
        fix="set data.cache_gib" + ("" if url.scheme == "pipe" else ", or take a server that knows range requests"),
    )


def _index(url: Url, saved: Path, sha256: str, access: Access) -> ShardIndex:
    try:
        known = load_saved(url, saved)
        if url.scheme == "pipe":
            return known or _save(_scan_whole(url, None, access), saved)
        now = facts(url, access.at_start())
        if known is not None:
            _refuse_another(known, now, saved)
            return known
        index = _from_beside(url, now, access) or _scan(url, now, access)
        return _save(dataclasses.replace(index, version=now.version, sha256=sha256 or now.sha256), saved)
    except FaultError as fault:
        raise bad_shard(url, fault, at_start=True) from None


def _refuse_another(known: ShardIndex, now: Facts, saved: Path) -> None:
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
    try:
        return index if lists_all(index, lambda: _BufferedShard(url, now.size, access)) else None
    except FaultError as fault:
        if not fault.not_ranged:
            raise
    return None


def _scan(url: Url, now: Facts, access: Access) -> ShardIndex:
    """Scan a shard from start to end; large files are skipped if the server supports range requests."""
    try:
        return ShardIndex(url, now.size, *scan_stream(_BufferedShard(url, now.size, access), now.size, url))
    except FaultError as fault:
        if not fault.not_ranged:
            raise
    return _scan_whole(url, now, access)


class _BufferedShard(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """Remote shard as a buffered file: fsspec caches its blocks, and each block is checked and retried."""

    def __init__(self, url: Url, size: int, access: Access) -> None:
        self._url, self._access = url, access
        kept = {"maxblocks": 2}  # the headers of a sample may span two blocks
        blocks = {"block_size": SCAN_BLOCK_BYTES, "cache_type": "blockcache", "cache_options": kept}
        super().__init__(None, str(url), size=size, **blocks)  # name for logs, without credentials

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self._url, start, min(end, self.size), self._access)  # the last block is shorter


def _scan_whole(url: Url, now: Facts | None, access: Access) -> ShardIndex:
    """Download a shard into the cache and scan it there. The size of a pipe's output is unknown before it runs."""
    if access.cache is None:
        raise _needs_cache(url)
    size, version = (None, "") if now is None else (now.size, now.version)
    key = cache_key(url, version, size or 0)
    descriptor = access.cache.open_or_add(key, size, lambda out: fetch(url, out, access, size, version))
    if descriptor is None:
        raise no_room(url)
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(descriptor).st_size
        return ShardIndex(url, size, *scan_stream(stream, size, url))


def _checksums(shards: Sequence[Url], access: Access) -> dict[Url, str]:
    """Return the SHA-256 of shards, from the manifests in their folders."""
    sums = {}
    for folder in sorted({url.parent for url in shards if url.scheme != "pipe"}):
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
