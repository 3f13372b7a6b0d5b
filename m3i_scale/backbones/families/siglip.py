"""`SiglipVisionModel` of SigLIP and of fixed-size SigLIP 2: a ViT without class token."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import SiglipVisionConfig, SiglipVisionModel

from m3i_scale.backbones.families.base import TokenFamily
from m3i_scale.backbones.families.clip import Clip
from m3i_scale.backbones.families.vit import VIT_SIZES, sized
from m3i_scale.errors import ConfigError

SIGLIP_SIZES = {"b": VIT_SIZES["b"], "l": VIT_SIZES["l"], "so400m": (1152, 27, 16, 4304)}
"""Width, depth, heads, MLP (Zhai et al.; so400m: Alabdulmohsin et al.)."""
_PATCHES = {"b": (16,), "l": (16,), "so400m": (14, 16)}
"""Patch sizes of published SigLIP towers (Zhai et al.; Tschannen et al.)."""


class Siglip(TokenFamily):
    """Vision towers of SigLIP, without their attention pooling."""

    config_class, model_class = SiglipVisionConfig, SiglipVisionModel
    name, first_preset, derives = "SigLIP", "siglip-b/16", False
    has_class_token, asks_to_interpolate = False, True
    shape_fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "image_size", "patch_size", "num_channels", "vision_use_head"),
    )
    training_fields = ("attention_dropout",)
    parts: ClassVar[dict[str, str]] = {
        part: name for part, name in Clip.parts.items() if part not in ("class", "pre_norm")
    }

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"siglip-{size}/{patch}": sized(*SIGLIP_SIZES[size], patch) | {"vision_use_head": False}
            for size, patches in _PATCHES.items()
            for patch in patches
        }

    def adapt(self, config: Any) -> None:
        """Disable the attention pooling: see `check`."""
        config.vision_use_head = False

    def check(self, config: Any, where: str) -> None:
        """Reject sizes that are invalid for a backbone, and the attention pooling; see `Family`."""
        super().check(config, where)
        if config.vision_use_head:
            raise ConfigError(
                "a backbone has no pooling head",
                where=f"{where}.config.vision_use_head: {config.vision_use_head}",
                why="recipes pool by their decoders: nothing would train that head",
                fix=f"{where}.config.vision_use_head=false",
            )
