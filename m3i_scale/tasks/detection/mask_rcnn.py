"""Mask R-CNN on a backbone, with its losses and the attention windows of a plain Transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.families.internimage import MapBackbone
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.errors import ConfigError
from m3i_scale.objective.ranks import Ranks
from m3i_scale.tasks.detection.configuration_mask_rcnn import HeadFields
from m3i_scale.tasks.detection.detection_heads import MaskRcnn, Windows, default_global_layers
from m3i_scale.tasks.detection.detection_losses import (
    Objects,
    RegionSamples,
    box_loss,
    choose_regions,
    class_weights,
    counted_regions,
    federated_classes,
    masks_in,
    region_losses,
    sigmoid_loss,
)
from m3i_scale.tasks.detection.modeling_mask_rcnn import (
    KERNEL,
    MapNorm,
    MaskHead,
    MaskRcnnHead,
    SimplePyramid,
    WindowedLayers,
    cut_out,
    propose,
    sizes_of,
)
from m3i_scale.tasks.detection.object_detector import ObjectDetector


class MaskRcnnDetector(MaskRcnnHead, ObjectDetector):
    """Trainable Mask R-CNN for square images, padded at the right and at the bottom.

    Modules compute in the engine's dtype; predictions, anchors, boxes, RoIAlign and losses are fp32. Losses are
    normalized over `ranks`. The head replaces the attention function of a plain Transformer. Only a federated loss
    reads `image_counts`, the number of training images per class.
    """

    def __init__(
        self,
        spec: MaskRcnn,
        backbone: Backbone,
        classes: int,
        ranks: Ranks,
        image_counts: Sequence[int] | None = None,
    ) -> None:
        normed, widths = spec.norm == "layer", backbone.stage_widths
        if widths and spec.windows is not None:
            raise ConfigError(
                "windows have no effect: this backbone has no attention", where="task.head.windows", fix="leave it out"
            )
        windows: WindowedLayers | None = None
        pyramid: nn.Module
        if widths:
            pyramid = StagePyramid(widths, spec.channels, norm=normed)
        else:
            windows = windowed_layers(spec.windows, backbone)
            pyramid = SimplePyramid(backbone.width, spec.channels, norm=normed)
        super().__init__(HeadFields.of(spec.model_dump()), classes, backbone.patch_size, windows, pyramid)
        self.spec, self.classes, self.ranks = spec, classes, ranks
        self.drawn_by = _drawn_by(spec, classes, image_counts)

    def backbone_layers(self) -> dict[str, int]:
        if self.windows is None:
            return {}
        return {
            f"windows.layers.{number}.{name}": number
            for number, layer in enumerate(self.windows.layers)
            for name, _ in layer.named_parameters()
        }

    def read(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return the backbone's map for normalized images (B, D, H, W), or the maps of its four stages."""
        if self.windows is not None:
            plain = cast(TokenBackbone, backbone)
            return [self.windows(plain.layers, plain.embed(images_BCHW)[1])]
        return cast(MapBackbone, backbone).stage_maps(images_BCHW)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the feature maps of five levels (B, C, H, W)."""
        levels: list[Tensor] = self.pyramid(maps)
        return levels

    def losses(self, levels: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        spec, maps = self.spec, [map_BCHW.float() for map_BCHW in levels[:4]]
        logits, deltas, places = self.predict_regions(levels)
        if maps[0].is_meta:
            objectness, moves = torch.cat(logits, dim=1).mean(), torch.cat(deltas, dim=1).mean()
            chosen = [counted_regions(spec.regions, objects)] * len(maps[0])
        else:
            generators, there = objects.generators(), [objects.on(image) for image in range(len(maps[0]))]
            boxes = [boxes_O4 for boxes_O4, *_ in there]
            objectness, moves = region_losses(
                spec, torch.cat(logits, dim=1), torch.cat(deltas, dim=1), torch.cat(places), boxes, generators
            )
            sizes = sizes_of(objects.sizes_B2)
            proposals = propose(self.head.regions, logits, deltas, places, sizes, training=self.training)
            chosen = [
                self._chosen(boxes_R4, of_image, generator)
                for boxes_R4, of_image, generator in zip(proposals, there, generators, strict=True)
            ]
        counts = [sum(len(one.labels_R) for one in chosen), sum(len(one.objects_P) for one in chosen)]
        count_2 = self.ranks.sum(torch.tensor(counts, dtype=torch.float32).to(maps[0].device, non_blocking=True))
        regions, positives = (count_2 / self.ranks.world_size).clamp(min=1 / self.ranks.world_size).unbind()
        cut_RCSS = cut_out(self.head, maps, self.strides, [one.boxes_R4 for one in chosen], spec.box_side)
        logits_RK, deltas_RK4 = self.boxes(cut_RCSS)
        found = {
            "rpn_objectness": objectness,
            "rpn_box": moves,
            "class": self._class_loss(logits_RK, chosen) / regions,
            "box": self._box_loss(deltas_RK4, chosen) / regions,
        }
        if self.masks is not None:
            found["mask"] = self._mask_loss(self.masks, maps, chosen) / positives
        return found

    def _chosen(
        self, proposals_R4: Tensor, objects: tuple[Tensor, Tensor, Tensor | None], generator: torch.Generator
    ) -> RegionSamples:
        spec, count = self.spec, self.spec.federated_classes
        chosen = choose_regions(spec.regions, proposals_R4, objects, self.classes, generator)
        if count is None:
            return chosen
        if self.drawn_by is None:
            raise ValueError("a federated loss draws classes by their numbers of images")
        self.drawn_by = self.drawn_by.to(proposals_R4.device)  # copies once; a buffer would become bf16
        return replace(chosen, drawn_C=federated_classes(chosen.labels_R, count, self.drawn_by, generator))

    def _class_loss(self, logits_RK: Tensor, chosen: Sequence[RegionSamples]) -> Tensor:
        """Return the sum over regions. Federated losses sample classes per image (published runs: one image per
        GPU)."""
        if self.spec.classifier == "softmax":
            return F.cross_entropy(logits_RK, torch.cat([one.labels_R for one in chosen]), reduction="sum")
        by_image = logits_RK.split([len(one.labels_R) for one in chosen])
        parts = [
            sigmoid_loss(part_RK, one.labels_R, one.drawn_C) for part_RK, one in zip(by_image, chosen, strict=True)
        ]
        return torch.stack(parts).sum()

    def _box_loss(self, deltas_RK4: Tensor, chosen: Sequence[RegionSamples]) -> Tensor:
        parts = []
        for deltas_SK4, one in zip(deltas_RK4.split([len(one.labels_R) for one in chosen]), chosen, strict=True):
            place_P = torch.arange(len(one.objects_P), device=deltas_SK4.device)
            label_P = one.labels_R[: len(place_P)] if deltas_SK4.shape[1] > 1 else torch.zeros_like(place_P)
            coder, beta = BoxCoder(self.spec.box_weights), self.spec.smooth_l1_beta
            boxes_P4 = one.boxes_R4[: len(place_P)]
            parts.append(box_loss(deltas_SK4[place_P, label_P], boxes_P4, one.truth_P4, coder, beta))
        return torch.stack(parts).sum()

    def _mask_loss(self, head: MaskHead, maps: Sequence[Tensor], chosen: Sequence[RegionSamples]) -> Tensor:
        """Return the sum over object regions of the mean over pixels."""
        boxes = [one.boxes_R4[: len(one.objects_P)] for one in chosen]
        labels_P = torch.cat([one.labels_R[: len(one.objects_P)] for one in chosen])
        logits_PMM = head(cut_out(self.head, maps, self.strides, boxes, self.spec.mask_side), labels_P)
        side, truth = int(logits_PMM.shape[-1]), []
        for one, boxes_P4 in zip(chosen, boxes, strict=True):
            if one.masks_PMM is None:
                raise ValueError("a mask head learns from masks")
            truth.append(masks_in(one.masks_PMM, one.truth_P4, boxes_P4, side))
        loss: Tensor = F.binary_cross_entropy_with_logits(logits_PMM, torch.cat(truth), reduction="sum")
        return loss / side**2


def _drawn_by(spec: MaskRcnn, classes: int, image_counts: Sequence[int] | None) -> Tensor | None:
    """Return the class sampling weights of a federated loss."""
    if spec.federated_classes is None or image_counts is None:
        return None
    there = sum(count > 0 for count in image_counts)
    if len(image_counts) != classes or there < spec.federated_classes:
        raise ConfigError(
            f"federated_classes must be at most {there}, the number of classes in training images, got "
            f"{spec.federated_classes}",
            where="task.head.federated_classes",
            why=f"{there} of {classes} classes have an `image_count` in categories.json",
            fix=f"set task.head.federated_classes={there} or less, or null",
        )
    return class_weights(image_counts, spec.federated_power)


def windowed_layers(spec: Windows | None, backbone: Backbone) -> WindowedLayers:
    """Return windowed layers for a plain Transformer as in ViTDet; most layers use windows. The backbone's attention
    function is replaced. By default (None), ViTDet's windows are used; grids smaller than two windows get neither
    windows nor relative positions, like the backbone.

    Export, layer decay, drop path and activation checkpointing work as without windows, since the layers are those of
    the stock model.
    """
    if not isinstance(backbone, TokenBackbone):
        raise ConfigError("windows need a plain Transformer", where="task.head.windows", fix="leave it out")
    if backbone.prefix != 1:
        raise ConfigError(
            f"windows need one class token, but this {backbone.model.config.model_type} has {backbone.prefix} tokens "
            "before the patches",
            where="task.head.windows",
            fix="leave it out, or use a ViT, DINOv2 or CLIP as backbone",
        )
    config, (side, _), depth = backbone.model.config, backbone.grid, len(backbone.layers)
    if config._attn_implementation not in ("sdpa", KERNEL):
        raise ConfigError(
            f"attention in windows must use SDPA, got {config._attn_implementation}",
            where="backbone.attention_kernel",
            fix="leave it out",
        )
    if spec is None:
        usual = Windows()
        spec = usual if side >= 2 * usual.size else Windows(size=0, relative_positions=False)
    if spec.size >= side:
        raise ConfigError(
            f"task.head.windows.size must be smaller than the grid of {side} × {side} patches, got {spec.size}",
            where="task.head.windows.size",
            fix="lower it, or set task.head.windows.size=0",
        )
    layers = default_global_layers(depth) if spec.global_layers is None else spec.global_layers
    if max(layers, default=0) >= depth:
        raise ConfigError(
            f"a global layer must be from 0 to {depth - 1}, got {spec.global_layers}",
            where="task.head.windows.global_layers",
            fix="leave out task.head.windows.global_layers, or correct it",
        )
    if spec.size and spec.global_layers is not None and len(layers) == depth:
        raise ConfigError(
            f"a window of {spec.size} tokens has no effect: all layers use global attention",
            where="task.head.windows.global_layers",
            fix="set task.head.windows.size=0",
        )
    config._attn_implementation = KERNEL
    width = config.hidden_size // config.num_attention_heads
    windows = [spec.size if spec.size and number not in layers else side for number in range(depth)]
    return WindowedLayers(side, windows, width, relative=spec.relative_positions)


class _FpnConv(nn.Conv2d):
    """A convolution with the initialization of torchvision's FPN."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StagePyramid(nn.Module):
    """Feature pyramid network over the maps of four stages."""

    def __init__(self, widths: Sequence[int], channels: int, *, norm: bool) -> None:
        super().__init__()
        self.network = FeaturePyramidNetwork(
            list(widths), channels, extra_blocks=LastLevelMaxPool(), norm_layer=MapNorm if norm else None
        )
        for block in (*self.network.inner_blocks, *self.network.layer_blocks):
            conv = block[0]
            size, padding = cast(tuple[int, int], conv.kernel_size), cast(tuple[int, int], conv.padding)
            block[0] = _FpnConv(conv.in_channels, conv.out_channels, size, padding=padding, bias=conv.bias is not None)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return five maps (B, C, H, W) from four, the largest first."""
        named = OrderedDict((str(number), map_BCHW) for number, map_BCHW in enumerate(maps))
        return list(self.network(named).values())
