"""COCO and LVIS annotation files, with their images, as input of `make`.

Valid annotations are written to shards, unusual ones are counted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from m3i_scale.data.categories import Categories, parse_categories
from m3i_scale.data.instances import NO_MASK, Instances, is_index, parse_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.annotation_checks import BoxForms
from m3i_scale.shards.image_folders import SPLIT_NAMES, key_of
from m3i_scale.shards.records import ListedInput, Record, annotations_of, reading

_SPLITS = SPLIT_NAMES | {"minival"}
_KINDS = ("instances_*.json", "lvis_*.json", "*.json")
"""Patterns of annotation files; the first one that matches is used. COCO's folder also has captions and keypoints."""
_ROBOFLOW = "*/_annotations.coco.json"
_LISTS = ("images", "annotations", "categories")
_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")
_EDGE = 1.0
"""Tolerance in pixels for boxes beyond the edge of their image: annotation tools round."""


def coco_input(
    inputs: Sequence[Path], images: Path | None = None, *, shares: bool = False, skip_bad: bool = False
) -> ListedInput:
    """List images and their annotations.

    Args:
        inputs: annotation files, or folders in COCO's layout.
        images: root of the image names; None: the folder of the file, or the parent of `annotations`.
        shares: a single file is split by fractions, so the split in its name is ignored.
        skip_bad: skip images with errors and annotations of unknown images.
    """
    files = [file for source in inputs for file in annotation_files(source)]
    splits = [split_of(file) if not shares or len(files) > 1 else None for file in files]
    _check_splits(files, splits)
    sets: dict[str | None, Categories] = {}
    records, counts = list[Record](), dict[str, dict[str, int]]()
    for path, split in zip(files, splits, strict=True):
        annotated = read_annotation_file(path, skip_bad=skip_bad)
        first = next(iter(sets.values()), annotated.categories)
        if _named(first) != _named(annotated.categories):
            raise DataError(
                "all annotation files must have the same categories",
                where=f"{path}, {files[0]}",
                why="a detector has one list of categories",
                fix="give both files the same ids, names and frequencies, or pack them one by one",
            )
        sets[split] = annotated.categories
        records += _records(annotated, images, split, skip_bad=skip_bad)
        counts["/".join(path.parts[-2:])] = annotated.summary()
    # Image counts per category are those of the training set.
    categories = sets[next((split for split in splits if split in ("train", "training")), splits[0])]
    return ListedInput(records, [], categories=categories, source=categories.format, annotations=counts)


def annotation_files(source: Path) -> list[Path]:
    """Return the annotation files of a folder: from its `annotations`, directly in it, or one per split folder."""
    if source.is_file():
        return [source]
    for root in (source / "annotations", source):
        kinds = [
            [path for path in sorted(root.glob(kind)) if "image_info" not in path.name and path.name[0] != "."]
            for kind in _KINDS
        ]
        if kinds[0] and kinds[1]:
            raise ConfigError(
                "the folder has annotation files of COCO and of LVIS",
                where=f"{kinds[0][0]}, {kinds[1][0]}",
                fix="choose the files, each with --input FILE",
            )
        files = next((of_kind for of_kind in kinds if of_kind), [])
        if files:
            return files
    files = sorted(source.glob(_ROBOFLOW))
    if not files:
        raise DataError(
            "no annotation files found",
            where=str(source),
            fix="name the file, or use DIR/annotations/instances_train2017.json or DIR/train/_annotations.coco.json",
        )
    return files


