"""Images with boxes from COCO or LVIS annotation files, listed for packing into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.coco import annotation_files, coco_input, split_of
from m3i_scale.shards.records import ListedInput
from m3i_scale.tasks.unpacked import EVALUATED, TRAIN, TRAINED, Unpacked, digest_of

BOXES_FIX = (
    "shards of `m3i-scale shards make coco` in DIR/train and DIR/val, or in DIR; DIR/annotations with "
    "instances_train2017.json and instances_val2017.json, or lvis_v1_train.json and lvis_v1_val.json, and the images "
    "in DIR; or --data FILE, the annotation file for training"
)
_EVALUATED = (*EVALUATED, "minival")


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
    usable = [record for record in records if record.fault is None]
    trained = {record.key: "" for record in usable if record.split == TRAIN}
    digest = digest_of(
        [
            *((path.name, path.stat().st_size) for path in files.values()),
            *((f"{record.split}/{record.meta['path']}", record.size) for record in records),
        ]
    )
    counts = found.info()["annotations"]
    for file in files.values():
        of_file = counts["/".join(file.parts[-2:])]
        if of_file["annotations"] <= of_file["crowds"]:
            purpose = "training" if file == train else "evaluation"
            raise ConfigError(f"no object is annotated for {purpose}", where=f"--data {file}", fix=BOXES_FIX)
    return Unpacked(
        ListedInput(records, [], categories=found.categories, **found.info()),
        list(files),
        trained,
        digest,
        len(usable) - len(trained),
    )


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    """Return the annotation files of a folder for training and for evaluation."""
    try:
        files = annotation_files(folder)
    except ConfigError as error:
        error.fix = "--data FILE, the annotation file for training; that for evaluation is the one beside it"
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
    return trained[0], _first(files)


def _find_annotations(train: Path) -> tuple[Path, Path | None]:
    """Return the training file, and the evaluation file with the same path except for the split name."""
    near = [*train.parent.glob("*.json"), *train.parent.parent.glob(f"*/{train.name}")]
    return train, _first([file for file in near if file != train and _without_split(file) == _without_split(train)])


def _first(files: Sequence[Path]) -> Path | None:
    """Return the file for evaluation."""
    by_split = {split_of(file): file for file in files}
    return next((by_split[split] for split in _EVALUATED if split in by_split), None)


def _without_split(file: Path) -> tuple[str, str]:
    before, _, after = "/".join(file.parts[-2:]).lower().rpartition(split_of(file) or "/")
    return before, after
