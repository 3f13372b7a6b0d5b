"""The stock `transformers` ViT as a backbone that takes any subset of patches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, ViTConfig, ViTModel
from transformers.initialization import no_init_weights

from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """Width × depth of a published size."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int


_SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}

PRESETS = {f"vit-{size}/{patch}": Preset(*numbers, patch) for size, numbers in _SIZES.items() for patch in (14, 16, 32)}
"""ViT Ti to G (22M to 1.8B parameters) at patch sizes 14, 16 and 32."""

DEFAULT_PRESET = "vit-b/16"


def vit_config(backbone: BackboneConfig, *, where: str = "backbone") -> ViTConfig:
    """The `transformers` configuration of a backbone section.

    Raises:
        ConfigError: unknown preset or field, another model type than ViT, a patch size that does not divide the image,
            heads that do not divide the width.
    """
    if backbone.from_pretrained is not None:
        config = _pretrained_config(backbone.from_pretrained, where)
    else:
        config = _preset_config(backbone.preset or DEFAULT_PRESET, where)
    _override(config, backbone.config, where)
    _check(config, where)
    config._attn_implementation = backbone.attention_kernel
    return config


def _preset_config(name: str, where: str) -> ViTConfig:
    if name not in PRESETS:
        raise ConfigError(f"no backbone '{name}'", where=f"{where}.preset", fix=did_you_mean(name, PRESETS))
    preset = PRESETS[name]
    return ViTConfig(
        hidden_size=preset.width,
        num_hidden_layers=preset.depth,
        num_attention_heads=preset.heads,
        intermediate_size=preset.mlp,
        patch_size=preset.patch,
        layer_norm_eps=1e-6,
    )


def _pretrained_config(source: str, where: str) -> ViTConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a model from '{source}': {str(error).splitlines()[0]}",
            where=f"{where}.from_pretrained",
            fix="give a folder with config.json and model.safetensors, or a Hub id (needs a network)",
        ) from None
    if not isinstance(config, ViTConfig):
        raise ConfigError(
            f"'{source}' is a {config.model_type}, and this backbone is a vit", where=f"{where}.from_pretrained"
        )
    return config


def _override(config: ViTConfig, fields: dict[str, Any], where: str) -> None:
    known = [key for key in config.to_dict() if not key.startswith("_")]
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"ViT has no field '{key}'", where=f"{where}.config", fix=did_you_mean(key, known))
        try:
            setattr(config, key, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(f"'{key}: {value!r}': {error}", where=f"{where}.config") from None
    if "hidden_size" in fields and "pooler_output_size" not in fields:
        config.pooler_output_size = config.hidden_size


def _check(config: ViTConfig, where: str) -> None:
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(config, key), int):
            raise ConfigError(f"'{key}' must be one number: images and patches are square", where=f"{where}.config")
    sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in sizes:
        if getattr(config, key) < 1:
            raise ConfigError(f"'{key}' must be at least 1", where=f"{where}.config")
    if config.num_channels != 3:
        raise ConfigError("images have 3 channels", where=f"{where}.config.num_channels: {config.num_channels}")
    if config.image_size % config.patch_size:
        raise ConfigError(
            f"patch size {config.patch_size} does not divide image size {config.image_size}",
            where=f"{where}.config",
            fix=f"image_size: {round(config.image_size / config.patch_size) * config.patch_size}",
        )
    if config.hidden_size % config.num_attention_heads or config.hidden_size % 4:
        raise ConfigError(
            f"width {config.hidden_size} must be a multiple of 4 and of its {config.num_attention_heads} heads",
            where=f"{where}.config",
        )


class Backbone(nn.Module):
    """f_θ. `embed` and `encode` are separate, so that tokens can be hidden or mixed between them.

    All parameters are used inside the forward of the stock module that owns them, which ZeRO-3 relies on.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        with no_init_weights():  # initialised once, later, where the parameters may already be partitioned
            self.model = ViTModel(config, add_pooling_layer=False)

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.model.config.image_size)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.config.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers, in order."""
        layers: nn.ModuleList = self.model.layers
        return layers

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of the parameters."""
        first: nn.Parameter = next(self.model.parameters())
        return first.dtype

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images → class token (B, 1, D) and patch tokens (B, N, D), positions added."""
        tokens_BND = self.model.embeddings(images_BCHW.to(self.dtype))
        return tokens_BND[:, :1], tokens_BND[:, 1:]

    def encode(self, tokens_BLD: Tensor) -> Tensor:
        """Embedded tokens → the last layer's normalised tokens, same shape."""
        for layer in self.layers:
            tokens_BLD = layer(tokens_BLD)
        output_BLD: Tensor = self.model.layernorm(tokens_BLD)
        return output_BLD


def pretrained_folder(source: str) -> Path:
    """The folder with the weights of `source`: itself, or the local snapshot of a Hub id."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
