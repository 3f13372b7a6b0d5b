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

MASK = "mask.png"
"""Extension of the member that names the class of every pixel."""

MASK_MODES = ("L", "P")
"""Modes of a mask: eight bits a pixel, which are the class (in a palette, the index)."""

NO_CLASS = 255
"""Pixels of a mask that count for nothing."""

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


class MaskSource(Protocol):
    """Where the class of every pixel comes from. Picklable."""

    def mask(self) -> bytes:
        """An eight-bit PNG of the image's size: class by pixel, `NO_CLASS` where there is none.

        Raises:
            DataError: the mask cannot be read.
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
    mask: MaskSource | None = None
    """Classes by pixel, for dense probes."""


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
class FileMask:
    """A PNG with one byte a pixel, kept as it is."""

    path: Path

    def mask(self) -> bytes:
        """See `MaskSource`."""
        try:
            data = self.path.read_bytes()
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                mode = image.mode
                image.load()
        except OSError as error:
            why = error.strerror or str(error)
            raise DataError(f"cannot read the mask: {why}", where=str(self.path)) from None
        except DECODE_FAULTS as error:
            raise DataError(f"the mask does not decode: {error}", where=str(self.path)) from None
        if mode not in MASK_MODES:
            raise DataError(
                f"the mask has mode {mode}",
                where=str(self.path),
                fix="save it as a PNG with one byte a pixel (mode L or P): the class, 255 where there is none",
            )
        return data


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
