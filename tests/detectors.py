"""Small detectors, and batches of colored shapes for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.config import BackboneConfig
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.ranks import Ranks, SingleProcess
from m3i_scale.tasks.detection.detection_heads import MaskRcnn
from m3i_scale.tasks.detection.detection_losses import Objects
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector

_SHAPE = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"preset": "vit-ti/16", "config": _SHAPE | {"intermediate_size": 128}},
    "dinov2": {"preset": "dinov2-s/14", "config": _SHAPE | {"mlp_ratio": 2}},
    "gated": {"preset": "dinov2-g/14", "config": _SHAPE | {"mlp_ratio": 2}},
    "clip": {"preset": "clip-b/16", "config": _SHAPE | {"intermediate_size": 128, "hidden_act": "quick_gelu"}},
    "internimage": {
        "preset": "internimage-t",
        "config": {"image_size": 64, "channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]},
    },
}
SMALL: dict[str, Any] = {
    "windows": {"size": 3},
    "channels": 16,
    "box_width": 32,
    "box_convs": 1,
    "mask_convs": 1,
    "regions": {
        "sizes": [8, 16, 32, 48, 64],
        "anchors_per_image": 64,
        "before_nms": [100, 100],
        "after_nms": [50, 50],
        "per_image": 32,
    },
}
SIDE = 64


def small_spec(backbone: str = "vit", **fields: Any) -> MaskRcnn:
    given = SMALL | fields
    if backbone == "internimage":
        given.pop("windows")
    if not given.get("masks", True):
        given.pop("mask_convs")
    return MaskRcnn.model_validate(given)


def small_backbone(name: str = "vit", *, seed: int = 0, noise: float = 0.0) -> Backbone:
    """With first weights, and where there is noise with scales and biases that are not those of the start."""
    backbone = build_backbone(backbone_config(BackboneConfig.model_validate(BACKBONES[name])))
    initialize_sharded(backbone, initialize_module, seed=seed)
    shake(backbone, noise)
    return backbone


def small_detector(
    spec: MaskRcnn | None = None,
    backbone: Backbone | None = None,
    *,
    classes: int = 3,
    ranks: Ranks | None = None,
    image_counts: list[int] | None = None,
    noise: float = 0.0,
) -> MaskRcnnDetector:
    detector = MaskRcnnDetector(
        spec or small_spec(), backbone or small_backbone(), classes, ranks or SingleProcess(), image_counts
    )
    initialize_sharded(detector, initialize_module, seed=1)
    shake(detector, noise)
    return detector


def shake(module: nn.Module, noise: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)


def scene(seed: int, objects: int = 3, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes in distinct colors on a gray ground: image (3, side, side) in 0 … 1, boxes, classes, full masks."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.2, 0.2, 1.0]])
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    image = 0.4 + 0.03 * torch.randn(3, side, side, generator=generator)
    boxes, labels, masks = [], [], []
    quarters = torch.randperm(4, generator=generator)[:objects]
    for quarter in quarters.tolist():
        label = int(torch.randint(3, (1,), generator=generator))
        radius = float(torch.randint(7, 13, (1,), generator=generator))
        center = torch.tensor([quarter % 2, quarter // 2]) * side / 2 + side / 4
        dx, dy = x - center[0], y - center[1]
        shapes = (
            dx**2 + dy**2 <= radius**2,
            torch.maximum(dx.abs(), dy.abs()) <= radius,
            (dx.abs() + dy.abs()) <= radius,
        )
        mask = shapes[label]
        image[:, mask] = colors[label][:, None]
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
        labels.append(label)
        masks.append(mask)
    found = torch.stack(masks) if masks else torch.zeros(0, side, side, dtype=torch.bool)
    return image, torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels, dtype=torch.int64), found


def cropped(masks_NHW: Tensor, boxes_N4: Tensor, side: int = 112) -> Tensor:
    """Masks in their boxes (whole pixels), resized as a data loader would: uint8 (N, side, side)."""
    parts = []
    for mask_HW, (x1, y1, x2, y2) in zip(masks_NHW, boxes_N4.int().tolist(), strict=True):
        part = mask_HW[y1:y2, x1:x2].float()[None, None]
        parts.append(torch.nn.functional.interpolate(part, size=(side, side), mode="bilinear")[0, 0] >= 0.5)
    return torch.stack(parts).byte() if parts else torch.zeros(0, side, side, dtype=torch.uint8)


def batch_of(scenes: list[tuple[Tensor, Tensor, Tensor, Tensor]], seed: int = 0) -> tuple[Tensor, Objects]:
    """Normalized images, and what is on them, padded by −1."""
    most = max(*(len(boxes) for _, boxes, _, _ in scenes), 1)
    boxes_BN4 = torch.zeros(len(scenes), most, 4)
    labels_BN = torch.full((len(scenes), most), -1)
    masks_BNMM = torch.zeros(len(scenes), most, 112, 112, dtype=torch.uint8)
    for number, (_, boxes, labels, masks) in enumerate(scenes):
        boxes_BN4[number, : len(boxes)] = boxes
        labels_BN[number, : len(boxes)] = labels
        masks_BNMM[number, : len(boxes)] = cropped(masks, boxes)
    images = (torch.stack([image for image, *_ in scenes]) - 0.45) / 0.25
    sizes_B2 = torch.full((len(scenes), 2), float(images.shape[-1]))
    return images, Objects(boxes_BN4, labels_BN, masks_BNMM, sizes_B2, torch.arange(len(scenes)) + seed)


FOUR_SCENES = [scene(0), scene(1), scene(9, objects=0), scene(8, objects=0)]
"""The second half is without objects."""
