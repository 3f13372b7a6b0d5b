"""Losses of a Mask R-CNN, with the federated loss for incompletely labeled images.

detectron2 normalizes by counts of one rank and averages over ranks; here counts are over all ranks. Both are equal for
one rank, or if all ranks have the same number of regions and objects. Here, results do not depend on the distribution
of a batch over ranks. Random numbers depend on the seed of a sample for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, roi_align

from m3i_scale.tasks.detection.detection_heads import MaskRcnn, Regions
from m3i_scale.tasks.detection.modeling_mask_rcnn import has_area


@dataclass(frozen=True)
class Objects:
    """Ground-truth objects of the B square images of a micro-batch."""

    boxes_BN4: Tensor
    """float32: x1, y1, x2, y2 in pixels of the padded image."""
    labels_BN: Tensor
    """int64: classes; −1 is padding."""
    masks_BNMM: Tensor | None
    """uint8: masks within the boxes, resized to M × M; None if the dataset only has boxes."""
    sizes_B2: Tensor
    """float32: height and width of an image before padding."""
    seeds_B: Tensor
    """int64: seeds of the samples, on the CPU, from which regions and classes are drawn."""

    def on(self, image: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return boxes (N, 4), classes and masks of the objects of an image, without padding and boxes of zero area."""
        boxes_N4 = self.boxes_BN4[image].float()
        # Indices once instead of boolean masks: finding the number of objects synchronizes with the device.
        (place_O,) = ((self.labels_BN[image] >= 0) & has_area(boxes_N4)).nonzero(as_tuple=True)
        masks_OMM = None if self.masks_BNMM is None else self.masks_BNMM[image][place_O]
        return boxes_N4[place_O], self.labels_BN[image][place_O], masks_OMM

    def generators(self) -> list[torch.Generator]:
        """Return one random generator per image."""
        return [torch.Generator(self.boxes_BN4.device).manual_seed(seed) for seed in self.seeds_B.tolist()]


@dataclass(frozen=True)
class RegionSamples:
    """Regions of an image selected for training, objects first."""

    boxes_R4: Tensor
    labels_R: Tensor
    """K for the background."""
    objects_P: Tensor
    """Object index of the first P regions."""
    truth_P4: Tensor
    """Boxes of these objects."""
    masks_PMM: Tensor | None = None
    drawn_C: Tensor | None = None
    """Classes included in a federated loss."""


def box_loss(deltas_N4: Tensor, boxes_N4: Tensor, truth_N4: Tensor, coder: BoxCoder, beta: float) -> Tensor:
    """Return the smooth L1 loss between predicted and true box deltas, summed."""
    return F.smooth_l1_loss(deltas_N4, coder.encode_single(truth_N4, boxes_N4), reduction="sum", beta=beta)


