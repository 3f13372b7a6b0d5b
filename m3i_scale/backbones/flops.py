"""FLOP counting, with formulas that torch's counter lacks, and the costs of a backbone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families import PRESETS
from m3i_scale.config import BackboneConfig


def _bag(weight: Size, index: Size, *_: Any, **__: Any) -> int:
    """Count a weighted bag: a product and a sum per value of the fetched rows."""
    return 2 * index.numel() * weight[1]


def _bag_backward(gradient: Size, index: Size, *_: Any, **__: Any) -> int:
    return 2 * index.numel() * gradient[-1]


def _bag_weights_backward(gradient: Size, _weight: Size, index: Size, *_: Any, **__: Any) -> int:
    return _bag_backward(gradient, index)


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Size, query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Count four products, without the scores that the kernel recomputes to save memory."""
    again = query.numel() * key[-2] * 2  # torch counts the recomputed scores
    return int(sdpa_backward_flop_count(gradient, query, key, value)) - again


def _convolution_backward(
    gradient: Size,
    image: Size,
    weight: Size,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Any,
    **_: Any,
) -> int:
    """Count each gradient as the forward pass, which has the same products. torch's formula ignores groups: for a
    depthwise convolution of 64 channels, it counts 64 times too much for the weight gradient."""
    places = image if transposed else gradient
    forward = 2 * places[0] * places[2:].numel() * weight.numel()
    return forward * sum(map(bool, output_mask[:2]))


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._embedding_bag: _bag,
    torch.ops.aten._embedding_bag_backward: _bag_backward,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_weights_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Formulas in addition to torch's. Tensor arguments are shapes."""


class _NoModules(ModuleTracker):
    """A no-op module tracker. torch's hooks create reference cycles with the graph, which would keep recomputed
    activations in memory until garbage collection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def counter() -> FlopCounterMode:
    """Return torch's counter with `FORMULAS`, without module tracking. It counts products and sums of matrix products,
    convolutions and attention."""
    counted = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    counted.mod_tracker = _NoModules()
    return counted


def describe_backbone(section: BackboneConfig, name: str) -> dict[str, Any]:
    """Count parameters and forward FLOPs of one backbone, without allocating memory.

    `image_size`, `patch_size` and `mask_cell` are in pixels; `parameters` are those of the exported model; `gmac` is in
    10⁹ multiply-adds per image, forward (published tables call these FLOPs).
    """
    config = backbone_config(section)
    if hasattr(config, "num_attention_heads"):
        config._attn_implementation = "eager"  # not every device counts fused attention
    with torch.device("meta"):
        backbone = build_backbone(config).eval()
        image_BCHW = torch.zeros(1, 3, config.image_size, config.image_size)
        with counter() as counted, torch.no_grad():
            backbone.last_hidden_state(image_BCHW)
    return {
        "name": name,
        "model_type": config.model_type,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "tokens": backbone.grid[0] * backbone.grid[1],
        "mask_cell": backbone.cell * backbone.patch_size,
        "width": backbone.width,
        "layers": len(backbone.layers),
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "gmac": counted.get_total_flops() / 2e9,
    }


if __name__ == "__main__":  # python -m m3i_scale.backbones.flops > m3i_scale/backbones/sizes.json
    counted_rows = (describe_backbone(BackboneConfig(preset=name), name) for name in PRESETS)
    lines = (json.dumps(row | {"gmac": round(row["gmac"], 4)}) for row in counted_rows)
    sys.stdout.write("[\n" + ",\n".join(lines) + "\n]\n")
