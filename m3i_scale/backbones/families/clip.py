"""`CLIPVisionModel`, the vision tower of CLIP: a ViT with a norm before the first layer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from m3i_scale.backbones.families.base import TokenFamily
from m3i_scale.backbones.families.vit import VIT_SIZES, sized

_PATCHES = {"b": (16, 32), "l": (14,), "h": (14,), "g": (14,), "G": (14,)}
"""Patch sizes of published CLIP towers (Radford et al.; Cherti et al.)."""


class Clip(TokenFamily):
    """Vision towers of CLIP."""

    config_class, model_class = CLIPVisionConfig, CLIPVisionModel
    name, first_preset, derives = "CLIP", "clip-b/16", False
    shape_fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "image_size", "patch_size", "num_channels"),
    )
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
            f"clip-{size}/{patch}": sized(*VIT_SIZES[size], patch) | {"hidden_act": "gelu"}
            for size, patches in _PATCHES.items()
            for patch in patches
        }

    def embed(self, model: Any, images_BCHW: Tensor) -> Tensor:
        """Return the input tokens of the first layer, (B, 1 + N, D)."""
        # The norm is per token, so it may precede masking.
        normed_BSD: Tensor = model.pre_layrnorm(super().embed(model, images_BCHW))
        return normed_BSD