def split_of(path: Path) -> str | None:
    """Return the split in a file's name (`instances_train2017`, `lvis_v1_val`) or else in its folder's name; None if
    neither contains exactly one."""
    for name in (path.stem, path.parent.name):
        named = {word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
        if len(named) == 1:
            return named.pop()
    return None


def _check_splits(files: Sequence[Path], splits: Sequence[str | None]) -> None:
    for number, split in enumerate(splits):
        same = splits.index(split)
        if same < number or (split is None and len(files) > 1):
            raise ConfigError(
                f"two files are for the split '{split}'" if split else "the name of a file must contain its split",
                where=", ".join(map(str, dict.fromkeys((files[same], files[number])))),
                fix="choose one file per split, as in --input train.json --input val.json",
            )


def _named(categories: Categories) -> list[Any]:
    """Return the properties that must be equal in all files; image counts may differ."""
    return [categories.format, *(replace(category, image_count=None) for category in categories.categories)]


def _records(file: AnnotationFile, images: Path | None, split: str | None, *, skip_bad: bool) -> list[Record]:
    folders = _folders(file.path, images, split)
    records, names = list[Record](), set[str]()
    for row in file.rows:
        where = f"{file.path}: image {row['id']}"
        problem, candidates, instances = None, list[str](), b""
        try:
            candidates = _image_names(row, where)
            with annotations_of(where):
                instances = file.instances(row)
        except DataError as error:
            problem = error
        image = _find(candidates, folders)
        name = candidates[0] if candidates else f"image-{row['id']}"
        if problem is None and image is None:
            problem = DataError(
                "the image is missing",
                where=f"{where}: {name}",
                fix="restore the image, or skip such images with --skip-bad",
            )
        if problem is None and name in names:
            problem = DataError(
                "two images have one file name", where=f"{where}: {name}", fix="give every image its own file name"
            )
        names.add(name)
        records.append(
            Record(
                key_of(Path(split or "", name)),
                image or b"",
                meta={"path": name},
                split=split,
                size=len(instances) + (image.stat().st_size if image else 0),
                instances=instances,
                where=f"{where}: {image or name}",
                problem=problem,
            )
        )
    file.forms.check(str(file.path))
    if records and not any(record.image for record in records):
        raise DataError(
            "none of the images exists",
            where=f"{file.path}: {records[0].meta['path']}",
            why=f"searched in {', '.join(map(str, folders))}",
            fix="set `--images DIR` to the folder of the images",
        )
    problems = [record.problem for record in records if record.problem is not None]
    if problems and not skip_bad:
        problems[0].fix = f"{len(problems)} of {len(records)} images have problems; --skip-bad leaves them out"
        raise problems[0]
    return records


def _image_names(row: dict[str, Any], where: str) -> list[str]:
    """Return candidate names of an image: its `file_name`, and the end of its `coco_url`, as in LVIS."""
    url, candidates = row.get("coco_url"), [row["file_name"]] if row.get("file_name") else []
    parts = url.split("/") if isinstance(url, str) else []  # the last two parts of http://host/train2017/NAME
    candidates += ["/".join(parts[-2:]), parts[-1]] if len(parts) > 4 else []
    if not candidates or not all(
        isinstance(candidate, str) and PurePosixPath(candidate).name for candidate in candidates
    ):
        raise DataError(
            "the image has no file_name",
            where=where,
            fix="correct the annotation file, or skip such images with --skip-bad",
        )
    for candidate in map(PurePosixPath, candidates):
        if candidate.is_absolute() or ".." in candidate.parts or "\0" in str(candidate):
            raise DataError(
                f"the file name of an image must not lead out of the folder, got {str(candidate)!r:.200}",
                where=where,
                fix="correct the file name",
            )
    return candidates


def _folders(path: Path, images: Path | None, split: str | None) -> list[Path]:
    """Return candidate root folders of images: the root, and its subfolders with the name of the split or of the end of
    the file's name (`train2017`)."""
    parent = path.parent.parent if path.parent.name == "annotations" else path.parent
    root = images or parent
    subfolders = dict.fromkeys(name for name in (path.stem.rpartition("_")[2], split) if name)
    named = [folder / name for name in subfolders for folder in (root, root / "images")]
    return [folder for folder in (root, *named, root / "images") if folder.is_dir()]


def _find(candidates: Sequence[str], folders: list[Path]) -> Path | None:
    paths = (folder / candidate for folder in folders for candidate in candidates)
    with suppress(OSError, ValueError):  # not a valid file name, for example too long
        return next((path for path in paths if path.is_file()), None)
    return None


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


@dataclass
class AnnotationFile:
    """An annotation file whose annotations are grouped by image."""

    path: Path
    categories: Categories
    rows: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    """Annotations by image id."""
    repeated: set[int]
    """Ids that several annotations share."""
    counts: Counts = field(default_factory=Counts)
    forms: BoxForms = field(default_factory=BoxForms)
    used: set[int] = field(default_factory=set)
    """Indices of categories with annotations."""

    def __post_init__(self) -> None:
        self.indices = {category.id: index for index, category in enumerate(self.categories.categories)}

    def instances(self, row: dict[str, Any]) -> bytes:
        """Return the annotations of an image in the format of shards, and count them.

        Raise `BadSampleError` for an unknown category, a duplicate id, or an invalid box or mask.
        """
        value: dict[str, Any] = {"image_id": row["id"], "width": row.get("width"), "height": row.get("height")}
        value["annotations"] = [self._annotation(annotation) for annotation in self.annotations.get(row["id"], [])]
        if self.categories.format == "lvis":
            for name in _LVIS:
                if not isinstance(row.get(name), list):
                    raise BadSampleError("the image lacks what all of LVIS have", name)
                value[name] = [self._index(number, name) for number in row[name]]
        instances = parse_instances(value, len(self.indices))
        self.used.update(instances.labels_N.tolist())
        self.counts.count(instances)
        self.forms.add(instances)
        return json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")

    def summary(self) -> dict[str, int]:
        """Return the counts after all images are read."""
        self.counts.images, self.counts.categories = len(self.rows), len(self.indices)
        self.counts.categories_without_annotations = len(self.indices) - len(self.used)
        return dict(vars(self.counts))

    def _annotation(self, row: dict[str, Any]) -> dict[str, Any]:
        name = f"annotation {row.get('id')!r:.40}"
        if is_index(row.get("id")) and row["id"] in self.repeated:
            raise BadSampleError("duplicate annotation id", f"{name}: ids are counted over the whole file")
        result = {"category": self._index(row.get("category_id"), name), "iscrowd": row.get("iscrowd", 0)}
        result |= {key: row[key] for key in ("id", "bbox", "area") if key in row}
        segmentation = self._segmentation(row.get("segmentation"), name)
        return result if not segmentation else result | {"segmentation": segmentation}

    def _segmentation(self, value: Any, name: str) -> Any:
        """Convert a mask to the format of shards; it is validated later."""
        if isinstance(value, list):
            valid = [part for part in value if not isinstance(part, list) or (len(part) >= 6 and len(part) % 2 == 0)]
            self.counts.polygons_left_out += len(value) - len(valid)
            return valid
        if isinstance(value, dict) and isinstance(value.get("counts"), list):
            try:
                return {"size": value.get("size"), "counts": encode_runs(value["counts"])}
            except ValueError as error:
                raise BadSampleError(NO_MASK, f"{name}: {error}") from None
        return value

    def _index(self, number: Any, where: str) -> int:
        if not is_index(number) or number not in self.indices:
            raise BadSampleError("a category is unknown", f"{number!r:.40} of {where}")
        return self.indices[number]


def encode_runs(runs: Sequence[int]) -> str:
    """Encode the run lengths of a mask, integers from 0 to 2³³ - 1, as text that `decode_runs` reads.

    Other values raise a ValueError.
    """
    if not all(type(run) is int and 0 <= run < 2**33 for run in runs):
        raise ValueError("a run length of the mask is not a non-negative integer")
    letters = bytearray()
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        while True:
            group, number = number & 31, number >> 5
            last = number == (-1 if group & 16 else 0)
            letters.append(48 + group + (0 if last else 32))
            if last:
                break
    return letters.decode("ascii")


def read_annotation_file(path: Path, *, skip_bad: bool) -> AnnotationFile:
    """Read an annotation file and group its annotations by image.

    With `skip_bad`, annotations of unknown images are skipped and counted instead of raising an error.
    """
    with reading(path, ValueError, RecursionError, fix="give an annotation file of COCO or LVIS"):
        document = json.loads(path.read_bytes())
    lists = document if isinstance(document, dict) else {}
    missing = [name for name in _LISTS if not isinstance(lists.get(name), list)]
    if missing:
        raise DataError(
            f"the annotation file must have boxes, as in COCO and LVIS, but has no list of {', '.join(missing)}",
            where=str(path),
            why="files of captions and of test images have no boxes",
            fix="use instances_*.json or lvis_*.json",
        )
    rows, annotations, sorted_in = lists["images"], lists["annotations"], defaultdict[int, list[dict[str, Any]]](list)
    lvis = any(isinstance(row, dict) and _LVIS[0] in row for row in rows)
    categories = parse_categories(lists["categories"], str(path), lvis=lvis)
    known: set[int] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not is_index(row.get("id")):
            raise DataError(
                "the image id must be a number ≥ 0",
                where=f"{path}: image {number} in the list",
                fix="correct the id in the annotation file",
            )
        if row["id"] in known:
            raise DataError(
                "duplicate image id",
                where=f"{path}: image {row['id']}",
                why="annotations refer to images by their id",
                fix="give every image its own id",
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
            f"{len(lost)} annotations refer to images that the file does not have",
            where=f"{path}: {lost[0]}",
            fix="correct the file, or leave these annotations out with --skip-bad",
        )
    return AnnotationFile(path, categories, rows, dict(sorted_in), repeated, Counts(of_unknown_images=len(lost)))
