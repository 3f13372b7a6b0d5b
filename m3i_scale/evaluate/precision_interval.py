"""Compute the interval of an average precision by bootstrap over images, whose matches are made once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m3i_scale.evaluate.detection_matches import match, overlaps
from m3i_scale.evaluate.detections import Detections, Kind
from m3i_scale.evaluate.intervals import RESAMPLES, Clusters, Estimate, bootstrap


def ap_interval(
    detections: Detections,
    kind: Kind,
    clusters: Clusters,
    thresholds: NDArray[np.float64],
    recalls: NDArray[np.float64],
    *,
    by_class: bool = True,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Return AP and its percentile interval; whole clusters of images are drawn with replacement.

    A draw weighs images and matches nothing anew. Classes of which it has no object are left out of its mean.

    Args:
        detections: all images.
        kind: boxes or masks.
        clusters: of the same images.
        thresholds: of overlap, over which AP is the mean.
        recalls: at which precision is read, ascending.
        by_class: a class may be mistaken; else the place alone counts.
        resamples: bootstrap draws.
    """
    weighted = WeightedPrecision(detections, kind, thresholds, recalls, by_class=by_class)
    numbers_I = np.unique(clusters.of, return_inverse=True)[1]
    count = int(numbers_I.max()) + 1

    def statistic(drawn: NDArray[np.int64]) -> float:
        return weighted(np.bincount(drawn, minlength=count)[numbers_I])

    return bootstrap(statistic, clusters, samples=len(detections.truths), resamples=resamples)


class WeightedPrecision:
    """Computes AP of a set in which every image stands as often as its weight says.

    Precision is highest where an object has just been found, so that it is computed there alone: at the hits H, in
    order of threshold, class and score. The rest of the N predictions is summed up before them.

    Args:
        detections: all images.
        kind: boxes or masks.
        thresholds: of overlap, over which AP is the mean.
        recalls: at which precision is read, ascending.
        by_class: see `ap_interval`.
    """

    def __init__(
        self,
        detections: Detections,
        kind: Kind,
        thresholds: NDArray[np.float64],
        recalls: NDArray[np.float64],
        *,
        by_class: bool = True,
    ) -> None:
        form, self._recalls, self._thresholds = detections.categories["format"], recalls, len(thresholds)
        self._classes = len(detections.categories["categories"]) if by_class else 1
        found, ignored, scores, labels, counts = [], [], [], [], []
        for truth, prediction in zip(detections.truths, detections.predictions, strict=True):
            ious_DG = overlaps(truth, prediction, kind)
            matches = match(truth, prediction, ious_DG, thresholds, form, by_class=by_class)
            kept_D = ~matches.ignored_TD.all(axis=0)
            found.append(matches.found_TD[:, kept_D] >= 0)
            ignored.append(matches.ignored_TD[:, kept_D])
            scores.append(prediction["scores"][kept_D])
            labels.append(prediction["labels"][kept_D] if by_class else np.zeros(kept_D.sum(), dtype=np.int64))
            counts.append(int(kept_D.sum()))
        labels_N, scores_N = np.concatenate(labels), np.concatenate(scores)
        order_N = np.lexsort((-scores_N, labels_N))  # stable: of equals the first image
        labels_N = labels_N[order_N]
        self._image_N = np.repeat(np.arange(len(counts)), counts)[order_N]
        ignored_TN = np.concatenate(ignored, axis=1)[:, order_N]
        hit_TN = np.concatenate(found, axis=1)[:, order_N] & ~ignored_TN
        self._image_G = np.asarray([image for image, _ in detections.objects], dtype=np.int64)
        classes = [one["category"] if by_class else 0 for _, one in detections.objects]
        self._class_G = np.asarray(classes, dtype=np.int64)

        threshold_H, self._place_H = np.nonzero(hit_TN)
        self._class_H = labels_N[self._place_H]
        series_H = threshold_H * self._classes + self._class_H
        self._is_first_H = np.diff(series_H, prepend=-1) != 0
        self._first_H = np.maximum.accumulate(np.where(self._is_first_H, np.arange(len(series_H)), 0))
        self._lift_H = 2.0 * (self._thresholds * self._classes - series_H)
        start_H = np.searchsorted(labels_N, self._class_H)
        self._start_H = start_H
        threshold_Q, place_Q = np.nonzero(ignored_TN)
        key_Q, length = threshold_Q * len(labels_N) + place_Q, len(labels_N)
        self._image_Q = self._image_N[place_Q]
        self._ignored_before_H = np.searchsorted(key_Q, threshold_H * length + self._place_H)
        self._ignored_start_H = np.searchsorted(key_Q, threshold_H * length + start_H)

    def __call__(self, weights_I: NDArray[np.int64]) -> float:
        """Return AP where every image counts as often as its weight says; 0 where there is no object."""
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
        # Precision at a recall is the highest at that recall or beyond, within its threshold and class.
        best_H = np.maximum.accumulate((precision_H + self._lift_H)[::-1])[::-1] - self._lift_H
        reached_H = np.searchsorted(self._recalls, recall_H, side="right")
        newly_H = np.diff(reached_H, prepend=0)
        newly_H[self._is_first_H] = reached_H[self._is_first_H]
        return float((best_H * newly_H).sum()) / (len(self._recalls) * self._thresholds * classes)


def _sums(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of the first 0, 1, 2, … weights."""
    sums = np.zeros(len(weights) + 1, dtype=np.int64)
    np.cumsum(weights, out=sums[1:])
    return sums
