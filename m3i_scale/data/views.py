"""Images become augmented views here, with the geometry that the position embedding of targets needs.

The order is flip, crop and resize (one step from the decoded image to the view), RandAugment, colour jitter, grey,
blur, solarise.
What a crop has beyond the edge of the image is filled up last.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from m3i_scale.config import AugmentConfig, DistortionConfig
from m3i_scale.data.images import NO_CLASS, on_white, orientation, upright, upright_size
from m3i_scale.data.samples import decoding, quick_pixels

if TYPE_CHECKING:
    from m3i_scale.data.rand_augment import RandAugment

CROP_ATTEMPTS = 10
BLUR_SIGMA = (0.1, 2.0)
"""Standard deviation of the blur in pixels of a 224-pixel view; in proportion for other sizes."""
BLUR_REFERENCE_SIZE = 224


Pixels = NDArray[np.uint8]
"""(H, W, 3)."""


@dataclass(frozen=True)
class Crop:
    """Says which rectangle a view shows, in pixels of the (already flipped) source image; it may end beyond it."""

    top: float
    left: float
    height: float
    width: float
    flip: bool


@dataclass(frozen=True)
class Views:
    """Holds V views of one image, and where each was cut."""

    pixels_VCHW: NDArray[np.uint8]
    crops: list[Crop]
    size: tuple[int, int]
    """Height and width of the source image in pixels."""
    mask_HW: NDArray[np.uint8] | None = None
    """Class of every pixel of the first view, where the image has a mask."""


class ViewMaker:
    """Makes views of images.

    Args:
        config: kinds and strengths of augmentation.
        views: V, number of views per image.
        image_size: side of a view in pixels.
        augment: False gives the largest centre square, V times, with nothing random.
        mean: of the pixels, from 0 to 1: the colour beyond the edge of an image.
    """

    def __init__(
        self,
        config: DistortionConfig,
        *,
        views: int,
        image_size: int,
        augment: bool,
        mean: tuple[float, float, float] = AugmentConfig().mean,
    ) -> None:
        self._config = config
        self._fill = tuple(round(255 * channel) for channel in mean)
        self._rand_augment: RandAugment | None = None
        if augment and config.rand_augment is not None:
            from m3i_scale.data.rand_augment import RandAugment  # an extra, of which tasks say so where it is missing

            self._rand_augment = RandAugment(config.rand_augment, image_size, self._fill)
        self._views = views
        self._size = image_size
        self._augment = augment

    def __call__(self, image: Image.Image, seed: int, mask: Image.Image | None = None) -> Views:
        """Return views of an opened image; the same for the same seed.

        Args:
            image: not decoded yet.
            seed: of its crops and colours.
            mask: class of every pixel of the image as it is stored; it is turned and cut as the first view is.

        Raises:
            BadSampleError: the image does not decode.
        """
        lies = orientation(image)
        width, height = upright_size(image.size, lies)
        rng = random.Random(seed)
        mask = None if mask is None else upright(mask, lies)
        crops = [self._crop(height, width, rng, None if view else mask) for view in range(self._views)]
        smallest = min(min(crop.height, crop.width) for crop in crops)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size. Never below what the smallest crop needs.
        shrink = max((factor for factor in (1, 2, 4, 8) if smallest >= factor * self._size), default=1)
        quick = quick_pixels(image) if shrink == 1 else None
        if quick is not None and lies != 1:
            quick = np.asarray(upright(Image.fromarray(quick), lies))
        rgb: Image.Image | None = None
        pixels = np.empty((self._views, 3, self._size, self._size), dtype=np.uint8)
        for view, crop in enumerate(crops):
            cut: Pixels | Image.Image
            if quick is not None and self._needs_no_resize(crop, (height, width)):
                cut = _cut_out(quick, crop)
            else:
                if rgb is None:
                    rgb = upright(_decoded(image, shrink), lies) if quick is None else Image.fromarray(quick)
                cut = self._cut(rgb, crop, (height, width))
            cut = self._recolour(cut, view, rng) if self._augment else cut
            shown = np.asarray(cut)
            rows, columns = shown.shape[:2]
            if min(rows, columns) < self._size:
                pixels[view] = np.array(self._fill)[:, None, None]
            pixels[view, :, :rows, :columns] = shown.transpose(2, 0, 1)
        mask_HW = None if mask is None else self._cut_mask(mask, crops[0])
        return Views(pixels, crops, (height, width), mask_HW)

    def _crop(self, height: int, width: int, rng: random.Random, mask: Image.Image | None = None) -> Crop:
        """Draw a crop; one of a mask anew, as long as a class has too much of it."""
        if not self._augment:
            side = min(height, width)
            return Crop((height - side) / 2, (width - side) / 2, side, side, False)
        flip = rng.random() < self._config.flip
        draw = self._draw(height, width, rng)
        crop = Crop(*draw(), flip)
        if mask is not None and self._config.max_class_share is not None:
            for _ in range(CROP_ATTEMPTS - 1):
                if largest_share(self._cut_mask(mask, crop)) <= self._config.max_class_share:
                    break
                crop = Crop(*draw(), flip)
        return crop

    def _draw(self, height: int, width: int, rng: random.Random) -> Callable[[], tuple[float, float, float, float]]:
        """Return what draws top, left, height and width of a crop; of scale jitter, at a scale that is drawn here."""
        config = self._config
        if config.resize is None:
            return lambda: random_crop(height, width, config.crop_scale, config.crop_ratio, rng)
        scale = _uniform(*config.resize, rng) * self._size / min(height, width)
        return lambda: scaled_crop(height, width, scale, self._size, rng)

    def _needs_no_resize(self, crop: Crop, source: tuple[int, int]) -> bool:
        whole = crop.top == int(crop.top) and crop.left == int(crop.left)
        inside = crop.top + crop.height <= source[0] and crop.left + crop.width <= source[1]
        return whole and inside and (crop.height, crop.width) == (self._size, self._size)

    def _cut(self, image: Image.Image, crop: Crop, source: tuple[int, int]) -> Image.Image:
        """Crop and resize in one step. Flipping the small view instead of the large image gives the same pixels."""
        inside, size = self._inside(crop, source)
        box = _box(inside, source, image)
        if (box[2] - box[0], box[3] - box[1]) == size and box[0].is_integer() and box[1].is_integer():
            view = image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))  # resizing gives the same pixels
        else:
            view = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return ImageOps.mirror(view) if crop.flip else view

    def _cut_mask(self, mask: Image.Image, crop: Crop) -> NDArray[np.uint8]:
        """Crop and resize as `_cut` does, without mixing classes."""
        inside, size = self._inside(crop, (mask.height, mask.width))
        view = mask.resize(size, Image.Resampling.NEAREST, box=_box(inside, (mask.height, mask.width), mask))
        mask_HW = np.full((self._size, self._size), NO_CLASS, dtype=np.uint8)
        mask_HW[: size[1], : size[0]] = np.asarray(ImageOps.mirror(view) if crop.flip else view)
        return mask_HW

    def _inside(self, crop: Crop, source: tuple[int, int]) -> tuple[Crop, tuple[int, int]]:
        """Return what of a crop lies inside of the source, and how many columns and rows of the view show it."""
        height, width = min(crop.height, source[0] - crop.top), min(crop.width, source[1] - crop.left)
        columns, rows = round(self._size * width / crop.width), round(self._size * height / crop.height)
        return Crop(crop.top, crop.left, height, width, crop.flip), (columns, rows)

    def _recolour(self, cut: Pixels | Image.Image, view: int, rng: random.Random) -> Pixels | Image.Image:
        config = self._config
        if self._rand_augment is not None:
            cut = self._rand_augment(_as_image(cut), rng.getrandbits(64))
        if rng.random() < config.color_jitter_p:
            cut = jitter(_as_image(cut), config.color_jitter, rng)
        if rng.random() < config.grayscale:
            cut = _as_image(cut).convert("L").convert("RGB")
        if rng.random() < per_view(config.blur, view):
            sigma = _uniform(*BLUR_SIGMA, rng) * self._size / BLUR_REFERENCE_SIZE
            cut = _as_image(cut).filter(ImageFilter.GaussianBlur(sigma))
        if rng.random() < per_view(config.solarize, view):
            cut = ImageOps.solarize(_as_image(cut), 128)
        return cut


def _box(crop: Crop, source: tuple[int, int], image: Image.Image) -> tuple[float, float, float, float]:
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


def _decoded(image: Image.Image, shrink: int) -> Image.Image:
    """Decode to RGB, at 1/shrink of the size where the format allows that."""
    with decoding():
        image.draft("RGB", (max(1, image.width // shrink), max(1, image.height // shrink)))
        return on_white(image)


def _cut_out(pixels: Pixels, crop: Crop) -> Pixels:
    """Cut out a crop of the size of the view, which is not resized."""
    left = int(pixels.shape[1] - crop.left - crop.width if crop.flip else crop.left)
    top, height, width = int(crop.top), int(crop.height), int(crop.width)
    cut = pixels[top : top + height, left : left + width]
    return cut[:, ::-1] if crop.flip else cut


def _as_image(cut: Pixels | Image.Image) -> Image.Image:
    return cut if isinstance(cut, Image.Image) else Image.fromarray(np.ascontiguousarray(cut))


def per_view(values: Sequence[float], view: int) -> float:
    """Return the view's value of a list whose last value serves all further views."""
    return values[min(view, len(values) - 1)]


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw the top, left, height and width of a crop with a random share of the area and a random shape.

    Where no draw fits the image, the largest centred crop of an allowed shape.
    """
    for _ in range(CROP_ATTEMPTS):
        area = height * width * _uniform(*scale, rng)
        shape = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1]), rng))
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


def largest_share(mask_HW: NDArray[np.uint8]) -> float:
    """Return the share that the most frequent class has of the pixels with a class; 1 where none has."""
    counts = np.bincount(mask_HW.ravel(), minlength=256)[:NO_CLASS]
    return float(counts.max() / max(1, counts.sum())) if counts.any() else 1.0


def jitter(image: Image.Image, strength: tuple[float, float, float, float], rng: random.Random) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order."""
    order = sorted(range(4), key=lambda _: rng.random())
    for which in order:
        amount = strength[which]
        if not amount:
            continue
        if which == 3:
            image = shift_hue(image, _uniform(-amount, amount, rng))
            continue
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
        image = enhance(image).enhance(_uniform(max(0.0, 1 - amount), 1 + amount, rng))
    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn all hues by a share of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    steps = round(turns * 256)
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _uniform(low: float, high: float, rng: random.Random) -> float:
    return low + (high - low) * rng.random()
