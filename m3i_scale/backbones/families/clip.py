"""Describe `CLIPVisionModel`, the vision tower of CLIP: a ViT with a norm before the first layer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from m3i_scale.backbones.families.base import TokenFamily
from m3i_scale.backbones.families.vit import VIT_SIZES, sized

_PATCHES = {"b": (16, 32), "l": (14,), "h": (14,), "g": (14,), "G": (14,)}
"""Patch sizes of published CLIP towers (Radford et al.; Cherti et al.)."""


class Clip(TokenFamily):
    """Describes the vision towers of CLIP."""

    config_class, model_class = CLIPVisionConfig, CLIPVisionModel
    name, first_preset, derives = "CLIP", "clip-b/16", False
    shape_fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "image_size", "patch_size", "num_channels"),
    )
    norm_is_last = False
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
        """Return the published sizes."""
        return {
            f"clip-{size}/{patch}": sized(*VIT_SIZES[size], patch) | {"hidden_act": "gelu"}
            for size, patches in _PATCHES.items()
            for patch in patches
        }

    def layers(self, model: Any) -> nn.ModuleList:
        """Return the Transformer layers, in order."""
        layers: nn.ModuleList = model.encoder.layers
        return layers

    def embed(self, model: Any, images_BCHW: Tensor) -> Tensor:
        """Return tokens as the first layer reads them, (B, 1 + N, D)."""
        other = images_BCHW.shape[-1] != model.config.image_size
        tokens_BSD = model.embeddings(images_BCHW, **({"interpolate_pos_encoding": True} if other else {}))
        # A norm of each token, so it may come before tokens are hidden.
        normed_BSD: Tensor = model.pre_layrnorm(tokens_BSD)
        return normed_BSD

    def patch_projection(self, model: Any) -> nn.Module:
        """Return the convolution that makes tokens of patches."""
        projection: nn.Module = model.embeddings.patch_embedding
        return projection

    def normed(self, model: Any, tokens_BLD: Tensor) -> Tensor:
        """Return the last layer's tokens through the last norm."""
        output_BLD: Tensor = model.post_layernorm(tokens_BLD)
        return output_BLD

    def attention(self, layer: Any) -> tuple[nn.Module, Any, int]:
        """Return of a layer the norm before attention, attention, and its heads."""
        return layer.layer_norm1, layer.self_attn, layer.self_attn.num_heads
