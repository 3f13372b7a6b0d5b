"""Tars or folders of files downloaded by img2dataset as input of `make`, compared with its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_scale.data.categories import Categories
from m3i_scale.data.images import FILE_EXTENSIONS
from m3i_scale.data.make.arrow import read_rows
from m3i_scale.data.make.existing import Origin, field_of
from m3i_scale.data.make.layout import Outline
from m3i_scale.data.make.records import Record, reading
from m3i_scale.data.make.wds import ShardInput, record_of
from m3i_scale.errors import DataError

SUCCESS = "success"


@dataclass
class FileInput:
    """Reader of img2dataset's `files` output: a folder per shard; an image, a text and a JSON file per sample."""

    folders: Sequence[Path]
    caption_field: str | None
    group: str | None

    def outlines(self) -> Iterator[Outline]:
        """See `Input`; the place is the folder."""
        for image in self._images():
            group = None
            if self.group is not None:
                beside = image.with_suffix(".json")
                group = str(field_of(_bytes(beside) if beside.is_file() else None, self.group, str(image)))
            with reading(image):
                size = image.stat().st_size
            yield Outline(image.stem, size, group, place=str(image.parent))

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        for image in self._images():
            members = {image.suffix[1:].lower(): _bytes(image)}
            for extension in ("txt", "json", "cls"):
                beside = image.with_suffix(f".{extension}")
                if beside.is_file():
                    members[extension] = _bytes(beside)
            yield record_of(image.stem, members, str(image), None, self.caption_field)

    def _images(self) -> Iterator[Path]:
        for folder in self.folders:
            with reading(folder):
                paths = sorted(path for path in folder.iterdir() if path.suffix[1:].lower() in FILE_EXTENSIONS)
            yield from paths


@dataclass
class Downloaded:
    """Download of img2dataset, checked against the number of samples in its tables."""

    samples: ShardInput | FileInput
    expected: Mapping[Path, int]
    """Number of samples by shard."""
    statuses: Counter[str]
    """Number of downloads by status."""
    labels: list[str]
    """Not available in this input."""
    mask_labels: list[str] | None = None
    """Not available in this input."""
    categories: Categories | None = None
    """Not available in this input."""

    def outlines(self) -> Iterator[Outline]:
        """See `Input`; raises at the end if the number of samples of a shard differs from its table."""
        counts: Counter[Path] = Counter()
        for outline in self.samples.outlines():
            counts[Path(outline.place)] += 1
            yield outline
        for shard, successes in self.expected.items():
            if counts[shard] != successes:
                raise DataError(
                    f"img2dataset's table counts {successes} images, there are {counts[shard]}",
                    where=str(shard),
                    fix="copy the shard again, or remove it and its table and run img2dataset again",
                )

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        return self.samples.records()

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return {"source": "img2dataset", "statuses": dict(self.statuses)}


def img2dataset_input(
    folder: Path, *, caption_field: str | None, group: str | None, workers: int, skip_incomplete: bool
) -> Downloaded:
    """Open an output folder of img2dataset in `webdataset` or `files` format.

    Its tables (`00000.parquet`) list the expected samples; a shard without a table is incomplete.

    Args:
        folder: img2dataset's output_folder.
        caption_field: caption column; None: the .txt files, which img2dataset writes from it.
        group: column whose value keeps samples in the same split.
        workers: processes that read headers.
        skip_incomplete: skip shards that img2dataset did not finish.
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
        if table.is_file():
            of_shard = _statuses(table)
            statuses += of_shard
            expected[path] = of_shard[SUCCESS]
        elif not skip_incomplete:
            raise DataError(
                "img2dataset did not finish a shard: it has no table",
                where=str(table),
                fix="run img2dataset again (it goes on where it stopped), or leave such shards out: --skip-incomplete",
            )
    samples: ShardInput | FileInput = FileInput(list(expected), caption_field, group)
    if tars:
        origins = [Origin(path, group=group) for path in expected]
        samples = ShardInput(origins, None, caption_field, workers)
    return Downloaded(samples, expected, statuses, [])


def _statuses(table: Path) -> Counter[str]:
    try:
        return Counter(str(row["status"]) for row in read_rows(table, ["status"]))
    except KeyError:
        raise DataError("img2dataset's table has no column 'status'", where=str(table)) from None


def _bytes(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()
