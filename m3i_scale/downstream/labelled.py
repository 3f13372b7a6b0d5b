"""Find labelled images in a folder: shards, a tree of images by class, or a data set of Hugging Face; pack the latter.

Shards are packed once. They are used again as long as the splits that they were made of have the same files, by name
and size; the contents of files are not compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3i_scale.data.images import FILE_EXTENSIONS
from m3i_scale.data.index import load_index
from m3i_scale.data.make.arrow import NONE, Columns, find_roles, read_rows, schema_of
from m3i_scale.data.make.cut import ShardOptions
from m3i_scale.data.make.folder import imagefolder_input
from m3i_scale.data.make.huggingface import TableInput, find_files, huggingface_input
from m3i_scale.data.make.layout import Outline
from m3i_scale.data.make.records import Input, ListedInput, Record
from m3i_scale.data.make.shards import make_shards
from m3i_scale.data.shards import expand_shards, labels_beside
from m3i_scale.data.workers import DEFAULT_WORKERS
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.files import read_json
from m3i_scale.text import listed

TRAIN = "train"
TRAINED = (TRAIN, "training")
EVALUATED = ("val", "validation", "valid", "dev", "test", "testing", "eval")
"""Names of splits, in any case of letters; the first that is there is trained, or evaluated, on."""
_FIX = "DIR/train/CLASS/… and DIR/val/CLASS/…, or DIR/CLASS/… without evaluation; shards; or a folder of save_to_disk"
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


def find_labelled(folder: Path, packed: Path, cache: Path) -> Labelled:
    """Find out what kind of data lie in a folder, and check them as far as names tell.

    Args:
        folder: where they lie.
        packed: where shards of what is not in shards lie or will.
        cache: keeps indices of shards that have none beside them.

    Raises:
        ConfigError: neither kind, a class without images for training, classes that differ between splits, or shards
            at `packed` of other data.
        DataError: shards or a saved data set that are damaged.
    """
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=f"--data {folder}", fix=_FIX)
    train, evaluated = _split(folder, TRAINED), _split(folder, EVALUATED)
    if train is None and any(folder.glob("*.tar")):
        return _shards(folder, None, cache)
    if train is not None and any(train.glob("*.tar")):
        return _shards(train, evaluated, cache)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _to_pack(packed, _saved_dataset(folder))
    if train is None and evaluated is not None:
        raise ConfigError(f"'{evaluated.name}' has no '{TRAIN}' beside it", where=f"--data {folder}", fix=_FIX)
    places = {TRAIN: folder if train is None else train}
    if evaluated is not None:
        places[evaluated.name.lower()] = evaluated
    return _to_pack(packed, _image_folders(places))


def _split(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the folder of the first split that is there."""
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def _shards(train: Path, validation: Path | None, cache: Path) -> Labelled:
    classes = labels_beside(train)
    if not classes:
        raise ConfigError(
            "the shards have no classes: labels.json beside them names them",
            where=f"--data {train}",
            fix="m3i-scale shards make imagefolder, or make webdataset --labels",
        )
    if validation is not None and (others := labels_beside(validation)) != classes:
        raise _differing(classes, others or [], str(validation))
    index = load_index(expand_shards(str(train), "--data"), cache)
    return Labelled(train, validation, classes, sum(map(len, index)))


@dataclass(frozen=True)
class _Found:
    """Holds what is to be packed."""

    source: Input
    splits: list[str]
    samples: int
    digest: str


def _to_pack(packed: Path, found: _Found) -> Labelled:
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


