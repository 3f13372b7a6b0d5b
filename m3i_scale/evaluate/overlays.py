"""Draw what a model predicts beside the truth: the image, and both in colours over it. Here that of a segmenter."""

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
"""So many are drawn, unless another number is asked for."""
SIDE = 512
"""Longest side of an image in pixels, as it is drawn."""
_GAP = 4
LEGEND = "palette.json"
"""Beside the pictures: number, name and colour (red, green, blue) of every class."""
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
"""The colour of a class by its number, the same in every picture: red, green, blue from 0 to 255."""


def make_folder(folder: Path, option: str = "--overlays") -> None:
    """Make the folder of pictures, or take an empty one.

    Args:
        folder: of any depth.
        option: that named it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise refused(folder, error, option) from None
    if taken:
        raise ConfigError("the folder is not empty", where=f"{option} {folder}", fix="name a new one")


def refused(folder: Path, error: OSError, option: str = "--overlays") -> ConfigError:
    """Return the error for a disk that takes no pictures."""
    return ConfigError(f"pictures cannot be written: {error.strerror or error}", where=f"{option} {folder}")


def file_stem(key: str) -> str:
    """Return what a file of a sample can be called by, of its key."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key)[-100:]


def side_by_side(panels: list[Image.Image]) -> Image.Image:
    """Return one picture of panels of equal sizes."""
    width, height = panels[0].size
    picture = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), "white")
    for place, panel in enumerate(panels):
        picture.paste(panel, (place * (width + _GAP), 0))
    return picture


class Overlays:
    """Writes pictures of the first samples that are measured, image | truth | prediction, and the colours of classes.

    Args:
        folder: is made; one that exists is empty.
        count: so many samples are drawn.
        classes: their names, by number.

    Raises:
        ConfigError: the folder cannot be made, or something is in it.
    """

    def __init__(self, folder: Path, count: int, classes: list[str]) -> None:
        self._folder, self._count, self._classes, self._drawn = folder, count, classes, 0
        make_folder(folder)

    def __call__(self, sample: Sample, predicted_HW: NDArray[np.uint8]) -> None:
        """Draw a sample with the predicted class of every pixel, unless enough are drawn."""
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
            raise refused(self._folder, error) from None

    def _legend(self) -> list[dict[str, Any]]:
        return [
            {"class": number, "name": name, "rgb": PALETTE[number].tolist()}
            for number, name in enumerate(self._classes)
        ]


def _coloured(image: Image.Image, classes_HW: NDArray[np.uint8]) -> Image.Image:
    """Return the image with the colour of its class over every pixel; one without a class stays as it is."""
    classes = np.asarray(Image.fromarray(classes_HW).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image, dtype=np.float64)
    mixed = 0.35 * pixels + 0.65 * PALETTE[classes]
    return Image.fromarray(np.where((classes == NO_CLASS)[..., None], pixels, mixed).round().astype(np.uint8))
