"""Drop path (stochastic depth): residual branches are dropped at random during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.internimage.modeling_internimage import InternImageLayer

_BRANCHES = ("attention", "self_attn", "mlp")
"""Names of the residual branch modules in layers of ViT, DINOv2 and CLIP."""


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the drop rate of every layer: a linear ramp from 0 to `rate`, as in all published recipes."""
    return [rate * layer / max(depth - 1, 1) for layer in range(depth)]


def apply_drop_path(backbone: Backbone, rate: float) -> None:
    """Add drop path to every layer of a backbone, with a rate that increases with depth.

    The output of a branch is dropped before its layer scale, if any; the order does not matter, because both are
    factors. `transformers` has no drop path for ViT and CLIP, and only one rate for all layers of DINOv2.
    """
    layers = backbone.layers
    for layer, layer_rate in zip(layers, drop_path_rates(rate, len(layers)), strict=True):
        if isinstance(layer, InternImageLayer):
            layer.drop_path = layer_rate
        elif layer_rate > 0:
            for name in _BRANCHES:
                if hasattr(layer, name):
                    getattr(layer, name).register_forward_hook(_Drop(layer_rate))


class _Drop:
    """Forward hook that multiplies a branch's output by 0 or 1/(1 − rate) per sample. Inactive in evaluation mode."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return self._dropped(output[0]), *output[1:]
        return self._dropped(output)

    def _dropped(self, branch_BLD: Tensor) -> Tensor:
        kept_B = torch.rand(len(branch_BLD), device=branch_BLD.device) >= self._rate
        return branch_BLD * (kept_B / (1 - self._rate)).to(branch_BLD.dtype)[:, None, None]
