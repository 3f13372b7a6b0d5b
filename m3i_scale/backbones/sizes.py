"""Sizes and costs of backbones. Those of the presets are stored in sizes.json, since counting takes half a minute."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.files import read_json

SIZES = Path(__file__).with_name("sizes.json")


def describe_presets(names: list[str]) -> list[dict[str, Any]]:
    """Return the stored `describe_backbone` results of the named presets, or of all presets without names."""
    rows = {row["name"]: row for row in read_json(SIZES)}
    for name in names:
        if name not in rows:
            raise ConfigError(f"no backbone '{name}'", fix=did_you_mean(name, rows))
    return [rows[name] for name in names or rows]


def describe_backbone(section: BackboneConfig, name: str) -> dict[str, Any]:
    """Count parameters and forward FLOPs of one backbone, without allocating memory.

    `image_size`, `patch_size` and `mask_cell` are in pixels; `parameters` are those of the exported model; `gmac` is in
    10⁹ multiply-adds per image, forward (published tables call these FLOPs).
    """
    import torch

    from m3i_scale.backbones.build import backbone_config, build_backbone
    from m3i_scale.backbones.flops import counter

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


if __name__ == "__main__":  # python -m m3i_scale.backbones.sizes > m3i_scale/backbones/sizes.json
    from m3i_scale.backbones.families import PRESETS

    counted_rows = (describe_backbone(BackboneConfig(preset=name), name) for name in PRESETS)
    lines = (json.dumps(row | {"gmac": round(row["gmac"], 4)}) for row in counted_rows)
    sys.stdout.write("[\n" + ",\n".join(lines) + "\n]\n")
