"""Place anchors, cut regions out of maps, and choose among boxes: in fp32, and without a gradient for boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from m3i_scale.config.detection import MaskRcnn, Regions

_ANCHOR_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of the side of the image."""
_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16
"""A region as large as an image of ImageNet is cut out of the level of this stride (FPN, equation 1)."""


def anchors(regions: Regions, sides: Sequence[tuple[int, int]], strides: Sequence[float], like: Tensor) -> list[Tensor]:
    """Return the anchors of every level, (H · W · A, 4), round the upper left corner of every place.

    Args:
        regions: sizes and ratios.
        sides: rows and columns of every level.
        strides: of every level in pixels.
        like: a tensor on the device.
    """
    found, side = [], sides[0][0] * strides[0]
    sizes = regions.sizes or [side * share for share in _ANCHOR_SHARES]
    for (rows, columns), stride, size in zip(sides, strides, sizes, strict=True):
        ratio_A = torch.tensor(regions.ratios, device=like.device)
        width_A = size / ratio_A.sqrt()
        height_A = ratio_A * width_A
        cells_A4 = torch.stack([-width_A, -height_A, width_A, height_A], dim=1) / 2
        y_H, x_W = (torch.arange(count, device=like.device) * stride for count in (rows, columns))
        y_HW, x_HW = torch.meshgrid(y_H, x_W, indexing="ij")
        places_HW4 = torch.stack([x_HW, y_HW, x_HW, y_HW], dim=-1)
        found.append((places_HW4[:, :, None] + cells_A4).reshape(-1, 4))
    return found


@torch.no_grad()
def propose(
    regions: Regions,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Sequence[tuple[float, float]],
    *,
    training: bool,
) -> list[Tensor]:
    """Return the best regions of every image (R, 4), at most `after_nms`.

    Args:
        regions: how many, and what overlaps.
        logits: by level, whether an anchor is an object (B, N).
        deltas: by level, how it is moved (B, N, 4).
        anchors: by level (N, 4).
        sizes: height and width of every image before padding.
        training: which of the numbers hold.
    """
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, scores, levels = [], [], []
    for level, (logits_BN, deltas_BN4, anchors_N4) in enumerate(zip(logits, deltas, anchors, strict=True)):
        count = min(regions.before_nms[not training], logits_BN.shape[1])
        scores_BT, best_BT = logits_BN.detach().topk(count, dim=1)
        moved_BT4 = deltas_BN4.detach().gather(1, best_BT[..., None].expand(-1, -1, 4))
        decoded_R4 = coder.decode_single(moved_BT4.flatten(0, 1), anchors_N4[best_BT].flatten(0, 1))
        boxes.append(decoded_R4.view(len(logits_BN), -1, 4))
        scores.append(scores_BT)
        levels.append(torch.full((count,), level, device=logits_BN.device))
    level_T, kept = torch.cat(levels), []
    for box_T4, score_T, size in zip(torch.cat(boxes, dim=1), torch.cat(scores, dim=1), sizes, strict=True):
        clipped_T4 = clip_boxes_to_image(box_T4, size)
        there_T = box_T4.isfinite().all(dim=1) & score_T.isfinite() & has_area(clipped_T4)
        clipped_R4 = clipped_T4[there_T]
        best_R = batched_nms(clipped_R4, score_T[there_T], level_T[there_T], regions.nms_iou)
        kept.append(clipped_R4[best_R[: regions.after_nms[not training]]])
    return kept


