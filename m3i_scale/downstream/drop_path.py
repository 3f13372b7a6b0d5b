"""Leave out residual branches at random while training: drop path, also called stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.internimage.modeling_internimage import InternImageLayer

_BRANCHES = ("attention", "self_attn", "mlp")
"""What the layers of ViT, DINOv2 and CLIP call the modules whose outputs they add to their input."""


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the rate of every layer: a linear ramp from 0 to `rate`, as all published recipes mean it."""
    return [rate * layer / max(depth - 1, 1) for layer in range(depth)]


def apply_drop_path(backbone: Backbone, rate: float) -> None:
    """Have every layer of a backbone drop its branches, at a rate that grows with depth.

    The output of a branch is dropped before its layer scale, if it has one: both are factors. `transformers` has no
    drop path for ViT and CLIP, and one rate for all layers of DINOv2.
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
    """Multiplies the output of a branch by 0 or 1/(1 − rate), sample by sample; outside of training by 1."""

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
