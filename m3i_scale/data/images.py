"""Validation of encoded images and masks for shards, and conversion of images of any mode to upright RGB."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections import Counter
from collections.abc import Sequence

from PIL import ExifTags, Image, UnidentifiedImageError

from m3i_scale.data.deep_images import DEEP_MODES, ValueRange, check_header, check_values, eight_bits
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import DataError

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards store unchanged, with their file extensions."""

READ_FORMATS = (*KEPT_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""Formats that Pillow may try: some of its other readers start external programs."""

FILE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
"""Extensions of image files; formats that shards do not store are converted to PNG."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of image files in a shard."""

MASK = "mask.png"
"""Extension of the segmentation mask: the class of every pixel."""

_CHANNELS = {0: "one grey channel", 2: "three channels", 4: "grey and alpha", 6: "four channels"}
"""Keyed by the color type in a PNG header."""

DECODE_FAULTS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors that Pillow raises on truncated or damaged images and on other data (its PNG reader raises SyntaxError)."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes an image upright, by the orientation in its EXIF data (EXIF 2.32, tag 274)."""
_SIDEWAYS = (5, 6, 7, 8)
_TOLD_IN = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Metadata keys in which Pillow finds an orientation. Most images have none, so one lookup is enough."""
_DAMAGED = (SyntaxError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, struct.error)
"""Errors that Pillow raises on damaged EXIF data."""
_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>")


def fault_text(error: Exception) -> str:
    """Return Pillow's error message without its buffer address, so that the same bytes give the same text."""
    return _ADDRESS.sub("", str(error))


def open_any_size(data: bytes, formats: Sequence[str] = READ_FORMATS) -> Image.Image:
    """Open an encoded image of any size; read its header but no pixels. Raise one of `DECODE_FAULTS` if it is not an
    image."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # global in Pillow; callers check their own limits
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. damaged EXIF data, which does not affect the pixels
            return Image.open(io.BytesIO(data), formats=formats)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def encoded_image(data: bytes, where: str, value_range: ValueRange | None = None) -> tuple[bytes, str]:
    """Return image bytes for a shard, unchanged or converted to PNG, and their file extension.

    `value_range` is the intensity window for images with more than 8 bits; other images are then an error. `where`
    names the file in errors.
    """
    try:
        with open_any_size(data) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"the image is too large: {image.width} × {image.height} pixels, at most {MAX_IMAGE_PIXELS}",
                    where=where,
                    fix="resize or crop it, or skip such images with --skip-bad",
                )
            check_header(image, value_range, where)
            image.load()
            check_values(image, where)
            kind = str(image.format)
            as_it_is = kind in KEPT_FORMATS and value_range is None
            return (data, KEPT_FORMATS[kind]) if as_it_is else (to_png(image, value_range), "png")
    except DECODE_FAULTS as error:
        raise DataError(
            f"the image does not decode: {fault_text(error)}",
            where=where,
            fix="repair or remove the file, or skip such files with --skip-bad",
        ) from None


def to_png(image: Image.Image, value_range: ValueRange | None = None) -> bytes:
    """Encode an image as an RGB PNG; see `on_white`."""
    buffer = io.BytesIO()
    on_white(image, value_range).save(buffer, "PNG")
    return buffer.getvalue()


def check_mask(data: bytes, image: bytes, where: str) -> Counter[int]:
    """Check that bytes are the mask of an encoded image: a valid PNG of its size with one byte per pixel.

    Return the number of pixels by value.
    """
    fault, counts = mask_fault(data), Counter[int]()
    try:
        with Image.open(io.BytesIO(image), formats=READ_FORMATS) as picture:
            size, lies = picture.size, orientation(picture)
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as mask:
            counts = pixel_counts(mask)
            if mask.size != size:
                upright_only = mask.size == upright_size(size, lies)
                turned = f", which its EXIF orientation {lies} rotates" if upright_only else ""
                fault = fault or f"of size {mask.size}, but its image is {size}{turned}"
    except DECODE_FAULTS as error:
        fault = fault or f"damaged: {fault_text(error)}"
    if fault is not None:
        raise DataError(
            f"the mask is {fault}",
            where=where,
            fix="save it at the size of its image, as an 8-bit gray or palette PNG with the class of every pixel; 255 "
            "is ignored",
        )
    return counts


def pixel_counts(mask: Image.Image) -> Counter[int]:
    """Count the pixels of a mask by value; of a palette PNG, by palette index."""
    return Counter({value: count for value, count in enumerate(mask.histogram()) if count})


def mask_fault(data: bytes) -> str | None:
    """Return the reason why bytes are not a valid mask PNG, or None if they are valid.

    Pillow stretches gray PNGs of 1, 2 or 4 bits to 0 … 255, which destroys class indices.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        return "no PNG"
    depth, colour = data[24], data[25]
    if colour == 3 or (colour == 0 and depth == 8):
        return None
    return f"a PNG of {_CHANNELS.get(colour, 'unknown channels')} of {depth} bit"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 … 8) of an opened, not yet decoded image; 1 (upright) if EXIF is damaged."""
    if _TOLD_IN.isdisjoint(image.info):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged data
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(image: Image.Image, lies: int) -> Image.Image:
    """Rotate or flip a decoded image according to its `orientation`."""
    return image.transpose(_TURNS[lies]) if lies in _TURNS else image


def upright_size(size: tuple[int, int], lies: int) -> tuple[int, int]:
    """Return width and height of an image after `upright`."""
    return (size[1], size[0]) if lies in _SIDEWAYS else size


def on_white(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Convert an opened image to RGB on white, as exported image processors do: a plain conversion drops transparency.

    A gray image with more than 8 bits may need a `value_range`; see `eight_bits`.
    """
    if image.mode in DEEP_MODES:
        return eight_bits(image, value_range).convert("RGB")
    if not image.has_transparency_data:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
