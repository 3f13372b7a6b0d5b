"""Records: the common form of samples of all inputs; a record's image is read later."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from m3i_scale.data.categories import Categories
from m3i_scale.data.deep_images import ValueRange
from m3i_scale.data.images import (
    MASK,
    READ_FORMATS,
    check_mask,
    encoded_image,
    orientation,
    upright_size,
)
from m3i_scale.data.instances import INSTANCES, check_turned, read_instances
from m3i_scale.errors import DataError
from m3i_scale.shards.existing import annotations_of
from m3i_scale.shards.layout import Outline, hash_of


class LazyContents(Protocol):
    """An image or mask that is created on demand. It must pickle, because a worker process reads it."""

    def read(self) -> bytes:
        """Return the encoded image or mask."""
        ...


Contents = Path | bytes | LazyContents
"""A file, bytes from another container, or generated contents."""


@dataclass(frozen=True)
class Record:
    """A sample to be written to a shard."""

    key: str
    """Unique name without a dot: the part of a file name after the first dot is the file's type."""
    image: Contents
    caption: str | None = None
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """Content of the JSON file."""
    split: str | None = None
    """Folder of the sample; None: assigned by the split rule."""
    group: str | None = None
    """Text that the split rule hashes, to keep related samples in the same split; None: the key."""
    size: int = 16_384
    """Approximate size of the image in bytes, for planning the number of shards."""
    mask: Contents | None = None
    """8-bit PNG of the image's size with the class of every pixel."""
    instances: bytes | None = None
    """Boxes and masks in the format of shards."""
    categories: int | None = None
    """Number of categories of the instances."""
    where: str = ""
    """Names the sample in errors if the image is not a file."""
    fault: DataError | None = None
    """Error found before encoding; `--skip-bad` handles it like other errors."""


class Input(Protocol):
    """Samples in a fixed order, read once as outlines and once as records."""

    @property
    def labels(self) -> list[str]:
        """Return the class names, in index order."""
        ...

    @property
    def mask_labels(self) -> list[str] | None:
        """Return the class names of masks, in index order; None if unknown."""
        ...

    @property
    def categories(self) -> Categories | None:
        """Return the categories of boxes and masks; None if unknown."""
        ...

    def outlines(self) -> Iterator[Outline]:
        """Yield the outlines (names and sizes) of all samples."""
        ...

    def records(self) -> Iterator[Record]:
        """Yield the same samples in the same order, with contents."""
        ...

    def info(self) -> dict[str, Any]:
        """Return facts about the input for manifest.json; called after all samples are read."""
        ...


class InputWrapper:
    """Base class of inputs that change a part of another input.

    Args:
        source: wrapped input.
    """

    def __init__(self, source: Input) -> None:
        self._source = source

    @property
    def labels(self) -> list[str]:
        """See `Input`."""
        return self._source.labels

    @property
    def mask_labels(self) -> list[str] | None:
        """See `Input`."""
        return self._source.mask_labels

    @property
    def categories(self) -> Categories | None:
        """See `Input`."""
        return self._source.categories

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        return self._source.outlines()

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        return self._source.records()

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return self._source.info()


class ListedInput:
    """Input of records that are listed in advance, mostly files; images are read later.

    Records are sorted by a hash of the key, so neighbors in the input are not neighbors in a shard.

    Args:
        records: in any order.
        labels: class names, in index order.
        mask_labels: class names of masks.
        categories: categories of boxes.
        info: source, license, … for manifest.json.

    Raises:
        DataError: a label has no class name.
    """

    def __init__(
        self,
        records: Sequence[Record],
        labels: Sequence[str],
        *,
        mask_labels: Sequence[str] | None = None,
        categories: Categories | None = None,
        **info: Any,
    ) -> None:
        for record in records:
            if record.label is not None and not 0 <= record.label < len(labels):
                what = f"label {record.label} is out of range: there are {len(labels)} labels"
                raise DataError(what, where=record.key)
        self._records = sorted(records, key=lambda record: hash_of("order", record.key))
        self.labels, self._info = list(labels), info
        self.mask_labels = None if mask_labels is None else list(mask_labels)
        self.categories = categories

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        for record in self._records:
            yield Outline(record.key, record.size, record.group, record.split, _place(record, record.image))

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        return iter(self._records)

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return self._info


@dataclass(frozen=True)
class EncodedSample:
    """Encoded files of a sample, and the pixel counts of its mask."""

    members: dict[str, bytes]
    """Image, mask and instances by extension."""
    pixels: Counter[int] = field(default_factory=Counter)
    """Number of mask pixels by value; empty if there is no mask."""


Encoded = EncodedSample | DataError
"""A sample, or the error for the caller to raise or skip."""


@dataclass(frozen=True)
class EncodeTask:
    """Records for a worker to encode."""

    records: Sequence[Record]
    value_range: ValueRange | None
    """See `encoded_image`."""


def encode_all(task: EncodeTask) -> list[Encoded]:
    """Read, check and encode records in a worker process; return an error for each record that fails."""
    return [_encode(record, task.value_range) for record in task.records]


def _encode(record: Record, value_range: ValueRange | None) -> Encoded:
    if record.fault is not None:
        return record.fault
    try:
        image, extension = encoded_image(contents_of(record.image), _place(record, record.image), value_range)
        members, pixels = {extension: image}, Counter[int]()
        if record.mask is not None:
            members[MASK] = contents_of(record.mask)
            pixels = check_mask(members[MASK], image, _place(record, record.mask))
        if record.instances is not None:
            members[INSTANCES] = record.instances
            _check_instances(record.instances, record.categories, image, record.where or _place(record, record.image))
    except DataError as error:
        return error
    return EncodedSample(members, pixels)


def _check_instances(data: bytes, categories: int | None, image: bytes, where: str) -> None:
    with Image.open(io.BytesIO(image), formats=READ_FORMATS) as picture:
        size, lies = picture.size, orientation(picture)
    fix = None
    if size != upright_size(size, lies):
        fix = f"the EXIF orientation of the image, {lies}, turns it; boxes lie as its stored pixels do: save it upright"
    with annotations_of(where, fix):
        read_instances({INSTANCES: data}, categories, size)
    with annotations_of(where, "save the image upright, and annotate it as it is then"):
        check_turned(lies)


def contents_of(contents: Contents) -> bytes:
    """Return the encoded image or mask."""
    if isinstance(contents, bytes):
        return contents
    if not isinstance(contents, Path):
        return contents.read()
    with reading(contents, fix="correct the path; relative ones start at the folder of the table, or at --root"):
        return contents.read_bytes()


def _place(record: Record, contents: Contents) -> str:
    return str(contents) if isinstance(contents, Path) else record.where or record.key


@contextmanager
def reading(path: Path, *kinds: type[Exception], fix: str | None = None) -> Iterator[None]:
    """Convert errors of reading a file or folder into a DataError that names it.

    Args:
        path: file or folder to read.
        kinds: further exception types to convert, besides OSError.
        fix: suggested fix for these errors.
    """
    faults: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except faults as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the file: {why}", where=str(path), fix=fix) from None


def split_name(value: Any, where: str) -> str | None:
    """Return the shard folder for a split name; None if there is no name."""
    if not value:
        return None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(value)):
        raise DataError(f"'{value}' is no name for a split", where=where, fix="letters, digits, - and _ only")
    return str(value)
