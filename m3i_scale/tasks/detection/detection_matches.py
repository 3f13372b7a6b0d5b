"""Matching of detections with ground-truth objects of an image, as in COCO and LVIS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_scale.data.instances import Instances
from m3i_scale.tasks.detection.detections import PER_IMAGE, Form, Kind, Prediction


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


@dataclass(frozen=True)
class Matches:
    """Matches between the predictions and objects of an image, for every IoU threshold."""

    found_TD: NDArray[np.int64]
    """Index of the matched object; −1: none."""
    ignored_TD: NDArray[np.bool_]
    """Whether a prediction is ignored: it exceeds the maximum number, is matched to a crowd, or belongs to a class that
    is not exhaustively annotated."""


def match(
    truth: Instances,
    prediction: Prediction,
    ious_DG: NDArray[np.float64],
    thresholds: Sequence[float] | NDArray[np.float64],
    form: Form,
    *,
    by_class: bool = True,
) -> Matches:
    """Return the matches of an image as COCO defines them. In order of score, each prediction matches the remaining
    object with the highest IoU, with `by_class` only of its class. `prediction` is in order of the scores, and
    `ious_DG` a result of `ious`."""
    labels_D, crowd_G = np.asarray(prediction["labels"], dtype=np.int64), truth.crowds_N
    beyond_D = np.zeros(len(labels_D), dtype=bool)
    if form == "coco":
        beyond_D = _rank(labels_D if by_class else 0 * labels_D) >= PER_IMAGE["coco"]
    alike_DG = (labels_D[:, None] == truth.labels_N) | (not by_class)
    ious_DG = np.where(alike_DG & ~beyond_D[:, None], ious_DG, -1.0)
    bars_T1 = np.minimum(np.asarray(thresholds, dtype=np.float64), 1 - 1e-10)[:, None]
    found_TD = np.full((len(bars_T1), len(labels_D)), -1, dtype=np.int64)
    taken_TG = np.zeros((len(bars_T1), len(truth)), dtype=bool)
    for number in np.flatnonzero(ious_DG.max(axis=1, initial=-1.0) >= bars_T1.min()):
        near_TG = (ious_DG[number] >= bars_T1) & ~taken_TG
        real_TG = near_TG & ~crowd_G  # a crowd only matches predictions without another match
        near_TG = np.where(real_TG.any(axis=1, keepdims=True), real_TG, near_TG)
        most_T = np.where(near_TG, ious_DG[number], -2.0)[:, ::-1].argmax(axis=1)  # in a tie, the last object wins
        best_T = len(truth) - 1 - most_T
        hits_T = np.flatnonzero(near_TG.any(axis=1))
        found_TD[hits_T, number] = best_T[hits_T]
        taken_TG[hits_T, best_T[hits_T]] = ~crowd_G[best_T[hits_T]]
    in_crowd_TD = np.append(crowd_G, False)[found_TD]
    unsure_D = np.zeros(len(labels_D), dtype=bool)
    if form == "lvis":
        unsure_D = np.isin(labels_D, np.asarray(truth.not_exhaustive or (), dtype=np.int64))
    return Matches(found_TD, beyond_D | in_crowd_TD | ((found_TD < 0) & unsure_D))


def _rank(labels_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of previous entries with the same label."""
    order_D = np.argsort(labels_D, kind="stable")
    starts = np.flatnonzero(np.diff(labels_D[order_D], prepend=-1))
    rank_D = np.empty_like(labels_D)
    lengths = np.diff(starts, append=len(labels_D))
    rank_D[order_D] = np.arange(len(labels_D)) - np.repeat(starts, lengths)
    return rank_D
