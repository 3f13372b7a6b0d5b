"""Detections and ground truth of images: validation, and matching as in COCO and LVIS."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import Categories
from m3i_scale.data.instances import Instances, Rle
from m3i_scale.errors import ConfigError, DataError

Form = Literal["coco", "lvis"]
"""Rules for counting."""
Kind = Literal["box", "mask"]
"""Type of region to compare."""
PER_IMAGE = {"coco": 100, "lvis": 300}
"""Maximum number of counted predictions per image, by score: in COCO per class, in LVIS over all classes."""
EVERY_AREA = (0.0, 1e10)


class Prediction(TypedDict):
    """Detections in one image, in any order."""

    boxes: NDArray[np.floating]
    """x1, y1, x2, y2 in pixels of the image: (n, 4)."""
    scores: NDArray[np.floating]
    labels: NDArray[np.integer]
    """Indices into the categories."""
    masks: list[Rle] | None


@dataclass(frozen=True)
class DetectionSet:
    """Images of a dataset, unique and sorted by id, with their predictions."""

    truths: list[Instances]
    predictions: list[Prediction]
    """For the same images, sorted by score; for LVIS only the counted ones."""
    categories: Categories
    order: NDArray[np.int64]
    """Index of each image in the original order."""

    @cached_property
    def kinds(self) -> list[Kind]:
        """Return the comparable region types: masks only if ground truth and all predictions have them."""
        masked = all(mask is not None for truth in self.truths for mask in truth.segmentations)
        both = masked and all(one["masks"] is not None for one in self.predictions)
        return ["box", "mask"] if both else ["box"]

    @cached_property
    def objects(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return image index, category and area of all detectable objects: (G) each; crowds are excluded."""
        real = np.concatenate([~truth.crowds_N for truth in self.truths])
        image_N = np.repeat(np.arange(len(self.truths), dtype=np.int64), [len(truth) for truth in self.truths])
        labels_N = np.concatenate([truth.labels_N for truth in self.truths])
        areas_N = np.concatenate([truth.areas_N for truth in self.truths])
        return image_N[real], labels_N[real], areas_N[real]


