"""Sizes of the backbone presets. `python tests/backbone_sizes.py > m3i_scale/backbones/sizes.json` regenerates them."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families import PRESETS
from m3i_scale.backbones.flops import counter
from m3i_scale.config import BackboneConfig


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


if __name__ == "__main__":
    counted_rows = (describe_backbone(BackboneConfig(preset=name), name) for name in PRESETS)
    lines = (json.dumps(row | {"gmac": round(row["gmac"], 4)}) for row in counted_rows)
    sys.stdout.write("[\n" + ",\n".join(lines) + "\n]\n")
