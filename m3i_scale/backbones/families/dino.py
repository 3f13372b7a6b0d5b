"""DINOv2 (a ViT with LayerScale), DINOv2 with registers, and DINOv3 (registers, and rotary positions instead of learned
position embeddings)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

from m3i_scale.backbones.families.base import Angles, TokenFamily
from m3i_scale.backbones.families.vit import VIT_SHAPE, vit_fields
from m3i_scale.errors import ConfigError

DINOV2_SIZES = {
    "s": (384, 12, 6, False),
    "b": (768, 12, 12, False),
    "l": (1024, 24, 16, False),
    "g": (1536, 40, 24, True),
}
"""Width, depth, heads, SwiGLU (Oquab et al.)."""

_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "use_swiglu_ffn"),
)
_TRAINING = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range"),
    "layerscale_value",
)

_DINOV3_SIZES = {
    "s": (384, 12, 6, 1536, False),
    "s+": (384, 12, 6, 1536, True),
    "b": (768, 12, 12, 3072, False),
    "l": (1024, 24, 16, 4096, False),
    "h+": (1280, 32, 20, 5120, True),
    "7b": (4096, 40, 32, 8192, True),
}
"""Width, depth, heads, MLP, gated (Siméoni et al., and the Hub folders of facebook)."""
_BIASES = ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
_AUGMENTED = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")


def _sized(width: int, depth: int, heads: int, gated: bool) -> dict[str, Any]:
    """Return the fields of a size in `DINOV2_SIZES`."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": 14,
        "use_swiglu_ffn": gated,
    }


class Dinov2(TokenFamily):
    """Vision Transformers of DINOv2 (Oquab et al.)."""

    config_class, model_class = Dinov2Config, Dinov2Model
    name, first_preset = "DINOv2", "dinov2-s/14"
    shape_fields = (*_SHAPE, "use_mask_token")
    training_fields = _TRAINING
    mlp_field = "mlp_ratio"
    parts: ClassVar[dict[str, str]] = {
        "patch": "embeddings.patch_embeddings.projection",
        "class": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "norm1": "encoder.layer.{}.norm1",
        **{part: f"encoder.layer.{{}}.attention.{part}_proj" for part in "qkvo"},
        "scale1": "encoder.layer.{}.layer_scale1.lambda1",
        "norm2": "encoder.layer.{}.norm2",
        **{part: f"encoder.layer.{{}}.mlp.{part}" for part in ("fc1", "fc2", "gate_proj", "up_proj", "down_proj")},
        "scale2": "encoder.layer.{}.layer_scale2.lambda1",
        "norm": "layernorm",
    }

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"dinov2-{size}/14": _sized(*numbers) | {"use_mask_token": False} for size, numbers in DINOV2_SIZES.items()
        }

    def adapt(self, config: Any) -> None:
        """Remove the mask token, which would not be trained: the recipe has a separate one."""
        config.use_mask_token = False


class Dinov2WithRegisters(TokenFamily):
    """Vision Transformers of DINOv2 with registers, tokens without position before the patches (Darcet et al.)."""

    config_class, model_class = Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    name, first_preset = "DINOv2 with registers", "dinov2-reg-s/14"
    shape_fields = (*_SHAPE, "num_register_tokens")
    training_fields = _TRAINING
    mlp_field = "mlp_ratio"
    untrained = ("embeddings.mask_token",)
    antialias = True
    parts: ClassVar[dict[str, str]] = Dinov2.parts | {"registers": "embeddings.register_tokens"}

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"dinov2-reg-{size}/14": _sized(*numbers) | {"num_register_tokens": 4}
            for size, numbers in DINOV2_SIZES.items()
        }


