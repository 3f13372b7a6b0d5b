"""`ViTModel`, also with the shape of EVA."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import ViTConfig, ViTModel

from m3i_scale.backbones.families.base import TokenFamily

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
_EVA_STD = 0.015
"""Init std of EVA with one billion parameters (Fang et al.)."""
VIT_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("layer_norm_eps", "image_size", "patch_size", "num_channels"),
)
"""`shape_fields` that configurations of plain Transformers share."""


def sized(width: int, depth: int, heads: int, mlp: int, patch: int) -> dict[str, Any]:
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
            f"vit-{size}/{patch}": sized(*numbers, patch) for size, numbers in _SIZES.items() for patch in (14, 16, 32)
        }
        eva = {"eva-g/14": sized(*VIT_SIZES["g"], 14) | {"initializer_range": _EVA_STD}}
        return {name: fields | {"layer_norm_eps": 1e-6} for name, fields in (plain | eva).items()}
