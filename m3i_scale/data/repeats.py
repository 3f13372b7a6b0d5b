"""Repeat-factor sampling: samples with rare categories are read several times per epoch, samples without objects never.

The mean number of reads of a sample is its repeat factor, as in LVIS (Gupta et al. 2019, appendix B.2). The integer
part is guaranteed; the fractional part is rounded along the list of all samples, from an offset that is drawn per
epoch. So each sample gets its fractional part on average, and every epoch has the same number of reads. The sample of a
read depends only on the epoch and the index of the read.

The number of reads per epoch is the sum of all factors, rounded up. All factors are scaled to sum to it, so the
relative frequencies of samples exactly match their factors.

The categories of the samples of a shard are stored next to its index, so that sampling need not read the shards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import is_index, shard_categories
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.order import seed_of
from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.scan import ShardIndex, stored_arrays
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.data.tar import RawSample, read_members, read_shard
from m3i_scale.errors import DataError, error_prefix
from m3i_scale.files import replacing

_ORDER = "2"
"""Version of the rule for the reads of an epoch; a checkpoint with another version has another sample order."""


@dataclass(frozen=True)
class SampleCategories:
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


def join(shards: Sequence[SampleCategories]) -> SampleCategories:
    """Concatenate the categories of several shards."""
    counts, categories = zip(*((shard.counts_N, shard.categories_M) for shard in shards), strict=True)
    return SampleCategories(np.concatenate(counts), np.concatenate(categories))


def save_categories(shard: Path, digest: str) -> None:
    """Write the categories of the samples of a local shard to `index/` next to it; `digest` is the digest of its index.
    The folder of the shard must have a categories file."""
    categories = len(shard_categories(shard.parent) or ())
    found = []
    with shard.open("rb") as stream:
        for sample in read_shard(shard).samples:
            only = [member for member in sample.members if member.extension == INSTANCES]
            data = read_members(stream, RawSample(sample.key, only)).get(INSTANCES) if only else None
            found.append([] if data is None else _categories_in(data, categories))
    with replacing(shard.parent / "index" / categories_file(shard.name), durable=False) as file:
        np.savez(
            file,
            shard=np.str_(digest),
            counts=np.array([len(of_sample) for of_sample in found], dtype=np.int64),
            categories=np.array([number for of_sample in found for number in of_sample], dtype=np.int64),
        )


def categories_file(name: str) -> str:
    """Return the file name for a shard's categories, in `index/` next to it."""
    return f"{name}.categories.npz"


