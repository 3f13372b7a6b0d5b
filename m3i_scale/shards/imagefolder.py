"""Folder of images, by class or by split and class, as input of `make`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from m3i_scale.errors import DataError
from m3i_scale.shards.encode_image import FILE_EXTENSIONS
from m3i_scale.shards.records import ListedInput, Record, split_name

Captions = Literal["auto", "none", "optional", "required"]
"""auto: either all images of a folder have a caption file, or none."""

FolderLayout = Literal["auto", "classes", "splits"]
"""classes: FOLDER/CLASS/…; splits: FOLDER/SPLIT/CLASS/…; auto: splits if all top-level folders have names of splits and
one of them has all classes, classes if no folder has such a name."""

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
"""Case-insensitive."""


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
            "an image lies in no split", where=str(images[parents.index(())]), fix="move it, or --layout classes"
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
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder))
    images = sorted(path for path in folder.rglob("*") if _is_shown_image(path, folder))
    if not images:
        raise DataError("the folder holds no images", where=str(folder), fix=f"known: {', '.join(FILE_EXTENSIONS)}")
    return images


def _is_shown_image(path: Path, folder: Path) -> bool:
    """Return whether a file has an image extension and no hidden part in its path, such as `.ipynb_checkpoints` of
    notebooks or `._NAME.jpg` of macOS."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower()[1:] in FILE_EXTENSIONS and not path.is_dir()


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
        why = f"{', '.join(others) or 'an image'} beside {', '.join(splits)}"
    elif bare:
        why = f"images lie directly in {', '.join(bare)}, in no folder of a class"
    elif any(alone.values()):
        split = next(split for split in splits if alone[split])
        why = f"{split} has folders that {most} has not: {', '.join(alone[split][:3])}"
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