def _image_folders(places: dict[str, Path]) -> _Found:
    records: list[Record] = []
    classes: dict[str, list[str]] = {}
    for split, place in places.items():
        shown = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        names = [path.name for path in shown if path.is_dir()]
        loose = next((path for path in shown if path.suffix.lower()[1:] in FILE_EXTENSIONS), None)
        if not names or loose is not None:
            what = "there are no folders of classes" if loose is None else "an image lies in no folder of a class"
            raise ConfigError(what, where=f"--data {loose or place}", fix=_FIX)
        _refuse_names(place, names)
        of_split = imagefolder_input(place, "none", "classes")
        if split == TRAIN:
            with_images = {*of_split.labels}
            _refuse_empty([name for name in names if name not in with_images], str(place))
        classes[split] = of_split.labels
        records += [replace(record, split=split, key=f"{split}_{record.key}") for record in of_split.records()]
    for split, labels in classes.items():
        if labels != classes[TRAIN]:
            raise _differing(classes[TRAIN], labels, str(places[split]))
    files = ((f"{record.split}/{record.meta['path']}", record.size) for record in records)
    samples = sum(record.split == TRAIN for record in records)
    images = ListedInput(records, classes[TRAIN], source="imagefolder")
    return _Found(images, list(places), samples, _digest(files))


def _refuse_names(place: Path, names: list[str]) -> None:
    links = [name for name in names if (place / name).is_symlink()]
    if links:
        raise ConfigError(
            f"folders of classes are links, which are not followed: {listed(links, 4)}",
            where=f"--data {place}",
            fix="give the folders themselves",
        )
    odd = [name for name in names if name != name.encode(errors="replace").decode()]
    if odd:
        raise ConfigError(
            f"the name of a class is no UTF-8: {odd[0].encode(errors='backslashreplace').decode()}",
            where=f"--data {place}",
            fix="rename the folder",
        )


def _saved_dataset(folder: Path) -> _Found:
    found = find_files(folder)
    there = {file.split for file in found}
    if there == {None}:
        found, splits = [replace(file, split=TRAIN) for file in found], [TRAIN]
    elif TRAIN in there:
        splits = [TRAIN, *[name for name in EVALUATED if name in there][:1]]
    else:
        names = ", ".join(sorted(map(str, there)))
        raise ConfigError(f"the data set has no split '{TRAIN}'", where=f"--data {folder}: {names}", fix=_FIX)
    files = [file for file in found if file.split in splits]
    try:
        table = huggingface_input(folder, Columns(caption=NONE))
    except ConfigError as error:
        error.fix = "m3i-scale shards make huggingface, which can be told the columns; then --data their folder"
        raise
    label = table.roles.label
    if label is None:
        raise ConfigError(
            "the data set has no column of classes",
            where=f"--data {folder}",
            fix="cast its labels to ClassLabel: datasets.class_encode_column",
        )
    for file in files:
        labels = _names_in(schema_of(file.path), label)
        if labels != table.labels:
            raise _differing(table.labels, labels, str(file.path))
    counts: Counter[Any] = Counter()
    for file in files:
        if file.split == TRAIN:
            counts.update(row[label] for row in read_rows(file.path, [label]))
    _refuse_empty([name for number, name in enumerate(table.labels) if not counts[number]], f"{folder}, split {TRAIN}")
    digest = _digest((f"{file.split}/{file.path.name}", file.path.stat().st_size) for file in files)
    source = TableInput(files, table.roles, table.labels)
    return _Found(source, splits, sum(counts.values()), digest)


def _names_in(schema: Any, label: str) -> list[str]:
    return find_roles(schema, Columns(caption=NONE, label=label), "")[1]


def _digest(files: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for name, size in sorted(files):
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _refuse_empty(names: list[str], where: str) -> None:
    if names:
        raise ConfigError(
            f"{len(names)} classes have no images for training: {listed(names, 4)}",
            where=f"--data {where}",
            why="the head would never be right about them",
            fix="add images, or remove the classes",
        )


def _differing(train: list[str], others: list[str], where: str) -> ConfigError:
    missing, extra = sorted(set(train) - set(others)), sorted(set(others) - set(train))
    parts = [f"{what} {listed(names, 4)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
    return ConfigError(
        "the classes to evaluate are not those to train",
        where=f"--data {where}",
        why=f"it {' and '.join(parts) or 'has them in another order'}",
        fix="the same classes in both",
    )
