"""Labeled images that are not in shards yet: folders of classes or of masks, or COCO and LVIS annotation files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.coco import annotation_files, coco_input, split_of
from m3i_scale.shards.digests import INPUT_DIGEST, digest_of_files
from m3i_scale.shards.encode_image import FILE_EXTENSIONS
from m3i_scale.shards.image_folders import check_class_names, imagefolder_input, masks_input, read_mask_labels
from m3i_scale.shards.records import Input, ListedInput, Record
from m3i_scale.text import listed

TRAIN = "train"
TRAINED = (TRAIN, "training")
EVALUATED = ("val", "validation", "valid", "dev", "test", "testing", "eval")
"""Split names, case-insensitive; the first existing one is used for training, or for evaluation."""
ADE_NAMES = "objectInfo150.txt"
_IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
_ANNOTATIONS = {"masks", "mask", "annotations", "annotation", "labels", "label", "gt", "boxes", "bboxes"}
_ANNOTATIONS |= {"segmentationclass", "segmentationobject", "imagesets", "metadata"}
_NUMBERED_SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing|dev|eval|minival)[-_ ]?\d{0,4}")
"""Names of folders in data for other tasks, and of splits, in lower case."""
FIX = (
    "DIR/train/CLASS/… and DIR/val/CLASS/…, or DIR/CLASS/… without evaluation; shards, "
    "for a Hugging Face dataset those of `m3i-scale shards make huggingface`"
)
BOXES_FIX = (
    "shards of `m3i-scale shards make coco` in DIR/train and DIR/val, or in DIR; DIR/annotations with "
    "instances_train2017.json and instances_val2017.json, or lvis_v1_train.json and lvis_v1_val.json, and the images "
    "in DIR; or --data FILE, the annotation file for training"
)
_ANNOTATED_SPLITS = (*EVALUATED, "minival")


@dataclass(frozen=True)
class Unpacked:
    """Images to pack into shards."""

    source: Input
    splits: list[str]
    classes: dict[str, str]
    """Class by key, for training images with one; the same dummy class for all images if pixels have classes."""
    evaluated: int = 0
    """Number of evaluation images."""
    is_subset: bool = False

    @property
    def digest(self) -> str:
        """Return the digest of everything that goes into the shards."""
        return str(self.source.info()[INPUT_DIGEST])


def image_folders(places: dict[str, Path]) -> Unpacked:
    """List images by split and class, from a folder of classes per split, training first."""
    records: list[Record] = []
    classes: dict[str, list[str]] = {}
    for split, place in places.items():
        shown = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        names = [path.name for path in shown if path.is_dir()]
        loose = next((path for path in shown if path.suffix.lower()[1:] in FILE_EXTENSIONS), None)
        if not names or loose is not None:
            what = "there are no class folders" if loose is None else "an image is outside the class folders"
            raise ConfigError(what, where=f"--data {loose or place}", fix=FIX)
        check_class_names(names, f"--data {place}")
        _check_layout(place, names)
        of_split = imagefolder_input(place, "none", "classes")
        if split == TRAIN:
            with_images = {*of_split.labels}
            _check_not_empty([name for name in names if name not in with_images], str(place))
        classes[split] = of_split.labels
        records += [replace(record, split=split, key=f"{split}_{record.key}") for record in of_split.records()]
    for split, labels in classes.items():
        if labels != classes[TRAIN]:
            raise differing_classes(classes[TRAIN], labels, str(places[split]))
    files = ((f"{record.split}/{record.meta['path']}", record.size) for record in records)
    names = classes[TRAIN]
    trained = {
        record.key: names[record.label] for record in records if record.split == TRAIN and record.label is not None
    }
    images = ListedInput(records, names, source="imagefolder", **{INPUT_DIGEST: digest_of_files(files)})
    return Unpacked(images, list(places), trained, len(records) - len(trained))


def mask_folders(places: dict[str, tuple[Path, Path]], names: Path, *, skip_bad: bool) -> Unpacked:
    """List images with masks of the same names, by split.

    Args:
        places: folders of images and of masks by split, training first.
        names: file with the class names: a list from 0 on, or the table of ADE20k, where 0 in a mask is no class.
        skip_bad: skip images without mask, and masks without image, when the shards are created.
    """
    reduce_zero_label = names.name == ADE_NAMES
    labels = read_mask_labels(names, reduce_zero_label=reduce_zero_label)
    records: list[Record] = []
    for split, (images, masks) in places.items():
        pairs = masks_input(images, masks, labels, reduce_zero_label=reduce_zero_label, split=split, skip_bad=skip_bad)
        records += [replace(record, key=f"{split}_{record.key}") for record in pairs.records()]
    files = [(f"{record.split}/{record.meta.get('path', record.key)}", record.size) for record in records]
    numbered = [(f"{number} {name}", int(reduce_zero_label)) for number, name in enumerate(labels)]
    usable = [record for record in records if record.problem is None]
    trained = {record.key: "" for record in usable if record.split == TRAIN}
    about = {
        "source": "masks",
        "reduce_zero_label": reduce_zero_label,
        INPUT_DIGEST: digest_of_files([*files, *numbered]),
    }
    source = ListedInput(records, [], mask_labels=labels, **about)
    return Unpacked(source, list(places), trained, len(usable) - len(trained))


def annotated_images(given: Path, *, skip_bad: bool) -> Unpacked:
    """List images and their annotations, by split. `given` is a folder of annotation files, or the training file with
    the evaluation file next to it. With `skip_bad`, unusable images are skipped when shards are created."""
    train, evaluated = _find_annotations(given) if given.is_file() else _in_folder(given)
    files = {TRAIN: train} | ({} if evaluated is None else {split_of(evaluated) or "": evaluated})
    found = coco_input([*files.values()], skip_bad=skip_bad)
    records = [
        record if record.split in files else replace(record, split=TRAIN)  # `training`, or a name without a split
        for record in found.records()
    ]
    usable = [record for record in records if record.problem is None]
    trained = {record.key: "" for record in usable if record.split == TRAIN}
    sizes = [(path.name, path.stat().st_size) for path in files.values()]
    sizes += [(f"{record.split}/{record.meta['path']}", record.size) for record in records]
    counts = found.info()["annotations"]
    for file in files.values():
        of_file = counts["/".join(file.parts[-2:])]
        if of_file["annotations"] <= of_file["crowds"]:
            purpose = "training" if file == train else "evaluation"
            raise ConfigError(f"no object is annotated for {purpose}", where=f"--data {file}", fix=BOXES_FIX)
    source = ListedInput(
        records, [], categories=found.categories, **found.info() | {INPUT_DIGEST: digest_of_files(sizes)}
    )
    return Unpacked(source, list(files), trained, len(usable) - len(trained))


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    """Return the annotation files of a folder for training and for evaluation."""
    try:
        files = annotation_files(folder)
    except ConfigError as error:
        error.fix = "--data FILE, the annotation file for training; the evaluation file is next to it"
        raise
    except DataError:
        raise ConfigError(
            "there are neither shards nor annotation files", where=f"--data {folder}", fix=BOXES_FIX
        ) from None
    trained = [file for file in files if split_of(file) in TRAINED]
    if not trained and len(files) == 1 and split_of(files[0]) is None:
        trained = files
    if len(trained) != 1:
        raise ConfigError(
            f"{len(trained) or 'none'} of the annotation files are for training",
            where=f"--data {folder}: {', '.join(file.name for file in files)}",
            fix="--data FILE, the annotation file for training",
        )
    return trained[0], _evaluation_file(files)


def _find_annotations(train: Path) -> tuple[Path, Path | None]:
    """Return the training file, and the evaluation file with the same path except for the split name."""
    near = [*train.parent.glob("*.json"), *train.parent.parent.glob(f"*/{train.name}")]
    return train, _evaluation_file(
        [file for file in near if file != train and _without_split(file) == _without_split(train)]
    )


def _evaluation_file(files: Sequence[Path]) -> Path | None:
    """Return the file for evaluation."""
    by_split = {split_of(file): file for file in files}
    return next((by_split[split] for split in _ANNOTATED_SPLITS if split in by_split), None)


def _without_split(file: Path) -> tuple[str, str]:
    before, _, after = "/".join(file.parts[-2:]).lower().rpartition(split_of(file) or "/")
    return before, after


def _check_layout(place: Path, names: list[str]) -> None:
    """Raise an error for folder layouts of segmentation or detection data, and for unknown split names."""
    folded = [name.casefold() for name in names]
    images, annotations = (kind.intersection(folded) for kind in (_IMAGES, _ANNOTATIONS))
    splits = [name for name in folded if _NUMBERED_SPLIT.fullmatch(name)]
    if not (images and annotations) and len(annotations) + len(splits) < len(names):
        return
    shown = listed(names, 4)
    raise ConfigError(
        f"the folders are not classes: {shown}",
        where=f"--data {place}",
        why="a classifier would learn to distinguish the folders of the layout",
        fix="m3i-scale finetune segmentation for masks, or finetune detection for boxes; for classes: "
        f"{FIX.partition('; shards')[0]}",
    )


def _check_not_empty(names: list[str], where: str) -> None:
    if names:
        raise ConfigError(
            f"{len(names)} classes have no images for training: {listed(names, 4)}",
            where=f"--data {where}",
            why="the head would never be right about them",
            fix="add images, or remove the classes",
        )


def differing_classes(train: list[str], others: list[str], where: str) -> ConfigError:
    """Return the error for a split with other classes than the training split."""
    missing, extra = sorted(set(train) - set(others)), sorted(set(others) - set(train))
    parts = [f"{what} {listed(names, 4)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
    return ConfigError(
        "the evaluation split must have the classes of the training split",
        where=f"--data {where}",
        why=f"it {' and '.join(parts) or 'has them in another order'}",
        fix="give both splits the same classes, in the same order",
    )
