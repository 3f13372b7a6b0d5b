"""Indices of remote shards: fetched from beside them, or made by reading them once, and kept with their versions."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from m3i_scale.data.ahead import cache_key
from m3i_scale.data.cache import ShardCache
from m3i_scale.data.faults import FaultError, bad_at_start, start_fix
from m3i_scale.data.places import Place, Url
from m3i_scale.data.remote import (
    Access,
    Facts,
    RangedFile,
    facts,
    fetch,
    fetch_pipe,
    read_file,
    read_range,
)
from m3i_scale.data.scan import ShardIndex, cached, load_saved, parse_index, save_index, scan_stream
from m3i_scale.errors import DataError

THREADS = 16
"""Requests at a time: they mostly wait."""
SCAN_BLOCK_BYTES = 1 << 20


def index_remote(shards: Sequence[Url], cache_dir: Path, access: Access) -> dict[Place, ShardIndex]:
    """Indices of remote shards, saved in `cache_dir`.

    Raises:
        DataError: a shard that cannot be read, or is not the one that was indexed; pipes that are not allowed.
    """
    for url in shards:
        no_pipes(url, access)
    sums = _checksums(shards, access.at_start())
    _first_of_each_folder(shards, access)
    with ThreadPoolExecutor(min(THREADS, len(shards))) as pool:
        found = pool.map(lambda url: _index(url, cached(url, cache_dir), sums.get(url, ""), access), shards)
        return {index.path: index for index in found}


def _first_of_each_folder(shards: Sequence[Url], access: Access) -> None:
    """Ask after one shard of every folder before all are: a server that is down is told once, and soon."""
    for url in {url.parent: url for url in reversed(shards) if url.scheme != "pipe"}.values():
        try:
            facts(url, access.at_start())
            no_whole_files(url, access.at_start())
        except FaultError as fault:
            raise bad_at_start(url, fault) from None


def _index(url: Url, saved: Path, sha256: str, access: Access) -> ShardIndex:
    try:
        known = load_saved(url, saved)
        if url.scheme == "pipe":
            return known or _saved(_scan_pipe(url, access), saved)
        now = facts(url, access.at_start())
        if known is not None:
            _refuse_another(known, now, saved)
            return known
        index = _from_beside(url, now, access) or _scan(url, now, access)
        return _saved(dataclasses.replace(index, version=now.version, sha256=sha256 or now.sha256), saved)
    except FaultError as fault:
        raise bad_at_start(url, fault) from None


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


def _saved(index: ShardIndex, path: Path) -> ShardIndex:
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
    return index if index is not None and index.size == now.size else None


def _scan(url: Url, now: Facts, access: Access) -> ShardIndex:
    """Read a shard from front to back; members larger than a block are passed over."""
    try:
        stream = io.BufferedReader(RangedFile(url, now.size, access), SCAN_BLOCK_BYTES)
        return ShardIndex(url, now.size, *scan_stream(stream, now.size, url))
    except FaultError as fault:
        if not fault.not_ranged or not access.cache_bytes:
            raise
    key = cache_key(url, now.version, now.size)
    fill = functools.partial(_fetch_into, url, now, access)
    return _scan_in_cache(url, key, now.size, fill, access)


def _fetch_into(url: Url, now: Facts, access: Access, out: BinaryIO) -> None:
    fetch(url, now.size, out, access, now.version)


def _scan_pipe(url: Url, access: Access) -> ShardIndex:
    def fill(out: BinaryIO) -> None:
        out.truncate(fetch_pipe(url, out, access))

    return _scan_in_cache(url, cache_key(url, "", 0), None, fill, access)


def _scan_in_cache(
    url: Url, key: str, size: int | None, fill: Callable[[BinaryIO], None], access: Access
) -> ShardIndex:
    cache = ShardCache(access.cache_dir, access.cache_bytes)
    found = cache.open(key)
    if found is None and cache.add(key, size, fill):
        found = cache.open(key)
    if found is None:
        raise DataError(
            "the shard can only be read whole, and the cache has no room for it", where=str(url), fix="raise cache_gib"
        )
    with os.fdopen(found, "rb") as stream:
        size = os.fstat(found).st_size
        return ShardIndex(url, size, *scan_stream(stream, size, url))


def _checksums(shards: Sequence[Url], access: Access) -> dict[Url, str]:
    """SHA-256 of shards, as the manifests beside them have it."""
    sums = {}
    for folder in sorted({url.parent for url in shards if url.scheme != "pipe"}):
        place = folder / "manifest.json"
        try:
            listed = json.loads(read_file(place, access))["shards"]
            known = {folder / name: str(entry.get("sha256", "")) for name, entry in _entries(listed).items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fix = start_fix(error) or "renew or remove it"
            raise DataError(f"cannot read the manifest: {error}", where=str(place), fix=fix) from None
        sums.update(known)
    return sums


def _entries(listed: object) -> Mapping[str, Mapping[str, object]]:
    if not isinstance(listed, dict):
        raise TypeError("'shards' is no mapping")
    return cast("Mapping[str, Mapping[str, object]]", listed)


def no_pipes(url: Url, access: Access) -> None:
    """Refuse shells where they are not allowed, or cannot work.

    Raises:
        DataError: see the message.
    """
    if url.scheme != "pipe":
        return
    if not access.allow_shell:
        raise DataError(
            "the shards come out of a shell command, and those are not run",
            where=str(url),
            why="whoever can change the run file or a list of shards could run any program",
            fix="if you trust the commands: data.allow_shell=true",
        )
    if not access.cache_bytes:
        raise DataError(
            "a pipe cannot seek, so its shards must go through the cache, which is off",
            where=str(url),
            fix="set data.cache_gib",
        )


def no_whole_files(url: Url, access: Access) -> None:
    """Refuse a server that knows no ranges where there is no cache; asks it for one byte.

    Raises:
        DataError: see the message.
        FaultError: it does not answer.
    """
    if access.cache_bytes or url.scheme not in ("http", "https"):
        return
    try:
        read_range(url, 0, 1, access)
    except FaultError as fault:
        if not fault.not_ranged:
            raise
        raise DataError(
            "the server sends whole files only, so its shards must go through the cache, which is off",
            where=str(url),
            fix="set data.cache_gib, or take a server that knows range requests",
        ) from None
