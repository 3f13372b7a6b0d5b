"""Define what the objective asks of a head that finds objects, and what such a head gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone
from m3i_scale.objective.detection.losses import Objects
from m3i_scale.objective.detection.modeling_mask_rcnn import Detections


class ObjectDetector(nn.Module, ABC):
    """Finds objects on square images, padded at the right and at the bottom."""

    def backbone_layers(self) -> dict[str, int]:
        """Return the layer of the backbone, from 0, at whose rate parameters of this module learn."""
        return {}

    @abstractmethod
    def read(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return maps of the backbone (B, D, H, W) of normalised images: of some layers, or of its four stages."""

    @abstractmethod
    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the maps (B, C, H, W) that objects are found in, of those of `read`."""

    def encode(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return `levels` of what is read of normalised images."""
        return self.levels(self.read(backbone, images_BCHW))

    @abstractmethod
    def losses(self, levels: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        """Return this rank's share of every loss, fp32; the mean over ranks is the loss of the global batch.

        Every parameter has a gradient, zero where a batch has no object. The loss of the model is their sum.

        Args:
            levels: of `encode`.
            objects: to be found.
        """

    @abstractmethod
    def detect(self, levels: Sequence[Tensor], sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
        """Return what is found on every image.

        Args:
            levels: of `encode`.
            sizes_B2: height and width of the images before padding.
            own_B2: those of the images themselves, which boxes are scaled to.
        """
