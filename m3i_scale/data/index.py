"""Indices of the shards of a dataset: loaded from `index/` next to the shards or from a cache, and built if missing."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m3i_scale.data.present import file_of, save_present
from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.address import Address, Url
from m3i_scale.data.remote.index import index_remote
from m3i_scale.data.scan import ShardIndex, cached, load_saved, save_index, scan_shard
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.errors import DataError

WAIT_TIMEOUT_S = 3_600.0
"""Timeout of ranks that wait for rank 0 to build indices."""


def build_index(shards: Sequence[Path], folder: Path, threads: int = 4) -> list[ShardIndex]:
    """Scan shards and save their indices in `folder`; in `index/` next to them also their object categories."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            indices = list(pool.map(scan_shard, shards))
        for path, index in zip(shards, indices, strict=True):
            save_index(index, folder / f"{path.name}.npz")
            if folder == path.parent / "index" and (path.parent / CATEGORIES).is_file():
                save_present(path, index.digest, folder / file_of(path.name))
    except OSError as error:
        raise DataError(f"cannot write the index: {error}", where=str(folder)) from None
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
    remote = [path for path in shards if isinstance(path, Url)]
    local = [path for path in shards if isinstance(path, Path)]
    for path in local:
        index = load_sidecar_index(path) or load_saved(path, cached(path, cache_dir))
        if index is not None:
            indices[path] = index
    absent = [path for path in local if path not in indices]
    if rank == 0:
        by_folder: dict[Path, list[Path]] = {}
        for path in absent:
            by_folder.setdefault(path.parent, []).append(path)
        for members in by_folder.values():
            indices.update({index.path: index for index in build_index(members, cached(members[0], cache_dir).parent)})
        if remote:
            indices.update(index_remote(remote, cache_dir, access or Access()))
    else:
        wait = functools.partial(_await, deadline=time.monotonic() + wait_timeout_s, timeout_s=wait_timeout_s)
        places: list[Address] = [*absent, *remote]
        indices.update({path: wait(path, cached(path, cache_dir)) for path in places})
    return [indices[path] for path in shards]


def load_sidecar_index(path: Path) -> ShardIndex | None:
    """Return the index in `index/` next to a shard; None if it is missing, or the shard has changed since."""
    return load_saved(path, path.parent / "index" / f"{path.name}.npz")


def _await(path: Address, saved: Path, *, deadline: float, timeout_s: float) -> ShardIndex:
    while (index := load_saved(path, saved)) is None:
        if time.monotonic() > deadline:
            raise DataError(
                f"rank 0 did not index the shard within {timeout_s:g} s",
                where=str(path),
                fix="index shards beforehand with `m3i-scale shards index`, and let all hosts see the cache folder",
            )
        time.sleep(0.05)
    return index
