"""Metrics of the online evaluation, computed on one rank from the features of all ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m3i_scale.config.run_control import ONLINE_METRICS, PROBES, WITH_TEXT, OnlineEvaluationConfig, OnlineMetric
from m3i_scale.errors import DataError
from m3i_scale.evaluation.online_samples import Annotations
from m3i_scale.evaluation.probes import check_finite, knn_predict, linear_predict, rankme
from m3i_scale.evaluation.towers import distinct_captions, rank, zero_shot_predict
from m3i_scale.run.hooks.metrics import RunWarning, accuracy_margin

NEIGHBOURS = 20
STRENGTH = 0.01
"""C of the linear probe. It is not selected, so that the curve of a run does not depend on the selection."""
HIGH_NORM = 4.0
"""Norm of a high-norm patch token, as a multiple of the median of its image."""
PATIENCE = 3
"""Consecutive evaluations below the best one after which a falling metric is reported."""


def choose_metrics(
    online: OnlineEvaluationConfig, has_text: bool, train: Annotations | None, test: Annotations
) -> tuple[list[OnlineMetric], dict[str, str]]:
    """Return the metrics to measure, and the reasons why others cannot be measured. Raise DataError if a requested
    metric is among the others."""
    reasons = {name: reason for name in ONLINE_METRICS if (reason := _obstacle(name, has_text, train, test))}
    if impossible := [f"{name}: {reasons[name]}" for name in online.metrics or () if name in reasons]:
        raise DataError(
            f"the online evaluation cannot measure {'; '.join(impossible)}",
            where=f"evaluation.online.data: {online.data}",
            fix="remove these metrics from evaluation.online.metrics, or use shards with labels and captions",
        ).raised_everywhere()
    chosen = [name for name in online.metrics or ONLINE_METRICS if name not in reasons]
    return chosen, {name: reason for name, reason in reasons.items() if online.metrics is None}


def _obstacle(metric: OnlineMetric, has_text: bool, train: Annotations | None, test: Annotations) -> str | None:
    """Return the reason why a metric cannot be measured, or None."""
    probes, labeled = metric in PROBES, len(test.labeled)
    captions = {test.captions[number] for number in test.captioned}
    fitted, classes = (0, 0) if train is None else (len(train.labeled), len(train.present))
    rules = (
        (metric in WITH_TEXT and not has_text, "the recipe has no text target"),
        (probes and train is None, "evaluation.online.train_data is not set"),
        (metric in (*PROBES, "zero_shot") and not labeled, "the test images have no labels"),
        (metric == "zero_shot" and len(test.present) < 2, "the test images have a single class"),
        (metric == "retrieval" and len(captions) < 2, "the test images have fewer than two distinct captions"),
        (
            metric == "knn" and fitted < NEIGHBOURS,
            f"{fitted} labeled training images, fewer than the {NEIGHBOURS} neighbors",
        ),
        (metric == "linear" and classes < 2, "the labeled training images have fewer than two classes"),
    )
    return next((reason for applies, reason in rules if applies), None)


def token_statistics(patches_BND: Tensor, last_map_BCHW: Tensor | None) -> Tensor:
    """Return diagnostics of patch tokens, fp32 (B, 2): mean cosine similarity between different patches of an image,
    and fraction of patches with a high norm before the final norm layer (NaN without `last_map_BCHW`).

    A rising similarity means that dense features degrade (https://arxiv.org/abs/2508.10104). High-norm tokens are
    artifacts that registers remove (https://arxiv.org/abs/2309.16588).
    """
    unit_BND = nn.functional.normalize(patches_BND.float(), dim=-1)
    count = unit_BND.shape[1]
    similarity_B = (unit_BND.sum(dim=1).square().sum(dim=-1) - count) / max(count * (count - 1), 1)
    if last_map_BCHW is None:
        high_B = similarity_B.new_full((len(similarity_B),), math.nan)
    else:
        norms_BN = last_map_BCHW.float().flatten(2).norm(dim=1)
        high_B = (norms_BN > HIGH_NORM * norms_BN.median(dim=1, keepdim=True).values).float().mean(dim=1)
    return torch.stack([similarity_B, high_B], dim=1)


@dataclass(frozen=True)
class EncodedSplits:
    """Features of one encoder, of all images."""

    train_ND: NDArray[np.float32] | None
    test_MD: NDArray[np.float32]
    tokens_M2: NDArray[np.float32]
    """`token_statistics` of the test images."""


def measure_features(
    metrics: Sequence[OnlineMetric], features: EncodedSplits, train: Annotations | None, test: Annotations
) -> dict[str, float]:
    """Return the metrics that need no text. Raise NotMeasuredError if features are not finite."""
    check_finite(features.test_MD)
    values: dict[str, float] = {}
    if train is not None and features.train_ND is not None:
        fit, asked = train.labeled, test.labeled
        fitted_ND, labels_N = features.train_ND[fit], train.labels_N[fit]
        test_MD, truth_M = features.test_MD[asked], test.labels_N[asked]
        if "knn" in metrics:
            k, classes = NEIGHBOURS, len(train.classes)
            predicted_M = knn_predict(fitted_ND, labels_N, test_MD, neighbours=(k,), classes=classes)[k]
            values["knn"] = float((predicted_M == truth_M).mean())
        if "linear" in metrics:
            predicted_M, _ = linear_predict(fitted_ND, labels_N, test_MD, STRENGTH)
            values["linear"] = float((predicted_M == truth_M).mean())
    if "rankme" in metrics:
        values["rankme"] = rankme(features.test_MD)
    if "patches" in metrics:
        similarity, high = features.tokens_M2.mean(axis=0).tolist()
        values |= {"patch_similarity": similarity} | ({} if math.isnan(high) else {"high_norm_tokens": high})
    return values


def measure_text(
    metrics: Sequence[OnlineMetric],
    images_ME: NDArray[np.float32],
    classes_KE: NDArray[np.float32],
    captions_UE: NDArray[np.float32],
    test: Annotations,
) -> dict[str, float]:
    """Return the metrics of the joint space of images and texts: `classes_KE` are the vectors of the classes that have
    test images, `captions_UE` those of the distinct captions. Raise NotMeasuredError if a vector is not finite."""
    check_finite(images_ME, classes_KE, captions_UE)
    values: dict[str, float] = {}
    if "zero_shot" in metrics:
        predicted = test.present[zero_shot_predict(images_ME[test.labeled], classes_KE)]
        values["zero_shot"] = float((predicted == test.labels_N[test.labeled]).mean())
    if "retrieval" in metrics:
        caption_of = distinct_captions([test.captions[number] or "" for number in test.captioned])[1]
        found = rank(images_ME[test.captioned], captions_UE, caption_of)
        values["image_to_text_r1"] = float((found.image_to_text == 0).mean())
        values["text_to_image_r1"] = float((found.text_to_image == 0).mean())
    return values


class FallingMetrics:
    """Detection of accuracies that fall while the training loss falls too, as in overfitting and forgetting. A resumed
    process starts without history.

    Args:
        test: annotations of the test images, whose number determines the sampling error.
    """

    def __init__(self, test: Annotations) -> None:
        captions = {test.captions[number] for number in test.captioned}
        self._counts = dict.fromkeys(("knn", "linear", "zero_shot"), len(test.labeled))
        self._counts |= {"image_to_text_r1": len(test.captioned), "text_to_image_r1": len(captions)}
        self._best: dict[str, tuple[float, float]] = {}
        """Best value, and the mean loss at that evaluation."""
        self._below: Counter[str] = Counter()

    def check(self, values: Mapping[str, float], loss: float) -> list[RunWarning]:
        """Return the warnings after an evaluation. `loss` is the mean since the previous evaluation; infinite before
        training."""
        warnings = []
        for name, value in values.items():
            count = self._counts.get(name.rpartition("/")[2])
            if not count:
                continue
            best, loss_then = self._best.get(name, (-math.inf, math.nan))
            if value >= best:
                self._best[name] = value, loss
                best = value
            falls = value < best - accuracy_margin(best, count) and loss < loss_then
            self._below[name] = self._below[name] + 1 if falls else 0
            if self._below[name] == PATIENCE:
                then = (
                    f"{loss_then:.4g} at the best value" if math.isfinite(loss_then) else "the best is before training"
                )
                warnings.append(
                    RunWarning(
                        "evaluation",
                        f"{name} falls while the loss falls",
                        f"{value:.3f} now, {best:.3f} at its best, and lower in {PATIENCE} consecutive evaluations; "
                        f"mean loss {loss:.4g} now, {then}",
                        f"set checkpoint.keep_best={{metric: evaluation/{name}, mode: max}} and use that checkpoint; "
                        "train with more images, fewer optim.steps or a lower optim.lr",
                    )
                )
        return warnings
