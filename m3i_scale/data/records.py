"""What `shards make` writes: one record per sample, its image not yet read."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from m3i_scale.data.pixels import on_white
from m3i_scale.errors import DataError

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes go into the shard as they are, and the extension of their member."""

READ_FORMATS = (*KEPT_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try: some of its other readers start programs."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members of a shard that are images."""

MASK = "mask.png"
"""Extension of the member that names the class of every pixel."""

NO_CLASS = 255
"""Pixels of a mask that count for nothing."""

_CHANNELS = {0: "one grey channel", 2: "three channels", 4: "grey and alpha", 6: "four channels"}
"""By the colour type in a PNG's header."""

DECODE_FAULTS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises on images that are cut off, damaged, or no images (its PNG reader raises SyntaxError)."""

_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>")


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
        return encoded_image(data, str(self.path))


@dataclass(frozen=True)
class BytesImage:
    """An encoded image that came out of another container."""

    data: bytes
    where: str
    """Names it in errors."""

    def encoded(self) -> tuple[bytes, str]:
        """See `ImageSource`."""
        return encoded_image(self.data, self.where)


@dataclass(frozen=True)
class FileMask:
    """A PNG with one byte a pixel, kept as it is."""

    path: Path

    def mask(self) -> bytes:
        """See `MaskSource`."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the mask: {error.strerror}",
                where=str(self.path),
                fix="correct the path; relative ones start where those of the images do",
            ) from None
        return checked_mask(data, str(self.path))


@dataclass(frozen=True)
class BytesMask:
    """A mask that came out of another container."""

    data: bytes
    where: str

    def mask(self) -> bytes:
        """See `MaskSource`."""
        return checked_mask(self.data, self.where)


@dataclass(frozen=True)
class Unusable:
    """Stands for an image where the record is at fault: `--skip-bad` then treats all faults alike."""

    error: DataError

    def encoded(self) -> tuple[bytes, str]:
        """Raises the fault."""
        raise self.error


def fault_text(error: Exception) -> str:
    """What Pillow says of bytes, without the address of the buffer it read: the same bytes give the same text."""
    return _ADDRESS.sub("", str(error))


def encoded_image(data: bytes, where: str) -> tuple[bytes, str]:
    """Image bytes as a shard holds them, and the extension of their member: as they are, or as a PNG.

    Raises:
        DataError: they do not decode.
    """
    try:
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
            kind = str(image.format)
            image.load()
            return (data, KEPT_FORMATS[kind]) if kind in KEPT_FORMATS else (to_png(image), "png")
    except DECODE_FAULTS as error:
        raise DataError(
            f"the image does not decode: {fault_text(error)}",
            where=where,
            fix="mend or remove the file, or leave such files out with --skip-bad",
        ) from None


def checked_mask(data: bytes, where: str) -> bytes:
    """The same bytes.

    Raises:
        DataError: they are no mask.
    """
    fix = "save it as an eight-bit grey PNG or one with a palette: the class of every pixel, 255 where there is none"
    fault = mask_fault(data)
    if fault:
        raise DataError(f"the mask is {fault}", where=where, fix=fix)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
    except DECODE_FAULTS:
        raise DataError("the mask does not decode", where=where, fix=fix) from None
    return data


def mask_fault(data: bytes) -> str | None:
    """Why PNG bytes are no mask; None where they are one.

    Pillow stretches grey PNGs of 1, 2 or 4 bits to 0 … 255, so their values are no classes any more.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        return "no PNG"
    depth, colour = data[24], data[25]
    if colour == 3 or (colour == 0 and depth == 8):
        return None
    return f"a PNG of {_CHANNELS.get(colour, 'unknown channels')} of {depth} bit"


def to_png(image: Image.Image) -> bytes:
    """RGB PNG bytes of an image; what is transparent becomes white."""
    buffer = io.BytesIO()
    on_white(image).save(buffer, "PNG")
    return buffer.getvalue()


def split_name(value: Any, where: str) -> str | None:
    """Return the folder of shards that a name of a split stands for; None where there is no name.

    Raises:
        DataError: it cannot be one.
    """
    if not value:
        return None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(value)):
        raise DataError(f"'{value}' is no name for a split", where=where, fix="letters, digits, - and _ only")
    return str(value)
