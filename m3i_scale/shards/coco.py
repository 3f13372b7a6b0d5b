"""COCO and LVIS annotation files, with their images, as input of `make`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from m3i_scale.data.categories import Categories
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.annotations import AnnotatedImage, read_annotation_file
from m3i_scale.shards.imagefolder import SPLIT_NAMES, key_of
from m3i_scale.shards.records import ListedInput, Record

_SPLITS = SPLIT_NAMES | {"minival"}
_KINDS = ("instances_*.json", "lvis_*.json", "*.json")
"""Patterns of annotation files; the first one that matches is used. COCO's folder also has captions and keypoints."""
_ROBOFLOW = "*/_annotations.coco.json"


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
    files = [file for given in inputs for file in annotation_files(given)]
    splits = [split_of(file) if not shares or len(files) > 1 else None for file in files]
    _check_splits(files, splits)
    sets: dict[str | None, Categories] = {}
    records, counts = list[Record](), dict[str, dict[str, int]]()
    for path, split in zip(files, splits, strict=True):
        annotated = read_annotation_file(path, skip_bad=skip_bad)
        first = next(iter(sets.values()), annotated.categories)
        if _named(first) != _named(annotated.categories):
            raise DataError(
                "the categories are not those of the other file",
                where=f"{path}, {files[0]}",
                why="the head of a detector is of one list",
                fix="the same ids, names and frequencies in both; or pack them one by one",
            )
        sets[split] = annotated.categories
        records += _records(path, annotated.images(), images, split, skip_bad=skip_bad)
        counts["/".join(path.parts[-2:])] = annotated.counts.to_json()
    # Image counts per category are those of the training set.
    categories = sets[next((split for split in splits if split in ("train", "training")), splits[0])]
    return ListedInput(records, [], categories=categories, source=categories.format, annotations=counts)


def annotation_files(given: Path) -> list[Path]:
    """Return the annotation files of a folder: from its `annotations`, directly in it, or one per split folder."""
    if given.is_file():
        return [given]
    for place in (given / "annotations", given):
        kinds = [
            [path for path in sorted(place.glob(kind)) if "image_info" not in path.name and path.name[0] != "."]
            for kind in _KINDS
        ]
        if kinds[0] and kinds[1]:
            raise ConfigError(
                "there are annotation files of COCO and of LVIS",
                where=f"{kinds[0][0]}, {kinds[1][0]}",
                fix="name those that are meant, each with --input FILE",
            )
        found = next((of_kind for of_kind in kinds if of_kind), [])
        if found:
            return found
    found = sorted(given.glob(_ROBOFLOW))
    if not found:
        raise DataError(
            "there are no annotation files",
            where=str(given),
            fix="DIR/annotations/instances_train2017.json and the like; DIR/train/_annotations.coco.json; or a file",
        )
    return found


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
                f"two files are of the split '{split}'" if split else "the name of a file says no split",
                where=", ".join(map(str, dict.fromkeys((files[same], files[number])))),
                fix="name those that are meant, one of each split, as in --input train.json --input val.json",
            )


def _named(categories: Categories) -> list[Any]:
    """Return the properties that must be equal in all files; image counts may differ."""
    return [categories.format, *(replace(category, image_count=None) for category in categories.categories)]


def _records(
    path: Path, annotated: Iterator[AnnotatedImage], images: Path | None, split: str | None, *, skip_bad: bool
) -> list[Record]:
    folders = _folders(path, images, split)
    records, names = list[Record](), set[str]()
    for item in annotated:
        fault, ways = item.fault, list[str]()
        try:
            ways = _ways(item)
        except DataError as error:
            fault = error
        image = _find(ways, folders)
        name = ways[0] if ways else f"image-{item.row['id']}"
        if fault is None and image is None:
            fault = DataError("the image is missing", where=f"{item.where}: {name}")
        if fault is None and name in names:
            fault = DataError("two images have one file name", where=f"{item.where}: {name}")
        names.add(name)
        records.append(
            Record(
                key_of(Path(split or "", name)),
                image or b"",
                meta={"path": name},
                split=split,
                size=len(item.member) + (image.stat().st_size if image else 0),
                instances=item.member,
                where=f"{item.where}: {image or name}",
                fault=fault,
            )
        )
    if records and not any(record.image for record in records):
        raise DataError(
            "none of the images is there",
            where=f"{path}: {records[0].meta['path']}",
            why=f"looked for in {', '.join(map(str, folders))}",
            fix="m3i-scale shards make coco --images DIR, the folder that holds them",
        )
    faults = [record.fault for record in records if record.fault is not None]
    if faults and not skip_bad:
        faults[0].fix = f"{len(faults)} of {len(records)} images have faults; --skip-bad leaves them out"
        raise faults[0]
    return records


def _ways(item: AnnotatedImage) -> list[str]:
    """Return candidate names of an image: its `file_name`, and the end of its `coco_url`, as in LVIS."""
    row = item.row
    url, ways = row.get("coco_url"), [row["file_name"]] if row.get("file_name") else []
    parts = url.split("/") if isinstance(url, str) else []  # the last two parts of http://host/train2017/NAME
    ways += ["/".join(parts[-2:]), parts[-1]] if len(parts) > 4 else []
    if not ways or not all(isinstance(way, str) and PurePosixPath(way).name for way in ways):
        raise DataError("the image has no file_name", where=item.where)
    for way in map(PurePosixPath, ways):
        if way.is_absolute() or ".." in way.parts or "\0" in str(way):
            raise DataError("the name of the image leads out of the folder", where=f"{item.where}: {str(way)!r:.200}")
    return ways


def _folders(path: Path, images: Path | None, split: str | None) -> list[Path]:
    """Return candidate root folders of images: the root, and its subfolders with the name of the split or of the end of
    the file's name (`train2017`)."""
    around = path.parent.parent if path.parent.name == "annotations" else path.parent
    root = images or around
    below = dict.fromkeys(name for name in (path.stem.rpartition("_")[2], split) if name)
    named = [place / name for name in below for place in (root, root / "images")]
    return [folder for folder in (root, *named, root / "images") if folder.is_dir()]


def _find(ways: Sequence[str], folders: list[Path]) -> Path | None:
    """Return the file of an image. The folder that contains it is searched first for the next image."""
    with suppress(OSError, ValueError):  # not a valid file name, for example too long
        for folder in folders:
            for way in ways:
                if (folder / way).is_file():
                    folders.remove(folder)
                    folders.insert(0, folder)
                    return folder / way
    return None
