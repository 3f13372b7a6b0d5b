"""Augmented views of images, with the crop geometry that position embeddings of targets need.

The order is flip, crop and resize (one step from the decoded image to the view), RandAugment, color jitter, grayscale,
blur, solarize. The part of a crop beyond the edge of the image is filled last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from m3i_scale.config import AugmentConfig, DistortionConfig
from m3i_scale.config.data import Reads
from m3i_scale.config.views import ViewSpecs, each_view, view_sizes
from m3i_scale.data.augment import (
    CROP_ATTEMPTS,
    CenterCrop,
    Crop,
    Objects,
    RandAugment,
    box_of,
    largest_share,
    objects_in,
    random_crop,
    scaled_crop,
    uniform,
)
from m3i_scale.data.images import on_white, orientation, upright, upright_size
from m3i_scale.data.instances import Instances, check_turned
from m3i_scale.data.samples import decoding, quick_pixels
from m3i_scale.defaults import MAX_IMAGE_PIXELS, NO_CLASS

BLUR_SIGMA = (0.1, 2.0)
"""Standard deviation of the blur in pixels of a 224-pixel view; scaled in proportion for other sizes."""
BLUR_REFERENCE_SIZE = 224

Pixels = NDArray[np.uint8]
"""(H, W, 3)."""


@dataclass(frozen=True)
class Views:
    """The views of one image, with their crops."""

    pixels_VCHW: NDArray[np.uint8]
    """Views (global crops) of the backbone's size."""
    small_VCHW: NDArray[np.uint8]
    """Smaller views (local crops), which come last; (0, 3, 0, 0) if there are none."""
    crops: list[Crop]
    """Crops of all views, in order."""
    size: tuple[int, int]
    """Height and width of the source image in pixels."""
    mask_HW: NDArray[np.uint8] | None = None
    """Class of every pixel of the first view, if the image has a mask."""
    objects: Objects | None = None
    """Objects in the first view, if the image has boxes."""


