"""Labeled images in a folder, packed once into shards if necessary. Shards are reused as long as the original splits
have the same files, by name and size; file contents are not compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from m3i_scale.data.categories import Categories, shard_categories
from m3i_scale.data.index import load_index
from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS, expand_shards, read_labels
from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json
from m3i_scale.shards.annotation_checks import check_mask_classes
from m3i_scale.shards.digests import INPUT_DIGEST
from m3i_scale.shards.make import SKIPPED, pack_images
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.process_pool import DEFAULT_WORKERS
from m3i_scale.shards.records import Input
from m3i_scale.tasks.subset import Subset, subset_of_shards
from m3i_scale.tasks.unpacked import (
    ADE_NAMES,
    BOXES_FIX,
    EVALUATED,
    FIX,
    TRAIN,
    TRAINED,
    Unpacked,
    annotated_images,
    differing_classes,
    image_folders,
    mask_folders,
)

MASKS_FIX = (
    "use shards with masks and mask_labels.json in DIR/train and DIR/val, or in DIR; or DIR/train/images and "
    "DIR/train/masks, and the same in DIR/val; or DIR/images/training and DIR/annotations/training, and `validation`"
)
_FIXES = {LABELS: FIX, MASK_LABELS: MASKS_FIX, CATEGORIES: BOXES_FIX}
_COUNTED = {LABELS: "with_label", MASK_LABELS: "with_mask", CATEGORIES: "with_instances"}
"""Manifest key for the number of samples with labels, by the file with the class names."""


@dataclass(frozen=True)
class Labelled:
    """Labeled images for training and, if available, for evaluation."""

    train: Path
    """A folder of shards, which exists after `pack`."""
    validation: Path | None
    classes: list[str]
    samples: int
    """Training samples with a label, a mask or a (possibly empty) list of boxes; all samples if `unlabelled` is
    None."""
    unlabelled: int | None = 0
    """Number of additional training samples without labels; None: not counted."""
    source: Input | None = None
    """Input from which the shards are still to be created."""
    evaluated: int = 0
    """Number of evaluation images, with or without a class."""
    categories: Categories | None = None
    class_images: dict[str, int] | None = None
    """Training images per class; None: images have several classes, or were not counted."""
    annotations: dict[str, dict[str, int]] | None = None
    """Counts from `shards make coco` by annotation file; None for other tasks."""
    every_class: bool = True
    """Whether each class of masks must have a training pixel; a subset may lack some."""

    @property
    def read(self) -> int:
        """Return the number of images per epoch."""
        return self.samples + (self.unlabelled or 0)

    @property
    def without_mask(self) -> Literal["all", "some", "none"]:
        """Return how many of the annotated objects have no mask."""
        counts = (self.annotations or {}).values()
        objects, bare = (sum(one.get(name, 0) for one in counts) for name in ("annotations", "without_mask"))
        return "none" if not bare else "some" if bare < objects else "all"

    @property
    def skipped(self) -> int:
        """Return the number of unusable images that were skipped when the shards were created."""
        path = self.train.parent / SKIPPED
        return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0

    def pack(self, tell: Callable[[str], None], *, skip_bad: bool = False) -> None:
        """Create the shards if they do not exist yet. With `skip_bad`, unusable images are skipped and listed."""
        if self.source is None:
            return
        folder = self.train.parent
        tell(f"packing {self.samples} images for training into {folder}, which later starts use again")
        options = ShardOptions(workers=DEFAULT_WORKERS, vocabulary=0, skip_bad=skip_bad)
        pack_images(self.source, folder, tell, options=options, every_class=self.every_class)


def find_labelled(
    folder: Path,
    packed: Path,
    cache: Path,
    file: str = LABELS,
    *,
    subset: Subset | None = None,
    skip_bad: bool = False,
) -> Labelled:
    """Detect the type of data in a folder, and validate it as far as possible from file names.

    Args:
        folder: data folder; for boxes also the annotation file for training.
        packed: folder of shards created from other data or a subset.
        cache: folder for indices of shards that have none.
        file: file with the class names next to shards, which implies the task: classes of images, pixels or boxes.
        skip_bad: allow images without masks, masks without images, and unusable images in annotation files.
    """
    found = _find(folder, packed, cache, file, subset=subset, skip_bad=skip_bad)
    if file == LABELS and len(found.classes) < 2:
        raise ConfigError(
            f"a classifier must have two classes or more, got {len(found.classes)}: {', '.join(found.classes)}",
            where=f"--data {folder}",
            why="any model predicts a single class perfectly",
            fix=FIX,
        )
    return found


def _find(folder: Path, packed: Path, cache: Path, file: str, *, subset: Subset | None, skip_bad: bool) -> Labelled:
    if file == CATEGORIES and folder.is_file():
        annotated = annotated_images(folder, skip_bad=skip_bad)
        return _to_pack(packed, annotated if subset is None else subset.of(annotated))
    if not folder.is_dir():
        raise ConfigError("no such folder", where=f"--data {folder}", fix=_FIXES[file])
    train, evaluated = _split(folder, TRAINED), _split(folder, EVALUATED)
    if train is None and any(folder.glob("*.tar")):
        train, evaluated = folder, None
    if train is not None and any(train.glob("*.tar")):
        given = _shards(train, evaluated, cache, file)
        if subset is None:
            return given
        few = _to_pack(packed, subset_of_shards(subset, train, given.classes, file))
        return replace(few, validation=evaluated, evaluated=given.evaluated, annotations=given.annotations)
    if file == CATEGORIES:
        found = annotated_images(folder, skip_bad=skip_bad)
    elif file == MASK_LABELS:
        found = mask_folders(_mask_places(folder, train, evaluated), _mask_names(folder), skip_bad=skip_bad)
    elif train is None and evaluated is not None:
        raise _without_train(evaluated, FIX)
    else:
        found = image_folders(_places(folder if train is None else train, evaluated))
    return _to_pack(packed, found if subset is None else subset.of(found))


def _without_train(evaluated: Path, fix: str) -> ConfigError:
    return ConfigError(f"'{evaluated.name}' has no '{TRAIN}' next to it", where=f"--data {evaluated.parent}", fix=fix)


def _places(train: Path, evaluated: Path | None) -> dict[str, Path]:
    return {TRAIN: train} | ({} if evaluated is None else {evaluated.name.lower(): evaluated})


def _mask_places(folder: Path, train: Path | None, evaluated: Path | None) -> dict[str, tuple[Path, Path]]:
    """Return folders of images and masks by split: DIR/images/SPLIT and DIR/annotations/SPLIT, or DIR/SPLIT/images and
    DIR/SPLIT/masks."""
    images, masks = folder / "images", folder / "annotations"
    together = images.is_dir() and masks.is_dir()
    if together:
        train, evaluated = _split(images, TRAINED), _split(images, EVALUATED)
    if train is None and evaluated is not None:
        raise _without_train(evaluated, MASKS_FIX)
    if train is None:
        raise ConfigError("no shards and no folders of images and masks", where=f"--data {folder}", fix=MASKS_FIX)
    return {
        split: (place, masks / place.name) if together else (place / "images", place / "masks")
        for split, place in _places(train, evaluated).items()
    }


def _mask_names(folder: Path) -> Path:
    for name in (ADE_NAMES, MASK_LABELS):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        "no class names for the masks",
        where=f"--data {folder}",
        fix=f"put {MASK_LABELS} there, a list of class names in the order of the mask values, from 0 on; or, if 0 is "
        f"not a class, the {ADE_NAMES} of ADE20k",
    )


def _split(folder: Path, names: Sequence[str]) -> Path | None:
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def _shards(train: Path, validation: Path | None, cache: Path, file: str) -> Labelled:
    classes = _find_classes(train, file)
    evaluated = 0
    if validation is not None:
        others = _find_classes(validation, file)
        if others != classes:
            raise differing_classes(classes, others, str(validation))
        evaluated = sum(map(len, load_index(expand_shards(str(validation), "--data"), cache)))
    index = load_index(expand_shards(str(train), "--data"), cache)
    read, labelled = sum(map(len, index)), _labelled(train, {one.path.name for one in index}, file)
    if labelled == 0:
        raise ConfigError("no training sample has a class", where=f"--data {train}: manifest.json", fix=_FIXES[file])
    samples, unlabelled = (read, None) if labelled is None else (labelled, read - labelled)
    given = Labelled(train, validation, classes, samples, unlabelled, evaluated=evaluated)
    if file != CATEGORIES:
        return given
    return replace(given, categories=shard_categories(train), annotations=_annotations(train))


def _find_classes(folder: Path, file: str) -> list[str]:
    classes = read_labels(folder, file)
    if not classes:
        makes = {
            LABELS: "m3i-scale shards make imagefolder, or make webdataset --labels",
            MASK_LABELS: f"put {file} there, a list of class names in the order of the masks' numbers",
            CATEGORIES: "m3i-scale shards make coco",
        }
        raise ConfigError(f"the shards have no {file} with the classes", where=f"--data {folder}", fix=makes[file])
    if file == MASK_LABELS:
        check_mask_classes(classes, str(folder / file))
    return classes


def read_manifest(train: Path) -> dict[str, Any]:
    """Return the manifest of shards. Shards of other tools have none."""
    try:
        found = read_json(train / "manifest.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _labelled(train: Path, shards: set[str], file: str) -> int | None:
    """Return the number of labeled samples from the manifest; None if it is missing or covers other shards."""
    try:
        counts = read_manifest(train)["shards"]
        if {*counts} != shards:
            return None
        return sum(int(counts[name][_COUNTED[file]]) for name in shards)
    except (ValueError, KeyError, TypeError):
        return None


def _annotations(train: Path) -> dict[str, dict[str, int]] | None:
    try:
        counts = read_manifest(train)["annotations"]
        return {str(file): {str(name): int(count) for name, count in of.items()} for file, of in counts.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _to_pack(packed: Path, found: Unpacked) -> Labelled:
    validation = packed / found.splits[1] if len(found.splits) > 1 else None
    source: Input | None = found.source
    if packed.is_file() or (packed.is_dir() and any(packed.iterdir())):
        if read_manifest(packed / TRAIN).get(INPUT_DIGEST) != found.digest:
            raise ConfigError(
                "the existing shards are of other data",
                where=str(packed),
                why="files of --data changed since, by name or size; or the subset is different",
                fix="remove them, or use another folder with --shards or output_dir",
            )
        source = None
    categories, train = found.source.categories, packed / TRAIN
    classes = found.source.mask_labels or found.source.labels if categories is None else categories.names
    of_class = Counter(found.classes.values())
    return Labelled(
        train,
        validation,
        classes,
        samples=len(found.classes),
        source=source,
        evaluated=found.evaluated,
        categories=categories,
        class_images={name: of_class[name] for name in classes} if found.source.labels else None,
        annotations=found.source.info().get("annotations"),
        every_class=not found.is_subset,
    )
