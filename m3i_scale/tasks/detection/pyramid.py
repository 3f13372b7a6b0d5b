"""Feature pyramid of five strides from the four stages of an InternImage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from m3i_scale.tasks.detection.modeling_mask_rcnn import MapNorm


class _FpnConv(nn.Conv2d):
    """A convolution with the initialization of torchvision's FPN."""

    def reset_parameters(self) -> None:
        """Initialize weights (Kaiming uniform) and biases (0)."""
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
