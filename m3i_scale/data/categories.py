"""Object categories of a dataset: their names, and the categories of every sample for repeat-factor sampling.

The names are in a sidecar file of the shards, in index order. The categories of the samples of a shard are stored next
to its index, so that sampling need not read the shards. Samples with rare categories are read several times per epoch,
samples without objects never; see `order.Repeats`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.instances import is_index
from m3i_scale.data.order import Repeats
from m3i_scale.data.remote.access import Access, Address
from m3i_scale.data.remote.fetch import read_file
from m3i_scale.data.scan import ShardIndex, stored_arrays
from m3i_scale.data.shards import CATEGORIES, read_sidecar
from m3i_scale.errors import DataError, error_prefix

FORMATS = ("coco", "lvis")
FREQUENCIES = ("r", "c", "f")
"""LVIS frequency classes (rare, common, frequent) by the number of training images with the category."""
_ORDER = "2"
"""Version of the rule for the reads of an epoch; a checkpoint with another version has another sample order."""


@dataclass(frozen=True)
class Category:
    """An entry of the category list of an annotation file."""

    id: int
    """Id in the annotation file, possibly with gaps; samples use the index instead."""
    name: str
    frequency: str | None = None
    """One of `FREQUENCIES`; None if the dataset is not LVIS."""
    image_count: int | None = None
    """Number of training images with the category (LVIS only)."""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON types, without missing fields."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Categories:
    """The categories of a dataset, in index order."""

    format: Literal["coco", "lvis"]
    categories: tuple[Category, ...]

    @property
    def names(self) -> list[str]:
        """Return the names, which need not be unique."""
        return [category.name for category in self.categories]

    def __len__(self) -> int:
        return len(self.categories)

    def to_json(self) -> dict[str, Any]:
        """Convert to the content of the sidecar file."""
        return {"format": self.format, "categories": [category.to_json() for category in self.categories]}


def parse_categories(rows: Any, where: str, *, lvis: bool) -> Categories:
    """Parse the categories of an annotation file or of `categories.json`, sorted by id. With `lvis`, every category
    must have a frequency and an image count. `where` names the file in errors."""
    if not isinstance(rows, list) or not rows:
        raise DataError(
            "no categories in the annotation file", where=where, fix="add `categories`, a list of {id, name}"
        )
    found: dict[int, Category] = {}
    for number, listed in enumerate(rows):
        place = f"{where}: category {number} in the list"
        row = listed if isinstance(listed, dict) else {}
        category = Category(row.get("id", -1), row.get("name", ""))
        if not is_index(category.id) or not isinstance(category.name, str) or not category.name:
            raise DataError(
                "the category must have a non-negative integer id and a name",
                where=place,
                fix="correct the entry in the annotation file",
            )
        if category.id in found:
            raise DataError(f"duplicate category id {category.id}", where=place, fix="give every category its own id")
        if lvis:
            category = Category(category.id, category.name, row.get("frequency"), row.get("image_count"))
            if category.frequency not in FREQUENCIES or not is_index(category.image_count):
                raise DataError(
                    "the category must have a frequency (r, c, f) and an image_count, as in LVIS",
                    where=place,
                    fix="use the original file of LVIS",
                )
        found[category.id] = category
    return Categories("lvis" if lvis else "coco", tuple(found[number] for number in sorted(found)))


def shard_categories(folder: Address, whose: str = "", access: Access | None = None) -> Categories | None:
    """Read the categories from the folder of the shards, or return None. `whose` is the prefix of errors."""
    path = folder / CATEGORIES
    value = read_sidecar(path, whose, access)
    if value is None:
        return None
    where = f"{whose}{path}"
    if not isinstance(value, Mapping) or value.get("format") not in FORMATS:
        raise DataError(
            f"{CATEGORIES} must have a format, one of {', '.join(FORMATS)}",
            where=where,
            fix="restore the file that `shards make coco` wrote with the samples",
        )
    found = parse_categories(value.get("categories"), where, lvis=value["format"] == "lvis")
    if [row["id"] for row in value["categories"]] != [category.id for category in found.categories]:
        raise DataError(
            f"{CATEGORIES} must be sorted by id",
            where=where,
            why="samples contain indices into it, so objects would get wrong names",
            fix="restore the file that `shards make coco` wrote with the samples",
        )
    return found


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
            fix=f"run `m3i-scale shards index FOLDER` on the shards and their {CATEGORIES}",
        ) from None
    return SampleCategories(counts, categories)


def repeat_factors(samples: SampleCategories, threshold: float) -> NDArray[np.float64]:
    """Return the mean number of reads per epoch of every sample: r(I) = max over the categories c of I of max(1,
    √(threshold / f(c))), where f(c) is the fraction of images with c (Gupta et al. 2019, LVIS, appendix B.2). LVIS uses
    the threshold 0.001.

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
        shards = [load_categories(index, access) for index in indices]
    counts, categories = zip(*((shard.counts_N, shard.categories_M) for shard in shards), strict=True)
    samples = SampleCategories(np.concatenate(counts), np.concatenate(categories))
    factors = np.split(repeat_factors(samples, threshold), np.cumsum([len(index) for index in indices])[:-1])
    return Repeats(factors, seed, where, f"{samples.digest} {threshold!r} {_ORDER}")