class Dinov3(TokenFamily):
    """Vision Transformers of DINOv3 (Siméoni et al.)."""

    config_class, model_class = DINOv3ViTConfig, DINOv3ViTModel
    name, first_preset = "DINOv3", "dinov3-s/16"
    shape_fields = (*VIT_SHAPE, *_BIASES, "use_gated_mlp", "num_register_tokens", "rope_theta")
    training_fields = ("attention_dropout", "drop_path_rate", "initializer_range", "layerscale_value", *_AUGMENTED)
    untrained = ("embeddings.mask_token",)
    parts: ClassVar[dict[str, str]] = {
        "patch": "embeddings.patch_embeddings",
        "class": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "norm1": "model.layer.{}.norm1",
        **{part: f"model.layer.{{}}.attention.{part}_proj" for part in "qkvo"},
        "scale1": "model.layer.{}.layer_scale1.lambda1",
        "norm2": "model.layer.{}.norm2",
        **{part: f"model.layer.{{}}.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
        "fc1": "model.layer.{}.mlp.up_proj",  # for MLPs without gates
        "fc2": "model.layer.{}.mlp.down_proj",
        "scale2": "model.layer.{}.layer_scale2.lambda1",
        "norm": "norm",
    }

    def presets(self) -> dict[str, dict[str, Any]]:
        """Return the published sizes; the largest has no biases of queries and values."""
        return {
            f"dinov3-{size}/16": {
                **vit_fields(width, depth, heads, mlp, 16),
                "use_gated_mlp": gated,
                "hidden_act": "silu" if gated else "gelu",
                "query_bias": size != "7b",
                "value_bias": size != "7b",
                "num_register_tokens": 4,
                **dict.fromkeys(_AUGMENTED),
            }
            for size, (width, depth, heads, mlp, gated) in _DINOV3_SIZES.items()
        }

    def adapt(self, config: Any) -> None:
        """Disable augmentation of coordinates: see `check`."""
        for key in _AUGMENTED:
            setattr(config, key, None)

    def angles(self, model: Any, images_BCHW: Tensor) -> Angles | None:
        keep_frequencies(model.rope_embeddings)
        # The module only uses shape, device and dtype.
        dtype = model.embeddings.patch_embeddings.weight.dtype
        cos, sin = model.rope_embeddings(images_BCHW.new_empty((1, *images_BCHW.shape[1:]), dtype=dtype))
        return cos, sin

    def check(self, config: Any, where: str) -> None:
        """Reject sizes that are invalid for a backbone, and augmentation of coordinates; see `Family`."""
        super().check(config, where)
        if config.hidden_size // config.num_attention_heads % 4:
            raise ConfigError(
                "the width of an attention head must be a multiple of 4, got "
                f"{config.hidden_size // config.num_attention_heads}",
                where=f"{where}.config.num_attention_heads: {config.num_attention_heads}",
                why="rotary positions rotate pairs of channels, by row and by column",
                fix="change hidden_size or num_attention_heads; 64 channels per head are usual",
            )
        if config.rope_theta <= 0:
            raise ConfigError(
                f"'rope_theta' must be > 0, got {config.rope_theta}",
                where=f"{where}.config.rope_theta",
                fix=f"set {where}.config.rope_theta=100",
            )
        for key in _AUGMENTED:
            if (value := getattr(config, key)) is not None:
                raise ConfigError(
                    f"'{key}' is not supported, got {value}",
                    where=f"{where}.config.{key}",
                    why="one random number per micro-batch would make the loss depend on the number of ranks",
                    fix=f"set {where}.config.{key}=null; for crops of several sizes use `data.augment.crop_scale`",
                )


def keep_frequencies(rope: nn.Module | None) -> None:
    """Restore the fp32 frequencies of DINOv3's rotary positions; other modules are ignored. Engines cast buffers like
    parameters, and a frequency in bf16 is off by up to 1 / 512."""
    if isinstance(rope, DINOv3ViTRopePositionEmbedding) and rope.inv_freq.dtype != torch.float32:
        exponents = torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float32, device=rope.inv_freq.device)
        rope.inv_freq = 1 / rope.base**exponents
