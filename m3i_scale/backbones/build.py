"""From the `backbone` section of a run file to a configuration, and from that to modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, Dinov2Config, PreTrainedModel, ViTConfig

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.internimage import AUTO_MAP, SOURCE_FILES, InternImageConfig, InternImageModel
from m3i_scale.backbones.maps import MapBackbone
from m3i_scale.backbones.presets import DEFAULT_PRESET, PRESETS, VisionConfig, fusion_width, preset_config
from m3i_scale.backbones.tokens import TokenBackbone, token_class
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError, did_you_mean

_DERIVED = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "model_type")
_COUNTS = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
_SHAPE_FIELDS: dict[type, tuple[str, ...]] = {
    ViTConfig: (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias"),
    ),
    Dinov2Config: (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
        *("image_size", "patch_size", "num_channels", "qkv_bias", "use_swiglu_ffn", "use_mask_token"),
    ),
    InternImageConfig: (
        *("channels", "depths", "groups", "dw_kernel_size", "mlp_ratio", "layer_scale", "offset_scale", "post_norm"),
        *("res_post_norm", "level2_post_norm", "level2_post_norm_block_ids", "center_feature_scale", "fusion_width"),
        *("layer_norm_eps", "image_size"),
    ),
}
_FIRST_PRESET = {ViTConfig: DEFAULT_PRESET, Dinov2Config: "dinov2-s/14", InternImageConfig: "internimage-t"}


def backbone_config(backbone: BackboneConfig, *, where: str = "backbone") -> VisionConfig:
    """The `transformers` configuration of a backbone section.

    Raises:
        ConfigError: unknown preset or field, another model type than those here, a patch size that does not divide the
            image, heads that do not divide the width.
    """
    if backbone.from_pretrained is not None:
        config = _pretrained_config(backbone.from_pretrained, where)
    else:
        name = backbone.preset or DEFAULT_PRESET
        if name not in PRESETS:
            raise ConfigError(f"no backbone '{name}'", where=f"{where}.preset", fix=did_you_mean(name, PRESETS))
        config = preset_config(name)
    config = _override(config, backbone.config, where)
    if isinstance(config, InternImageConfig):
        _check_maps(config, backbone, where)
    else:
        _check_tokens(config, where)
        config._attn_implementation = backbone.attention_kernel
    return config


def _pretrained_config(source: str, where: str) -> VisionConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a model from '{source}': {str(error).splitlines()[0]}",
            where=f"{where}.from_pretrained",
            fix="give a folder with config.json and model.safetensors, or a Hub id (needs a network)",
        ) from None
    if not isinstance(config, ViTConfig | Dinov2Config | InternImageConfig):
        raise ConfigError(
            f"'{source}' is a {config.model_type}, and a backbone is a vit, dinov2 or internimage",
            where=f"{where}.from_pretrained",
        )
    if isinstance(config, Dinov2Config):
        config.use_mask_token = False  # hidden patches are left out here, so nothing would train that token
    if isinstance(config, InternImageConfig) and config.fusion_width is None:
        config.fusion_width = fusion_width(config)
    return config


def _override(config: VisionConfig, fields: dict[str, Any], where: str) -> VisionConfig:
    known = [key for key in config.to_dict() if not key.startswith("_")]
    name = {"vit": "ViT", "dinov2": "DINOv2", "internimage": "InternImage"}[config.model_type]
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"{name} has no field '{key}'", where=f"{where}.config", fix=did_you_mean(key, known))
        try:
            setattr(config, key, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(f"'{key}: {value!r}': {error}", where=f"{where}.config") from None
    if isinstance(config, ViTConfig) and "hidden_size" in fields and "pooler_output_size" not in fields:
        config.pooler_output_size = config.hidden_size
    if isinstance(config, ViTConfig):
        return config
    # What follows from other fields is made once, when a configuration is.
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in _DERIVED}
    try:
        return type(config)(**kept)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(str(error), where=f"{where}.config") from None


def _check_tokens(config: ViTConfig | Dinov2Config, where: str) -> None:
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(config, key), int):
            raise ConfigError(f"'{key}' must be one number: images and patches are square", where=f"{where}.config")
    last = "intermediate_size" if isinstance(config, ViTConfig) else "mlp_ratio"
    for key in (*_COUNTS, "num_attention_heads", last):
        if getattr(config, key) < 1:
            raise ConfigError(f"'{key}' must be at least 1", where=f"{where}.config")
    if config.num_channels != 3:
        raise ConfigError("images have 3 channels", where=f"{where}.config.num_channels: {config.num_channels}")
    _check_side(config.image_size, config.patch_size, f"patch size {config.patch_size}", where)
    if config.hidden_size % config.num_attention_heads or config.hidden_size % 4:
        raise ConfigError(
            f"width {config.hidden_size} must be a multiple of 4 and of its {config.num_attention_heads} heads",
            where=f"{where}.config",
        )


def _check_maps(config: InternImageConfig, backbone: BackboneConfig, where: str) -> None:
    if config.fusion_width is None or config.fusion_width % 4:
        raise ConfigError(
            f"fusion_width {config.fusion_width}: dense targets need the map of stride 16, a multiple of 4 wide",
            where=f"{where}.config.fusion_width",
        )
    _check_side(config.image_size, 32, "the stride of the last stage, 32,", where)
    if backbone.attention_kernel != "sdpa":
        raise ConfigError(
            "`attention_kernel` has no effect: this backbone has no attention", where=f"{where}.attention_kernel"
        )


def _check_side(side: int, divisor: int, what: str, where: str) -> None:
    if side % divisor:
        raise ConfigError(
            f"{what} does not divide image size {side}",
            where=f"{where}.config",
            fix=f"image_size: {max(round(side / divisor), 1) * divisor}",
        )


def build_backbone(config: VisionConfig) -> Backbone:
    """The module, not yet initialised."""
    return MapBackbone(config) if isinstance(config, InternImageConfig) else TokenBackbone(config)


def vision_class(config: VisionConfig) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The class of the model that an export holds, and what its constructor is given beside the configuration."""
    if isinstance(config, InternImageConfig):
        return InternImageModel, {}
    return token_class(config)


def model_files(config: VisionConfig) -> tuple[dict[str, str], tuple[Path, ...]]:
    """What a folder needs beside the weights where `transformers` has no such model: `auto_map` and source files."""
    return (AUTO_MAP, SOURCE_FILES) if isinstance(config, InternImageConfig) else ({}, ())


def portable_section(config: VisionConfig) -> dict[str, Any]:
    """A backbone section that needs no folder: preset and every field that shapes the modules."""
    return {
        "preset": _FIRST_PRESET[type(config)],
        "config": {key: getattr(config, key) for key in _SHAPE_FIELDS[type(config)]},
    }


def belongs_to_layers(config: VisionConfig, name: str) -> bool:
    """Whether a weight that finds no place is one of the backbone: then the model was asked for in another shape.

    Classifiers and poolers are not; those of published InternImages are left out by the model itself.
    """
    return isinstance(config, InternImageConfig) or "layer" in name


def starts_fresh(source: str, name: str) -> bool:
    """Whether a folder need not have this weight: the fusion head, where its own configuration knows of none."""
    if not name.startswith("dcnv3_head_"):
        return False
    return AutoConfig.from_pretrained(source, trust_remote_code=False).fusion_width is None


def pretrained_folder(source: str) -> Path:
    """The folder with the weights of `source`: itself, or the local snapshot of a Hub id."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
