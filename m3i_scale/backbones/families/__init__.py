"""Backbone families: one file per family, found by the class of its configuration."""

from __future__ import annotations

from typing import Any

from m3i_scale.backbones.families.base import Family, TokenFamily, VisionConfig
from m3i_scale.backbones.families.clip import Clip
from m3i_scale.backbones.families.dinov2 import Dinov2
from m3i_scale.backbones.families.dinov2_registers import Dinov2WithRegisters
from m3i_scale.backbones.families.dinov3 import Dinov3
from m3i_scale.backbones.families.internimage import InternImage
from m3i_scale.backbones.families.siglip import Siglip
from m3i_scale.backbones.families.vit import ViT

__all__ = ["FAMILIES", "Family", "TokenFamily", "VisionConfig", "family_of", "find_family", "token_family"]

FAMILIES: tuple[Family, ...] = (ViT(), Clip(), Siglip(), Dinov2(), Dinov2WithRegisters(), Dinov3(), InternImage())


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
