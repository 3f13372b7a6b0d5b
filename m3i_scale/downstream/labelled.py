"""Find labelled images in a folder, and pack those that are not in shards.

Shards are packed once. They are used again as long as the splits that they were made of have the same files, by name
and size; the contents of files are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_scale.data.index import load_index
from m3i_scale.data.make.cut import ShardOptions
from m3i_scale.data.make.layout import Outline
from m3i_scale.data.make.records import Input, Record
from m3i_scale.data.make.shards import make_shards
from m3i_scale.data.shards import LABELS, MASK_LABELS, expand_shards, labels_beside
from m3i_scale.data.workers import DEFAULT_WORKERS
from m3i_scale.downstream.unpacked import (
    EVALUATED,
    FIX,
    TRAIN,
    TRAINED,
    Unpacked,
    differing_classes,
    image_folders,
    saved_dataset,
)
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.files import read_json

MASKS_FIX = "shards with masks, and mask_labels.json beside them, in DIR/train and DIR/val, or in DIR alone"
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
    """For training."""
    source: Input | None = None
    """What the shards are still to be made of."""

    def pack(self, tell: Callable[[str], None]) -> None:
        """Make the shards where they are not there yet.

        Raises:
            DataError: an image that cannot be used.
        """
        if self.source is None:
            return
        folder = self.train.parent
        tell(f"packing {self.samples} images for training into {folder}, which later starts use again")

        def progress(done: int, total: int) -> None:
            if done % _TOLD_EVERY == 0:
                tell(f"packed {done} of {total} images")

        try:
            make_shards(
                self.source, folder, options=ShardOptions(workers=DEFAULT_WORKERS, vocabulary=0), progress=progress
            )
        except DataError as error:
            others = "m3i-scale shards make imagefolder --input DIR --output /data/shards --skip-bad"
            error.fix = f"repair or remove the file; or pack all others by `{others}`, and give --data /data/shards"
            raise


def find_labelled(folder: Path, packed: Path, cache: Path, *, masks: bool = False) -> Labelled:
    """Find out what kind of data lie in a folder, and check them as far as names tell.

    Args:
        folder: where they lie.
        packed: where shards of what is not in shards lie or will.
        cache: keeps indices of shards that have none beside them.
        masks: whether pixels have classes, and not images.

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
        return _shards(folder, None, cache, file)
    if train is not None and any(train.glob("*.tar")):
        return _shards(train, evaluated, cache, file)
    if masks:
        raise ConfigError("there are no shards", where=f"--data {folder}", fix=fix)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _to_pack(packed, saved_dataset(folder))
    if train is None and evaluated is not None:
        raise ConfigError(f"'{evaluated.name}' has no '{TRAIN}' beside it", where=f"--data {folder}", fix=FIX)
    places = {TRAIN: folder if train is None else train}
    if evaluated is not None:
        places[evaluated.name.lower()] = evaluated
    return _to_pack(packed, image_folders(places))


def _split(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the folder of the first split that is there."""
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def _shards(train: Path, validation: Path | None, cache: Path, file: str) -> Labelled:
    classes = labels_beside(train, file)
    if not classes:
        masks = f"put {file} there, a list of class names in the order of the masks' numbers"
        make = "m3i-scale shards make imagefolder, or make webdataset --labels"
        raise ConfigError(
            f"the shards have no classes: {file} beside them names them",
            where=f"--data {train}",
            fix=make if file == LABELS else masks,
        )
    if validation is not None and (others := labels_beside(validation, file)) != classes:
        raise differing_classes(classes, others or [], str(validation))
    index = load_index(expand_shards(str(train), "--data"), cache)
    return Labelled(train, validation, classes, sum(map(len, index)))


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
                why="files of --data have been added, removed or changed since, by name or size",
                fix="remove them, or give another folder with --shards or output_dir",
            )
        source = None
    return Labelled(packed / TRAIN, validation, found.source.labels, found.samples, source)


class _Marked:
    """Gives the samples of an input, and has the manifest say which files it had.

    Args:
        source: the input.
        digest: of its files.
    """

    def __init__(self, source: Input, digest: str) -> None:
        self._source, self._digest = source, digest

    @property
    def labels(self) -> list[str]:
        """See `Input`."""
        return self._source.labels

    @property
    def mask_labels(self) -> list[str] | None:
        """See `Input`."""
        return self._source.mask_labels

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        return self._source.outlines()

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        return self._source.records()

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return self._source.info() | {_DIGEST: self._digest}
