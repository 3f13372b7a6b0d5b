"""Existing WebDataset shards as input of `make`: the files of a sample become a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3i_scale.data.categories import Categories
from m3i_scale.data.images import FILE_EXTENSIONS, MASK
from m3i_scale.data.instances import INSTANCES
from m3i_scale.data.samples import read_annotations
from m3i_scale.data.shards import CATEGORIES, MASK_LABELS, local_shards
from m3i_scale.errors import DataError
from m3i_scale.shards.existing import (
    Origin,
    annotations_of,
    common_categories,
    common_labels,
    contents,
    field_of,
    json_object,
    outlines,
)
from m3i_scale.shards.layout import Outline
from m3i_scale.shards.records import Record


@dataclass
class ShardInput:
    """Samples of existing tars as records."""

    origins: Sequence[Origin]
    label_names: Sequence[str] | None = None
    """None: a sample with a label is an error."""
    caption_field: str | None = None
    """JSON field of the caption; None: the txt file."""
    workers: int = 1
    """Processes that read headers."""
    mask_labels: list[str] | None = None
    """See `Input`."""
    categories: Categories | None = None
    """See `Input`; None: a sample with instances is an error."""

    @property
    def labels(self) -> list[str]:
        """Return the class names, in index order."""
        return list(self.label_names or ())

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        return outlines(self.origins, self.workers)

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        for origin, key, members in contents(self.origins):
            yield record_of(key, members, origin.where(key), self.label_names, self.caption_field, self.categories)

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return {"source": "webdataset"}


def webdataset_input(
    source: str, *, labels: Sequence[str] | None, caption_field: str | None, group: str | None, workers: int
) -> ShardInput:
    """Open existing shards.

    Args:
        source: a folder, a brace pattern or one tar.
        labels: class names; None: labels.json in the folder of the shards.
        caption_field: JSON field of the caption; None: the txt files.
        group: JSON field whose value keeps samples in the same split.
        workers: processes that read headers.
    """
    names = labels if labels is not None else common_labels(source)
    origins = [Origin(path, group=group) for path in local_shards(source)]
    masks, categories = common_labels(source, MASK_LABELS), common_categories(source)
    return ShardInput(origins, names, caption_field, workers, masks, categories)


def record_of(
    key: str,
    members: Mapping[str, bytes],
    where: str,
    labels: Sequence[str] | None = None,
    caption_field: str | None = None,
    categories: Categories | None = None,
) -> Record:
    """Convert a sample to a record; if its files are unusable, the record contains the error.

    Args:
        key: key of the sample.
        members: file contents by extension.
        where: names the sample in errors.
        labels: class names; None: a sample with a label is an error.
        caption_field: JSON field of the caption; None: the txt file.
        categories: categories of boxes and masks; None: a sample with instances is an error.
    """
    extension = next((extension for extension in FILE_EXTENSIONS if extension in members), None)
    size, mask, fault = sum(map(len, members.values())), members.get(MASK), None
    image, caption, label, meta = b"", None, None, dict[str, Any]()
    try:
        if extension is None:
            raise DataError("the sample has no image", where=where, fix=f"known: {', '.join(FILE_EXTENSIONS)}")
        image = members[extension]
        meta = json_object(members.get("json"), where)
        caption = _caption(members, where, caption_field)
        label = _label(members, where, labels)
        if INSTANCES in members and categories is None:
            raise DataError(
                f"the sample has instances, and there is no {CATEGORIES}",
                where=where,
                fix=f"put the {CATEGORIES} that `shards make coco` wrote beside the shards",
            )
    except DataError as error:
        fault = error
    return Record(
        key,
        image,
        caption,
        label,
        meta,
        size=size,
        mask=mask,
        instances=members.get(INSTANCES),
        categories=None if categories is None else len(categories),
        where=where,
        fault=fault,
    )


def _caption(members: Mapping[str, bytes], where: str, caption_field: str | None) -> str | None:
    if caption_field is not None:
        value = field_of(members.get("json"), caption_field, where)
        if not isinstance(value, str):
            raise DataError(f"the field '{caption_field}' is no text", where=where)
        return value.strip() or None
    with annotations_of(where):
        return read_annotations(members, None).caption


def _label(members: Mapping[str, bytes], where: str, labels: Sequence[str] | None) -> int | None:
    if "cls" not in members:
        return None
    if labels is None:
        raise DataError(
            "the sample has a label, and there is no labels.json",
            where=where,
            fix="name the classes with --labels FILE (a JSON list, or one name a line)",
        )
    with annotations_of(where):
        return read_annotations(members, len(labels), captions=False).label
