"""Eight scenes are learnt by heart, and found again as they are: boxes, classes and masks."""

from __future__ import annotations

import pytest
import torch
from detectors import batch_of, scene, small_backbone, small_detector, small_spec
from torch import Tensor
from torchvision.ops import box_iou

from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections, paste_masks

pytestmark = pytest.mark.slow

STEPS = 100


def mask_iou(first_NHW: Tensor, second_MHW: Tensor) -> Tensor:
    first, second = first_NHW.flatten(1).float(), second_MHW.flatten(1).float()
    both = first @ second.T
    return both / (first.sum(1)[:, None] + second.sum(1) - both).clamp(min=1)


def average_precision(scores: Tensor, hits: Tensor, objects: int) -> float:
    """Area under precision over recall, each precision the best at this recall or above."""
    order = scores.argsort(descending=True, stable=True)
    right = hits[order].float().cumsum(0)
    precision = (right / torch.arange(1, len(right) + 1)).flip(0).cummax(0).values.flip(0)
    return float((precision * hits[order].float()).sum() / objects)


def matched(iou_NM: Tensor) -> Tensor:
    """Which detections, the best first, have half in common with an object that none before had: bool (N)."""
    free, hits = torch.ones(iou_NM.shape[1], dtype=torch.bool), torch.zeros(len(iou_NM), dtype=torch.bool)
    for number, iou_M in enumerate(iou_NM):
        best, place = (iou_M * free).max(dim=0) if len(iou_M) else (torch.zeros(()), torch.zeros(()))
        if best >= 0.5:
            hits[number], free[place] = True, False
    return hits


def ap50(found: list[Detections], scenes: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Of boxes and of masks, mean over the classes."""
    results = []
    for label in range(3):
        scores, hits, objects = [], ([], []), 0
        for one, (_, boxes, labels, masks) in zip(found, scenes, strict=True):
            own, true = one.labels_N == label, labels == label
            assert one.masks_NMM is not None
            pasted = paste_masks(one.masks_NMM[own], one.boxes_N4[own], (64, 64))
            scores.append(one.scores_N[own])
            hits[0].append(matched(box_iou(one.boxes_N4[own], boxes[true])))
            hits[1].append(matched(mask_iou(pasted, masks[true])))
            objects += int(true.sum())
        results.append([average_precision(torch.cat(scores), torch.cat(part), objects) for part in hits])
    boxes_ap, masks_ap = torch.tensor(results).mean(dim=0).tolist()
    return boxes_ap, masks_ap


def test_eight_scenes_are_learnt_by_heart() -> None:
    torch.manual_seed(0)
    scenes = [scene(seed, objects=2 + seed % 3) for seed in range(8)]
    backbone = small_backbone().train()
    detector = small_detector(small_spec(channels=32, box_width=64), backbone).train()
    parameters = [*backbone.parameters(), *detector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        images, objects = batch_of(scenes, seed=8 * step)
        losses = detector.losses(detector.encode(backbone, images), objects)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        levels = detector.eval().encode(backbone.eval(), images)
        found = detector.detect(levels, objects.sizes_B2, objects.sizes_B2)
    boxes_ap, masks_ap = ap50(found, scenes)
    assert boxes_ap > 0.9
    assert masks_ap > 0.9