@torch.no_grad()
def match_anchors(regions: Regions, anchors_N4: Tensor, boxes_O4: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state of every anchor (1 object, 0 background, −1 ignored), and its matched box (N, 4)."""
    if not len(boxes_O4):
        return anchors_N4.new_zeros(len(anchors_N4), dtype=torch.int64), anchors_N4
    matcher = Matcher(regions.positive_iou, regions.negative_iou, allow_low_quality_matches=True)
    found_N = matcher(box_iou(boxes_O4, anchors_N4))
    state_N = (found_N >= 0).long()
    state_N[found_N == Matcher.BETWEEN_THRESHOLDS] = -1
    return state_N, boxes_O4[found_N.clamp(min=0)]


def draw(
    positive_N: Tensor, negative_N: Tensor, count: int, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample indices of positive candidates, up to a fraction of the count, and fill up with negative ones."""
    (positive_P,), (negative_Q,) = positive_N.nonzero(as_tuple=True), negative_N.nonzero(as_tuple=True)
    first_P, first_Q = (
        torch.randperm(len(number), device=number.device, generator=generator) for number in (positive_P, negative_Q)
    )
    drawn_P = positive_P[first_P[: int(count * fraction)]]
    return drawn_P, negative_Q[first_Q[: count - len(drawn_P)]]


def region_losses(
    spec: MaskRcnn,
    logits_BN: Tensor,
    deltas_BN4: Tensor,
    anchors_N4: Tensor,
    boxes: Sequence[Tensor],
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Return the RPN's objectness and box losses, divided by `anchors_per_image` times the number of images.
    `anchors_N4` are the anchors of all levels; `boxes` (M, 4) and `generators` are by image."""
    regions, coder = spec.regions, BoxCoder((1.0, 1.0, 1.0, 1.0))
    objectness, moves = logits_BN.sum() * 0, deltas_BN4.sum() * 0
    for image, generator in enumerate(generators):
        state_N, truth_N4 = match_anchors(regions, anchors_N4, boxes[image])
        drawn_P, drawn_Q = draw(state_N == 1, state_N == 0, regions.anchors_per_image, 0.5, generator)
        logits_S = logits_BN[image, torch.cat([drawn_P, drawn_Q])]
        target_S = torch.zeros_like(logits_S)
        target_S[: len(drawn_P)] = 1
        objectness = objectness + F.binary_cross_entropy_with_logits(logits_S, target_S, reduction="sum")
        moves = moves + box_loss(
            deltas_BN4[image, drawn_P], anchors_N4[drawn_P], truth_N4[drawn_P], coder, spec.smooth_l1_beta
        )
    count = regions.anchors_per_image * len(logits_BN)
    return objectness / count, moves / count


@torch.no_grad()
def choose_regions(
    regions: Regions,
    proposals_R4: Tensor,
    objects: tuple[Tensor, Tensor, Tensor | None],
    classes: int,
    generator: torch.Generator,
) -> RegionSamples:
    """Select the regions of an image for training, from proposals and ground-truth boxes. `objects` is a result of
    `Objects.on`, and `classes` (K) the class of the background."""
    boxes_O4, labels_O, masks_OMM = objects
    boxes_R4 = torch.cat([proposals_R4, boxes_O4])
    found_R = torch.full((len(boxes_R4),), -1, device=boxes_R4.device)
    if len(boxes_O4):
        matcher = Matcher(regions.object_iou, regions.object_iou, allow_low_quality_matches=False)
        found_R = matcher(box_iou(boxes_O4, boxes_R4))
    drawn_P, drawn_Q = draw(found_R >= 0, found_R < 0, regions.per_image, regions.positive_fraction, generator)
    objects_P = found_R[drawn_P]
    labels_R = torch.cat([labels_O[objects_P], torch.full_like(drawn_Q, classes)])
    masks_PMM = None if masks_OMM is None else masks_OMM[objects_P]
    return RegionSamples(boxes_R4[torch.cat([drawn_P, drawn_Q])], labels_R, objects_P, boxes_O4[objects_P], masks_PMM)


def counted_regions(regions: Regions, objects: Objects) -> RegionSamples:
    """Return the maximum number of training regions, for meta tensors."""
    count, positives = regions.per_image, int(regions.per_image * regions.positive_fraction)
    numbers, boxes = torch.zeros(count, dtype=torch.int64, device="meta"), torch.zeros(count, 4, device="meta")
    masks_PMM = None if objects.masks_BNMM is None else objects.masks_BNMM[0][numbers[:positives]]
    return RegionSamples(boxes, numbers, numbers[:positives], boxes[:positives], masks_PMM)


@torch.no_grad()
def masks_in(masks_RMM: Tensor, own_R4: Tensor, boxes_R4: Tensor, side: int) -> Tensor:
    """Return target masks of the regions `boxes_R4`: 0 or 1, fp32 (R, side, side). They are cropped from the masks of
    their objects, which are relative to the objects' boxes `own_R4`."""
    corner_R2, extent_R2 = own_R4[:, :2], (own_R4[:, 2:] - own_R4[:, :2]).clamp(min=1e-3)
    in_mask_R22 = (boxes_R4.unflatten(1, (2, 2)) - corner_R2[:, None]) / extent_R2[:, None] * masks_RMM.shape[-1]
    number_R1 = torch.arange(len(masks_RMM), device=masks_RMM.device)[:, None]
    rois_R5 = torch.cat([number_R1, in_mask_R22.flatten(1)], dim=1)
    soft_R1SS: Tensor = roi_align(masks_RMM[:, None].float(), rois_R5, side, aligned=True)
    return (soft_R1SS[:, 0] >= 0.5).float()


def class_weights(image_counts: Sequence[int], power: float) -> Tensor:
    """Return the sampling weight of every class from its number of images: float32 (K)."""
    return torch.tensor(image_counts, dtype=torch.float32) ** power


def federated_classes(labels_R: Tensor, count: int, weights_K: Tensor, generator: torch.Generator) -> Tensor:
    """Return the classes trained by the regions of one image: their classes, and sampled ones up to `count`, without
    repeats. The background (K) counts as a class if a region belongs to it, as in detectron2."""
    own: Tensor = labels_R.unique()
    missing = count - len(own)
    if missing <= 0:
        return own
    probability = torch.cat([weights_K, weights_K.new_zeros(1)])
    probability[own] = 0
    return torch.cat([own, torch.multinomial(probability, missing, replacement=False, generator=generator)])


def sigmoid_loss(logits_RK: Tensor, labels_R: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropy, summed over regions and `classes` (None: all). The last of K + 1 logits, for the
    background (label K), is unused."""
    count = logits_RK.shape[1]
    truth_RK = F.one_hot(labels_R, count)[:, :-1].to(logits_RK.dtype)
    loss_RK = F.binary_cross_entropy_with_logits(logits_RK[:, :-1], truth_RK, reduction="none")
    if classes is not None:
        counted_K = logits_RK.new_zeros(count).index_fill(0, classes, 1.0)
        loss_RK = loss_RK * counted_K[:-1]
    return loss_RK.sum()
