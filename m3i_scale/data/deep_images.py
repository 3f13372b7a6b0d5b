"""Conversion of gray images with more than 8 bits to 8 bits; images without a conversion rule are an error."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFile

from m3i_scale.errors import DataError

ValueRange = tuple[float, float]
"""Intensity window: the gray values that become black and white."""

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of gray images with more than 8 bits."""
SIXTEEN_AS_I = ("PNG", "PPM")
"""Formats whose 16-bit gray images Pillow reads as mode I; it stretches a PPM of fewer bits to 16."""

_BITS, _WHITE_IS, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 258, 262, 277, 339
"""TIFF tags. If the second one is 0 (Pillow's default if absent), zero is white."""
_UNSIGNED = 1


def check_header(image: Image.Image, value_range: ValueRange | None, where: str) -> None:
    """Check, before decoding, that the image can be converted to 8-bit RGB."""
    channels = _tag(image, _SAMPLES_PER_PIXEL, 1)
    if channels > len(image.getbands()):
        raise DataError(
            f"the image has {channels} channels, which are not RGB",
            where=where,
            why=f"Pillow reads {len(image.getbands())} of them",
            fix="save three channels as red, green and blue",
        )
    if image.mode not in DEEP_MODES:
        if value_range is not None:
            raise DataError(
                f"--value-range has no effect on an image of mode {image.mode}",
                where=where,
                why="it applies to gray images with more than 8 bits; of color images Pillow keeps the upper 8 bits",
                fix="convert such images in a separate command, or skip them with --skip-bad",
            )
        return
    if image.format == "TIFF" and _tag(image, _WHITE_IS, 0) == 0:
        raise DataError(
            "the image has gray values with more than 8 bits and zero as white",
            where=where,
            fix="save it with black as zero (PhotometricInterpretation 1)",
        )
    if value_range is None and not _is_sixteen(image):
        raise DataError(
            f"the image has {'floating-point' if image.mode == 'F' else '12-bit, 32-bit or signed'} values without a "
            "range",
            where=where,
            why="the values of black and white are unknown",
            fix="--value-range LOW,HIGH",
        )
    if value_range is not None and _is_stretched(image):
        raise DataError(
            "--value-range has no meaning for a PGM of fewer than 16 bits",
            where=where,
            why="Pillow stretches its values to 0 … 65,535",
            fix="save it as a PNG or TIFF of 16 bits, or leave out --value-range",
        )


def check_values(image: Image.Image, where: str) -> None:
    """Check the values of a decoded image after `check_header`."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise DataError("the image has values that are not finite", where=where, fix="replace them")
    unsigned = image.format == "TIFF" and _tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED
    if image.mode == "I" and unsigned and np.asarray(image).min() < 0:
        raise DataError(
            "the image has values of 2,147,483,648 and more",
            where=where,
            why="Pillow reads 32 bits as signed",
            fix="save it as floating-point numbers, or in 16 bits",
        )


def eight_bits(image: Image.Image, value_range: ValueRange | None) -> Image.Image:
    """Convert an image in one of `DEEP_MODES` to 8-bit gray.

    With `value_range`, values up to the first become 0, values from the second on 255, linear in between. Without it,
    16-bit images keep their upper 8 bits, as Pillow does for 16-bit color: a plain conversion would turn all but the
    darkest 1/256 of the values white. Other images raise a ValueError.
    """
    if value_range is None and not _is_sixteen(image):
        raise ValueError(f"values of mode {image.mode} have no range")
    values_HW = np.asarray(image)
    if value_range is None:
        levels_HW = values_HW >> 8
    else:
        low, high = value_range
        levels_HW = np.rint((np.clip(values_HW.astype(np.float64), low, high) - low) * (255 / (high - low)))
    return Image.fromarray(levels_HW.astype(np.uint8))


def _is_sixteen(image: Image.Image) -> bool:
    """Return whether a deep gray image has values 0 … 65,535; Pillow also reads 12-bit TIFFs as I;16."""
    if image.mode == "I":
        return image.format in SIXTEEN_AS_I
    return image.mode.startswith("I;16") and _tag(image, _BITS, 16) == 16


def _is_stretched(image: Image.Image) -> bool:
    """Return whether decoding an opened image stretches its values, because the decoder got a maximum value."""
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PPM" or image.mode != "I":
        return False
    decoder, _, _, arguments = image.tile[0]
    return decoder != "raw" and isinstance(arguments, tuple) and arguments[-1] != 65535


def _tag(image: Image.Image, number: int, default: int) -> Any:
    """Return the (first) value of a TIFF tag; the default if it is absent or for other formats."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) and value else value
