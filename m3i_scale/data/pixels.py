"""From the modes that images are stored in to the RGB that is trained on."""

from __future__ import annotations

import struct
import warnings

import numpy as np
from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by the orientation in its EXIF data (EXIF 2.32, tag 274)."""
_SIDEWAYS = (5, 6, 7, 8)
_TOLD_IN = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
"""Where Pillow finds an orientation. Most pictures have none of these, and cost one look."""
_DAMAGED = (SyntaxError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, struct.error)
"""What Pillow raises on damaged EXIF data."""


def orientation(image: Image.Image) -> int:
    """Tell how an opened, not yet decoded picture lies: 1 is upright, 2 … 8 as in EXIF; damaged data say nothing: 1."""
    if _TOLD_IN.isdisjoint(image.info):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(image: Image.Image, lies: int) -> Image.Image:
    """Turn a decoded picture as its `orientation` says."""
    return image.transpose(_TURNS[lies]) if lies in _TURNS else image


def upright_size(size: tuple[int, int], lies: int) -> tuple[int, int]:
    """Return width and height of a picture when it is upright."""
    return (size[1], size[0]) if lies in _SIDEWAYS else size


def on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB; what is transparent becomes white, as in exported image processors (a bare conversion drops it).

    Sixteen bits of grey become eight; a bare conversion would make all but the darkest 1/256 of them white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