def check_library(where: str = "detection") -> None:
    """Check that the library for overlaps and masks is installed; an error names the caller, `where`."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ConfigError(
            "faster-coco-eval, which evaluates boxes and masks, is not installed",
            where=where,
            fix="run `pip install -e '.[detection]'`",
        )


def sort_images(images: Iterable[tuple[Instances, Prediction]], categories: Categories) -> DetectionSet:
    """Sort the images of a dataset by id and check that they can be evaluated; `images` may be in any order."""
    check_library()
    given = list(images)
    order = sorted(range(len(given)), key=lambda place: given[place][0].image_id)
    truths = [given[place][0] for place in order]
    for truth, following in pairwise(truths):
        if truth.image_id == following.image_id:
            raise DataError(
                "duplicate image in the data",
                where=f"image {truth.image_id}",
                why="its objects would count as false positives when they are detected again",
                fix="remove one of the two",
            )
    predictions = [sorted_by_score(given[place][1], given[place][0], categories) for place in order]
    found = DetectionSet(truths, predictions, categories, np.asarray(order, dtype=np.int64))
    if not len(found.objects[0]):
        raise DataError(
            "no image has an annotated object",
            where="ground truth",
            why="average precision is then undefined",
            fix="use data with annotated objects",
        )
    image_of = {mask is not None: truth.image_id for truth in truths for mask in truth.segmentations}
    if len(image_of) == 2 and any(one["masks"] is not None for one in predictions):
        raise DataError(
            "the model predicts masks, so all objects need a mask, but some have none",
            where=f"image {image_of[False]}",
            fix="add the masks, or make the shards again from annotations with masks",
        )
    return found


def sorted_by_score(given: Prediction, truth: Instances, categories: Categories) -> Prediction:
    """Sort a prediction by score. For LVIS, select the 300 best, then drop categories that were not annotated."""
    boxes_D4 = np.asarray(given["boxes"], dtype=np.float64).reshape(-1, 4)
    scores_D = np.asarray(given["scores"], dtype=np.float64)
    labels_D = np.asarray(given["labels"], dtype=np.int64)
    if not (np.isfinite(boxes_D4).all() and np.isfinite(scores_D).all()):
        raise DataError(
            "a predicted box or score is not finite",
            where=f"image {truth.image_id}",
            fix="use an earlier checkpoint of the run",
        )
    best_D, masks = np.argsort(-scores_D, kind="stable"), given["masks"]
    if categories.format == "lvis":
        best_D = best_D[: PER_IMAGE["lvis"]]
        looked_for = [*truth.labels_N, *(truth.negative or ())]
        best_D = best_D[np.isin(labels_D[best_D], np.asarray(looked_for, dtype=np.int64))]
    return {
        "boxes": boxes_D4[best_D],
        "scores": scores_D[best_D],
        "labels": labels_D[best_D],
        "masks": None if masks is None else [masks[place] for place in best_D],
    }


def ious(truth: Instances, prediction: Prediction, kind: Kind) -> NDArray[np.float64]:
    """Return the IoU of every prediction and object: (D, G); for a crowd, the fraction of the prediction inside it."""
    from faster_coco_eval.core import mask

    if not len(truth) or not len(prediction["scores"]):
        return np.zeros((len(prediction["scores"]), len(truth)))
    crowds = truth.crowds_N.astype(int).tolist()
    if kind == "box":
        boxes_D4 = prediction["boxes"]
        sized_D4 = np.concatenate([boxes_D4[:, :2], boxes_D4[:, 2:] - boxes_D4[:, :2]], axis=1)
        return np.asarray(mask.iou(sized_D4.tolist(), truth.boxes_N4.tolist(), crowds), dtype=np.float64)
    return np.asarray(mask.iou(prediction["masks"], truth.segmentations, crowds), dtype=np.float64)


def areas(prediction: Prediction, kind: Kind) -> NDArray[np.float64]:
    """Return the area of every predicted box or mask in square pixels: (D)."""
    from faster_coco_eval.core import mask

    if kind == "mask":
        return np.asarray(mask.area(prediction["masks"]) if prediction["masks"] else [], dtype=np.float64)
    boxes_D4 = prediction["boxes"]
    return np.asarray((boxes_D4[:, 2] - boxes_D4[:, 0]) * (boxes_D4[:, 3] - boxes_D4[:, 1]), dtype=np.float64)


@dataclass(frozen=True)
class Matches:
    """Matches between the predictions and objects of an image, for every IoU threshold."""

    found_TD: NDArray[np.int64]
    """Index of the matched object; −1: none."""
    ignored_TD: NDArray[np.bool_]
    """Whether a prediction is ignored: it exceeds the maximum number, is matched to a crowd or to an object outside the
    range of areas, or is unmatched and outside this range or of a class that is not exhaustively annotated."""


def match(
    truth: Instances,
    prediction: Prediction,
    ious_DG: NDArray[np.float64],
    thresholds: Sequence[float] | NDArray[np.float64],
    form: Form,
    areas_D: NDArray[np.float64] | None = None,
    limits: tuple[float, float] = EVERY_AREA,
) -> Matches:
    """Return the matches of an image as COCO defines them. In order of score, each prediction matches the remaining
    object of its class with the highest IoU.

    Args:
        prediction: in order of the scores.
        ious_DG: result of `ious`.
        areas_D: result of `areas`; None: predictions of any area count.
        limits: minimum and maximum area of the objects that count.
    """
    labels_D, crowd_G = np.asarray(prediction["labels"], dtype=np.int64), truth.crowds_N
    ignored_G = crowd_G | (truth.areas_N < limits[0]) | (truth.areas_N > limits[1])
    beyond_D = np.zeros(len(labels_D), dtype=bool)
    if form == "coco":
        beyond_D = _rank(labels_D) >= PER_IMAGE["coco"]
    alike_DG = labels_D[:, None] == truth.labels_N
    ious_DG = np.where(alike_DG & ~beyond_D[:, None], ious_DG, -1.0)
    bars_T1 = np.minimum(np.asarray(thresholds, dtype=np.float64), 1 - 1e-10)[:, None]
    found_TD = np.full((len(bars_T1), len(labels_D)), -1, dtype=np.int64)
    taken_TG = np.zeros((len(bars_T1), len(truth)), dtype=bool)
    for number in np.flatnonzero(ious_DG.max(axis=1, initial=-1.0) >= bars_T1.min()):
        near_TG = (ious_DG[number] >= bars_T1) & ~taken_TG
        real_TG = near_TG & ~ignored_G  # an ignored object only matches predictions without another match
        near_TG = np.where(real_TG.any(axis=1, keepdims=True), real_TG, near_TG)
        most_T = np.where(near_TG, ious_DG[number], -2.0)[:, ::-1].argmax(axis=1)  # in a tie, the last object wins
        best_T = len(truth) - 1 - most_T
        hits_T = np.flatnonzero(near_TG.any(axis=1))
        found_TD[hits_T, number] = best_T[hits_T]
        taken_TG[hits_T, best_T[hits_T]] = ~crowd_G[best_T[hits_T]]
    unsure_D = np.zeros(len(labels_D), dtype=bool)
    if form == "lvis":
        unsure_D = np.isin(labels_D, np.asarray(truth.not_exhaustive or (), dtype=np.int64))
    if areas_D is not None:
        unsure_D |= (areas_D < limits[0]) | (areas_D > limits[1])
    return Matches(found_TD, beyond_D | np.append(ignored_G, False)[found_TD] | ((found_TD < 0) & unsure_D))


def _rank(labels_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of previous entries with the same label."""
    order_D = np.argsort(labels_D, kind="stable")
    starts = np.flatnonzero(np.diff(labels_D[order_D], prepend=-1))
    rank_D = np.empty_like(labels_D)
    lengths = np.diff(starts, append=len(labels_D))
    rank_D[order_D] = np.arange(len(labels_D)) - np.repeat(starts, lengths)
    return rank_D
