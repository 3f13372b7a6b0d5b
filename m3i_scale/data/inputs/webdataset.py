"""Existing WebDataset shards, and the folders of img2dataset, as input of `make`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from m3i_scale.data.inputs.members import EXTENSIONS, Reading, record_of
from m3i_scale.data.records import Record
from m3i_scale.data.shards import local_shards
from m3i_scale.data.tools.layout import Outline
from m3i_scale.data.tools.origin import Origin, common_labels, contents, field_of, outlines
from m3i_scale.data.tools.tar import printable
from m3i_scale.errors import DataError

SUCCESS = "success"


@dataclass
class ShardInput:
    """Samples of tars."""

    origins: Sequence[Origin]
    reading: Reading
    workers: int = 1
    source: str = "webdataset"
    statuses: Counter[str] = field(default_factory=Counter)
    expected: Mapping[Path, int] = field(default_factory=dict)
    """How many samples there must be, by shard."""

    @property
    def labels(self) -> list[str]:
        """Class names."""
        return list(self.reading.labels or ())

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        return _counted(((Path(item.place), item) for item in outlines(self.origins, self.workers)), self.expected)

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        for origin, key, members in contents(self.origins):
            yield record_of(key, members, f"{origin.path}: key '{printable(key)}'", self.reading)

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return {"source": self.source, **({"statuses": dict(self.statuses)} if self.statuses else {})}


@dataclass
class FileInput:
    """img2dataset's `files` output: a folder per shard, with an image, a text and a JSON file per sample."""

    folders: Sequence[Path]
    reading: Reading
    group: str | None = None
    statuses: Counter[str] = field(default_factory=Counter)
    expected: Mapping[Path, int] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Class names."""
        return list(self.reading.labels or ())

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        return _counted(((Path(item.place).parent, item) for item in self._outlines()), self.expected)

    def _outlines(self) -> Iterator[Outline]:
        for image in self._images():
            group = None
            if self.group is not None:
                beside = image.with_suffix(".json")
                data = _bytes(beside) if beside.is_file() else None
                group = str(field_of(data, self.group, str(image)))
            yield Outline(image.stem, image.stat().st_size, group, place=str(image))

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        for image in self._images():
            members = {image.suffix[1:].lower(): _bytes(image)}
            for extension in ("txt", "json", "cls"):
                beside = image.with_suffix(f".{extension}")
                if beside.is_file():
                    members[extension] = _bytes(beside)
            yield record_of(image.stem, members, str(image), self.reading)

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return {"source": "img2dataset", "statuses": dict(self.statuses)}

    def _images(self) -> Iterator[Path]:
        for folder in self.folders:
            yield from sorted(path for path in folder.iterdir() if path.suffix[1:].lower() in EXTENSIONS)


def webdataset_input(
    source: str, *, labels: Sequence[str] | None, caption_field: str | None, group: str | None, workers: int
) -> ShardInput:
    """Existing shards.

    Args:
        source: a folder, a brace pattern or one tar.
        labels: class names; None: labels.json beside the shards.
        caption_field: field of the json members that holds the caption; None: the txt members.
        group: samples with the same value of this field of their json members go to the same split.
        workers: processes that read headers.

    Raises:
        DataError: no shards there.
    """
    names = labels if labels is not None else common_labels(source)
    origins = [Origin(path, group=group) for path in local_shards(source)]
    return ShardInput(origins, Reading(names, caption_field), workers)


def img2dataset_input(
    folder: Path, *, caption_field: str | None, group: str | None, workers: int, skip_incomplete: bool
) -> ShardInput | FileInput:
    """A folder that img2dataset wrote, as `webdataset` or as `files`.

    Its tables (`00000.parquet`) say which samples there must be: a shard without one was cut short.

    Args:
        folder: img2dataset's output_folder.
        caption_field: column that holds the caption; None: the .txt files, which img2dataset writes from it.
        group: samples with the same value in this column go to the same split.
        workers: processes that read headers.
        skip_incomplete: leave out shards that img2dataset did not finish.

    Raises:
        DataError: no such folder, a shard without a table. One that lacks samples is told when it is read.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder))
    tars = sorted(folder.glob("*.tar"))
    folders = [] if tars else sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
    if not tars and not folders:
        raise DataError(
            "the folder holds neither tars nor numbered folders",
            where=str(folder),
            fix="give img2dataset's output_folder, written with output_format webdataset or files",
        )
    expected: dict[Path, int] = {}
    statuses = Counter[str]()
    for path in tars or folders:
        table = folder / f"{path.stem}.parquet"
        if not table.is_file():
            if skip_incomplete:
                continue
            raise DataError(
                "img2dataset did not finish a shard: it has no table",
                where=str(table),
                fix="run img2dataset again (it goes on where it stopped), or leave such shards out: --skip-incomplete",
            )
        found = _statuses(table)
        statuses += found
        expected[path] = found[SUCCESS]
    reading = Reading(None, caption_field)
    if folders:
        return FileInput(list(expected), reading, group, statuses, expected)
    origins = [Origin(path, group=group) for path in expected]
    return ShardInput(origins, reading, workers, "img2dataset", statuses, expected)


def _statuses(table: Path) -> Counter[str]:
    read: Any = pyarrow.parquet.read_table
    try:
        column = read(table, columns=["status"])["status"]
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read img2dataset's table: {error}", where=str(table)) from None
    return Counter(str(value) for value in column.to_pylist())


def _counted(found: Iterable[tuple[Path, Outline]], expected: Mapping[Path, int]) -> Iterator[Outline]:
    """The outlines; at the end it is known that every shard has as many as its table says."""
    counts: Counter[Path] = Counter()
    for shard, outline in found:
        counts[shard] += 1
        yield outline
    for shard, successes in expected.items():
        if counts[shard] != successes:
            raise DataError(
                f"img2dataset's table counts {successes} images, there are {counts[shard]}",
                where=str(shard),
                fix="copy the shard again, or remove it and its table and run img2dataset again",
            )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from None
