"""Find labelled images in a folder, and pack those that are not in shards.

Shards are packed once. They are used again as long as the splits that they were made of have the same files, by name
and size; the contents of files are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3i_scale.data.index import load_index
from m3i_scale.data.make.cut import ShardOptions
from m3i_scale.data.make.records import Input
from m3i_scale.data.make.shards import SKIPPED, make_shards
from m3i_scale.data.shards import LABELS, MASK_LABELS, check_mask_classes, expand_shards, labels_beside
from m3i_scale.data.workers import DEFAULT_WORKERS
from m3i_scale.downstream.subset import Subset, subset_of_shards
from m3i_scale.downstream.unpacked import (
    ADE_NAMES,
    EVALUATED,
    FIX,
    TRAIN,
    TRAINED,
    Unpacked,
    Wrapped,
    differing_classes,
    image_folders,
    mask_folders,
    saved_dataset,
)
from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json

MASKS_FIX = (
    "shards with masks, and mask_labels.json beside them, in DIR/train and DIR/val, or in DIR; DIR/train/images and "
    "DIR/train/masks, and such in DIR/val; or DIR/images/training and DIR/annotations/training, and validation beside"
)
_DIGEST = "input_sha256"
_TOLD_EVERY = 50_000


@dataclass(frozen=True)
class Labelled:
    """Describes labelled images for training and, where there are some, for evaluation."""

    train: Path
    """A folder of shards, which is there once `pack` has been called."""
    validation: Path | None
    classes: list[str]
    samples: int
    """For training, with a label or a mask; where `unlabelled` is None, those without are among them."""
    unlabelled: int | None = 0
    """How many others are read beside them; None: nobody has counted."""
    source: Input | None = None
    """What the shards are still to be made of."""
    evaluated: int = 0
    """How many images there are for evaluation, with a class or not."""

    @property
    def read(self) -> int:
        """Return how many images a pass reads."""
        return self.samples + (self.unlabelled or 0)

    @property
    def skipped(self) -> int:
        """Return how many images were left out when the shards were made, since they could not be used."""
        path = self.train.parent / SKIPPED
        return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0

    def pack(self, tell: Callable[[str], None], *, skip_bad: bool = False) -> None:
        """Make the shards where they are not there yet.

        Args:
            tell: prints a line for people.
            skip_bad: leave out images that cannot be used, and list them.

        Raises:
            DataError: an image that cannot be used, and is not to be left out.
        """
        if self.source is None:
            return
        folder = self.train.parent
        tell(f"packing {self.samples} images for training into {folder}, which later starts use again")

        def progress(done: int, total: int) -> None:
            if done % _TOLD_EVERY == 0:
                tell(f"packed {done} of {total} images")

        options = ShardOptions(workers=DEFAULT_WORKERS, vocabulary=0, skip_bad=skip_bad)
        make_shards(self.source, folder, options=options, progress=progress)
        if self.skipped:
            tell(f"left out {self.skipped} images that cannot be used: {folder / SKIPPED}")


def find_labelled(
    folder: Path,
    packed: Path,
    cache: Path,
    *,
    masks: bool = False,
    subset: Subset | None = None,
    skip_bad: bool = False,
) -> Labelled:
    """Find out what kind of data lie in a folder, and check them as far as names tell.

    Args:
        folder: where they lie.
        packed: where shards of what is not in shards, or of a subset, lie or will.
        cache: keeps indices of shards that have none beside them.
        masks: whether pixels have classes, and not images.
        subset: of the images for training; None: all of them.
        skip_bad: whether images may lack a mask, and masks an image.

    Raises:
        ConfigError: neither kind, a class without images for training, classes that differ between splits, or shards
            at `packed` of other data.
        DataError: shards or a saved data set that are damaged.
    """
    fix, file = (MASKS_FIX, MASK_LABELS) if masks else (FIX, LABELS)
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=f"--data {folder}", fix=fix)
    train, evaluated = _split(folder, TRAINED), _split(folder, EVALUATED)
    if train is None and any(folder.glob("*.tar")):
        train, evaluated = folder, None
    if train is not None and any(train.glob("*.tar")):
        given = _shards(train, evaluated, cache, file)
        if subset is None:
            return given
        few = subset_of_shards(subset, train, given.classes, masks=masks)
        return replace(_to_pack(packed, few), validation=evaluated, evaluated=given.evaluated)
    if masks:
        found = mask_folders(_mask_places(folder, train, evaluated), _mask_names(folder), skip_bad=skip_bad)
    elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = saved_dataset(folder)
    elif train is None and evaluated is not None:
        raise _without_train(evaluated, FIX)
    else:
        found = image_folders(_places(folder if train is None else train, evaluated))
    return _to_pack(packed, found if subset is None else subset.of(found))


def _without_train(evaluated: Path, fix: str) -> ConfigError:
    return ConfigError(f"'{evaluated.name}' has no '{TRAIN}' beside it", where=f"--data {evaluated.parent}", fix=fix)


def _places(train: Path, evaluated: Path | None) -> dict[str, Path]:
    return {TRAIN: train} | ({} if evaluated is None else {evaluated.name.lower(): evaluated})


def _mask_places(folder: Path, train: Path | None, evaluated: Path | None) -> dict[str, tuple[Path, Path]]:
    """Return folders of images and of masks by split: DIR/images/SPLIT and DIR/annotations/SPLIT, or DIR/SPLIT/images
    and DIR/SPLIT/masks."""
    images, masks = folder / "images", folder / "annotations"
    together = images.is_dir() and masks.is_dir()
    if together:
        train, evaluated = _split(images, TRAINED), _split(images, EVALUATED)
    if train is None and evaluated is not None:
        raise _without_train(evaluated, MASKS_FIX)
    if train is None:
        raise ConfigError(
            "there are neither shards nor folders of images and masks", where=f"--data {folder}", fix=MASKS_FIX
        )
    return {
        split: (place, masks / place.name) if together else (place / "images", place / "masks")
        for split, place in _places(train, evaluated).items()
    }


def _mask_names(folder: Path) -> Path:
    """Return the file that names the classes of masks in folders."""
    for name in (ADE_NAMES, MASK_LABELS):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        "nothing names the classes of the masks",
        where=f"--data {folder}",
        fix=f"put {MASK_LABELS} there, a list of class names in the order of the masks' numbers, from 0 on; or, where "
        f"0 is no class, the {ADE_NAMES} of ADE20k",
    )


def _split(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the folder of the first split that is there."""
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def _shards(train: Path, validation: Path | None, cache: Path, file: str) -> Labelled:
    classes = _classes_beside(train, file)
    evaluated = 0
    if validation is not None:
        others = _classes_beside(validation, file)
        if others != classes:
            raise differing_classes(classes, others, str(validation))
        evaluated = sum(map(len, load_index(expand_shards(str(validation), "--data"), cache)))
    index = load_index(expand_shards(str(train), "--data"), cache)
    read, labelled = sum(map(len, index)), _labelled(train, {one.path.name for one in index}, masks=file == MASK_LABELS)
    if labelled == 0:
        raise ConfigError("no sample for training has a class", where=f"--data {train}: manifest.json", fix=FIX)
    if labelled is None:
        return Labelled(train, validation, classes, read, None, evaluated=evaluated)
    return Labelled(train, validation, classes, labelled, read - labelled, evaluated=evaluated)