def load_categories(index: ShardIndex, access: Access | None = None) -> SampleCategories:
    """Read the categories of the samples of a shard, from `index/` next to it."""
    path = index.path.parent / "index" / categories_file(index.path.name)
    try:
        arrays = stored_arrays(read_file(path, access))
        counts, categories = arrays["counts"], arrays["categories"]
        fits = counts.dtype == categories.dtype == np.int64 and counts.shape == (len(index),)
        fits = fits and categories.ndim == 1 and str(arrays["shard"]) == index.digest
        if not fits or min(counts.min(), categories.min(initial=0)) < 0 or counts.sum() != len(categories):
            raise ValueError("the file does not match the shard")
        if categories.max(initial=0) > 2**24:
            raise ValueError("category index out of range")
    except (OSError, ValueError, KeyError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise DataError(
            "the categories of the samples are not indexed" if missing else f"cannot read the categories: {error}",
            where=str(path),
            why="repeat_threshold repeats samples by their categories",
            fix=f"m3i-scale shards index FOLDER, with the shards and their {CATEGORIES}",
        ) from None
    return SampleCategories(counts, categories)


def _categories_in(data: bytes, categories: int) -> list[int]:
    """Return the categories of a sample's annotations; empty if malformed, as the sample is then corrupt."""
    try:
        rows = json.loads(data)["annotations"]
        found = sorted({row["category"] for row in rows if not row.get("iscrowd")})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []
    return found if all(is_index(number) and number < categories for number in found) else []


def repeat_factors(samples: SampleCategories, threshold: float) -> NDArray[np.float64]:
    """Return the mean number of reads per epoch of every sample: r(I) = max over the categories c of I of max(1,
    √(threshold / f(c))), where f(c) is the fraction of images with c. LVIS uses the threshold 0.001.

    Images without a category have factor 0 and do not count in f(c), because detectron2 also drops them beforehand.
    """
    has = samples.counts_N > 0
    factors_N = np.zeros(len(samples))
    if not has.any():
        return factors_N
    frequencies = np.bincount(samples.categories_M) / has.sum()
    with np.errstate(divide="ignore"):  # category indices without images
        of_categories = np.maximum(1.0, np.sqrt(threshold / frequencies))
    firsts = np.cumsum(samples.counts_N) - samples.counts_N
    factors_N[has] = np.maximum.reduceat(of_categories[samples.categories_M], firsts[has])
    return factors_N


def repeats_of(
    indices: Sequence[ShardIndex], threshold: float | None, seed: int, where: str, access: Access
) -> Repeats | None:
    """Return the repeats of a dataset; None if every sample is read once. `indices` are in the order of the list of all
    samples; `threshold` is `DatasetConfig.repeat_threshold`; `seed` must depend on the run and the dataset."""
    if threshold is None:
        return None
    with error_prefix(where):
        samples = join([load_categories(index, access) for index in indices])
    factors = np.split(repeat_factors(samples, threshold), np.cumsum([len(index) for index in indices])[:-1])
    return Repeats(factors, seed, where, f"{samples.digest} {threshold!r} {_ORDER}")


class Repeats:
    """Repeated reads of an epoch; see `order.Reads`. It is an error if no sample is read.

    Args:
        factors: repeat factors by shard, in the order of the list of all samples.
        seed: seed of this (run, dataset).
        where: names the dataset in errors.
        digest: digest of the data that determines the factors.
    """

    def __init__(self, factors: Sequence[NDArray[np.float64]], seed: int, where: str, digest: str = "") -> None:
        of_all = np.concatenate(factors)
        total = float(of_all.sum())
        self.reads = math.ceil(round(total, 6))  # removes rounding errors of the sum
        """Number of reads per epoch."""
        if not self.reads:
            raise DataError(
                "no sample has an object", where=where, why="repeat_threshold leaves out samples without objects"
            )
        of_all = of_all * (self.reads / total)
        whole = np.floor(of_all + 1e-9)
        rest = np.cumsum((of_all - whole).clip(min=0))
        if more := self.reads - int(whole.sum()):
            rest *= more / rest[-1]
            rest[np.searchsorted(rest, rest[-1]) :] = more
        self._whole_N, self._rest_N = np.cumsum(whole).astype(np.int64), rest
        self._ends = np.cumsum([len(of_shard) for of_shard in factors])
        self._seed, self.digest = seed, digest
        self._shard: tuple[int, int, NDArray[np.int64]] | None = None

    def ends(self, epoch: int) -> NDArray[np.int64]:
        """See `Reads`."""
        return self._until(self._ends - 1, self._point(epoch))

    def outermost_ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Reads`."""
        last = self._ends - 1
        return self._until(last, 0.0), self._whole_N[last] + np.ceil(self._rest_N[last]).astype(np.int64)

    def sample(self, epoch: int, shard: int, number: int) -> tuple[int, int]:
        """See `Reads`; nearby reads are cheap."""
        if self._shard is None or self._shard[:2] != (epoch, shard):
            first = int(self._ends[shard - 1]) if shard else 0
            # Reads before the shard's first sample are subtracted.
            before = self._until(np.array([first - 1]), self._point(epoch)) if first else np.zeros(1, dtype=np.int64)
            until = self._until(np.arange(first, self._ends[shard]), self._point(epoch))
            self._shard = (epoch, shard, np.concatenate(([0], until - before)))
        until = self._shard[2]
        sample = int(np.searchsorted(until, number, side="right")) - 1
        return sample, number - int(until[sample])

    def _point(self, epoch: int) -> float:
        return (seed_of("repeats", self._seed, epoch) >> 10) / 2**53  # always below 1

    def _until(self, samples: NDArray[np.int64], point: float) -> NDArray[np.int64]:
        """Return the number of reads up to and including each of `samples`."""
        return self._whole_N[samples] + np.floor(self._rest_N[samples] + point).astype(np.int64)
