"""Folders of images as input of `make`: by class, by split and class, or paired by name with a folder of masks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from m3i_scale.data.images import DECODE_ERRORS, mask_error
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.shards.annotation_checks import check_mask_classes
from m3i_scale.shards.digests import digest_of_files
from m3i_scale.shards.encode_image import FILE_EXTENSIONS
from m3i_scale.shards.records import ListedInput, Record, read_class_names, reading, split_name
from m3i_scale.text import listed, printable

Captions = Literal["auto", "none", "optional", "required"]
"""auto: either all images of a folder have a caption file, or none."""

FolderLayout = Literal["auto", "classes", "splits"]
"""classes: FOLDER/CLASS/…; splits: FOLDER/SPLIT/CLASS/…; auto: splits if all top-level folders have names of splits and
one of them has all classes, classes if no folder has such a name."""

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
"""Case-insensitive."""
_FROM_ONE = np.append((np.arange(NO_CLASS) - 1) % 256, NO_CLASS).astype(np.uint8)
"""Class of every stored value if classes start at 1: 0 and 255 become 255 (no class)."""


def imagefolder_input(folder: Path, captions: Captions = "auto", layout: FolderLayout = "auto") -> ListedInput:
    """List images below `folder`: CLASS/… or SPLIT/CLASS/…, with `NAME.txt` next to an image as its caption.

    Images directly in it or in a split folder have no label. Hidden (dot) files are skipped.
    """
    images = list_images(folder)
    parents = [path.relative_to(folder).parts[:-1] for path in images]
    if layout == "auto":
        layout = "splits" if _has_splits(parents, folder) else "classes"
    if layout == "splits" and not all(parents):
        raise DataError(
            "an image is outside the splits", where=str(images[parents.index(())]), fix="move it, or --layout classes"
        )
    depth = 1 if layout == "splits" else 0
    classes = sorted({parts[depth] for parts in parents if len(parts) > depth})
    if captions == "auto":
        captions = "required" if any(path.with_suffix(".txt").is_file() for path in images) else "none"
    records, numbers = [], {name: number for number, name in enumerate(classes)}
    for path, parts in zip(images, parents, strict=True):
        label = numbers[parts[depth]] if len(parts) > depth else None
        split = split_name(parts[0], str(folder / parts[0])) if layout == "splits" else None
        records.append(_folder_record(path, folder, label, split, captions))
    return ListedInput(records, classes, source="imagefolder")


def list_images(folder: Path) -> list[Path]:
    """Return the files below a folder that have an image extension and are not hidden, sorted."""
    _check_exists(folder)
    paths = sorted(_not_hidden(folder))
    links = [path.relative_to(folder).as_posix() for path in paths if _is_linked_folder(path)]
    if links:
        raise ConfigError(
            f"folders of images must not be links, which are not followed: {printable(listed(links, 4))}",
            where=str(folder),
            fix="replace the links by the folders",
        )
    images = [path for path in paths if _is_image(path)]
    if not images:
        extensions = ", ".join(FILE_EXTENSIONS)
        raise DataError(
            "the folder contains no images", where=str(folder), fix=f"add files with these extensions: {extensions}"
        )
    return images


def _check_exists(folder: Path) -> None:
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        fix = did_you_mean(folder.name, siblings, otherwise="check the path: a folder of images")
        raise DataError("no such folder", where=str(folder), fix=fix)


def split_folder(folder: Path) -> Path | None:
    """Return the folder of the training split if the folders of a folder are splits, otherwise None. One name of a
    split among others is a class: "train" may be a vehicle."""
    _check_exists(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = [name for name in names if name.lower() in SPLIT_NAMES]
    if not splits or (len(splits) == 1 and splits != names):
        return None
    return folder / next((name for name in splits if name.lower().startswith("train")), splits[0])


def has_images(folder: Path) -> bool:
    """Return whether there is an image below a folder, or a linked folder, which may have some."""
    return any(_is_image(path) or _is_linked_folder(path) for path in _not_hidden(folder))


def holds_shards(folder: Path) -> bool:
    """Return whether a folder contains shards, itself or by split. Other .tar files below a folder of images, such as
    a backup, do not count."""
    return any(folder.glob("*.tar")) or (any(folder.glob("*/*.tar")) and not has_images(folder))


def folder_digest(folder: Path) -> str:
    """Return a digest of the names and sizes of the images below a folder, and of their caption files."""
    files: list[tuple[str, int]] = []
    for image in filter(_is_image, _not_hidden(folder)):
        for path in (image, image.with_suffix(".txt")):
            with suppress(FileNotFoundError):  # no caption, or a broken link
                files.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return digest_of_files(files)


def check_class_names(names: Sequence[str], where: str) -> None:
    """Check that the names of class folders are UTF-8."""
    unreadable = [name for name in names if name != name.encode(errors="replace").decode()]
    if unreadable:
        raise ConfigError(
            f"class names must be UTF-8, got {unreadable[0].encode(errors='backslashreplace').decode()}",
            where=where,
            fix="rename the folder",
        )


def _not_hidden(folder: Path) -> Iterator[Path]:
    """Yield the paths below a folder without a hidden part, such as `.ipynb_checkpoints` of notebooks or `._NAME.jpg`
    of macOS."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower()[1:] in FILE_EXTENSIONS and not path.is_dir()


