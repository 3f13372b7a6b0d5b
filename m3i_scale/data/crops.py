"""Crops are drawn here, by area and shape or at a scale, and judged by the classes in them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.defaults import NO_CLASS

CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Crop:
    """Says which rectangle a view shows, in pixels of the (already flipped) source image; it may end beyond it."""

    top: float
    left: float
    height: float
    width: float
    flip: bool


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw the top, left, height and width of a crop with a random share of the area and a random shape.

    Where no draw fits the image, the largest centred crop of an allowed shape.
    """
    for _ in range(CROP_ATTEMPTS):
        area = height * width * uniform(*scale, rng)
        shape = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1]), rng))
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def scaled_crop(
    height: int, width: int, scale: float, side: int, rng: random.Random
) -> tuple[float, float, float, float]:
    """Draw the top, left, height and width of what a square shows of an image that is scaled, in pixels of the image.

    Where the scaled image is smaller than the square it begins at its edge, and ends inside of it.
    """
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top = int(rng.random() * (max(0, rows - side) + 1)) * height / rows
    left = int(rng.random() * (max(0, columns - side) + 1)) * width / columns
    return top, left, side * height / rows, side * width / columns


def center_crop(height: int, width: int, size: int) -> tuple[float, float, float, float]:
    """Return the top, left, height and width of the center crop of a stock image processor.

    It resizes the short side to `size`, rounds the long side down, and cuts the center at whole pixels of the result
    (`get_resize_output_image_size` and `center_crop` of transformers).
    """
    short = min(height, width)
    rows, columns = int(size * height / short), int(size * width / short)
    top, left = (rows - size) // 2 * height / rows, (columns - size) // 2 * width / columns
    return top, left, size * height / rows, size * width / columns


def largest_share(mask_HW: NDArray[np.uint8]) -> float:
    """Return the share that the most frequent class has of the pixels with a class; 1 where none has."""
    counts = np.bincount(mask_HW.ravel(), minlength=256)[:NO_CLASS]
    return float(counts.max() / max(1, counts.sum())) if counts.any() else 1.0


def box_of(crop: Crop, source: tuple[int, int], image: Image.Image) -> tuple[float, float, float, float]:
    """Return where a crop lies in an image that is not flipped, and may have been decoded at less than its size.

    Args:
        crop: in pixels of the source.
        source: its height and width.
        image: as it was decoded.
    """
    height, width = source
    left = width - crop.left - crop.width if crop.flip else crop.left
    x, y = image.width / width, image.height / height
    right, bottom = (left + crop.width) * x, (crop.top + crop.height) * y
    return left * x, crop.top * y, min(right, image.width), min(bottom, image.height)


def uniform(low: float, high: float, rng: random.Random) -> float:
    """Draw a number from `low` to `high`."""
    return low + (high - low) * rng.random()
