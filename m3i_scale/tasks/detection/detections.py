"""Detections and ground truth of images, with validation of both."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import Categories
from m3i_scale.data.instances import Instances
from m3i_scale.errors import ConfigError, DataError

Form = Literal["coco", "lvis"]
"""Rules for counting."""
Kind = Literal["box", "mask"]
"""Type of region to compare."""
PER_IMAGE = {"coco": 100, "lvis": 300}
"""Maximum number of counted predictions per image, by score: in COCO per class, in LVIS over all classes."""


class Rle(TypedDict):
    """COCO mask in compressed RLE."""

    size: list[int]
    """Height and width of the image."""
    counts: str | bytes


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
    def objects(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return image index and category of all detectable objects: (G) each; crowds are excluded."""
        real = np.concatenate([~truth.crowds_N for truth in self.truths])
        image_N = np.repeat(np.arange(len(self.truths)), [len(truth) for truth in self.truths])
        return image_N[real], np.concatenate([truth.labels_N for truth in self.truths])[real]


def check_library(where: str = "detection") -> None:
    """Check that the library for detection metrics is installed; an error names the caller, `where`."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ConfigError(
            "average precision and masks of objects are faster-coco-eval's, which is not installed",
            where=where,
            fix="pip install 'm3i-scale[detection]'",
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
                "an image is in the data twice",
                where=f"image {truth.image_id}",
                why="it would count twice, and every object that is found again would count as false",
            )
    predictions = [sorted_by_score(given[place][1], given[place][0], categories) for place in order]
    found = DetectionSet(truths, predictions, categories, np.asarray(order, dtype=np.int64))
    if not len(found.objects[0]):
        raise DataError(
            "no image has an object that could be found", where="the truth", why="average precision is not defined then"
        )
    image_of = {mask is not None: truth.image_id for truth in truths for mask in truth.segmentations}
    if len(image_of) == 2 and any(one["masks"] is not None for one in predictions):
        raise DataError(
            "some objects have a mask and others have none, and masks are predicted", where=f"image {image_of[False]}"
        )
    return found


def sorted_by_score(given: Prediction, truth: Instances, categories: Categories) -> Prediction:
    """Sort a prediction by score. For LVIS, select the 300 best, then drop categories that were not annotated."""
    boxes_D4 = np.asarray(given["boxes"], dtype=np.float64).reshape(-1, 4)
    scores_D = np.asarray(given["scores"], dtype=np.float64)
    labels_D = np.asarray(given["labels"], dtype=np.int64)
    if not (np.isfinite(boxes_D4).all() and np.isfinite(scores_D).all()):
        raise DataError("a predicted box or score is not a finite number", where=f"image {truth.image_id}")
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
