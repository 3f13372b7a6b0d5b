"""The members of a sample become an image, a label and a caption here; each of them is checked."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from m3i_scale.data.images import (
    DECODE_FAULTS,
    IMAGE_EXTENSIONS,
    KEPT_FORMATS,
    MASK,
    fault_text,
    mask_fault,
)
from m3i_scale.data.reader import BadSampleError
from m3i_scale.defaults import MAX_CAPTION_BYTES, NO_CLASS

OUT_OF_RANGE = "label out of range"
MASK_OUT_OF_RANGE = "mask out of range"


@dataclass(frozen=True)
class Annotations:
    """Holds what a sample's image is paired with."""

    label: int | None
    caption: str | None


def open_image(members: Mapping[str, bytes], max_pixels: int) -> Image.Image:
    """Open the sample's image: its header is read and its size checked, but it is not decoded yet.

    Raises:
        BadSampleError: no image, one that is too large, or one that is no image.
    """
    data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if data is None:
        raise BadSampleError("no image", _instead(sorted(set(members) - {"__key__", "__url__"})))
    return _open(data, tuple(KEPT_FORMATS), max_pixels)


def _instead(extensions: list[str]) -> str:
    """Say what a sample has instead of an image; a name with several dots is the usual reason."""
    message = f"members: {', '.join(extensions)}"
    dotted = [name for name in extensions if name != MASK and name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return f"{message}; a key ends at the first dot of the name, so .{dotted[0]} is no image" if dotted else message


def open_mask(members: Mapping[str, bytes], max_pixels: int, size: tuple[int, int]) -> Image.Image | None:
    """Open the sample's mask (the class of every pixel), without decoding it; None where the sample has none.

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
    mask = _open(data, ("PNG",), max_pixels, "mask")
    if mask.size != size:
        raise BadSampleError("mask is not of the size of its image", f"{mask.size} pixels for {size}")
    return mask


def read_mask(members: Mapping[str, bytes], max_pixels: int, size: tuple[int, int], classes: int) -> Image.Image:
    """Decode the mask that a sample has to have: the class of every pixel as it is stored, of a palette the index.

    Args:
        members: as read from the shard.
        max_pixels: see `open_image`.
        size: width and height of the sample's image.
        classes: pixels are below this number, or `NO_CLASS`.

    Raises:
        BadSampleError: there is none, see `open_mask`, it does not decode, or it has a class beyond the last.
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


def _open(data: bytes, formats: tuple[str, ...], max_pixels: int, what: str = "image") -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS  # Pillow's is global and differs from the configured one, checked right after
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. damaged EXIF, which does not touch the pixels
            image = Image.open(io.BytesIO(data), formats=formats)
    except DECODE_FAULTS as error:
        raise _undecodable(error, what) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > max_pixels:
        raise BadSampleError(f"{what} too large", f"{width} × {height} pixels, data.max_image_pixels is {max_pixels}")
    return image


def quick_pixels(image: Image.Image) -> NDArray[np.uint8] | None:
    """Decode to RGB (H, W, 3) where torchvision is sure to give Pillow's pixels, only sooner; None elsewhere.

    It decodes plain JPEG and PNG without anything to consider beside the pixels. Where it fails the result is None
    too: Pillow decides whether an image is bad.
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
    if pixels.dtype != torch.uint8:  # 16 bits a channel
        return None
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return array


@contextlib.contextmanager
def decoding(what: str = "image") -> Iterator[None]:
    """Turn Pillow's errors into `BadSampleError`; `what` names the member in its reason."""
    try:
        yield
    except DECODE_FAULTS as error:
        raise _undecodable(error, what) from None


def _undecodable(error: Exception, what: str) -> BadSampleError:
    return BadSampleError(f"{what} does not decode", fault_text(error))


def read_annotations(
    members: Mapping[str, bytes],
    classes: int | None,
    draw: int | None = None,
    *,
    captions: bool = True,
    max_caption_bytes: int = MAX_CAPTION_BYTES,
) -> Annotations:
    """Return the label (`cls`) and the caption (`txt`) of a sample, as far as it has them.

    Args:
        members: as read from the shard.
        classes: size of the source's label set; None where it has none, then labels are not looked at.
        draw: a random number that picks one of several captions, a line each; None where all of it is one caption.
        captions: False leaves the caption out, and unread.
        max_caption_bytes: of the member, one caption or several.

    Raises:
        BadSampleError: a label that is no integer or out of range, a caption that is too large or not UTF-8.
    """
    return Annotations(_label(members, classes), _caption(members, draw, max_caption_bytes) if captions else None)


def _label(members: Mapping[str, bytes], classes: int | None) -> int | None:
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


def refuse_large_caption(data: bytes, limit: int) -> None:
    """Refuse a caption before it is read.

    Args:
        data: the `txt` member.
        limit: data.max_caption_bytes.

    Raises:
        BadSampleError: it is larger.
    """
    if len(data) > limit:
        raise BadSampleError("caption too large", f"{len(data)} bytes, data.max_caption_bytes is {limit}")


def _caption(members: Mapping[str, bytes], draw: int | None, max_bytes: int) -> str | None:
    data = members.get("txt")
    if data is None:
        return None
    refuse_large_caption(data, max_bytes)
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError("caption is not UTF-8", str(error)) from None
    if draw is None or not text:
        return text or None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[draw % len(lines)]
