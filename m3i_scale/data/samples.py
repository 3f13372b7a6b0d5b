"""From the members of a sample to an image, a label and a caption, each of them checked."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import Image

from m3i_scale.data.reader import BadSampleError
from m3i_scale.data.records import DECODE_FAULTS, IMAGE_EXTENSIONS, MASK, mask_fault

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may try: image bytes are hostile input, and some of its other readers start programs."""


@dataclass(frozen=True)
class Annotations:
    """What a sample is paired with."""

    label: int | None
    caption: str | None


def open_image(members: Mapping[str, bytes], max_pixels: int) -> Image.Image:
    """The sample's image, its header read and its size checked, not yet decoded.

    Raises:
        BadSampleError: no image, one that is too large, or one that is no image.
    """
    data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if data is None:
        raise BadSampleError("no image", f"members: {', '.join(sorted(set(members) - {'__key__', '__url__'}))}")
    return _open(data, IMAGE_FORMATS, max_pixels)


def open_mask(members: Mapping[str, bytes], max_pixels: int, size: tuple[int, int]) -> Image.Image | None:
    """The class of every pixel, not yet decoded; None where the sample has no mask.

    Args:
        members: as read from the shard.
        max_pixels: see `open_image`.
        size: width and height of the sample's image.

    Raises:
        BadSampleError: the mask is no eight-bit PNG, or not of that size.
    """
    data = members.get(MASK)
    if data is None:
        return None
    fault = mask_fault(data)
    if fault:
        raise BadSampleError(f"mask is {fault}")
    mask = _open(data, ("PNG",), max_pixels)
    if mask.size != size:
        raise BadSampleError("mask is not of the size of its image", f"{mask.size} pixels for {size}")
    return mask


def _open(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    with _own_pixel_limit(), decoding():
        image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > max_pixels:
        raise BadSampleError("image too large", f"{width} × {height} pixels, data.max_image_pixels is {max_pixels}")
    return image


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turn Pillow's errors into bad samples."""
    try:
        yield
    except DECODE_FAULTS as error:
        raise BadSampleError("image does not decode", str(error)) from None


@contextlib.contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Pillow's limit is global and differs from the configured one, which is checked right after opening."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. damaged EXIF, which does not touch the pixels
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_annotations(members: Mapping[str, bytes], classes: int | None, draw: int | None = None) -> Annotations:
    """Label (`cls`) and caption (`txt`) of a sample, as far as it has them.

    Args:
        members: as read from the shard.
        classes: size of the source's label set; None where it has none, then labels are not looked at.
        draw: a random number that picks one of several captions, a line each; None where all of it is one caption.

    Raises:
        BadSampleError: a label that is no integer or out of range, a caption that is not UTF-8.
    """
    return Annotations(_label(members, classes), _caption(members, draw))


def _label(members: Mapping[str, bytes], classes: int | None) -> int | None:
    data = members.get("cls")
    if data is None or classes is None:
        return None
    digits = data.strip()
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 18:
        raise BadSampleError("label is not an integer", repr(data[:40]))
    label = int(digits)
    if not 0 <= label < classes:
        raise BadSampleError("label out of range", f"{label}, the label set has {classes} classes")
    return label


def _caption(members: Mapping[str, bytes], draw: int | None) -> str | None:
    data = members.get("txt")
    if data is None:
        return None
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError("caption is not UTF-8", str(error)) from None
    if draw is None or not text:
        return text or None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[draw % len(lines)]
