"""Decoding and validation of the files of a sample: image, mask, label and caption."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from m3i_scale.data.images import (
    DECODE_ERRORS,
    IMAGE_EXTENSIONS,
    KEPT_FORMATS,
    MASK,
    READ_FORMATS,
    error_text,
    mask_error,
    open_any_size,
)
from m3i_scale.data.reader import BadSampleError
from m3i_scale.defaults import MAX_CAPTION_BYTES, NO_CLASS

OUT_OF_RANGE = "label out of range"
MASK_OUT_OF_RANGE = "mask out of range"


def open_image(members: Mapping[str, bytes], max_pixels: int) -> Image.Image:
    """Open the image of a sample: read its header and check its size, without decoding. Raise `BadSampleError` if it is
    missing, too large, or not an image."""
    data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if data is None:
        raise BadSampleError("no image", _instead(sorted(set(members) - {"__key__", "__url__"})))
    return open_encoded(data, max_pixels, tuple(KEPT_FORMATS))


def _instead(extensions: list[str]) -> str:
    """List the files of a sample without an image; a file name with several dots is the usual cause."""
    message = f"members: {', '.join(extensions)}"
    dotted = [name for name in extensions if name != MASK and name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return f"{message}; a key ends at the first dot of the name, so .{dotted[0]} is no image" if dotted else message


def open_mask(members: Mapping[str, bytes], max_pixels: int, size: tuple[int, int]) -> Image.Image | None:
    """Open the mask of a sample (the class of every pixel) without decoding; None if there is no mask.

    It must be an 8-bit PNG of `size`, the width and height of the sample's image; otherwise raise `BadSampleError`.
    """
    data = members.get(MASK)
    if data is None:
        return None
    error = mask_error(data)
    if error:
        raise BadSampleError(f"mask is {error}")
    mask = open_encoded(data, max_pixels, ("PNG",), "mask")
    if mask.size != size:
        raise BadSampleError("mask is not of the size of its image", f"{mask.size} pixels for {size}")
    return mask


def read_mask(members: Mapping[str, bytes], max_pixels: int, size: tuple[int, int], classes: int) -> Image.Image:
    """Decode the required mask of a sample: the stored class of every pixel, or its palette index.

    Raise `BadSampleError` if it is missing, invalid (see `open_mask`), undecodable, or if a pixel other than `NO_CLASS`
    is `classes` or more.
    """
    mask = open_mask(members, max_pixels, size)
    if mask is None:
        raise BadSampleError("no mask")
    with decoding("mask"):
        pixels_HW = np.asarray(mask)
    beyond = (pixels_HW >= classes) & (pixels_HW != NO_CLASS)
    if beyond.any():
        raise BadSampleError(MASK_OUT_OF_RANGE, f"class {pixels_HW[beyond].max()} in a mask, of {classes} classes")
    return Image.fromarray(pixels_HW)


def open_encoded(
    data: bytes, max_pixels: int, formats: tuple[str, ...] = READ_FORMATS, what: str = "image"
) -> Image.Image:
    """Open an encoded image as `open_image` does; `what` names it in the reason of a `BadSampleError`."""
    with decoding(what):
        image = open_any_size(data, formats)
    width, height = image.size
    if width * height > max_pixels:
        raise BadSampleError(f"{what} too large", f"{width} × {height} pixels, data.max_image_pixels is {max_pixels}")
    return image


def quick_pixels(image: Image.Image) -> NDArray[np.uint8] | None:
    """Decode to RGB (H, W, 3) with the faster torchvision if the pixels surely equal Pillow's; else return None.

    It handles plain JPEG and PNG images without relevant metadata. On errors the result is None too: Pillow decides
    whether an image is corrupt.
    """
    stream = getattr(image, "fp", None)
    if image.mode != "RGB" or not isinstance(stream, io.BytesIO):
        return None
    if image.format == "JPEG":
        decode = decode_jpeg
    elif image.format == "PNG" and not image.info:
        decode = decode_png
    else:
        return None
    try:
        pixels = decode(torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None
    if pixels.dtype != torch.uint8:  # 16 bits per channel
        return None
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return array


@contextlib.contextmanager
def decoding(what: str = "image") -> Iterator[None]:
    """Convert Pillow's errors to `BadSampleError`; `what` names the file in its reason."""
    try:
        yield
    except DECODE_ERRORS as error:
        raise BadSampleError(f"{what} does not decode", error_text(error)) from None


def read_label(members: Mapping[str, bytes], classes: int | None) -> int | None:
    """Return the label (`cls`) of a sample, or None if there is none. Raise `BadSampleError` if it is not an integer
    below `classes`, the number of classes; None ignores labels."""
    data = members.get("cls")
    if data is None or classes is None:
        return None
    digits = data.strip()
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 18:
        raise BadSampleError("label is not an integer", repr(data[:40]))
    label = int(digits)
    if not 0 <= label < classes:
        raise BadSampleError(OUT_OF_RANGE, f"{label}, the label set has {classes} classes")
    return label


def read_caption(
    members: Mapping[str, bytes], draw: int | None = None, max_bytes: int = MAX_CAPTION_BYTES
) -> str | None:
    """Return the caption (`txt`) of a sample, or None if it is missing or empty. Raise `BadSampleError` if the file is
    larger than `max_bytes` or not UTF-8.

    `draw` is a random number that selects one of several captions (one per line); None: all lines are one caption.
    """
    data = members.get("txt")
    if data is None:
        return None
    if len(data) > max_bytes:
        raise BadSampleError("caption too large", f"{len(data)} bytes, data.max_caption_bytes is {max_bytes}")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError("caption is not UTF-8", str(error)) from None
    if draw is None or not text:
        return text or None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[draw % len(lines)]
