"""Plain vision Transformers: `ViTModel`, also with the shape of EVA, and the vision towers of image-text models.

`CLIPVisionModel` is a ViT with a norm before the first layer. `SiglipVisionModel`, of SigLIP and SigLIP 2 of a fixed
size, is a ViT without class token.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from m3i_scale.backbones.families.base import TokenFamily
from m3i_scale.errors import ConfigError

VIT_SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}
"""Width, depth, heads, MLP (Zhai et al., Scaling Vision Transformers; H: Dosovitskiy et al.)."""

_SIZES = {"mini": (192, 6, 3, 768), **VIT_SIZES}
"""`mini` is a half-depth ViT-Ti of this project, for first runs."""

_CLIP_PATCHES = {"b": (16, 32), "l": (14,), "h": (14,), "g": (14,), "G": (14,)}
"""Patch sizes of published CLIP towers (Radford et al.; Cherti et al.)."""
SIGLIP_SIZES = {"b": VIT_SIZES["b"], "l": VIT_SIZES["l"], "so400m": (1152, 27, 16, 4304)}
"""Width, depth, heads, MLP (Zhai et al.; so400m: Alabdulmohsin et al.)."""
_SIGLIP_PATCHES = {"b": (16,), "l": (16,), "so400m": (14, 16)}
"""Patch sizes of published SigLIP towers (Zhai et al.; Tschannen et al.)."""

VIT_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("layer_norm_eps", "image_size", "patch_size", "num_channels"),
)
"""`shape_fields` that configurations of plain Transformers share."""


def vit_fields(width: int, depth: int, heads: int, mlp: int, patch: int) -> dict[str, Any]:
    """Return the fields of a size in `VIT_SIZES`."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "patch_size": patch,
    }


class ViT(TokenFamily):
    """Plain vision Transformers (Dosovitskiy et al.)."""

    config_class, model_class = ViTConfig, ViTModel
    options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    name, first_preset, derives = "ViT", "vit-b/16", False
    shape_fields = (*VIT_SHAPE, "qkv_bias")
    training_fields = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
    asks_to_interpolate = True
    parts: ClassVar[dict[str, str]] = {
        "patch": "embeddings.patch_embeddings.projection",
        "class": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "norm1": "layers.{}.layernorm_before",
        **{part: f"layers.{{}}.attention.{part}_proj" for part in "qkvo"},
        "norm2": "layers.{}.layernorm_after",
        **{part: f"layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
        "norm": "layernorm",
    }

    def presets(self) -> dict[str, dict[str, Any]]:
        plain = {
            f"vit-{size}/{patch}": vit_fields(*numbers, patch)
            for size, numbers in _SIZES.items()
            for patch in (14, 16, 32)
        }
        eva = {
            "eva-g/14": vit_fields(*VIT_SIZES["g"], 14) | {"initializer_range": 0.015}
        }  # init std of EVA with one billion parameters (Fang et al.)
        return {name: fields | {"layer_norm_eps": 1e-6} for name, fields in (plain | eva).items()}


class Clip(TokenFamily):
    """Vision towers of CLIP."""

    config_class, model_class = CLIPVisionConfig, CLIPVisionModel
    name, first_preset, derives = "CLIP", "clip-b/16", False
    shape_fields = VIT_SHAPE
    training_fields = ("attention_dropout", "initializer_range", "initializer_factor")
    norm_is_last, asks_to_interpolate = False, True
    parts: ClassVar[dict[str, str]] = {
        "patch": "embeddings.patch_embedding",
        "class": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",
        "norm1": "encoder.layers.{}.layer_norm1",
        **{part: f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"},
        "o": "encoder.layers.{}.self_attn.out_proj",
        "norm2": "encoder.layers.{}.layer_norm2",
        **{part: f"encoder.layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
        "norm": "post_layernorm",
    }

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"clip-{size}/{patch}": vit_fields(*VIT_SIZES[size], patch) | {"hidden_act": "gelu"}
            for size, patches in _CLIP_PATCHES.items()
            for patch in patches
        }

    def embed(self, model: Any, images_BCHW: Tensor) -> Tensor:
        # The norm is per token, so it may precede masking.
        normed_BSD: Tensor = model.pre_layrnorm(super().embed(model, images_BCHW))
        return normed_BSD


class Siglip(TokenFamily):
    """Vision towers of SigLIP, without their attention pooling."""

    config_class, model_class = SiglipVisionConfig, SiglipVisionModel
    name, first_preset, derives = "SigLIP", "siglip-b/16", False
    has_class_token, asks_to_interpolate = False, True
    shape_fields = (*VIT_SHAPE, "vision_use_head")
    training_fields = ("attention_dropout",)
    parts: ClassVar[dict[str, str]] = {
        part: name for part, name in Clip.parts.items() if part not in ("class", "pre_norm")
    }

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"siglip-{size}/{patch}": vit_fields(*SIGLIP_SIZES[size], patch) | {"vision_use_head": False}
            for size, patches in _SIGLIP_PATCHES.items()
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
                "a backbone must not have a pooling head",
                where=f"{where}.config.vision_use_head: {config.vision_use_head}",
                why="recipes pool with their decoders, so nothing would train that head",
                fix=f"set {where}.config.vision_use_head=false",
            )
