"""Random and center crops, the classes and objects in a crop, and timm's RandAugment."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from m3i_scale.data.instances import Instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.defaults import MASK_SIDE, NO_CLASS

CROP_ATTEMPTS = 10
_HALF = 128
_TRANSLATED = 0.45
"""Maximum translation of RandAugment as a fraction of the image size, as in timm's `create_transform`."""


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


@dataclass(frozen=True)
class CenterCrop:
    """Transform of a standard image processor: resize the full image, then crop the center square."""

    size: int
    """Size of the crop in pixels."""
    resize_size: int
    """Short side of the resized image, at least `size`."""
    stretch: bool = False
    """Resize both sides to `resize_size`."""
    resample: Image.Resampling = Image.Resampling.BICUBIC
    round_offset: bool = False
    """Round half a pixel at the start of the crop to an even number, like torchvision; False: down."""

    def locate(self, height: int, width: int) -> Crop:
        """Return the crop of an image. The long side is rounded down, and the crop starts at an integer pixel of the
        resized image (`get_resize_output_image_size` and `center_crop` of transformers)."""
        size, side, short = self.size, self.resize_size, min(height, width)
        rows, columns = (side, side) if self.stretch else (int(side * height / short), int(side * width / short))
        rounded = round if self.round_offset else int
        top, left = rounded((rows - size) / 2), rounded((columns - size) / 2)
        return Crop(top * height / rows, left * width / columns, size * height / rows, size * width / columns, False)


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


@dataclass(frozen=True)
class Objects:
    """The N objects of a view."""

    boxes_N4: NDArray[np.float32]
    """x1, y1, x2, y2 in pixels of the view."""
    labels_N: NDArray[np.int64]
    masks_NMM: NDArray[np.uint8]
    """1 inside: each object's mask, cropped to its box and resized; (N, 0, 0) if masks are not read."""


def objects_in(instances: Instances, crop: Crop, size: int, *, masks: bool) -> Objects:
    """Return the objects of a view, without crowds. `crop` is in pixels of the flipped image, `size` is the view size.

    A box that the crop cuts is recomputed from the remaining mask, as in detectron2 (`recompute_boxes`). Without
    `masks`, the box is clipped. With `masks`, an object without a mask raises `BadSampleError`.
    """
    numbers = instances.to_train()
    corners_N4, width = instances.corners()[numbers], instances.width
    if crop.flip:
        corners_N4 = corners_N4[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0]
    start, end = np.array([crop.left, crop.top] * 2), np.array([crop.left + crop.width, crop.top + crop.height] * 2)
    shown_N4 = corners_N4.clip(start, end)
    cut_N = (shown_N4 != corners_N4).any(axis=1)
    boxes, labels, cut_masks = [], [], []
    for number, shown_4, is_cut in zip(numbers, shown_N4, cut_N, strict=True):
        mask = _mask_of(instances, int(number), flip=crop.flip) if masks else None
        box_4 = shown_4 if mask is None or not is_cut else _extent(mask, shown_4)
        if not (box_4[2:] > box_4[:2]).all():
            continue
        boxes.append(box_4)
        labels.append(instances.labels_N[number])
        if mask is not None:
            cut_masks.append(_mask_in(mask, box_4))
    scale = np.array([size / crop.width, size / crop.height] * 2)
    return Objects(
        ((np.array(boxes).reshape(-1, 4) - start) * scale).astype(np.float32),
        np.array(labels, dtype=np.int64),
        np.array(cut_masks, dtype=np.uint8).reshape(len(boxes), *((MASK_SIDE,) * 2 if masks else (0, 0))),
    )


def _mask_of(instances: Instances, number: int, *, flip: bool) -> Image.Image:
    mask_HW = instances.mask(number)
    if mask_HW is None:
        raise BadSampleError("an object has no mask", f"annotation {instances.ids_N[number]}")
    mask = Image.fromarray(mask_HW * 255)
    return ImageOps.mirror(mask) if flip else mask


def _extent(mask: Image.Image, box_4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bounding box of a mask within a box; a box without area if that part of the mask is empty."""
    left, top = (int(edge) for edge in np.floor(box_4[:2]))
    right, bottom = (int(edge) for edge in np.ceil(box_4[2:]))
    x1, y1, x2, y2 = mask.crop((left, top, right, bottom)).getbbox() or (0, 0, 0, 0)
    return np.concatenate((np.maximum((left + x1, top + y1), box_4[:2]), np.minimum((left + x2, top + y2), box_4[2:])))


def _mask_in(mask: Image.Image, box_4: NDArray[np.float64]) -> NDArray[np.uint8]:
    x1, y1, x2, y2 = (float(value) for value in box_4)
    soft = mask.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR, box=(x1, y1, x2, y2))
    inside: NDArray[np.uint8] = (np.asarray(soft) >= _HALF).astype(np.uint8)
    return inside


class _Random(threading.local):
    """Replacement for the module `random` that draws from the thread's generator, if there is one.

    With `data.num_workers: 0`, a thread of the training process creates the views. If both threads drew from the global
    generators, as in timm, each would advance the generator of the other.
    """

    generator: random.Random | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(random if self.generator is None else self.generator, name)


_random = _Random()


def _patched_timm() -> Any:
    """Return timm's module of operations, with `_random` as their generator. Workers unpickle a `RandAugment`, so its
    constructor cannot set it for them."""
    from timm.data import auto_augment  # an optional dependency; tasks report if it is missing

    auto_augment.random = _random
    return auto_augment


class RandAugment:
    """timm's RandAugment with an explicit seed.

    Args:
        config: in timm's format, e.g. rand-m9-mstd0.5-inc1.
        image_size: view size in pixels.
        fill: fill color, from 0 to 255.
    """

    def __init__(self, config: str, image_size: int, fill: tuple[int, ...]) -> None:
        settings = {
            "translate_const": int(image_size * _TRANSLATED),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        self._transform = _patched_timm().rand_augment_transform(config, settings)
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Return an augmented RGB image; the same seed gives the same image."""
        _patched_timm()  # in this process
        transform = self._transform
        # Same as in timm's transform, which does not accept a generator.
        operations = np.random.RandomState(seed % 2**32).choice(
            transform.ops, transform.num_layers, replace=transform.choice_weights is None, p=transform.choice_weights
        )
        _random.generator = random.Random(seed)
        try:
            for operation in operations:
                image = operation(image)
        finally:
            _random.generator = None
        return image


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """Keep `bits_to_keep` bits per channel. For 0 bits, which timm keeps at full strength, return a black image, as in
    published results: current Pillow raises an error."""
    if bits_to_keep < 1:
        return Image.new("RGB", image.size)
    kept: Image.Image = _patched_timm().posterize(image, bits_to_keep, **settings)
    return kept