def _is_linked_folder(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _has_splits(parents: Sequence[tuple[str, ...]], folder: Path) -> bool:
    """Return whether the top-level folders are splits, not classes. `parents` are the path components of the folders of
    every image."""
    first = {parts[0] for parts in parents if parts}
    splits = sorted(name for name in first if name.lower() in SPLIT_NAMES)
    others = sorted(first.difference(splits))
    one_of_the_classes = (
        others and len(splits) == 1 and all(len(parts) == 1 for parts in parents if parts and parts[0] in splits)
    )
    if not splits or one_of_the_classes:  # "train" may also be the class of a vehicle
        return False
    inside = {split: {parts[1] for parts in parents if len(parts) > 1 and parts[0] == split} for split in splits}
    most = max(splits, key=lambda split: len(inside[split]))
    bare = sorted({parts[0] for parts in parents if parts and parts[0] in splits and len(parts) == 1})
    alone = {split: sorted(inside[split] - inside[most]) for split in splits}
    why = None
    if others or not all(parents):
        why = f"{', '.join(others) or 'an image'} is next to {', '.join(splits)}"
    elif bare:
        why = f"images are directly in {', '.join(bare)}, outside class folders"
    elif any(alone.values()):
        split = next(split for split in splits if alone[split])
        why = f"{split} has folders that {most} does not have: {', '.join(alone[split][:3])}"
    if why is not None:
        raise DataError(
            f"it is not clear whether {', '.join(splits)} are splits or classes",
            where=str(folder),
            why=why,
            fix="--layout splits for FOLDER/SPLIT/CLASS/…, or --layout classes for FOLDER/CLASS/…",
        )
    return True


def _folder_record(path: Path, folder: Path, label: int | None, split: str | None, captions: Captions) -> Record:
    relative = path.relative_to(folder)
    caption = problem = None
    try:
        caption = None if captions == "none" else read_caption(path.with_suffix(".txt"), captions)
    except DataError as error:
        problem = error
    size = 0
    try:
        size = path.stat().st_size
    except OSError as error:  # broken symbolic link
        problem = DataError(f"the image is missing: {error.strerror}", where=str(path), fix="remove the link")
    meta = {"path": relative.as_posix()}
    return Record(key_of(relative), path, caption, label, meta, split, size=size, problem=problem)


def read_caption(path: Path, captions: Captions) -> str | None:
    """Read a caption file; return None if it is empty, or missing and optional."""
    if not path.is_file():
        if captions == "optional":
            return None
        raise DataError(
            "the caption file is missing",
            where=str(path),
            fix="write it, or allow images without caption (--captions optional), or leave them out (--skip-bad)",
        )
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the caption file cannot be read: {error}", where=str(path), fix="save it as UTF-8") from None


def key_of(relative: Path) -> str:
    """Return a key without dots, which would end it in a shard, and without a leading __, which webdataset skips."""
    return re.sub(r"[^\w-]+", "-", relative.with_suffix("").as_posix().replace("/", "_")).lstrip("_-") or "image"


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
