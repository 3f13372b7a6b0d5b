"""Convolutional decoder over the patch grid, cheaper than a Transformer if an image has many masks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.backbones.families import VisionConfig
from m3i_scale.config.sections import MAX_HEADS, MAX_LAYERS, MAX_SIDE
from m3i_scale.objective.decoders import DecoderSpec


class ConvolutionDecoder(nn.Module):
    """Grouped convolutions over the grid of visible tokens and mask tokens. Each is followed by LayerNorm without
    parameters, GELU and a residual connection (data2vec 2.0, `Decoder2d`)."""

    def __init__(self, width: int, depth: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.width = width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(
            [nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)]
        )

    def reset_parameters(self) -> None:
        """Initialize the mask token; the layers initialize themselves."""
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        cls_B1D: Tensor,
        tokens_BLD: Tensor,
        visible_BL: Tensor,
        query_BQ: Tensor,
        grid: tuple[int, int],
        own_position_BNP: None,
        query_position_BNP: None,
    ) -> Tensor:
        """Predict the patches `query_BQ` as `TransformerDecoder`: (B, Q, width). Class token and positions are
        ignored."""
        masks_BND = self.mask_token.to(tokens_BLD.dtype).expand(len(tokens_BLD), grid[0] * grid[1], -1)
        filled_BND = masks_BND.scatter(1, visible_BL[..., None].expand_as(tokens_BLD), tokens_BLD)
        map_BDHW = filled_BND.transpose(1, 2).unflatten(2, grid)
        for layer in self.layers:
            normed_BHWD = F.layer_norm(layer(map_BDHW).movedim(1, 3).float(), (self.width,))
            map_BDHW = map_BDHW + F.gelu(normed_BHWD).movedim(3, 1).to(map_BDHW.dtype)
        return gather_tokens(map_BDHW.flatten(2).transpose(1, 2), query_BQ)


class ConvolutionSpec(DecoderSpec):
    """A decoder that predicts any patch of the input's view with convolutions."""

    kind: ClassVar[str] = "convolution"
    dense: ClassVar[bool] = True
    depth: int = Field(default=6, ge=1, le=MAX_LAYERS)
    """Number of convolutions, with the backbone's width."""
    kernel: int = Field(default=3, ge=3, le=MAX_SIDE)
    """Kernel size in patches."""
    groups: int = Field(default=16, ge=1, le=MAX_HEADS)
    """Number of channel groups of the grouped convolutions."""

    @field_validator("kernel")
    @classmethod
    def _has_a_centre(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"an odd number has a patch at its center; got {kernel}")
        return kernel

    def build(self, config: VisionConfig) -> nn.Module:
        if config.hidden_size % self.groups:
            raise ValueError(f"the backbone's width {config.hidden_size} is no multiple of its {self.groups} groups")
        return ConvolutionDecoder(config.hidden_size, self.depth, self.kernel, self.groups)
