"""Random and center crops, and the class statistics of a crop."""

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
    """Rectangle of a view, in pixels of the (already flipped) source image; it may extend beyond the image."""

    top: float
    left: float
    height: float
    width: float
    flip: bool


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width) with a random area and aspect ratio.

    If no attempt fits the image, return the largest centered crop with an allowed aspect ratio.
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
    """Draw a square crop (top, left, height, width) of a rescaled image, in pixels of the original image.

    If the rescaled image is smaller than the square, the crop starts at its edge and extends beyond it.
    """
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top = int(rng.random() * (max(0, rows - side) + 1)) * height / rows
    left = int(rng.random() * (max(0, columns - side) + 1)) * width / columns
    return top, left, side * height / rows, side * width / columns


def center_crop(height: int, width: int, size: int) -> tuple[float, float, float, float]:
    """Return the center crop (top, left, height, width) of a standard image processor.

    It resizes the short side to `size`, rounds the long side down, and crops at integer pixels of the result
    (`get_resize_output_image_size` and `center_crop` of transformers).
    """
    short = min(height, width)
    rows, columns = int(size * height / short), int(size * width / short)
    top, left = (rows - size) // 2 * height / rows, (columns - size) // 2 * width / columns
    return top, left, size * height / rows, size * width / columns


def largest_share(mask_HW: NDArray[np.uint8]) -> float:
    """Return the fraction of the most frequent class among pixels with a class; 1 if no pixel has a class."""
    counts = np.bincount(mask_HW.ravel(), minlength=256)[:NO_CLASS]
    return float(counts.max() / max(1, counts.sum())) if counts.any() else 1.0


def box_of(crop: Crop, source: tuple[int, int], image: Image.Image) -> tuple[float, float, float, float]:
    """Return the box of a crop in a decoded image that is not flipped and may be decoded at reduced size; `source` is
    the original height and width."""
    height, width = source
    left = width - crop.left - crop.width if crop.flip else crop.left
    x, y = image.width / width, image.height / height
    right, bottom = (left + crop.width) * x, (crop.top + crop.height) * y
    return left * x, crop.top * y, min(right, image.width), min(bottom, image.height)


def uniform(low: float, high: float, rng: random.Random) -> float:
    """Draw a uniform random number."""
    return low + (high - low) * rng.random()
