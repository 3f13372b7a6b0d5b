"""Interface of detection heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from m3i_scale.backbones.base import Backbone, Tokens
from m3i_scale.data.batch import Batch
from m3i_scale.objective.heads import BackboneReader
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.detection.detection_losses import Objects
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections


class ObjectDetector(BackboneReader):
    """A detection head for square images, padded at the right and at the bottom."""

    def backbone_layers(self) -> dict[str, int]:
        """Return the backbone layer, from 0, of which each parameter of this module gets the learning rate."""
        return {}

    @abstractmethod
    def read(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return maps of the backbone (B, D, H, W) for normalized images: of some layers, or of its four stages."""

    @abstractmethod
    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the feature maps (B, C, H, W) for detection, from the maps of `read`."""

    def encode(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return the `levels` of normalized images."""
        return self.levels(self.read(backbone, images_BCHW))

    def encode_view(self, backbone: Backbone, images_BCHW: Tensor, progress: float) -> tuple[Tokens, list[Tensor]]:
        """Return the mean token and the tokens of normalized images, and their `levels`."""
        maps = self.read(backbone, images_BCHW)
        own_BDHW = maps[2] if backbone.stage_widths else maps[-1]  # at the stride of the patches
        tokens_BND, levels = own_BDHW.flatten(2).transpose(1, 2), self.levels(maps)
        return (tokens_BND.mean(dim=1, keepdim=True), tokens_BND), levels

    @abstractmethod
    def losses(self, levels: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        """Return this rank's share of every loss, fp32; the mean over ranks is the loss of the global batch.

        Every parameter has a gradient, which is zero if a batch has no object. The loss of the model is their sum.

        Args:
            levels: result of `encode`.
            objects: ground truth.
        """

    @abstractmethod
    def detect(self, levels: Sequence[Tensor], sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
        """Return the detections of every image.

        Args:
            levels: result of `encode`.
            sizes_B2: height and width of the images before padding.
            own_B2: height and width of the original images, to which boxes are scaled.
        """


def detector_of(objective: Objective) -> ObjectDetector:
    """Return the detection head of a recipe with a detection target."""
    return cast(ObjectDetector, objective.reader)


@torch.no_grad()
def detect(objective: Objective, pixels_BCHW: Tensor, sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
    """Return the objects detected in normalized, padded images; arguments as for `ObjectDetector.detect`."""
    detector = detector_of(objective)
    return detector.detect(detector.encode(objective.student, pixels_BCHW), sizes_B2, own_B2)


def image_sizes(batch: Batch) -> Tensor:
    """Return the height and width (B, 2) in pixels of the image area in view 1, without padding."""
    side = batch.images_VBCHW.shape[-1]
    crops_B4 = batch.crops_VB4[0]
    inside_B2 = torch.minimum(crops_B4[:, 2:], batch.sizes_B2 - crops_B4[:, :2])
    return (side * inside_B2 / crops_B4[:, 2:]).round()