class ViewMaker:
    """Transform from an image to its views.

    Args:
        config: kinds and strengths of augmentation.
        views: number of views per image, or the spec of each view.
        image_size: view size of the backbone in pixels.
        augment: False: center crop and pixels of a standard image processor, without randomness.
        center: center crop without augmentation; None: resize the short side to `image_size` (bicubic).
        reads: annotation to read. For boxes without augmentation, the view is the full image, with its long side
            resized to the view size.
        mean: pixel mean from 0 to 1; the fill color beyond the edge of an image.
        stretch: resize a full image to the view size on both sides.
    """

    def __init__(
        self,
        config: DistortionConfig,
        *,
        views: ViewSpecs,
        image_size: int,
        augment: bool,
        center: CenterCrop | None = None,
        reads: Reads = "labels",
        mean: tuple[float, float, float] = AugmentConfig().mean,
        stretch: bool = False,
    ) -> None:
        self.resized: Callable[..., ViewMaker] = partial(
            ViewMaker, config, views=views, augment=augment, reads=reads, mean=mean, stretch=stretch
        )
        """Creates a maker with another `image_size`, and the center crop of this size."""
        self._fill = tuple(round(255 * channel) for channel in mean)
        self._rand_augment: RandAugment | None = None
        if augment and config.rand_augment is not None:
            self._rand_augment = RandAugment(config.rand_augment, image_size, self._fill)
        self._configs = [spec.distortions(config) for spec in each_view(views)]
        self._sizes = view_sizes(views, image_size)
        self._size = image_size
        self._augment = augment
        self._center = center or CenterCrop(image_size, image_size)
        self._reads = reads
        self._stretch = stretch

    def __call__(
        self, image: Image.Image, seed: int, mask: Image.Image | None = None, instances: Instances | None = None
    ) -> Views:
        """Return the views of an opened, not yet decoded image; the same seed gives the same views.

        `mask` (the class of every pixel) and `instances` are those of the stored image. They are cropped like the first
        view; EXIF data also rotates the mask.

        Raise `BadSampleError` if the image does not decode, or if it has instances and its EXIF data rotates it.
        """
        lies = orientation(image)
        if instances is not None:
            check_turned(lies)
        width, height = upright_size(image.size, lies)
        rng = random.Random(seed)
        mask = None if mask is None else upright(mask, lies)
        crops = [
            self._crop(config, size, (height, width), rng, None if view else mask)
            for view, (config, size) in enumerate(zip(self._configs, self._sizes, strict=True))
        ]
        sides = [(min(crop.height, crop.width), size) for crop, size in zip(crops, self._sizes, strict=True)]
        # In training, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, never below the resolution that any crop needs.
        # This changes pixels, so evaluation decodes the full size, like an exported image processor.
        factors = (1, 2, 4, 8) if self._augment else (1,)
        shrink = max((by for by in factors if all(side >= by * size for side, size in sides)), default=1)
        quick = quick_pixels(image) if shrink == 1 else None
        if quick is not None and lies != 1:
            quick = np.asarray(upright(Image.fromarray(quick), lies))
        rgb: Image.Image | None = None
        small = [size for size in self._sizes if size != self._size]
        side = small[0] if small else 0
        pixels_VCHW = np.empty((len(self._sizes) - len(small), 3, self._size, self._size), dtype=np.uint8)
        small_VCHW = np.empty((len(small), 3, side, side), dtype=np.uint8)
        pixels = [*pixels_VCHW, *small_VCHW]
        for view, (crop, size) in enumerate(zip(crops, self._sizes, strict=True)):
            cut: Pixels | Image.Image
            if quick is not None and _needs_no_resize(crop, size, (height, width)):
                cut = _cut_out(quick, crop)
            else:
                if rgb is None:
                    rgb = upright(_decoded(image, shrink), lies) if quick is None else Image.fromarray(quick)
                exact = not self._augment and size == self._size
                cut = cut_and_resize(rgb, crop, size, (height, width), exact=exact, resample=self._center.resample)
            cut = self._recolour(cut, view, rng) if self._augment else cut
            shown = np.asarray(cut)
            rows, columns = shown.shape[:2]
            if min(rows, columns) < size:
                pixels[view][:] = np.array(self._fill)[:, None, None]
            pixels[view][:, :rows, :columns] = shown.transpose(2, 0, 1)
        mask_HW = None if mask is None else cut_mask(mask, crops[0], self._size)
        objects = None
        if instances is not None:
            objects = objects_in(instances, crops[0], self._size, masks=self._reads == "boxes_and_masks")
        return Views(pixels_VCHW, small_VCHW, crops, (height, width), mask_HW, objects)

    def _crop(
        self, config: DistortionConfig, size: int, source: tuple[int, int], rng: random.Random, mask: Image.Image | None
    ) -> Crop:
        """Draw a crop; redraw it while one class covers too much of the mask."""
        height, width = source
        if not self._augment and self._reads in ("boxes", "boxes_and_masks"):
            if self._stretch:
                return Crop(0, 0, height, width, False)
            return Crop(*scaled_crop(height, width, size / max(height, width), size, rng), False)
        if not self._augment:
            return self._center.locate(height, width)
        flip = rng.random() < config.flip
        draw = _draw(config, size, height, width, rng)
        crop = Crop(*draw(), flip)
        if mask is not None and config.cat_max_ratio is not None:
            for _ in range(CROP_ATTEMPTS - 1):
                if largest_share(cut_mask(mask, crop, size)) <= config.cat_max_ratio:
                    break
                crop = Crop(*draw(), flip)
        return crop

    def _recolour(self, cut: Pixels | Image.Image, view: int, rng: random.Random) -> Pixels | Image.Image:
        config = self._configs[view]
        if self._rand_augment is not None:
            cut = self._rand_augment(_as_image(cut), rng.getrandbits(64))
        if rng.random() < config.color_jitter_p:
            cut = jitter(_as_image(cut), config.color_jitter, rng)
        if rng.random() < config.grayscale:
            cut = _as_image(cut).convert("L").convert("RGB")
        if rng.random() < per_view(config.blur, view):
            # Relative to the backbone's size for small views too, as in multi-crop methods.
            sigma = uniform(*BLUR_SIGMA, rng) * self._size / BLUR_REFERENCE_SIZE
            cut = _as_image(cut).filter(ImageFilter.GaussianBlur(sigma))
        if rng.random() < per_view(config.solarize, view):
            cut = ImageOps.solarize(_as_image(cut), 128)
        return cut


def _draw(
    config: DistortionConfig, size: int, height: int, width: int, rng: random.Random
) -> Callable[[], tuple[float, float, float, float]]:
    """Return a sampler of crops as (top, left, height, width). The scale of scale jitter is drawn once, here."""
    if config.scale_jitter is None:
        return lambda: random_crop(height, width, config.crop_scale, config.crop_ratio, rng)
    side = (max if config.scale_jitter_side == "long" else min)(height, width)
    scale = uniform(*config.scale_jitter, rng) * size / side
    return lambda: scaled_crop(height, width, scale, size, rng)


