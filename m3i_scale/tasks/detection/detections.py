"""Pairs of detections and ground truth by image, with validation of both."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import NotRequired

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
    segmentation: NotRequired[list[list[float]] | Rle]


class GroundTruth(TypedDict):
    """Ground-truth objects of one image: the instances.json of a sample."""

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

    image_id: int
    boxes: NDArray[np.floating]
    """x1, y1, x2, y2 in pixels of the image: (n, 4)."""
    scores: NDArray[np.floating]
    labels: NDArray[np.integer]
    """Indices into the categories."""
    masks: list[Rle] | None


class Category(TypedDict):
    """One category, at its index."""

    id: int
    name: str
    frequency: NotRequired[Literal["r", "c", "f"]]
    image_count: NotRequired[int]


class Categories(TypedDict):
    """The categories.json of shards."""

    format: Form
    categories: list[Category]


@dataclass(frozen=True)
class Detections:
    """Images of a dataset, unique and sorted by id, with their predictions."""

    truths: list[GroundTruth]
    predictions: list[Prediction]
    """For the same images, sorted by score; for LVIS only the counted ones."""
    categories: Categories
    order: NDArray[np.int64]
    """Index of each image in the original ground truth."""

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


def pair_by_image(
    truths: Iterable[GroundTruth], predictions: Iterable[Prediction], categories: Categories
) -> Detections:
    """Pair predictions with the ground truth of all images of a dataset, both in any order. Images without predictions
    count too. Predictions of several ranks may be concatenated."""
    check_library()
    truth_of: dict[int, GroundTruth] = {}
    place_of: dict[int, int] = {}
    for place, truth in enumerate(truths):
        if truth["image_id"] in truth_of:
            raise _counted_twice(truth["image_id"], "the truth")
        truth_of[truth["image_id"]], place_of[truth["image_id"]] = truth, place
    _check_truths(truth_of.values(), categories)
    prediction_of: dict[int, Prediction] = {}
    for prediction in predictions:
        image = int(prediction["image_id"])
        if image in prediction_of:
            raise _counted_twice(image, "the predictions")
        if image not in truth_of:
            raise DataError("the image of a prediction is not one of the set", where=f"image {image}")
        prediction_of[image] = sorted_by_score(prediction, truth_of[image], categories)
    given = [one for one in prediction_of.values() if len(one["scores"])]
    bare = [one["image_id"] for one in given or prediction_of.values() if one["masks"] is None]
    if given and 0 < len(bare) < len(given):
        raise DataError("masks are predicted of some images and not of others", where=f"image {bare[0]}")
    if not bare:
        _check_masks(truth_of.values())
    nothing: Prediction = {
        "image_id": -1,
        "boxes": np.zeros((0, 4)),
        "scores": np.zeros(0),
        "labels": np.zeros(0, dtype=np.int64),
        "masks": None if bare else [],
    }
    found = {one["image_id"]: one for one in given}
    images = sorted(truth_of)
    return Detections(
        [truth_of[image] for image in images],
        [found.get(image, nothing) for image in images],
        categories,
        np.asarray([place_of[image] for image in images], dtype=np.int64),
    )


def _counted_twice(image: int, what: str) -> DataError:
    return DataError(
        f"an image stands twice in {what}",
        where=f"image {image}",
        why="it would count twice, and every object that is found again would count as false",
        fix="give every image to one rank",
    )


def _check_truths(truths: Iterable[GroundTruth], categories: Categories) -> None:
    count = len(categories["categories"])
    unbinned = [one["name"] for one in categories["categories"] if one.get("frequency") not in ("r", "c", "f")]
    if categories["format"] == "lvis" and unbinned:
        raise DataError(
            "a category has no frequency, by which LVIS counts", where=unbinned[0], fix="r, c or f in categories.json"
        )
    real = 0
    for truth in truths:
        for one in truth["annotations"]:
            if not 0 <= one["category"] < count:
                raise DataError(
                    f"an object has category {one['category']}, of {count}", where=f"image {truth['image_id']}"
                )
            real += not one["iscrowd"]
    if not real:
        raise DataError(
            "no image has an object that could be found", where="the truth", why="average precision is not defined then"
        )


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
    where = f"image {truth['image_id']}"
    boxes_D4 = np.asarray(given["boxes"], dtype=np.float64).reshape(-1, 4)
    scores_D = np.asarray(given["scores"], dtype=np.float64)
    labels_D = np.asarray(given["labels"], dtype=np.int64)
    masks = given["masks"]
    counts = {len(boxes_D4), *scores_D.shape, *labels_D.shape} | (set() if masks is None else {len(masks)})
    if len(counts) > 1:
        raise DataError(f"boxes, scores, labels and masks are of different numbers: {sorted(counts)}", where=where)
    if not (np.isfinite(boxes_D4).all() and np.isfinite(scores_D).all()):
        raise DataError("a predicted box or score is not a finite number", where=where)
    if len(labels_D) and not 0 <= labels_D.min() <= labels_D.max() < len(categories["categories"]):
        raise DataError(f"a predicted label is none of the {len(categories['categories'])} categories", where=where)
    size = [truth["height"], truth["width"]]
    if any(list(mask["size"]) != size for mask in masks or []):
        raise DataError(
            f"a predicted mask has another size than the image, which is {size[0]} × {size[1]}", where=where
        )
    best_D = np.argsort(-scores_D, kind="stable")
    if categories["format"] == "lvis":
        best_D = best_D[: PER_IMAGE["lvis"]]
        looked_for = [*(one["category"] for one in truth["annotations"]), *truth.get("neg_category_ids", [])]
        best_D = best_D[np.isin(labels_D[best_D], np.asarray(looked_for, dtype=np.int64))]
    return {
        "image_id": truth["image_id"],
        "boxes": boxes_D4[best_D],
        "scores": scores_D[best_D],
        "labels": labels_D[best_D],
        "masks": None if masks is None else [masks[place] for place in best_D],
    }
