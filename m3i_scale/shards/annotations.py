"""Reader of COCO and LVIS annotation files: valid annotations are written to shards, unusual ones are counted."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3i_scale.data.box_forms import BoxForms
from m3i_scale.data.categories import Categories, is_index, parse_categories
from m3i_scale.data.instances import NO_MASK, Instances, parse_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.rle import packed
from m3i_scale.errors import DataError
from m3i_scale.shards.existing import annotations_of
from m3i_scale.shards.records import reading

_LISTS = ("images", "annotations", "categories")
_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")
_EDGE = 1.0
"""Tolerance in pixels for boxes beyond the edge of their image: annotation tools round."""


@dataclass
class Counts:
    """Statistics of an annotation file. All annotations except `of_unknown_images` are also in the shards."""

    images: int = 0
    annotations: int = 0
    categories: int = 0
    categories_without_annotations: int = 0
    images_without_annotations: int = 0
    crowds: int = 0
    without_mask: int = 0
    """Annotations with a box only."""
    zero_areas: int = 0
    """Boxes without width or height, and annotations whose area is 0; training skips the boxes."""
    past_the_edge: int = 0
    """Boxes that extend beyond the image by more than a pixel; training clips them."""
    outside: int = 0
    """Boxes completely outside the image; training skips them."""
    polygons_left_out: int = 0
    """Polygons with fewer than three corners or an odd number of coordinates: they have no area."""
    of_unknown_images: int = 0
    """Annotations of unknown images, which are skipped."""

    def count(self, instances: Instances) -> None:
        """Add the annotations of an image."""
        boxes_N4, corners_N4 = instances.boxes_N4, instances.corners()
        no_size_N = (boxes_N4[:, 2:] == 0).any(axis=1)
        outside_N = (corners_N4[:, 2:] <= corners_N4[:, :2]).any(axis=1) & ~no_size_N
        past_N4 = np.abs(np.concatenate((boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]), axis=1) - corners_N4)
        self.annotations += len(instances)
        self.images_without_annotations += len(instances) == 0
        self.crowds += int(instances.crowds_N.sum())
        self.without_mask += sum(segmentation is None for segmentation in instances.segmentations)
        self.zero_areas += int((no_size_N | (instances.areas_N == 0)).sum())
        self.outside += int(outside_N.sum())
        self.past_the_edge += int(((past_N4 > _EDGE).any(axis=1) & ~outside_N).sum())

    def to_json(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class AnnotatedImage:
    """An image of an annotation file."""

    where: str
    """Names the image in errors."""
    row: dict[str, Any]
    """Its entry in the file."""
    member: bytes
    """Annotations in the format of shards; empty if there is an error."""
    fault: DataError | None


@dataclass
class AnnotationFile:
    """An annotation file whose annotations are grouped by image."""

    path: Path
    categories: Categories
    rows: list[dict[str, Any]]
    """Entries of the images."""
    annotations: dict[int, list[dict[str, Any]]]
    """Annotations by image id."""
    repeated: set[int]
    """Ids that several annotations share."""
    counts: Counts = field(default_factory=Counts)
    forms: BoxForms = field(default_factory=BoxForms)

    def images(self) -> Iterator[AnnotatedImage]:
        """Yield the images in file order; `counts` is complete afterwards."""
        indices = {category.id: index for index, category in enumerate(self.categories.categories)}
        used: set[int] = set()
        for row in self.rows:
            where = f"{self.path}: image {row['id']}"
            try:
                with annotations_of(where):
                    value = self._value(row, indices)
                    instances = parse_instances(value, len(indices))
            except DataError as fault:
                yield AnnotatedImage(where, row, b"", fault)
                continue
            used.update(instances.labels_N.tolist())
            self.counts.count(instances)
            self.forms.add(instances)
            member = json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")
            yield AnnotatedImage(where, row, member, None)
        self.counts.images, self.counts.categories = len(self.rows), len(indices)
        self.counts.categories_without_annotations = len(indices) - len(used)
        self.forms.check(str(self.path))

    def _value(self, row: dict[str, Any], indices: dict[int, int]) -> dict[str, Any]:
        """Return the annotations of an image in the format of shards.

        Raises:
            BadSampleError: an unknown category, a duplicate id, or a mask that cannot be packed.
        """
        rows = self.annotations.get(row["id"], [])
        value: dict[str, Any] = {"image_id": row["id"], "width": row.get("width"), "height": row.get("height")}
        value["annotations"] = [self._annotation(annotation, indices) for annotation in rows]
        if self.categories.format == "lvis":
            for name in _LVIS:
                if not isinstance(row.get(name), list):
                    raise BadSampleError("the image lacks what all of LVIS have", name)
                value[name] = [_index(number, indices, name) for number in row[name]]
        return value

    def _annotation(self, row: dict[str, Any], indices: dict[int, int]) -> dict[str, Any]:
        name = f"annotation {row.get('id')!r:.40}"
        if is_index(row.get("id")) and row["id"] in self.repeated:
            raise BadSampleError("the id of an annotation stands twice", f"{name}: ids are counted over the whole file")
        made = {"category": _index(row.get("category_id"), indices, name), "iscrowd": row.get("iscrowd", 0)}
        made |= {key: row[key] for key in ("id", "bbox", "area") if key in row}
        segmentation = self._segmentation(row.get("segmentation"), name)
        return made if not segmentation else made | {"segmentation": segmentation}

    def _segmentation(self, value: Any, name: str) -> Any:
        """Convert a mask to the format of shards; it is validated later."""
        if isinstance(value, list):
            kept = [part for part in value if not isinstance(part, list) or (len(part) >= 6 and len(part) % 2 == 0)]
            self.counts.polygons_left_out += len(value) - len(kept)
            return kept
        if isinstance(value, dict) and isinstance(value.get("counts"), list):
            try:
                return {"size": value.get("size"), "counts": packed(value["counts"])}
            except ValueError as error:
                raise BadSampleError(NO_MASK, f"{name}: {error}") from None
        return value


def read_annotation_file(path: Path, *, skip_bad: bool) -> AnnotationFile:
    """Read an annotation file and group its annotations by image.

    Args:
        path: COCO or LVIS file.
        skip_bad: skip and count annotations of unknown images instead of raising an error.
    """
    with reading(path, ValueError, RecursionError, fix="give an annotation file of COCO or LVIS"):
        document = json.loads(path.read_bytes())
    lists = document if isinstance(document, dict) else {}
    missing = [name for name in _LISTS if not isinstance(lists.get(name), list)]
    if missing:
        raise DataError(
            f"it is no annotation file of boxes, as COCO and LVIS have them: no list of {', '.join(missing)}",
            where=str(path),
            why="files of captions and of images to test have none",
            fix="give instances_*.json or lvis_*.json",
        )
    rows, annotations, sorted_in = lists["images"], lists["annotations"], defaultdict[int, list[dict[str, Any]]](list)
    lvis = any(isinstance(row, dict) and _LVIS[0] in row for row in rows)
    categories = parse_categories(lists["categories"], str(path), lvis=lvis)
    known: set[int] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not is_index(row.get("id")):
            raise DataError("the image has no id from 0 on", where=f"{path}: image {number} in the list")
        if row["id"] in known:
            raise DataError(
                "the id of an image stands twice",
                where=f"{path}: image {row['id']}",
                why="annotations name images by it",
            )
        known.add(row["id"])
    ids, repeated, lost = set[int](), set[int](), list[str]()
    for number, annotation in enumerate(annotations):
        image = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not is_index(image) or image not in known:
            lost.append(f"annotation {number} in the list, of image {image!r:.40}")
            continue
        sorted_in[image].append(annotation)
        if is_index(annotation.get("id")):
            (repeated if annotation["id"] in ids else ids).add(annotation["id"])
    if lost and not skip_bad:
        raise DataError(
            f"{len(lost)} annotations are of images that the file does not have",
            where=f"{path}: {lost[0]}",
            fix="--skip-bad leaves them out",
        )
    return AnnotationFile(path, categories, rows, dict(sorted_in), repeated, Counts(of_unknown_images=len(lost)))


def _index(number: Any, indices: dict[int, int], place: str) -> int:
    if not is_index(number) or number not in indices:
        raise BadSampleError("a category is unknown", f"{number!r:.40} of {place}")
    return indices[number]
