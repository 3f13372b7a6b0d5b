"""Records, the common form of the samples of all inputs, and their encoding as files of a shard."""

from __future__ import annotations

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from m3i_scale.data.categories import Categories
from m3i_scale.data.images import MASK, READ_FORMATS, orientation, upright_size
from m3i_scale.data.instances import INSTANCES, check_turned, read_instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.shards.encode_image import ValueRange, check_mask, encoded_image

Contents = Path | bytes | Callable[[], bytes]
"""A file, bytes from another container, or a function that creates them. It must pickle: a worker process calls it."""


@dataclass(frozen=True)
class Record:
    """A sample to be written to a shard."""

    key: str
    """Unique name without a dot: the part of a file name after the first dot is the file's type."""
    image: Contents = b""
    """Empty in an outline."""
    caption: str | None = None
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """Content of the JSON file."""
    split: str | None = None
    """Folder of the sample; None: assigned by the split rule."""
    group: str | None = None
    """Text that the split rule hashes, to keep related samples in the same split; None: the key."""
    size: int = 16_384
    """Approximate size in bytes, for planning the number of shards."""
    mask: Contents | None = None
    """8-bit PNG of the image's size with the class of every pixel."""
    instances: bytes | None = None
    """Boxes and masks in the format of shards."""
    categories: int | None = None
    """Number of categories of the instances."""
    where: str = ""
    """Names the sample in errors if the image is not a file."""
    problem: DataError | None = None
    """Error found before encoding; `--skip-bad` handles it like other errors."""

    def location(self, contents: Contents | None) -> str:
        """Return the name of the image or mask in errors."""
        return str(contents) if isinstance(contents, Path) else self.where or self.key

    def files(self, encoded: dict[str, bytes]) -> dict[str, bytes]:
        """Add caption, label and JSON file to the encoded files, by extension, following webdataset's conventions."""
        files = dict(encoded)
        if self.caption is not None:
            files["txt"] = self.caption.encode("utf-8")
        if self.label is not None:
            files["cls"] = str(self.label).encode("ascii")
        files["json"] = json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode(errors="backslashreplace")
        return files


class Input(ABC):
    """Samples in a fixed order, read once as outlines and once as records.

    Args:
        labels: class names, in index order.
        mask_labels: class names of masks, in index order; None: unknown.
        categories: categories of boxes and masks; None: unknown.
        info: source, license, … for manifest.json.
    """

    def __init__(
        self,
        labels: Sequence[str] = (),
        *,
        mask_labels: Sequence[str] | None = None,
        categories: Categories | None = None,
        **info: Any,
    ) -> None:
        self.labels, self.categories, self._info = list(labels), categories, info
        self.mask_labels = None if mask_labels is None else list(mask_labels)

    def outlines(self) -> Iterator[Record]:
        """Yield all samples, at least with key, size, group and split, for the layout of the shards."""
        return self.records()

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield the same samples in the same order, with contents."""

    def info(self) -> dict[str, Any]:
        """Return facts about the input for manifest.json; called after all samples are read."""
        return self._info


class ListedInput(Input):
    """Input of records that are listed in advance, mostly files; images are read later.

    Records are sorted by a hash of the key, so neighbors in the input are not neighbors in a shard. A label without a
    class name is an error.
    """

    def __init__(self, records: Sequence[Record], labels: Sequence[str], **about: Any) -> None:
        super().__init__(labels, **about)
        for record in records:
            if record.label is not None and not 0 <= record.label < len(labels):
                what = f"the label must be from 0 to {len(labels) - 1}, got {record.label}"
                raise DataError(what, where=record.key, fix="correct the label, or add the missing class names")
        self._records = sorted(records, key=lambda record: hash_of("order", record.key))

    @override
    def records(self) -> Iterator[Record]:
        return iter(self._records)


Encoded = tuple[dict[str, bytes], Counter[int]] | DataError
"""Image, mask and instances by extension, and the pixels of the mask by value; or the error."""


def encode_all(records: Sequence[Record], value_range: ValueRange | None) -> list[Encoded]:
    """Read, check and encode records in a worker process; return an error for each record that fails. `value_range` as
    in `encoded_image`."""
    return [_encode(record, value_range) for record in records]


def _encode(record: Record, value_range: ValueRange | None) -> Encoded:
    if record.problem is not None:
        return record.problem
    try:
        where = record.location(record.image)
        image, extension = encoded_image(_read(record.image), where, value_range)
        files, pixels = {extension: image}, Counter[int]()
        if record.mask is not None:
            files[MASK] = _read(record.mask)
            pixels = check_mask(files[MASK], image, record.location(record.mask))
        if record.instances is not None:
            files[INSTANCES] = record.instances
            _check_instances(record.instances, record.categories, image, record.where or where)
    except DataError as error:
        return error
    return files, pixels


def _check_instances(data: bytes, categories: int | None, image: bytes, where: str) -> None:
    with Image.open(io.BytesIO(image), formats=READ_FORMATS) as picture:
        size, lies = picture.size, orientation(picture)
    fix = None
    if size != upright_size(size, lies):
        fix = f"save the image upright: its EXIF orientation, {lies}, rotates it, but boxes refer to the stored pixels"
    with annotations_of(where, fix):
        read_instances({INSTANCES: data}, categories, size)
    with annotations_of(where, "save the image upright, and annotate it as it is then"):
        check_turned(lies)


def _read(contents: Contents) -> bytes:
    if isinstance(contents, bytes):
        return contents
    if not isinstance(contents, Path):
        return contents()
    with reading(contents, fix="correct the path; relative ones start at the folder of the table, or at --root"):
        return contents.read_bytes()


@contextmanager
def reading(path: Path, *kinds: type[Exception], fix: str | None = None) -> Iterator[None]:
    """Convert errors of reading a file or folder, OSError and `kinds`, into a DataError that names it."""
    expected: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except expected as error:
        why = getattr(error, "strerror", None) or error
        fix = fix or ("check the path" if isinstance(error, FileNotFoundError) else None)
        raise DataError(f"cannot read the file: {why}", where=str(path), fix=fix) from None


@contextmanager
def annotations_of(where: str, fix: str | None = None) -> Iterator[None]:
    """Convert annotation errors of a sample into a DataError that names the sample."""
    try:
        yield
    except BadSampleError as bad:
        raise DataError(f"{bad.reason}: {bad.detail}", where=where, fix=fix) from None


def split_name(value: Any, where: str) -> str | None:
    """Return the shard folder for a split name; None if there is no name."""
    if not value:
        return None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(value)):
        raise DataError(
            f"a split name must have letters, digits, - and _ only, got '{value}'", where=where, fix="rename the split"
        )
    return str(value)


def read_class_names(path: Path) -> list[str]:
    """Read class names from a JSON list, or from a text file with one name per line."""
    try:
        text = path.read_text(encoding="utf-8")
        labels = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the labels: {error}",
            where=str(path),
            fix="check the path: it must be a UTF-8 file with a JSON list, or one name per line",
        ) from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(
            "the labels must be a list of names", where=str(path), fix="write a JSON list, or one name per line"
        )
    if len(set(labels)) < len(labels):
        raise ConfigError("duplicate label", where=str(path), fix="remove one of the two")
    return labels


def hash_of(purpose: str, key: str) -> bytes:
    """Return the hash for ordering and splitting samples, independent of the machine and of other samples."""
    return hashlib.sha256(f"{purpose}/{key}".encode()).digest()
