"""Average precision of detected boxes and masks, as defined by COCO and LVIS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.categories import Categories
from m3i_scale.data.instances import Instances
from m3i_scale.evaluation.intervals import RESAMPLES, Clusters, Estimate, bootstrap
from m3i_scale.tasks.detection.detections import (
    EVERY_AREA,
    DetectionSet,
    Kind,
    Prediction,
    areas,
    ious,
    match,
    sort_images,
)

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds; AP is the mean over them."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall values at which precision is sampled."""
AREAS = {"AP": EVERY_AREA, "APs": (0.0, 32.0**2), "APm": (32.0**2, 96.0**2), "APl": (96.0**2, 1e10)}
"""Minimum and maximum area of the objects that count, in square pixels."""
_FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}


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
    matched = {kind: match_images(detections, kind) for kind in detections.kinds}
    for kind, by_area in matched.items():
        weighted = WeightedPrecision(detections, by_area["AP"])
        intervals[f"{kind}_AP"] = _interval(weighted, drawn, resamples).as_dict()
    return intervals | _figures(detections, matched)


def average_precision(images: Iterable[tuple[Instances, Prediction]], categories: Categories) -> dict[str, Any]:
    """Return AP of boxes and, if available, masks, from 0 to 1. The order of images does not matter.

    The format of the categories selects the rules. COCO: 100 predictions per image and class. LVIS: the 300 best per
    image, in categories that are annotated in the image or listed as absent.

    Returns:
        The number of images and objects, and for `box` and `mask`: AP, AP50, AP75, APs, APm, APl (by area), AP per
            class, and the precision-recall curve averaged over classes. LVIS adds APr, APc, APf (by frequency). None:
            there is no object to detect.
    """
    detections = sort_images(images, categories)
    return _figures(detections, {kind: match_images(detections, kind) for kind in detections.kinds})


@dataclass(frozen=True)
class MatchedSet:
    """Predictions of a dataset by class, then in order of score, with their matches at every threshold."""

    labels_N: NDArray[np.int64]
    image_N: NDArray[np.int64]
    hit_TN: NDArray[np.bool_]
    """Whether a prediction is counted, and correct."""
    ignored_TN: NDArray[np.bool_]


def match_images(detections: DetectionSet, kind: Kind) -> dict[str, MatchedSet]:
    """Return the matches of all images, by the keys of `AREAS`."""
    parts: dict[str, list[tuple[NDArray[Any], ...]]] = {name: [] for name in AREAS}
    for image, (truth, prediction) in enumerate(zip(detections.truths, detections.predictions, strict=True)):
        ious_DG, areas_D = ious(truth, prediction, kind), areas(prediction, kind)
        for name, limits in AREAS.items():
            found = match(
                truth, prediction, ious_DG, THRESHOLDS, detections.categories.format, areas_D=areas_D, limits=limits
            )
            kept_D = ~found.ignored_TD.all(axis=0)
            of_image = prediction["labels"][kept_D], prediction["scores"][kept_D], np.full(kept_D.sum(), image)
            parts[name].append((*of_image, found.found_TD[:, kept_D] >= 0, found.ignored_TD[:, kept_D]))
    return {name: _joined(of_area) for name, of_area in parts.items()}


def _joined(parts: list[tuple[NDArray[Any], ...]]) -> MatchedSet:
    labels_N, scores_N, image_N, found_TN, ignored_TN = (
        np.concatenate(one, axis=-1) for one in zip(*parts, strict=True)
    )
    order_N = np.lexsort((-scores_N, labels_N))  # stable: in a tie, the first image
    ignored_TN = ignored_TN[:, order_N]
    return MatchedSet(labels_N[order_N], image_N[order_N], found_TN[:, order_N] & ~ignored_TN, ignored_TN)


def _figures(detections: DetectionSet, matched: dict[Kind, dict[str, MatchedSet]]) -> dict[str, Any]:
    images, objects = len(detections.truths), len(detections.objects[0])
    figures: dict[str, Any] = {"images": images, "objects": objects}
    return figures | {kind: _of_kind(detections, by_area) for kind, by_area in matched.items()}


def _of_kind(detections: DetectionSet, matched: dict[str, MatchedSet]) -> dict[str, Any]:
    categories, form = detections.categories.categories, detections.categories.format
    precision_TRKA = np.full((len(THRESHOLDS), len(RECALLS), len(categories), len(AREAS)), -1.0)
    for place, (name, (low, high)) in enumerate(AREAS.items()):
        _, class_G, area_G = detections.objects
        counts_K = np.bincount(class_G[(area_G >= low) & (area_G <= high)], minlength=len(categories))
        _fill_precision(precision_TRKA[..., place], matched[name], counts_K)
    all_TRK = precision_TRKA[..., 0]
    figures: dict[str, Any] = {
        "AP": _mean(all_TRK),
        "AP50": _mean(all_TRK[_place(0.5)]),
        "AP75": _mean(all_TRK[_place(0.75)]),
    }
    figures |= {name: _mean(precision_TRKA[..., place]) for place, name in enumerate(AREAS) if place}
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


def _fill_precision(precision_TRK: NDArray[np.float64], matched: MatchedSet, counts_K: NDArray[np.int64]) -> None:
    """Write the interpolated precision of every class that has objects: the maximum at this or any higher recall."""
    borders = np.searchsorted(matched.labels_N, np.arange(len(counts_K) + 1))
    for number in np.flatnonzero(counts_K):
        of_class = slice(borders[number], borders[number + 1])
        true_TN = np.cumsum(matched.hit_TN[:, of_class], axis=1)
        counted_TN = np.cumsum(~matched.ignored_TN[:, of_class], axis=1)
        best_TN = np.maximum.accumulate((true_TN / np.maximum(counted_TN, 1))[:, ::-1], axis=1)[:, ::-1]
        best_TN = np.append(best_TN, np.zeros((len(best_TN), 1)), axis=1)  # of recalls that are never reached
        for row, (best_N, recall_N) in enumerate(zip(best_TN, true_TN / counts_K[number], strict=True)):
            precision_TRK[row, :, number] = best_N[np.searchsorted(recall_N, RECALLS)]


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

    def __init__(self, detections: DetectionSet, matched: MatchedSet) -> None:
        labels_N, self._image_N = matched.labels_N, matched.image_N
        self._classes = len(detections.categories)
        self._image_G, self._class_G, _ = detections.objects

        threshold_H, self._place_H = np.nonzero(matched.hit_TN)
        self._class_H = labels_N[self._place_H]
        series_H = threshold_H * self._classes + self._class_H
        self._is_first_H = np.diff(series_H, prepend=-1) != 0
        self._first_H = np.maximum.accumulate(np.where(self._is_first_H, np.arange(len(series_H)), 0))
        self._lift_H = 2.0 * (len(THRESHOLDS) * self._classes - series_H)
        start_H = np.searchsorted(labels_N, self._class_H)
        self._start_H = start_H
        threshold_Q, place_Q = np.nonzero(matched.ignored_TN)
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
