"""Boxes, classes and masks of the objects in a view, from the annotations of its image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from m3i_scale.data.crops import Crop
from m3i_scale.data.instances import Instances
from m3i_scale.data.reader import BadSampleError
from m3i_scale.defaults import MASK_SIDE

_HALF = 128


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
