"""Average precision of detected boxes and masks, as defined by COCO and LVIS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import Categories
from m3i_scale.data.instances import Instances
from m3i_scale.evaluate.intervals import RESAMPLES, Clusters, Estimate, bootstrap
from m3i_scale.tasks.detection.detections import (
    PER_IMAGE,
    DetectionSet,
    Kind,
    Prediction,
    ious,
    match,
    sort_images,
)

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds; AP is the mean over them."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall values at which precision is sampled."""
_SIZES = ("APs", "APm", "APl")
_FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}
_TYPES: dict[Kind, str] = {"box": "bbox", "mask": "segm"}


def detector_metrics(
    images: Iterable[tuple[Instances, Prediction]],
    categories: Categories,
    clusters: Clusters,
    *,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Return `average_precision`, and AP of boxes and masks with a bootstrap interval over `clusters` of images, which
    are in the order of `images`."""
    detections = sort_images(images, categories)
    drawn, intervals = clusters.take(detections.order), {}
    for kind in detections.kinds:
        weighted = WeightedPrecision(detections, kind)
        intervals[f"{kind}_AP"] = _interval(weighted, drawn, resamples).as_dict()
    return intervals | _figures(detections)


def average_precision(images: Iterable[tuple[Instances, Prediction]], categories: Categories) -> dict[str, Any]:
    """Return AP of boxes and, if available, masks, from 0 to 1. The order of images does not matter.

    The format of the categories selects the rules. COCO: 100 predictions per image and class. LVIS: the 300 best per
    image, in categories that are annotated in the image or listed as absent.

    Returns:
        The number of images and objects, and for `box` and `mask`: AP, AP50, AP75, APs, APm, APl (by area), AP per
            class, and the precision-recall curve averaged over classes. LVIS adds APr, APc, APf (by frequency). None:
            there is no object to detect.
    """
    return _figures(sort_images(images, categories))


def _figures(detections: DetectionSet) -> dict[str, Any]:
    images, objects = len(detections.truths), len(detections.objects[0])
    return {"images": images, "objects": objects} | {kind: _of_kind(detections, kind) for kind in detections.kinds}


def _of_kind(detections: DetectionSet, kind: Kind) -> dict[str, Any]:
    categories, form = detections.categories.categories, detections.categories.format
    precision_TRKA = _precision(detections, kind)
    all_TRK = precision_TRKA[..., 0]
    figures: dict[str, Any] = {
        "AP": _mean(all_TRK),
        "AP50": _mean(all_TRK[_place(0.5)]),
        "AP75": _mean(all_TRK[_place(0.75)]),
    }
    figures |= {name: _mean(precision_TRKA[..., number]) for number, name in enumerate(_SIZES, start=1)}
    if form == "lvis":
        for name, frequency in _FREQUENCIES.items():
            chosen = [number for number, one in enumerate(categories) if one.frequency == frequency]
            figures[name] = _mean(all_TRK[:, :, chosen])
    counts_K = np.bincount(detections.objects[1], minlength=len(categories))
    figures["classes"] = [
        {"name": one.name, "AP": _mean(all_TRK[:, :, number]), "objects": int(counts_K[number])}
        for number, one in enumerate(categories)
    ]
    known_TRK = all_TRK[:, :, counts_K > 0]
    figures["curves"] = {
        "recall": RECALLS.round(2).tolist(),
        "precision": {
            "0.50": known_TRK[_place(0.5)].mean(axis=-1).tolist(),
            "0.75": known_TRK[_place(0.75)].mean(axis=-1).tolist(),
            "0.50:0.95": known_TRK.mean(axis=(0, 2)).tolist(),
        },
    }
    return figures


def _precision(detections: DetectionSet, kind: Kind) -> NDArray[np.float64]:
    """Return precision by threshold, recall, class and area range: (T, R, K, A); −1 without objects."""
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    form = detections.categories.format
    truth, found = (COCO(document) for document in _documents(detections, kind))
    counted = COCOeval_faster(truth, found, _TYPES[kind], lvis_style=form == "lvis")
    counted.params.maxDets = [PER_IMAGE[form]]
    counted.params.iouThrs, counted.params.recThrs = THRESHOLDS, RECALLS
    counted.evaluate()
    counted.accumulate()
    precision: NDArray[np.float64] = np.asarray(counted.eval["precision"])[..., 0]
    return precision


def _documents(detections: DetectionSet, kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ground truth and predictions in the format of the library.

    All ids start at 1: the library treats a match with object id 0 as unmatched. Image ids may be arbitrary.
    """
    from faster_coco_eval.core import mask

    categories = [
        one.to_json() | {"id": number} for number, one in enumerate(detections.categories.categories, start=1)
    ]
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, (truth, prediction) in enumerate(zip(detections.truths, detections.predictions, strict=True), start=1):
        images.append(
            {
                "id": image,
                "width": truth.width,
                "height": truth.height,
                "neg_category_ids": [category + 1 for category in truth.negative or ()],
                "not_exhaustive_category_ids": [category + 1 for category in truth.not_exhaustive or ()],
            }
        )
        objects += [
            {
                "id": len(objects) + 1 + number,
                "image_id": image,
                "category_id": int(truth.labels_N[number]) + 1,
                "bbox": truth.boxes_N4[number].tolist(),
                "area": float(truth.areas_N[number]),
                "iscrowd": int(truth.crowds_N[number]),
            }
            | ({"segmentation": truth.segmentations[number]} if kind == "mask" else {})
            for number in range(len(truth))
        ]
        masks = prediction["masks"] or []
        areas = mask.area(masks).tolist() if kind == "mask" and masks else []
        for place, (box, score, label) in enumerate(
            zip(prediction["boxes"].tolist(), prediction["scores"].tolist(), prediction["labels"].tolist(), strict=True)
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            of_image = {"id": len(found) + 1, "image_id": image, "category_id": label + 1}
            area = areas[place] if kind == "mask" else bbox[2] * bbox[3]
            drawn = {"segmentation": masks[place]} if kind == "mask" else {}
            found.append(of_image | {"score": score, "bbox": bbox, "area": area, "iscrowd": 0} | drawn)
    return (
        {"images": images, "annotations": objects, "categories": categories},
        {"images": images, "annotations": found, "categories": categories},
    )


def _place(threshold: float) -> int:
    return int(np.abs(THRESHOLDS - threshold).argmin())


def _mean(precision: NDArray[np.float64]) -> float | None:
    """Return the mean over entries with objects; None if there are none."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _interval(weighted: WeightedPrecision, clusters: Clusters, resamples: int) -> Estimate:
    """Return AP and its percentile interval, by resampling clusters of images with replacement.

    Resamples weight images and need no new matching. Classes without objects in a resample are excluded from its mean.
    """
    numbers_I = np.unique(clusters.of, return_inverse=True)[1]
    count = int(numbers_I.max()) + 1

    def statistic(drawn: NDArray[np.int64]) -> float:
        return weighted(np.bincount(drawn, minlength=count)[numbers_I])

    return bootstrap(statistic, clusters, samples=len(numbers_I), resamples=resamples)


class WeightedPrecision:
    """AP of a dataset in which every image is repeated according to its weight.

    Precision has its local maxima at true positives, so it is computed only at these hits H, in order of threshold,
    class and score. The other of the N predictions enter through cumulative sums.
    """

    def __init__(self, detections: DetectionSet, kind: Kind) -> None:
        form = detections.categories.format
        self._classes = len(detections.categories)
        found, ignored, scores, labels, counts = [], [], [], [], []
        for truth, prediction in zip(detections.truths, detections.predictions, strict=True):
            ious_DG = ious(truth, prediction, kind)
            matches = match(truth, prediction, ious_DG, THRESHOLDS, form)
            kept_D = ~matches.ignored_TD.all(axis=0)
            found.append(matches.found_TD[:, kept_D] >= 0)
            ignored.append(matches.ignored_TD[:, kept_D])
            scores.append(prediction["scores"][kept_D])
            labels.append(prediction["labels"][kept_D])
            counts.append(int(kept_D.sum()))
        labels_N, scores_N = np.concatenate(labels), np.concatenate(scores)
        order_N = np.lexsort((-scores_N, labels_N))  # stable: in a tie, the first image
        labels_N = labels_N[order_N]
        self._image_N = np.repeat(np.arange(len(counts)), counts)[order_N]
        ignored_TN = np.concatenate(ignored, axis=1)[:, order_N]
        hit_TN = np.concatenate(found, axis=1)[:, order_N] & ~ignored_TN
        self._image_G, self._class_G = detections.objects

        threshold_H, self._place_H = np.nonzero(hit_TN)
        self._class_H = labels_N[self._place_H]
        series_H = threshold_H * self._classes + self._class_H
        self._is_first_H = np.diff(series_H, prepend=-1) != 0
        self._first_H = np.maximum.accumulate(np.where(self._is_first_H, np.arange(len(series_H)), 0))
        self._lift_H = 2.0 * (len(THRESHOLDS) * self._classes - series_H)
        start_H = np.searchsorted(labels_N, self._class_H)
        self._start_H = start_H
        threshold_Q, place_Q = np.nonzero(ignored_TN)
        key_Q, length = threshold_Q * len(labels_N) + place_Q, len(labels_N)
        self._image_Q = self._image_N[place_Q]
        self._ignored_before_H = np.searchsorted(key_Q, threshold_H * length + self._place_H)
        self._ignored_start_H = np.searchsorted(key_Q, threshold_H * length + start_H)

    def __call__(self, weights_I: NDArray[np.int64]) -> float:
        """Return AP with every image counted according to its weight; 0 if there are no objects."""
        objects_K = np.bincount(self._class_G, weights=weights_I[self._image_G], minlength=self._classes)
        classes = int((objects_K > 0).sum())
        if not classes or not len(self._place_H):
            return 0.0
        seen_N, ignored_Q = _sums(weights_I[self._image_N]), _sums(weights_I[self._image_Q])
        hits_H = _sums(weights_I[self._image_N[self._place_H]])
        true_H = hits_H[1:] - hits_H[self._first_H]
        counted_H = seen_N[self._place_H + 1] - seen_N[self._start_H]
        counted_H -= ignored_Q[self._ignored_before_H] - ignored_Q[self._ignored_start_H]
        precision_H = true_H / np.maximum(counted_H, 1)
        recall_H = true_H / np.maximum(objects_K[self._class_H], 1)
        # Interpolated precision at a recall is the maximum at this or any higher recall, per threshold and class.
        best_H = np.maximum.accumulate((precision_H + self._lift_H)[::-1])[::-1] - self._lift_H
        reached_H = np.searchsorted(RECALLS, recall_H, side="right")
        newly_H = np.diff(reached_H, prepend=0)
        newly_H[self._is_first_H] = reached_H[self._is_first_H]
        return float((best_H * newly_H).sum()) / (len(RECALLS) * len(THRESHOLDS) * classes)


def _sums(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of the first 0, 1, 2, … weights."""
    sums = np.zeros(len(weights) + 1, dtype=np.int64)
    np.cumsum(weights, out=sums[1:])
    return sums
