"""Make maps of five strides for detection: of one map, as ViTDet does, or of an InternImage's four."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

STRIDES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the levels, in patches of the backbone."""


class MapNorm(nn.Module):
    """Normalises the channels at every place, in fp32."""

    eps = 1e-6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Set scale 1 and offset 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the same shape and type."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).float()
        normed_BHWC = F.layer_norm(x_BHWC, x_BHWC.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return normed_BHWC.permute(0, 3, 1, 2).to(x_BCHW.dtype)


class SimplePyramid(nn.Module):
    """Scales the map of a plain Transformer ×4, ×2, ×1 and ×½, and takes every second place of the last."""

    def __init__(self, width: int, channels: int, *, norm: bool) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        scaled: list[tuple[list[nn.Module], int]] = [
            (
                [
                    nn.ConvTranspose2d(width, half, 2, 2),
                    *_norm(half, norm),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(width, half, 2, 2)], half),
            ([], width),
            ([nn.MaxPool2d(2, 2)], width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(inner, channels, 1, bias=not norm),
                *_norm(channels, norm),
                nn.Conv2d(channels, channels, 3, padding=1, bias=not norm),
                *_norm(channels, norm),
            )
            for layers, inner in scaled
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return five maps (B, C, H, W), the largest first, of one."""
        (map_BDHW,) = maps
        levels = [level(map_BDHW) for level in self.levels]
        return [*levels, levels[-1][:, :, ::2, ::2]]


class _FpnConv(nn.Conv2d):
    """Convolves, and starts from what torchvision's network does."""

    def reset_parameters(self) -> None:
        """Draw first values."""
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StagePyramid(nn.Module):
    """Joins the maps of four stages by a feature pyramid network."""

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
        """Return five maps (B, C, H, W), the largest first, of four."""
        named = OrderedDict((str(number), map_BCHW) for number, map_BCHW in enumerate(maps))
        return list(self.network(named).values())


def _norm(channels: int, there: bool) -> list[nn.Module]:
    return [MapNorm(channels)] if there else []
