"""Prediction overlays of segmenters (image, ground truth and prediction in colors over it), and shared drawing code."""

from __future__ import annotations

import re
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.samples import Sample
from m3i_scale.files import write_json

OVERLAY_COUNT = 20
"""Default number of overlays."""
SIDE = 512
"""Maximum size in pixels of a drawn image."""
_GAP = 4
LEGEND = "palette.json"
"""File next to the pictures: number, name and color (red, green, blue) of every class."""
_GOLDEN = 0.618034
PALETTE = np.array(
    [
        [
            round(255 * part)
            for part in hsv_to_rgb(number * _GOLDEN % 1, (1.0, 0.6, 0.8)[number % 3], (1.0, 0.7)[number % 2])
        ]
        for number in range(256)
    ]
)
"""Color of a class by its number, the same in every picture: red, green, blue from 0 to 255."""


def make_folder(folder: Path) -> None:
    """Create the folder of pictures and its parents, or use an existing empty one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise write_error(folder, error) from None
    if taken:
        raise ConfigError("the folder is not empty", where=f"--pictures {folder}", fix="name a new one")


def write_error(folder: Path, error: OSError) -> ConfigError:
    """Return the error for pictures that cannot be written."""
    return ConfigError(f"pictures cannot be written: {error.strerror or error}", where=f"--pictures {folder}")


def file_stem(key: str) -> str:
    """Return a valid file name stem for a sample key."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key)[-100:]


def side_by_side(panels: list[Image.Image]) -> Image.Image:
    """Join panels of equal size side by side."""
    width, height = panels[0].size
    picture = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), "white")
    for place, panel in enumerate(panels):
        picture.paste(panel, (place * (width + _GAP), 0))
    return picture


class Overlays:
    """Writer of pictures (image | ground truth | prediction) of the first `count` samples with a mask, and of the class
    colors. `folder` is created if missing; it must be empty."""

    def __init__(self, folder: Path, count: int, classes: list[str]) -> None:
        self._folder, self._count, self._classes, self._drawn = folder, count, classes, 0
        make_folder(folder)

    def __call__(self, sample: Sample, predicted_HW: NDArray[np.uint8]) -> None:
        """Draw a sample with the predicted class of every pixel, unless it has no mask or `count` samples are drawn."""
        if sample.mask is None or self._drawn == self._count:
            return
        self._drawn += 1
        image = Image.fromarray(sample.pixels.transpose(1, 2, 0))
        image.thumbnail((SIDE, SIDE))
        picture = side_by_side([image, *(_coloured(image, classes_HW) for classes_HW in (sample.mask, predicted_HW))])
        try:
            if self._drawn == 1:
                write_json(self._folder / LEGEND, self._legend())
            picture.save(self._folder / f"{self._drawn:04d}-{file_stem(sample.key)}.png")
        except OSError as error:
            raise write_error(self._folder, error) from None

    def _legend(self) -> list[dict[str, Any]]:
        return [
            {"class": number, "name": name, "rgb": PALETTE[number].tolist()}
            for number, name in enumerate(self._classes)
        ]


def _coloured(image: Image.Image, classes_HW: NDArray[np.uint8]) -> Image.Image:
    """Return the image with class colors blended over it; pixels without a class are unchanged."""
    classes = np.asarray(Image.fromarray(classes_HW).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image, dtype=np.float64)
    mixed = 0.35 * pixels + 0.65 * PALETTE[classes]
    return Image.fromarray(np.where((classes == NO_CLASS)[..., None], pixels, mixed).round().astype(np.uint8))
