"""What `shards make` writes: one record per sample, its image not yet read."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from m3i_scale.errors import DataError

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes go into the shard as they are, and the extension of their member."""

READ_FORMATS = (*KEPT_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try: some of its other readers start programs."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members of a shard that are images."""

DECODE_FAULTS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises on images that are cut off, damaged, or no images (its PNG reader raises SyntaxError)."""


class ImageSource(Protocol):
    """Where a record's image comes from. Picklable: it is read in a worker process."""

    def encoded(self) -> tuple[bytes, str]:
        """The encoded image and the extension of its member.

        Raises:
            DataError: the image cannot be read.
        """
        ...


@dataclass(frozen=True)
class Record:
    """A sample on its way into a shard."""

    key: str
    """Unique name; no dot, since the part of a member's name after the first dot is its type."""
    image: ImageSource
    caption: str | None = None
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """The JSON member."""
    split: str | None = None
    """Folder the sample goes to; None leaves it to the split rule."""
    split_by: str | None = None
    """What the split rule hashes, so that samples that belong together stay together; None: the key."""
    size_hint: int = 16_384
    """Bytes of the image, roughly, for planning the number of shards."""


@dataclass(frozen=True)
class FileImage:
    """An image file; its bytes are kept where the format is one that shards hold, else it becomes a PNG."""

    path: Path

    def encoded(self) -> tuple[bytes, str]:
        """See `ImageSource`."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the image: {error.strerror}", where=str(self.path)) from None
        try:
            with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
                kind = str(image.format)
                image.load()
                return (data, KEPT_FORMATS[kind]) if kind in KEPT_FORMATS else (to_png(image), "png")
        except DECODE_FAULTS as error:
            raise DataError(
                f"the image does not decode: {error}",
                where=str(self.path),
                fix="mend or remove the file, or leave such files out with --skip-bad",
            ) from None


@dataclass(frozen=True)
class Unusable:
    """Stands for an image where the record is at fault: `--skip-bad` then treats all faults alike."""

    error: DataError

    def encoded(self) -> tuple[bytes, str]:
        """Raises the fault."""
        raise self.error


def to_png(image: Image.Image) -> bytes:
    """RGB PNG bytes of an image."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
