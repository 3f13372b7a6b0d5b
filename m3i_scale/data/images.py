"""Images and masks as shards hold them."""

from __future__ import annotations

import io
import re

from PIL import Image, UnidentifiedImageError

from m3i_scale.data.pixels import on_white
from m3i_scale.errors import DataError

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes go into the shard as they are, and the extension of their member."""

READ_FORMATS = (*KEPT_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""Formats that Pillow may try: some of its other readers start programs."""

FILE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
"""Files that may be images; what shards do not hold becomes a PNG."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members of a shard that are images."""

MASK = "mask.png"
"""Extension of the member that names the class of every pixel."""

NO_CLASS = 255
"""Pixels of a mask that count for nothing."""

_CHANNELS = {0: "one grey channel", 2: "three channels", 4: "grey and alpha", 6: "four channels"}
"""Keyed by the colour type in a PNG's header."""

DECODE_FAULTS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors that Pillow raises on images that are cut off, damaged, or no images (its PNG reader raises SyntaxError)."""

_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>")


def fault_text(error: Exception) -> str:
    """Return what Pillow says of bytes, without the address of its buffer: the same bytes give the same text."""
    return _ADDRESS.sub("", str(error))


def encoded_image(data: bytes, where: str) -> tuple[bytes, str]:
    """Return image bytes as a shard holds them, as they are or as a PNG, and the extension of their member.

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


def to_png(image: Image.Image) -> bytes:
    """Return the RGB PNG bytes of an image; what is transparent becomes white."""
    buffer = io.BytesIO()
    on_white(image).save(buffer, "PNG")
    return buffer.getvalue()


def check_mask(data: bytes, image: bytes, where: str) -> None:
    """See whether bytes are the mask of an encoded image: a PNG of its size that decodes, with one byte a pixel.

    Raises:
        DataError: they are not.
    """
    fault = mask_fault(data)
    try:
        with Image.open(io.BytesIO(image), formats=READ_FORMATS) as picture:
            size = picture.size
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as mask:
            mask.load()
            if mask.size != size:
                fault = fault or f"of {mask.size} pixels, its image of {size}"
    except DECODE_FAULTS as error:
        fault = fault or f"damaged: {fault_text(error)}"
    if fault is not None:
        raise DataError(
            f"the mask is {fault}",
            where=where,
            fix="save it at the size of its image, as an eight-bit grey PNG or one with a palette: the class of every "
            "pixel, 255 where there is none",
        )


def mask_fault(data: bytes) -> str | None:
    """Say why PNG bytes are no mask; None where they are one.

    Pillow stretches grey PNGs of 1, 2 or 4 bits to 0 … 255, so their values are no classes any more.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        return "no PNG"
    depth, colour = data[24], data[25]
    if colour == 3 or (colour == 0 and depth == 8):
        return None
    return f"a PNG of {_CHANNELS.get(colour, 'unknown channels')} of {depth} bit"
