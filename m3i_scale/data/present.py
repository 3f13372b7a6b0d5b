"""Object categories of the samples of a shard, stored next to its index, so that sampling need not read the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import is_index, shard_categories
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.scan import ShardIndex, stored_arrays
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.data.tar import RawSample, read_members, read_shard
from m3i_scale.errors import DataError
from m3i_scale.files import replacing


@dataclass(frozen=True)
class AvailableFields:
    """Categories of the samples of a shard, without crowds."""

    counts_N: NDArray[np.int64]
    """Number of categories per sample."""
    categories_M: NDArray[np.int64]
    """Categories of all samples, concatenated; unique per sample."""

    def __len__(self) -> int:
        return len(self.counts_N)

    @property
    def digest(self) -> str:
        """Return a digest of all fields."""
        parts = (self.counts_N.astype("<i8").tobytes(), self.categories_M.astype("<i8").tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def join(shards: Sequence[AvailableFields]) -> AvailableFields:
    """Concatenate the categories of several shards."""
    counts, categories = zip(*((shard.counts_N, shard.categories_M) for shard in shards), strict=True)
    return AvailableFields(np.concatenate(counts), np.concatenate(categories))


def save_present(shard: Path, digest: str, path: Path) -> None:
    """Write the categories of the samples of a local shard to `path` (see `file_of`); `digest` is the digest of its
    index. The folder of the shard must have a categories file."""
    categories = len(shard_categories(shard.parent) or ())
    found = []
    with shard.open("rb") as stream:
        for sample in read_shard(shard).samples:
            only = [member for member in sample.members if member.extension == INSTANCES]
            data = read_members(stream, RawSample(sample.key, only)).get(INSTANCES) if only else None
            found.append([] if data is None else _categories_in(data, categories))
    with replacing(path, durable=False) as file:
        np.savez(
            file,
            shard=np.str_(digest),
            counts=np.array([len(of_sample) for of_sample in found], dtype=np.int64),
            categories=np.array([number for of_sample in found for number in of_sample], dtype=np.int64),
        )


def file_of(name: str) -> str:
    """Return the file name for a shard's categories, in `index/` next to it."""
    return f"{name}.categories.npz"


def load_present(index: ShardIndex, access: Access | None = None) -> AvailableFields:
    """Read the categories of the samples of a shard, from `index/` next to it."""
    path = index.path.parent / "index" / file_of(index.path.name)
    try:
        arrays = stored_arrays(read_file(path, access))
        counts, categories = arrays["counts"], arrays["categories"]
        fits = counts.dtype == categories.dtype == np.int64 and counts.shape == (len(index),)
        fits = fits and categories.ndim == 1 and str(arrays["shard"]) == index.digest
        if not fits or min(counts.min(), categories.min(initial=0)) < 0 or counts.sum() != len(categories):
            raise ValueError("it is of another shard")
        if categories.max(initial=0) > 2**24:
            raise ValueError("it has categories that none has")
    except (OSError, ValueError, KeyError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise DataError(
            "nothing says which categories the samples have" if missing else f"cannot read the categories: {error}",
            where=str(path),
            why="samples are repeated by them",
            fix=f"m3i-scale shards index FOLDER, where the shards and their {CATEGORIES} lie",
        ) from None
    return AvailableFields(counts, categories)


def _categories_in(data: bytes, categories: int) -> list[int]:
    """Return the categories of a sample's annotations; empty if malformed, as the sample is then corrupt."""
    try:
        rows = json.loads(data)["annotations"]
        found = sorted({row["category"] for row in rows if not row.get("iscrowd")})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []
    return found if all(is_index(number) and number < categories for number in found) else []
