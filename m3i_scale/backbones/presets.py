"""Published model sizes by name."""

from __future__ import annotations

from m3i_scale.backbones.families import FAMILIES, VisionConfig
from m3i_scale.backbones.families.dinov2 import DINOV2_SIZES
from m3i_scale.backbones.families.siglip import SIGLIP_SIZES
from m3i_scale.backbones.families.vit import VIT_SIZES

_FAMILY_OF = {name: family for family in FAMILIES for name in family.presets()}
PRESETS = tuple(_FAMILY_OF)
DEFAULT_PRESET = "vit-b/16"


def preset_config(name: str) -> VisionConfig:
    """Return the configuration of a name in `PRESETS`, at 224 pixels."""
    family = _FAMILY_OF[name]
    return family.config_class(**family.presets()[name])


def published_heads(width: int, depth: int) -> int | None:
    """Return the number of heads of the published ViT, SigLIP or DINOv2 with this size, or None."""
    sizes = {size[:2]: size[2] for size in (*VIT_SIZES.values(), *SIGLIP_SIZES.values(), *DINOV2_SIZES.values())}
    return sizes.get((width, depth))
