"""Bootstrap interval of average precision over images, with matching done only once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m3i_scale.evaluate.intervals import RESAMPLES, Clusters, Estimate, bootstrap
from m3i_scale.tasks.detection.detection_matches import match, overlaps
from m3i_scale.tasks.detection.detections import Detections, Kind


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
    """Return AP and its percentile interval, by resampling clusters of images with replacement.

    Resamples weight images and need no new matching. Classes without objects in a resample are excluded from its mean.

    Args:
        detections: all images.
        kind: boxes or masks.
        clusters: of the same images.
        thresholds: IoU thresholds; AP is the mean over them.
        recalls: recall values at which precision is sampled, ascending.
        by_class: compute AP per class; otherwise ignore classes.
        resamples: number of bootstrap resamples.
    """
    weighted = WeightedPrecision(detections, kind, thresholds, recalls, by_class=by_class)
    numbers_I = np.unique(clusters.of, return_inverse=True)[1]
    count = int(numbers_I.max()) + 1

    def statistic(drawn: NDArray[np.int64]) -> float:
        return weighted(np.bincount(drawn, minlength=count)[numbers_I])

    return bootstrap(statistic, clusters, samples=len(detections.truths), resamples=resamples)


class WeightedPrecision:
    """AP of a dataset in which every image is repeated according to its weight.

    Precision has its local maxima at true positives, so it is computed only at these hits H, in order of threshold,
    class and score. The other of the N predictions enter through cumulative sums.

    Args:
        detections: all images.
        kind: boxes or masks.
        thresholds: IoU thresholds; AP is the mean over them.
        recalls: recall values at which precision is sampled, ascending.
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
        order_N = np.lexsort((-scores_N, labels_N))  # stable: in a tie, the first image
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
        reached_H = np.searchsorted(self._recalls, recall_H, side="right")
        newly_H = np.diff(reached_H, prepend=0)
        newly_H[self._is_first_H] = reached_H[self._is_first_H]
        return float((best_H * newly_H).sum()) / (len(self._recalls) * self._thresholds * classes)


def _sums(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of the first 0, 1, 2, … weights."""
    sums = np.zeros(len(weights) + 1, dtype=np.int64)
    np.cumsum(weights, out=sums[1:])
    return sums