def _needs_no_resize(crop: Crop, size: int, source: tuple[int, int]) -> bool:
    whole = crop.top == int(crop.top) and crop.left == int(crop.left)
    inside = crop.top + crop.height <= source[0] and crop.left + crop.width <= source[1]
    return whole and inside and (crop.height, crop.width) == (size, size)


def cut_and_resize(
    image: Image.Image,
    crop: Crop,
    size: int,
    source: tuple[int, int],
    *,
    exact: bool = False,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Return the view of a crop, cropped and resized in one step. Flipping the view gives the same pixels as flipping
    the image, and is cheaper.

    Args:
        image: decoded, possibly at reduced size.
        crop: in pixels of the source.
        size: view size in pixels.
        source: height and width of the source.
        exact: resize the full image, then crop, as a standard image processor does. Otherwise only the crop is resized,
            after a box reduction of large images to about twice the size, which is faster. The faster way also applies
            to images above `MAX_IMAGE_PIXELS` once resized: a strip of 1,000,000 × 2 pixels would take 100 GB.
    """
    inside, shown = _inside(crop, size, source)
    rows, columns = round(size * source[0] / crop.height), round(size * source[1] / crop.width)
    if exact and rows * columns <= MAX_IMAGE_PIXELS:
        top, left = round(crop.top * rows / source[0]), round(crop.left * columns / source[1])
        resized = image.resize((columns, rows), resample)
        return resized.crop((left, top, left + shown[0], top + shown[1]))
    box = box_of(inside, source, image)
    if (box[2] - box[0], box[3] - box[1]) == shown and box[0].is_integer() and box[1].is_integer():
        view = image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))  # same pixels as resizing
    else:
        view = image.resize(shown, resample, box=box, reducing_gap=2.0)
    return ImageOps.mirror(view) if crop.flip else view


def cut_mask(mask: Image.Image, crop: Crop, size: int) -> NDArray[np.uint8]:
    """Crop and resize as `cut_and_resize` does, with nearest-neighbor sampling, so that classes do not mix."""
    inside, shown = _inside(crop, size, (mask.height, mask.width))
    view = mask.resize(shown, Image.Resampling.NEAREST, box=box_of(inside, (mask.height, mask.width), mask))
    mask_HW = np.full((size, size), NO_CLASS, dtype=np.uint8)
    mask_HW[: shown[1], : shown[0]] = np.asarray(ImageOps.mirror(view) if crop.flip else view)
    return mask_HW


def _inside(crop: Crop, size: int, source: tuple[int, int]) -> tuple[Crop, tuple[int, int]]:
    """Return the part of a crop inside the source, and its number of columns and rows in the view."""
    height, width = min(crop.height, source[0] - crop.top), min(crop.width, source[1] - crop.left)
    columns, rows = round(size * width / crop.width), round(size * height / crop.height)
    return Crop(crop.top, crop.left, height, width, crop.flip), (columns, rows)


def _decoded(image: Image.Image, shrink: int) -> Image.Image:
    """Decode to RGB, at 1/shrink of the size if the format supports it."""
    with decoding():
        image.draft("RGB", (max(1, image.width // shrink), max(1, image.height // shrink)))
        return on_white(image)


def _cut_out(pixels: Pixels, crop: Crop) -> Pixels:
    """Return the pixels of a crop that already has the view size, without resizing."""
    left = int(pixels.shape[1] - crop.left - crop.width if crop.flip else crop.left)
    top, height, width = int(crop.top), int(crop.height), int(crop.width)
    cut = pixels[top : top + height, left : left + width]
    return cut[:, ::-1] if crop.flip else cut


def _as_image(cut: Pixels | Image.Image) -> Image.Image:
    return cut if isinstance(cut, Image.Image) else Image.fromarray(np.ascontiguousarray(cut))


def per_view(values: Sequence[float], view: int) -> float:
    """Return the value for a view; the last value of the list applies to all further views."""
    return values[min(view, len(values) - 1)]


def jitter(image: Image.Image, strength: tuple[float, float, float, float], rng: random.Random) -> Image.Image:
    """Apply brightness, contrast, saturation and hue jitter in random order."""
    order = sorted(range(4), key=lambda _: rng.random())
    for which in order:
        amount = strength[which]
        if not amount:
            continue
        if which == 3:
            image = shift_hue(image, uniform(-amount, amount, rng))
            continue
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
        image = enhance(image).enhance(uniform(max(0.0, 1 - amount), 1 + amount, rng))
    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Rotate all hues by a fraction of the color wheel."""
    hue, saturation, value = image.convert("HSV").split()
    steps = round(turns * 256)
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
