"""Reading of encoded images and masks, and conversion of images of any mode to upright RGB with 8 bits."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards store unchanged, with their file extensions."""

READ_FORMATS = (*KEPT_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""Formats that Pillow may try: some of its other readers start external programs."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of image files in a shard."""

MASK = "mask.png"
"""Extension of the segmentation mask: the class of every pixel."""

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of gray images with more than 8 bits."""

_SIXTEEN_AS_I = ("PNG", "PPM")
"""Formats whose 16-bit gray images Pillow reads as mode I; it stretches a PPM of fewer bits to 16."""

_BITS_TAG = 258
"""TIFF tag for the number of bits."""

_CHANNELS = {0: "one gray channel", 2: "three channels", 4: "gray and alpha", 6: "four channels"}
"""Keyed by the color type in a PNG header."""

DECODE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
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
_EXIF_KEYS = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Metadata keys in which Pillow finds an orientation. Most images have none, so one lookup is enough."""
_DAMAGED = (SyntaxError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, struct.error)
"""Errors that Pillow raises on damaged EXIF data."""
_PILLOW_LIMIT = threading.Lock()
# Damaged EXIF data, for example, does not affect the pixels. Changing the filters for every image instead would make
# Python repeat all warnings of the process that it shows only once.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>")


def error_text(error: Exception) -> str:
    """Return Pillow's error message without its buffer address, so that the same bytes give the same text."""
    return _ADDRESS.sub("", str(error))


def open_any_size(data: bytes, formats: tuple[str, ...] = READ_FORMATS) -> Image.Image:
    """Open an encoded image of any size; read its header but no pixels. Raise one of `DECODE_ERRORS` if it is not an
    image."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # global; callers check their own limits
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def mask_error(data: bytes) -> str | None:
    """Return the reason why bytes are not a valid mask PNG, or None if they are valid.

    Pillow stretches gray PNGs of 1, 2 or 4 bits to 0 … 255, which destroys class indices.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        return "no PNG"
    depth, color = data[24], data[25]
    if color == 3 or (color == 0 and depth == 8):
        return None
    return f"a PNG of {_CHANNELS.get(color, 'unknown channels')} of {depth} bit"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 … 8) of an opened, not yet decoded image; 1 (upright) if EXIF is damaged."""
    if _EXIF_KEYS.isdisjoint(image.info):
        return 1
    try:
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


def on_white(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB on white, as exported image processors do: a plain conversion drops transparency.

    16-bit gray images keep their upper 8 bits, as Pillow does for 16-bit color: a plain conversion would turn all but
    the darkest 1/256 of the values white. Other images in one of `DEEP_MODES` raise a ValueError.
    """
    if image.mode in DEEP_MODES:
        if not is_16_bit(image):
            raise ValueError(f"values of mode {image.mode} have no range")
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")


def is_16_bit(image: Image.Image) -> bool:
    """Return whether a deep gray image has values 0 … 65,535; Pillow also reads 12-bit TIFFs as I;16."""
    if image.mode == "I":
        return image.format in _SIXTEEN_AS_I
    return image.mode.startswith("I;16") and tiff_tag(image, _BITS_TAG, 16) == 16


def tiff_tag(image: Image.Image, number: int, default: int) -> Any:
    """Return the (first) value of a TIFF tag; the default if it is absent or for other formats."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) and value else value
