"""Model of a folder as a module with built-in image normalization, for custom programs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_scale.errors import DataError
from m3i_scale.evaluate.features import VisionModel


class LoadedBackbone(nn.Module):
    """Image encoder with the weights of a model folder, in fp32. Its parameters receive gradients.

    Args:
        vision: the model, as in `evaluate`.
    """

    def __init__(self, vision: VisionModel) -> None:
        super().__init__()
        self.model: nn.Module = vision.model
        """The standard model of `transformers`."""
        self._vision = vision

    @property
    def image_size(self) -> int:
        """Return the image size in pixels."""
        return self._vision.size

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of every image (B, D), and its patch tokens, row by row (B, L, D).

        Args:
            images_BCHW: uint8 (B, 3, H, W), H = W = `image_size`; normalized here.

        Raises:
            DataError: images have another dtype or size.
            ExportError: the model has no class token, but `pool` needs one.
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