def cut_out(
    spec: MaskRcnn, levels: Sequence[Tensor], strides: Sequence[float], boxes: Sequence[Tensor], side: int
) -> Tensor:
    """Return what lies in regions, each from the level of its size: fp32 (R, C, side, side).

    Every level has part in the result, with a gradient of zero where no region is of its size.

    Args:
        spec: how they are sampled.
        levels: maps (B, C, H, W) in fp32, the largest first.
        strides: in pixels, of them and of what follows.
        boxes: by image (R, 4).
        side: of the result.
    """
    image_R1 = torch.cat([box_R4.new_full((len(box_R4), 1), number) for number, box_R4 in enumerate(boxes)])
    rois_R5 = torch.cat([image_R1, torch.cat(list(boxes))], dim=1)
    side_R = ((rois_R5[:, 3] - rois_R5[:, 1]) * (rois_R5[:, 4] - rois_R5[:, 2])).sqrt()
    canonical = math.log2(_CANONICAL_STRIDE / strides[0])
    level_R = (canonical + (side_R / _CANONICAL_SIDE + 1e-8).log2()).floor().clamp(0, len(levels) - 1)
    found_RCSS = levels[0].new_zeros((len(rois_R5), levels[0].shape[1], side, side))
    for number, (map_BCHW, stride) in enumerate(zip(levels, strides[: len(levels)], strict=True)):
        there_L = _where(level_R == number, number)
        cut_LCSS = roi_align(map_BCHW, rois_R5[there_L], side, 1 / stride, spec.sampling_ratio, spec.aligned)
        found_RCSS = found_RCSS.index_put((there_L,), cut_LCSS)
    return found_RCSS


def choose(spec: MaskRcnn, scores_RK: Tensor, boxes_RK4: Tensor, size: tuple[float, float]) -> tuple[Tensor, ...]:
    """Return boxes (N, 4), scores and classes of the detections of an image, the best first.

    Args:
        spec: lowest score, overlap and number.
        scores_RK: of the regions, by class.
        boxes_RK4: of the regions, by class, or one for all (R, 1, 4).
        size: height and width of the image before padding.
    """
    finite_R = boxes_RK4.flatten(1).isfinite().all(dim=1) & scores_RK.isfinite().all(dim=1)
    boxes_RK4 = clip_boxes_to_image(boxes_RK4, size)
    region_N, label_N = ((scores_RK > spec.score_above) & finite_R[:, None]).nonzero(as_tuple=True)
    box_N4 = boxes_RK4[region_N, label_N if boxes_RK4.shape[1] > 1 else 0]
    score_N = scores_RK[region_N, label_N]
    best_N = batched_nms(box_N4, score_N, label_N, spec.nms_iou)[: spec.detections]
    return box_N4[best_N], score_N[best_N], label_N[best_N]


def scaled(boxes_N4: Tensor, size: tuple[float, float], own: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return boxes at an image's own size, clipped, and which of them have an area: (N, 4), bool (N).

    Args:
        boxes_N4: in the batch's image.
        size: height and width there, before padding.
        own: of the image itself.
    """
    by_y, by_x = own[0] / size[0], own[1] / size[1]
    boxes_N4 = clip_boxes_to_image(boxes_N4 * boxes_N4.new_tensor([by_x, by_y, by_x, by_y]), own)
    return boxes_N4, has_area(boxes_N4)


def paste_masks(masks_NMM: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks of detections as pixels of the image where they are at least one half: bool (N, H, W).

    Args:
        masks_NMM: soft masks in their boxes.
        boxes_N4: x1, y1, x2, y2 in the image.
        size: H and W.
    """
    (height, width), device = size, boxes_N4.device
    x1_N, y1_N, x2_N, y2_N = boxes_N4.float()[:, :, None].unbind(dim=1)
    x_NW = (torch.arange(width, device=device) + 0.5 - x1_N) / (x2_N - x1_N) * 2 - 1
    y_NH = (torch.arange(height, device=device) + 0.5 - y1_N) / (y2_N - y1_N) * 2 - 1
    shape = (len(boxes_N4), height, width)
    places_NHW2 = torch.stack([x_NW[:, None, :].expand(shape), y_NH[:, :, None].expand(shape)], dim=-1)
    soft_N1HW = F.grid_sample(masks_NMM[:, None].float(), places_NHW2, align_corners=False)
    return soft_N1HW[:, 0] >= 0.5


def _where(mask_R: Tensor, level: int) -> Tensor:
    """Return the numbers of regions of a level; where there are no values, all are of the first one."""
    if mask_R.is_meta:
        return torch.arange(0 if level else len(mask_R), device="meta")
    return mask_R.nonzero()[:, 0]


def has_area(boxes_N4: Tensor) -> Tensor:
    """Return which boxes (…, 4) have an area."""
    return (boxes_N4[..., 2] > boxes_N4[..., 0]) & (boxes_N4[..., 3] > boxes_N4[..., 1])
