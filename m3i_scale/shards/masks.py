"""Folder of images and folder of masks, paired by name, as input of `make`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from m3i_scale.data.images import DECODE_ERRORS, mask_error
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.annotation_checks import check_mask_classes
from m3i_scale.shards.imagefolder import SPLIT_NAMES, key_of, list_images
from m3i_scale.shards.records import ListedInput, Record, read_class_names, reading

_FROM_ONE = np.append((np.arange(NO_CLASS) - 1) % 256, NO_CLASS).astype(np.uint8)
"""Class of every stored value if classes start at 1: 0 and 255 become 255 (no class)."""


def read_mask(path: Path, classes: int, reduce_zero_label: bool) -> bytes:
    """Return a mask with classes from 0. Invalid data is returned unchanged; `check_mask` rejects it."""
    with reading(path):
        data = path.read_bytes()
    if mask_error(data) is not None:
        return data
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
            pixels_HW = np.asarray(mask)
    except DECODE_ERRORS:
        return data
    highest = int(pixels_HW.max(where=pixels_HW != NO_CLASS, initial=0))
    if highest == classes and not reduce_zero_label:
        raise ConfigError(
            f"a mask has the class {highest}, and the {classes} names are of 0 to {classes - 1}",
            where=str(path),
            why="where 0 is no class, as in ADE20k, all masks are off by one",
            fix="a name for every class, in the order of their numbers; or, where 0 is none, `shards make masks"
            " --reduce-zero-label`, or the layout of ADE20k with its objectInfo150.txt",
        )
    if highest >= classes + reduce_zero_label:
        raise DataError(
            f"the mask has a class without a name: {highest}, of {classes} names",
            where=str(path),
            fix="a name for every class, in the order of their numbers; pixels without one are 255",
        )
    if not reduce_zero_label:
        return data
    buffer = io.BytesIO()
    Image.fromarray(_FROM_ONE[pixels_HW]).save(buffer, "PNG")
    return buffer.getvalue()


def masks_input(
    images: Path,
    masks: Path,
    labels: Sequence[str],
    *,
    reduce_zero_label: bool = False,
    split: str | None = None,
    skip_bad: bool = False,
) -> ListedInput:
    """List images and the masks of the same name: IMAGES/a/b.jpg and MASKS/a/b.png.

    Args:
        masks: folder of masks: 8-bit gray PNGs, or palette PNGs whose indices are the classes.
        reduce_zero_label: 0 means no class and the first name has value 1. Shards start at 0 and use 255 for no class.
        split: split of all samples; None: the top-level folder of an image, if those folders have names of splits.
        skip_bad: skip samples without an image or without a mask.
    """
    check_mask_classes(labels, "--labels", NO_CLASS - reduce_zero_label)
    of_images, of_masks = _by_name(images), _by_name(masks)
    both = of_images.keys() & of_masks.keys()
    if not both:
        raise DataError(
            "no mask has the name of an image",
            where=f"{images}, {masks}",
            why=f"the first are {min(of_images)} and {min(of_masks)}",
            fix="name them alike, as in IMAGES/a/b.jpg and MASKS/a/b.png",
        )
    pairs = {name for name in both if of_masks[name].suffix.lower() == ".png"}
    splits = set() if split is not None else _splits(pairs, images)
    records = []
    for name in sorted({*of_images, *of_masks}):
        image, mask = of_images.get(name), of_masks.get(name)
        problem = None
        if mask is None:
            problem = DataError("the image has no mask", where=str(image))
        elif image is None:
            problem = DataError("the mask has no image", where=str(mask))
        elif mask.suffix.lower() != ".png":
            problem = DataError("the mask is no PNG", where=str(mask))
        if problem is not None and not skip_bad:
            problem.fix = f"{len(pairs)} pairs are whole; --skip-bad leaves the others out"
            raise problem
        records.append(
            Record(
                key_of(Path(f"{name}.png")),
                image or b"",
                mask=None if mask is None else partial(read_mask, mask, len(labels), reduce_zero_label),
                meta={} if image is None else {"path": image.relative_to(images).as_posix()},
                # Skipped samples must not create a split.
                split=name.parts[0] if name.parts[0] in splits else min(splits, default=split),
                size=sum(path.stat().st_size for path in (image, mask) if path is not None and path.is_file()),
                where=str(mask or image),
                problem=problem,
            )
        )
    return ListedInput(records, [], mask_labels=labels, source="masks", reduce_zero_label=reduce_zero_label)


def read_mask_labels(path: Path, *, reduce_zero_label: bool) -> list[str]:
    """Read class names: a JSON list, one name per line, or a table like ADE20k's, with the columns Idx and Name."""
    lines = read_class_names(path)
    header, *rows = [[cell.strip() for cell in line.split("\t")] for line in lines] or [[]]
    if not {"Idx", "Name"} <= {*header}:
        return lines
    numbers, names = (
        [row[header.index(column)] for row in rows if len(row) == len(header)] for column in ("Idx", "Name")
    )
    first = int(reduce_zero_label)
    if numbers != [str(number) for number in range(first, first + len(rows))]:
        from_one = not reduce_zero_label and numbers[:1] == ["1"]
        raise ConfigError(
            "its classes are numbered from 1: 0 in a mask is none of them"
            if from_one
            else f"it is no table of classes, numbered from {first} on",
            where=str(path),
            fix="--reduce-zero-label" if from_one else "one name a line",
        )
    return names


def _by_name(folder: Path) -> dict[Path, Path]:
    paths: dict[Path, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("")
        if name in paths:
            raise DataError(
                "two files have one name, and each is paired by it", where=f"{paths[name]}, {path}", fix="remove one"
            )
        paths[name] = path
    return paths


def _splits(names: Iterable[Path], images: Path) -> set[str]:
    """Return the top-level folders of images if they are splits."""
    first = {name.parts[0] if name.parent.parts else "" for name in names}
    splits = {name for name in first if name.lower() in SPLIT_NAMES}
    if splits and splits != first:
        raise DataError(
            f"it is not clear whether {', '.join(sorted(splits))} are splits",
            where=str(images),
            why=f"beside them: {', '.join(sorted(first - splits)) or 'images'}",
            fix="pack them one by one: --images IMAGES/train --masks MASKS/train --split train=1",
        )
    return splits
