"""Sigmoid losses per class, and the federated loss for datasets with incompletely labeled images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def class_weights(image_counts: Sequence[int], power: float) -> Tensor:
    """Return the sampling weight of every class from its number of images: float32 (K)."""
    return torch.tensor(image_counts, dtype=torch.float32) ** power


def federated_classes(labels_R: Tensor, count: int, weights_K: Tensor, generator: torch.Generator) -> Tensor:
    """Return the classes trained by the regions of one image: their classes, and sampled ones up to `count`, without
    repeats. The background counts as a class if a region belongs to it, as in detectron2.

    Args:
        labels_R: classes of the regions, K for the background.
        count: number of classes.
        weights_K: sampling weights.
        generator: random generator.
    """
    own: Tensor = labels_R.unique()
    missing = count - len(own)
    if missing <= 0:
        return own
    probability = torch.cat([weights_K, weights_K.new_zeros(1)])
    probability[own] = 0
    return torch.cat([own, torch.multinomial(probability, missing, replacement=False, generator=generator)])


def sigmoid_loss(logits_RK: Tensor, labels_R: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropy, summed over regions and classes.

    Args:
        logits_RK: (R, K + 1); the last one, of the background, is unused.
        labels_R: classes, K for the background.
        classes: classes to include; None: all.
    """
    count = logits_RK.shape[1]
    truth_RK = F.one_hot(labels_R, count)[:, :-1].to(logits_RK.dtype)
    loss_RK = F.binary_cross_entropy_with_logits(logits_RK[:, :-1], truth_RK, reduction="none")
    if classes is not None:
        counted_K = logits_RK.new_zeros(count).index_fill(0, classes, 1.0)
        loss_RK = loss_RK * counted_K[:-1]
    return loss_RK.sum()
