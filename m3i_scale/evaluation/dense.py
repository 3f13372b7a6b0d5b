"""Dense probe: linear classification of single patches into the class of their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m3i_scale.defaults import NO_CLASS
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.intervals import Clusters, Statistic

PATCHES_PER_IMAGE = 16
"""Number of patches sampled per image: neighboring patches are nearly redundant, and all of them would not fit into
memory."""

FIT_PATCHES = 16_384
"""Maximum number of training patches, sampled from all of them."""

_CLASSES = 256
_SEED = 20_221


@dataclass
class Patches:
    """Patches with a class, from all images with a mask."""

    labels_P: NDArray[np.int64]
    image_P: NDArray[np.int64]
    """Index of the image in the table."""
    features: dict[str, NDArray[np.float32]]
    """By encoder, (P, E)."""

    def of_images(self, images: NDArray[np.int64]) -> Patches:
        """Return only the patches of the given images."""
        kept_P = np.isin(self.image_P, images)
        features = {name: rows[kept_P] for name, rows in self.features.items()}
        return Patches(self.labels_P[kept_P], self.image_P[kept_P], features)


@dataclass
class SampledPatches:
    """Patches that were sampled from the images of a batch."""

    parts: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    """Per image with a mask: `labels`, `image`, `lot` (a random number) and features by encoder."""
    reason: str | None = None
    """Reason why the patches of the model cannot be used."""


def sample_patches(
    first: int, masks: Sequence[NDArray[np.uint8] | None], tokens_BLD: Tensor, images_BCHW: Tensor | None
) -> SampledPatches:
    """Sample patches of a batch; the choice depends only on the mask and on the index of the image.

    Args:
        first: index of its first image in the table.
        masks: (S, S), None for images without a mask.
        tokens_BLD: patch features; tokens that do not form a square grid are ignored.
        images_BCHW: only needed for the pixel baseline.
    """
    try:
        side = grid_side(tokens_BLD.shape[1])
    except NotMeasuredError as reason:
        return SampledPatches(reason=str(reason))
    tokens = {"model": tokens_BLD}
    if images_BCHW is not None:
        tokens["pixels"] = pixel_patches(images_BCHW, side)
    parts = []
    for place, mask in enumerate(masks):
        if mask is None:
            continue
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
        parts.append(part)
    return SampledPatches(parts)


class PatchCollector:
    """Collector of the patches of batches in the order of the table. Above `limit`, it keeps a uniform sample."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._held = 0
        self.masks = 0
        """Number of images with a mask so far."""
        self.reason: str | None = None
        """Reason why there are no patches although there are masks."""

    def add(self, sampled: SampledPatches) -> None:
        """Add the patches of the next batch."""
        self.reason = sampled.reason or self.reason
        self._parts += sampled.parts
        self.masks += len(sampled.parts)
        self._held += sum(len(part["labels"]) for part in sampled.parts)
        if self._limit is not None and self._held > 2 * self._limit:
            self._draw(self._limit)

    def patches(self) -> Patches | None:
        """Return the sampled patches; None, with a `reason`, if there are none."""
        if not self._held:
            self.reason = self.reason or ("no mask names the class of any patch" if self.masks else "no masks")
            return None
        self._draw(self._limit)
        whole = self._parts[0]
        features = {name: rows for name, rows in whole.items() if name in ("model", "pixels")}
        return Patches(whole["labels"], whole["image"], features)

    def _draw(self, limit: int | None) -> None:
        """Concatenate the parts. Above the limit, keep the patches with the lowest random numbers: a uniform sample."""
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        if limit is not None and self._held > limit:
            kept = np.sort(np.argsort(whole["lot"], kind="stable")[:limit])
            whole = {name: rows[kept] for name, rows in whole.items()}
        self._parts, self._held = [whole], len(whole["labels"])


def grid_side(patches: int) -> int:
    """Return the number of patches along a side of a square grid."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise NotMeasuredError(f"the model has {patches} patches, which are no square grid")
    return side


def patch_labels(mask_SS: NDArray[np.uint8], side: int) -> NDArray[np.int64]:
    """Return the most common value of each of side² patches, which can be `NO_CLASS`. The mask is split as evenly as
    possible."""
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
    """Return the mean IoU over the classes in `truth_P`, as a function of resampled clusters."""
    classes, truth = np.unique(truth_P, return_inverse=True)
    count, drawn = len(classes), np.unique(clusters.of, return_inverse=True)[1]
    # a prediction of an absent class is wrong, and only counts in the union of the true class
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
    """Return the mean IoU over the counted classes, as a function of resampled clusters.

    Args:
        both_CK: intersection per class, by cluster in the order of `np.unique`.
        counted_CK: a class counts if this is positive in a resampled cluster.
        either_CK: union per class.
    """

    def mean(chosen: NDArray[np.int64]) -> float:
        present = counted_CK[chosen].sum(axis=0) > 0
        return float((both_CK[chosen].sum(axis=0)[present] / either_CK[chosen].sum(axis=0)[present]).mean())

    return Statistic(mean, clusters, samples)
