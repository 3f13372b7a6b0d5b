"""Match what a detector predicts in an image with the objects that are there, as COCO and LVIS do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import DataError
from m3i_scale.evaluate.detections import PER_IMAGE, Form, GroundTruth, Instance, Kind, Prediction, Rle


def mask_of(one: Instance, truth: GroundTruth) -> Rle:
    """Return the mask of an object, compressed and as large as its image."""
    from faster_coco_eval.core import mask

    size, shape = [truth["height"], truth["width"]], one["segmentation"] or [[]]
    try:
        found = cast(Rle, mask.segmToRle(shape, truth["width"], truth["height"]))
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise DataError(f"the mask of an object cannot be read: {error}", where=f"image {truth['image_id']}") from None
    if list(found["size"]) != size:
        raise DataError(
            f"the mask of an object is {found['size']}, and its image {size}", where=f"image {truth['image_id']}"
        )
    return found


def overlaps(truth: GroundTruth, prediction: Prediction, kind: Kind) -> NDArray[np.float64]:
    """Return how much of their union every prediction and object share: (D, G); with a crowd, how much of itself."""
    from faster_coco_eval.core import mask

    objects = truth["annotations"]
    if not objects or not len(prediction["scores"]):
        return np.zeros((len(prediction["scores"]), len(objects)))
    crowds = [int(one["iscrowd"]) for one in objects]
    if kind == "box":
        boxes_D4 = prediction["boxes"]
        sized_D4 = np.concatenate([boxes_D4[:, :2], boxes_D4[:, 2:] - boxes_D4[:, :2]], axis=1)
        return np.asarray(mask.iou(sized_D4.tolist(), [one["bbox"] for one in objects], crowds), dtype=np.float64)
    masks = [mask_of(one, truth) for one in objects]
    return np.asarray(mask.iou(prediction["masks"], masks, crowds), dtype=np.float64)


@dataclass(frozen=True)
class Matches:
    """Says which predictions of an image find which of its objects, at every threshold of overlap."""

    found_TD: NDArray[np.int64]
    """Index of the object; −1: none."""
    ignored_TD: NDArray[np.bool_]
    """Whether a prediction counts for nothing: it is beyond the number that counts, in a crowd, or of a class of which
    not every object is there."""


def match(
    truth: GroundTruth,
    prediction: Prediction,
    ious_DG: NDArray[np.float64],
    thresholds: Sequence[float] | NDArray[np.float64],
    form: Form,
    *,
    by_class: bool = True,
) -> Matches:
    """Return the matches of an image as COCO defines them: the best prediction first, each finds the object that it
    overlaps most of those that are left.

    Args:
        truth: of the image.
        prediction: in order of the scores.
        ious_DG: of `overlaps`.
        thresholds: of overlap that count as found.
        form: whose rules hold.
        by_class: an object is found by predictions of its class alone.
    """
    objects, labels_D = truth["annotations"], np.asarray(prediction["labels"], dtype=np.int64)
    classes_G = np.asarray([one["category"] for one in objects], dtype=np.int64)
    crowd_G = np.asarray([one["iscrowd"] for one in objects], dtype=bool)
    beyond_D = np.zeros(len(labels_D), dtype=bool)
    if form == "coco":
        beyond_D = _rank(labels_D if by_class else 0 * labels_D) >= PER_IMAGE["coco"]
    alike_DG = (labels_D[:, None] == classes_G) | (not by_class)
    ious_DG = np.where(alike_DG & ~beyond_D[:, None], ious_DG, -1.0)
    bars_T1 = np.minimum(np.asarray(thresholds, dtype=np.float64), 1 - 1e-10)[:, None]
    found_TD = np.full((len(bars_T1), len(labels_D)), -1, dtype=np.int64)
    taken_TG = np.zeros((len(bars_T1), len(objects)), dtype=bool)
    for number in np.flatnonzero(ious_DG.max(axis=1, initial=-1.0) >= bars_T1.min()):
        near_TG = (ious_DG[number] >= bars_T1) & ~taken_TG
        real_TG = near_TG & ~crowd_G  # a crowd is left to those that find nothing else
        near_TG = np.where(real_TG.any(axis=1, keepdims=True), real_TG, near_TG)
        most_T = np.where(near_TG, ious_DG[number], -2.0)[:, ::-1].argmax(axis=1)  # of equals the last
        best_T = len(objects) - 1 - most_T
        hits_T = np.flatnonzero(near_TG.any(axis=1))
        found_TD[hits_T, number] = best_T[hits_T]
        taken_TG[hits_T, best_T[hits_T]] = ~crowd_G[best_T[hits_T]]
    in_crowd_TD = np.append(crowd_G, False)[found_TD]
    unsure_D = np.zeros(len(labels_D), dtype=bool)
    if form == "lvis":
        unsure_D = np.isin(labels_D, np.asarray(truth.get("not_exhaustive_category_ids", []), dtype=np.int64))
    return Matches(found_TD, beyond_D | in_crowd_TD | ((found_TD < 0) & unsure_D))


def _rank(labels_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many before it have the same label."""
    order_D = np.argsort(labels_D, kind="stable")
    starts = np.flatnonzero(np.diff(labels_D[order_D], prepend=-1))
    rank_D = np.empty_like(labels_D)
    lengths = np.diff(starts, append=len(labels_D))
    rank_D[order_D] = np.arange(len(labels_D)) - np.repeat(starts, lengths)
    return rank_D
