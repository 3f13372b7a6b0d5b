"""Wrap the model of a folder as a module that normalises its images itself, for programs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_scale.errors import DataError
from m3i_scale.evaluate.features import VisionModel


class LoadedBackbone(nn.Module):
    """Encodes images by the weights of a model folder, in fp32; gradients reach its parameters.

    Args:
        vision: the model as `evaluate` has it.
    """

    def __init__(self, vision: VisionModel) -> None:
        super().__init__()
        self.model: nn.Module = vision.model
        """The stock model of `transformers`."""
        self._vision = vision

    @property
    def image_size(self) -> int:
        """Return the side of the images in pixels."""
        return self._vision.size

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vector of every image (B, D), and the tokens of its patches, row by row (B, L, D).

        Args:
            images_BCHW: uint8 (B, 3, H, W), H = W = `image_size`; normalised here.

        Raises:
            DataError: images of another type or size.
            ExportError: the model has no class token, and `pool` asks for it.
        """
        size = self.image_size
        if images_BCHW.dtype != torch.uint8 or images_BCHW.shape[1:] != (3, size, size):
            raise DataError(
                f"the images are {images_BCHW.dtype} {tuple(images_BCHW.shape)}",
                where="images_BCHW",
                why="pixels from 0 to 255 are normalised here; others would be wrong without notice",
                fix=f"give torch.uint8 (B, 3, {size}, {size})",
            )
        return self._vision.encode(images_BCHW)
