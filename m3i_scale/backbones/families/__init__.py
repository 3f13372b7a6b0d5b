"""Backbone families, found by the class of their configuration, and their published sizes by name."""

from __future__ import annotations

from typing import Any

from m3i_scale.backbones.families.base import Family, TokenFamily, VisionConfig
from m3i_scale.backbones.families.dino import DINOV2_SIZES, Dinov2, Dinov2WithRegisters, Dinov3
from m3i_scale.backbones.families.internimage import InternImage
from m3i_scale.backbones.families.vit import SIGLIP_SIZES, VIT_SIZES, Clip, Siglip, ViT

__all__ = [
    "DEFAULT_PRESET",
    "FAMILIES",
    "PRESETS",
    "Family",
    "TokenFamily",
    "VisionConfig",
    "family_of",
    "find_family",
    "preset_config",
    "published_heads",
    "token_family",
]

FAMILIES: tuple[Family, ...] = (ViT(), Clip(), Siglip(), Dinov2(), Dinov2WithRegisters(), Dinov3(), InternImage())
_FAMILY_OF_PRESET = {name: family for family in FAMILIES for name in family.presets()}
PRESETS = tuple(_FAMILY_OF_PRESET)
DEFAULT_PRESET = "vit-b/16"


def find_family(config: Any) -> Family | None:
    """Return the family of a configuration, or None if it is not a backbone's."""
    return next((family for family in FAMILIES if type(config) is family.config_class), None)


def family_of(config: VisionConfig) -> Family:
    """Return the family of a backbone's configuration, or raise a TypeError."""
    family = find_family(config)
    if family is None:
        raise TypeError(f"{type(config).__name__} is no configuration of a backbone")
    return family


def token_family(config: VisionConfig) -> TokenFamily:
    """Return the family of a plain vision Transformer's configuration, or raise a TypeError."""
    family = family_of(config)
    if not isinstance(family, TokenFamily):
        raise TypeError(f"a {family.name} is no plain vision Transformer")
    return family


def preset_config(name: str) -> VisionConfig:
    """Return the configuration of a name in `PRESETS`, at 224 pixels."""
    family = _FAMILY_OF_PRESET[name]
    return family.config_class(**family.presets()[name])


def published_heads(width: int, depth: int) -> int | None:
    """Return the number of heads of the published ViT, SigLIP or DINOv2 with this size, or None."""
    sizes = {size[:2]: size[2] for size in (*VIT_SIZES.values(), *SIGLIP_SIZES.values(), *DINOV2_SIZES.values())}
    return sizes.get((width, depth))
