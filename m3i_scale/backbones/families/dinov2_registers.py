"""`Dinov2WithRegistersModel`: DINOv2 with registers, tokens without position, between class token and patches."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from m3i_scale.backbones.families.base import TokenFamily
from m3i_scale.backbones.families.dinov2 import DINOV2_SHAPE, DINOV2_SIZES, DINOV2_TRAINING, Dinov2, sized


class Dinov2WithRegisters(TokenFamily):
    """Vision Transformers of DINOv2 with registers (Darcet et al.)."""

    config_class, model_class = Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    name, first_preset = "DINOv2 with registers", "dinov2-reg-s/14"
    shape_fields = (*DINOV2_SHAPE, "num_register_tokens")
    training_fields = DINOV2_TRAINING
    mlp_field = "mlp_ratio"
    untrained = ("embeddings.mask_token",)
    antialias = True
    parts: ClassVar[dict[str, str]] = Dinov2.parts | {"registers": "embeddings.register_tokens"}

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"dinov2-reg-{size}/14": sized(*numbers) | {"num_register_tokens": 4}
            for size, numbers in DINOV2_SIZES.items()
        }
