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
from typing_extensions import NotRequired

from m3i_scale.data.categories import Categories
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


class Instance(TypedDict):
    """One ground-truth object."""

    id: int
    category: int
    """Index into the categories."""
    bbox: list[float]
    """x, y, width and height in pixels."""
    area: float
    iscrowd: int
    segmentation: NotRequired[Rle]


class GroundTruth(TypedDict):
    """Ground-truth objects of one image: the instances.json of a sample, with compressed masks."""

    image_id: int
    width: int
    height: int
    annotations: list[Instance]
    neg_category_ids: NotRequired[list[int]]
    """LVIS: categories known to be absent. Other categories without objects were not annotated."""
    not_exhaustive_category_ids: NotRequired[list[int]]
    """LVIS: categories that are not exhaustively annotated."""


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

    truths: list[GroundTruth]
    predictions: list[Prediction]
    """For the same images, sorted by score; for LVIS only the counted ones."""
    categories: Categories
    order: NDArray[np.int64]
    """Index of each image in the original order."""

    @cached_property
    def kinds(self) -> list[Kind]:
        """Return the comparable region types: masks only if ground truth and all predictions have them."""
        masked = all("segmentation" in one for truth in self.truths for one in truth["annotations"])
        both = masked and all(one["masks"] is not None for one in self.predictions)
        return ["box", "mask"] if both else ["box"]

    @cached_property
    def objects(self) -> list[tuple[int, Instance]]:
        """Return all detectable objects with their image index; crowds are excluded."""
        images = enumerate(self.truths)
        return [(number, one) for number, truth in images for one in truth["annotations"] if not one["iscrowd"]]


def check_library(where: str = "detection") -> None:
    """Check that the library for detection metrics is installed; an error names the caller, `where`."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ConfigError(
            "average precision and masks of objects are faster-coco-eval's, which is not installed",
            where=where,
            fix="pip install 'm3i-scale[detection]'",
        )


def sort_images(images: Iterable[tuple[GroundTruth, Prediction]], categories: Categories) -> DetectionSet:
    """Sort the images of a dataset by id and check that they can be evaluated; `images` may be in any order."""
    check_library()
    given = list(images)
    order = sorted(range(len(given)), key=lambda place: given[place][0]["image_id"])
    truths = [given[place][0] for place in order]
    for truth, following in pairwise(truths):
        if truth["image_id"] == following["image_id"]:
            raise DataError(
                "an image is in the data twice",
                where=f"image {truth['image_id']}",
                why="it would count twice, and every object that is found again would count as false",
            )
    predictions = [sorted_by_score(given[place][1], given[place][0], categories) for place in order]
    found = DetectionSet(truths, predictions, categories, np.asarray(order, dtype=np.int64))
    if not found.objects:
        raise DataError(
            "no image has an object that could be found", where="the truth", why="average precision is not defined then"
        )
    if any(one["masks"] is not None for one in predictions):
        _check_masks(truths)
    return found


def _check_masks(truths: Iterable[GroundTruth]) -> None:
    image_of: dict[bool, int] = {}
    for truth in truths:
        for one in truth["annotations"]:
            image_of.setdefault("segmentation" in one, truth["image_id"])
    if len(image_of) == 2:
        raise DataError(
            "some objects have a mask and others have none, and masks are predicted", where=f"image {image_of[False]}"
        )


def sorted_by_score(given: Prediction, truth: GroundTruth, categories: Categories) -> Prediction:
    """Sort a prediction by score. For LVIS, select the 300 best, then drop categories that were not annotated."""
    boxes_D4 = np.asarray(given["boxes"], dtype=np.float64).reshape(-1, 4)
    scores_D = np.asarray(given["scores"], dtype=np.float64)
    labels_D = np.asarray(given["labels"], dtype=np.int64)
    if not (np.isfinite(boxes_D4).all() and np.isfinite(scores_D).all()):
        raise DataError("a predicted box or score is not a finite number", where=f"image {truth['image_id']}")
    best_D, masks = np.argsort(-scores_D, kind="stable"), given["masks"]
    if categories.format == "lvis":
        best_D = best_D[: PER_IMAGE["lvis"]]
        looked_for = [*(one["category"] for one in truth["annotations"]), *truth.get("neg_category_ids", [])]
        best_D = best_D[np.isin(labels_D[best_D], np.asarray(looked_for, dtype=np.int64))]
    return {
        "boxes": boxes_D4[best_D],
        "scores": scores_D[best_D],
        "labels": labels_D[best_D],
        "masks": None if masks is None else [masks[place] for place in best_D],
    }
