"""Interface of detection heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone
from m3i_scale.objective.detection.losses import Objects
from m3i_scale.objective.detection.modeling_mask_rcnn import Detections


class ObjectDetector(nn.Module, ABC):
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
