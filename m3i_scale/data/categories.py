"""Names of the object categories of a dataset, in index order, from a sidecar file of the shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from m3i_scale.data.remote.access import Access, Address
from m3i_scale.data.shards import CATEGORIES, read_sidecar
from m3i_scale.errors import DataError

FORMATS = ("coco", "lvis")
FREQUENCIES = ("r", "c", "f")
"""LVIS frequency classes (rare, common, frequent) by the number of training images with the category."""


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
        raise DataError("there are no categories", where=where, fix="`categories` is a list of {id, name}")
    found: dict[int, Category] = {}
    for number, listed in enumerate(rows):
        place = f"{where}: category {number} in the list"
        row = listed if isinstance(listed, dict) else {}
        category = Category(row.get("id", -1), row.get("name", ""))
        if not is_index(category.id) or not isinstance(category.name, str) or not category.name:
            raise DataError("the category has no non-negative integer id, or no name", where=place)
        if category.id in found:
            raise DataError(f"duplicate category id {category.id}", where=place)
        if lvis:
            category = Category(category.id, category.name, row.get("frequency"), row.get("image_count"))
            if category.frequency not in FREQUENCIES or not is_index(category.image_count):
                raise DataError(
                    "the category has no frequency (r, c, f) or no image_count, as LVIS has",
                    where=place,
                    fix="use the original file of LVIS",
                )
        found[category.id] = category
    return Categories("lvis" if lvis else "coco", tuple(found[number] for number in sorted(found)))


def is_index(value: Any) -> bool:
    """Return whether a JSON value is a valid id: a non-negative integer below 2⁶³."""
    return type(value) is int and 0 <= value < 2**63


def shard_categories(folder: Address, whose: str = "", access: Access | None = None) -> Categories | None:
    """Read the categories from the folder of the shards, or return None. `whose` is the prefix of errors."""
    path = folder / CATEGORIES
    value = read_sidecar(path, whose, access)
    if value is None:
        return None
    where = f"{whose}{path}"
    if not isinstance(value, Mapping) or value.get("format") not in FORMATS:
        raise DataError(f"{CATEGORIES} has no format, which is one of {', '.join(FORMATS)}", where=where)
    found = parse_categories(value.get("categories"), where, lvis=value["format"] == "lvis")
    if [row["id"] for row in value["categories"]] != [category.id for category in found.categories]:
        raise DataError(
            f"{CATEGORIES} is not in the order of its ids",
            where=where,
            why="samples contain indices into it, so objects would get wrong names",
            fix="restore the file that `shards make coco` wrote with the samples",
        )
    return found
