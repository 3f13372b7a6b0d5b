"""`Dinov2Model`, a ViT with LayerScale, and `Dinov2WithRegistersModel`."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from m3i_scale.backbones.families.base import TokenFamily

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
