"""Validation of images and masks for shards, and conversion of images of any mode to PNG."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
from PIL import Image, ImageFile

from m3i_scale.data.images import (
    DECODE_ERRORS,
    DEEP_MODES,
    KEPT_FORMATS,
    READ_FORMATS,
    error_text,
    is_16_bit,
    mask_error,
    on_white,
    open_any_size,
    orientation,
    tiff_tag,
    upright_size,
)
from m3i_scale.defaults import MAX_IMAGE_PIXELS
from m3i_scale.errors import DataError

FILE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
"""Extensions of image files; formats that shards do not store are converted to PNG."""
_WHITE_IS, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 262, 277, 339
"""TIFF tags. If the first one is 0 (Pillow's default if absent), zero is white."""
_UNSIGNED = 1

ValueRange = tuple[float, float]
"""Intensity window: the gray values that become black and white."""


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
            _check_header(image, value_range, where)
            image.load()
            _check_values(image, where)
            kind = str(image.format)
            as_it_is = kind in KEPT_FORMATS and value_range is None
            return (data, KEPT_FORMATS[kind]) if as_it_is else (to_png(image, value_range), "png")
    except DECODE_ERRORS as error:
        raise DataError(
            f"the image does not decode: {error_text(error)}",
            where=where,
            fix="repair or remove the file, or skip such files with --skip-bad",
        ) from None


def to_png(image: Image.Image, value_range: ValueRange | None = None) -> bytes:
    """Encode an image as an RGB PNG; see `on_white`.

    With `value_range`, values up to the first become 0, values from the second on 255, linear in between.
    """
    if value_range is not None:
        low, high = value_range
        values_HW = np.clip(np.asarray(image).astype(np.float64), low, high)
        image = Image.fromarray(np.rint((values_HW - low) * (255 / (high - low))).astype(np.uint8))
    buffer = io.BytesIO()
    on_white(image).save(buffer, "PNG")
    return buffer.getvalue()


def pixel_counts(mask: Image.Image) -> Counter[int]:
    """Count the pixels of a mask by value; of a palette PNG, by palette index."""
    return Counter({value: count for value, count in enumerate(mask.histogram()) if count})


def check_mask(data: bytes, image: bytes, where: str) -> Counter[int]:
    """Check that bytes are the mask of an encoded image: a valid PNG of its size with one byte per pixel.

    Return the number of pixels by value.
    """
    problem, counts = mask_error(data), Counter[int]()
    try:
        with Image.open(io.BytesIO(image), formats=READ_FORMATS) as picture:
            size, lies = picture.size, orientation(picture)
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as mask:
            counts = pixel_counts(mask)
            if mask.size != size:
                upright_only = mask.size == upright_size(size, lies)
                turned = f", which its EXIF orientation {lies} rotates" if upright_only else ""
                problem = problem or f"of size {mask.size}, but its image is {size}{turned}"
    except DECODE_ERRORS as error:
        problem = problem or f"damaged: {error_text(error)}"
    if problem is not None:
        raise DataError(
            f"the mask is {problem}",
            where=where,
            fix="save it at the size of its image, as an 8-bit gray or palette PNG with the class of every pixel; 255 "
            "is ignored",
        )
    return counts


def _check_header(image: Image.Image, value_range: ValueRange | None, where: str) -> None:
    """Check, before decoding, that the image can be converted to 8-bit RGB."""
    channels = tiff_tag(image, _SAMPLES_PER_PIXEL, 1)
    if channels > len(image.getbands()):
        raise DataError(
            f"an image of {channels} channels must be RGB",
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
    if image.format == "TIFF" and tiff_tag(image, _WHITE_IS, 0) == 0:
        raise DataError(
            "gray images with more than 8 bits must have zero as black, but this one has zero as white",
            where=where,
            fix="save it with zero as black (PhotometricInterpretation 1)",
        )
    if value_range is None and not is_16_bit(image):
        raise DataError(
            f"the image has {'floating-point' if image.mode == 'F' else '12-bit, 32-bit or signed'} values without a "
            "range",
            where=where,
            why="the values of black and white are unknown",
            fix="set --value-range LOW,HIGH",
        )
    if value_range is not None and _is_stretched(image):
        raise DataError(
            "--value-range has no effect on a PGM of fewer than 16 bits",
            where=where,
            why="Pillow stretches its values to 0 … 65,535",
            fix="save it as a PNG or TIFF of 16 bits, or leave out --value-range",
        )


def _check_values(image: Image.Image, where: str) -> None:
    """Check the values of a decoded image after `_check_header`."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise DataError("the image has non-finite values", where=where, fix="replace these values")
    unsigned = image.format == "TIFF" and tiff_tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED
    if image.mode == "I" and unsigned and np.asarray(image).min() < 0:
        raise DataError(
            "the values of a 32-bit image must be below 2,147,483,648",
            where=where,
            why="Pillow reads 32 bits as signed",
            fix="save it as floating-point numbers, or in 16 bits",
        )


def _is_stretched(image: Image.Image) -> bool:
    """Return whether decoding an opened image stretches its values, because the decoder got a maximum value."""
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PPM" or image.mode != "I":
        return False
    decoder, _, _, arguments = image.tile[0]
    return decoder != "raw" and isinstance(arguments, tuple) and arguments[-1] != 65535