def _classes_beside(folder: Path, file: str) -> list[str]:
    """Return what a file beside shards names.

    Raises:
        ConfigError: there is no such file, or its names cannot be those of pixels.
    """
    classes = labels_beside(folder, file)
    if not classes:
        masks = f"put {file} there, a list of class names in the order of the masks' numbers"
        make = "m3i-scale shards make imagefolder, or make webdataset --labels"
        raise ConfigError(
            f"the shards have no classes: {file} beside them names them",
            where=f"--data {folder}",
            fix=make if file == LABELS else masks,
        )
    if file == MASK_LABELS:
        check_mask_classes(classes, str(folder / file))
    return classes


def _labelled(train: Path, shards: set[str], *, masks: bool) -> int | None:
    """Return how many samples have a label, or a mask, as the manifest counts them; None where it is of other shards or
    not there."""
    try:
        counts = read_json(train / "manifest.json")["shards"]
        if {*counts} != shards:
            return None
        return sum(int(counts[name]["with_mask" if masks else "with_label"]) for name in shards)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # shards of other tools have no such file


def _to_pack(packed: Path, found: Unpacked) -> Labelled:
    validation = packed / found.splits[1] if len(found.splits) > 1 else None
    source: Input | None = _Marked(found.source, found.digest)
    if packed.is_file() or (packed.is_dir() and any(packed.iterdir())):
        try:
            made_of = read_json(packed / TRAIN / "manifest.json").get(_DIGEST)
        except (OSError, ValueError, AttributeError):
            made_of = None
        if made_of != found.digest:
            raise ConfigError(
                "the shards there are of other data",
                where=str(packed),
                why="files of --data have changed since, by name or size; or they are of another subset",
                fix="remove them, or give another folder with --shards or output_dir",
            )
        source = None
    classes = found.source.mask_labels or found.source.labels
    train, samples = packed / TRAIN, len(found.classes)
    return Labelled(train, validation, classes, samples, found.unlabelled, source, found.evaluated)


class _Marked(Wrapped):
    """Has the manifest say which files an input had.

    Args:
        source: the input.
        digest: of its files.
    """

    def __init__(self, source: Input, digest: str) -> None:
        super().__init__(source)
        self._digest = digest

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return super().info() | {_DIGEST: self._digest}
