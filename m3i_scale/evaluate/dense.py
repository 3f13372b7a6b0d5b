"""Probe what single patches know, by a linear classifier from the feature of a patch to the class of its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m3i_scale.defaults import NO_CLASS
from m3i_scale.evaluate.intervals import Clusters, Statistic

PATCHES_PER_IMAGE = 16
"""So many patches of every image are looked at, drawn at random: neighbours say nearly the same, and all of them would
not fit into memory."""

FIT_PATCHES = 16_384
"""At most so many patches of the training side are kept, drawn from all of them."""

_CLASSES = 256
_SEED = 20_221

PatchEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 images (B, 3, S, S) → pooled features (B, D) and patch features (B, L, E), row by row of a square grid."""


@dataclass
class Patches:
    """Holds the patches that have a class, of all images with a mask."""

    labels_P: NDArray[np.int64]
    image_P: NDArray[np.int64]
    """Number of the image in the table."""
    features: dict[str, NDArray[np.float32]]
    """By encoder, (P, E)."""

    def of_images(self, images: NDArray[np.int64]) -> Patches:
        """Return the patches of some of the images alone."""
        kept_P = np.isin(self.image_P, images)
        features = {name: rows[kept_P] for name, rows in self.features.items()}
        return Patches(self.labels_P[kept_P], self.image_P[kept_P], features)


class PatchCollector:
    """Gathers patches as images are read, in the order of the table.

    Args:
        limit: keep at most so many, drawn from all; None keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._held = 0
        self.masks = 0
        """Images with a mask so far."""
        self.fault: str | None = None
        """Why there are no patches although there are masks."""

    def add(
        self, first: int, masks: list[NDArray[np.uint8] | None], tokens_BLD: Tensor, images_BCHW: Tensor | None
    ) -> None:
        """Draw patches of a batch. Tokens that are no square grid are left alone.

        Args:
            first: number of the batch's first image in the table.
            masks: (S, S) of every image, None without one.
            tokens_BLD: the model's features of all patches.
            images_BCHW: where the raw pixels of the same patches are wanted too.
        """
        side = math.isqrt(tokens_BLD.shape[1])
        if side * side != tokens_BLD.shape[1]:
            self.fault = f"the model has {tokens_BLD.shape[1]} patches, which are no square grid"
            return
        tokens = {"model": tokens_BLD}
        if images_BCHW is not None:
            tokens["pixels"] = pixel_patches(images_BCHW, side)
        for place, mask in enumerate(masks):
            if mask is None:
                continue
            self.masks += 1
            labels_L = patch_labels(mask, side)
            generator = np.random.default_rng([_SEED, first + place])
            chosen = np.sort(generator.permutation(np.flatnonzero(labels_L != NO_CLASS))[:PATCHES_PER_IMAGE])
            part: dict[str, NDArray[Any]] = {
                "labels": labels_L[chosen],
                "image": np.full(len(chosen), first + place, dtype=np.int64),
                "lot": generator.random(len(chosen)),
            }
            for name, values_BLE in tokens.items():
                rows = values_BLE[place, torch.from_numpy(chosen).to(values_BLE.device)]
                part[name] = rows.float().cpu().numpy()
            self._parts.append(part)
            self._held += len(chosen)
        if self._limit is not None and self._held > 2 * self._limit:
            self._draw(self._limit)

    def patches(self) -> Patches | None:
        """Return what was drawn; None, and a `fault`, where nothing was."""
        if not self._held:
            self.fault = self.fault or ("no mask names the class of any patch" if self.masks else "no masks")
            return None
        self._draw(self._limit)
        whole = self._parts[0]
        features = {name: rows for name, rows in whole.items() if name in ("model", "pixels")}
        return Patches(whole["labels"], whole["image"], features)

    def _draw(self, limit: int | None) -> None:
        """Join the parts; over the limit keep those with the lowest random numbers, so that each is as likely."""
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        if limit is not None and self._held > limit:
            kept = np.sort(np.argsort(whole["lot"], kind="stable")[:limit])
            whole = {name: rows[kept] for name, rows in whole.items()}
        self._parts, self._held = [whole], len(whole["labels"])


def patch_labels(mask_SS: NDArray[np.uint8], side: int) -> NDArray[np.int64]:
    """Return the commonest class of every patch, `NO_CLASS` where most of it has none: (side²).

    Args:
        mask_SS: class of every pixel.
        side: patches along a side; the mask is cut into them as evenly as whole pixels allow.
    """
    rows = np.arange(mask_SS.shape[0]) * side // mask_SS.shape[0]
    columns = np.arange(mask_SS.shape[1]) * side // mask_SS.shape[1]
    patch = rows[:, None] * side + columns
    counts = np.bincount((patch * _CLASSES + mask_SS).ravel(), minlength=side * side * _CLASSES)
    return np.asarray(counts.reshape(side * side, _CLASSES).argmax(axis=1), dtype=np.int64)


def pixel_patches(images_BCHW: Tensor, side: int) -> Tensor:
    """Return the pixels of every patch, values in 0…1 (B, side², 3·p²): the raw-pixel baseline of the dense probe."""
    size = images_BCHW.shape[-1] // side * side
    cut = images_BCHW[..., :size, :size].float() / 255
    return nn.functional.unfold(cut, kernel_size=size // side, stride=size // side).transpose(1, 2)


def mean_iou(predicted_P: NDArray[np.int64], truth_P: NDArray[np.int64], clusters: Clusters) -> Statistic:
    """Return intersection over union, mean over the classes that occur in `truth_P`, for any draw of clusters.

    Args:
        predicted_P: class of every patch.
        truth_P: the right ones.
        clusters: of the same patches.
    """
    classes, truth = np.unique(truth_P, return_inverse=True)
    count, drawn = len(classes), np.unique(clusters.of, return_inverse=True)[1]
    # a prediction outside the classes that occur is wrong, and counts in no class's union but the true one's
    place = np.searchsorted(classes, predicted_P).clip(max=count - 1)
    predicted = np.where(classes[place] == predicted_P, place, count)
    number = int(drawn.max()) + 1

    def table(rows: NDArray[np.int64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
        flat = np.bincount(drawn[which] * (count + 1) + rows[which], minlength=number * (count + 1))
        return flat.reshape(number, count + 1)[:, :count].astype(np.float64)

    everything = np.ones(len(truth), dtype=np.bool_)
    both_CK, truth_CK = table(truth, predicted == truth), table(truth, everything)
    either_CK = truth_CK + table(predicted, everything) - both_CK
    return iou_of_clusters(both_CK, truth_CK, either_CK, clusters, len(truth_P))


def iou_of_clusters(
    both_CK: NDArray[np.float64],
    counted_CK: NDArray[np.float64],
    either_CK: NDArray[np.float64],
    clusters: Clusters,
    samples: int,
) -> Statistic:
    """Return intersection over union, mean over the classes that count, for any draw of clusters.

    Args:
        both_CK: how much of every class truth and prediction share, by cluster in the order of `np.unique`.
        counted_CK: positive in some cluster that is drawn: the class counts.
        either_CK: how much is of it in one of them.
        clusters: of what was counted.
        samples: how much was counted, for the record.
    """

    def mean(chosen: NDArray[np.int64]) -> float:
        present = counted_CK[chosen].sum(axis=0) > 0
        return float((both_CK[chosen].sum(axis=0)[present] / either_CK[chosen].sum(axis=0)[present]).mean())

    return Statistic(mean, clusters, samples)
