"""Detect vision towers of open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, ViTConfig

from m3i_scale.backbones.sources.base import MismatchError, NameMap, Shapes, Source, normalisation
from m3i_scale.backbones.sources.plain import NO_PATCH_BIAS, Facts, plain_source, vit_source

OPEN_CLIP_MARK = "transformer.resblocks.0.ln_1.weight"
OPEN_CLIP_PREFIXES = ("visual.", "module.visual.")
_REFUSED = (
    (r"attn_pool", "its norm stands behind an attention pooling"),
    (r".*\.ls_[12]\.", "it has LayerScale"),
)
_LEFT_OUT = ((r"proj$", "projection into the joint space"), (r"head\.", "projection into the joint space"))
_UNLIKE = {
    "attentional_pool": "its norm stands behind an attention pooling",
    "final_ln_after_pool": "its tokens pass no norm after the last layer: it stands behind the pooling",
    "ls_init_value": "it has LayerScale",
    "block_type": "its layers are open_clip's custom ones",
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), "its attention scales in other ways"),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), "it has a norm inside attention or MLP"),
}
"""Fields of `vision_cfg` that change the architecture."""

_OUTER = {
    "conv1": "patch",
    "class_embedding": "class",
    "positional_embedding": "positions",
    "ln_pre": "pre_norm",
    "ln_post": "norm",
}
_INNER = {
    "ln_1": ("norm1",),
    "attn.in_proj_weight": ("q.weight", "k.weight", "v.weight"),
    "attn.in_proj_bias": ("q.bias", "k.bias", "v.bias"),
    "attn.out_proj": ("o",),
    "ln_2": ("norm2",),
    "mlp.c_fc": ("fc1",),
    "mlp.c_proj": ("fc2",),
}


def open_clip_source(given: str, file: Path, prefix: str, shapes: Shapes, fields: Mapping[str, Any]) -> Source:
    """Return the vision tower of a bare open_clip file; names have a prefix of `OPEN_CLIP_PREFIXES`."""
    return plain_source(given, file, _names(prefix), shapes, Facts(class_row=True), fields, _REFUSED)


def _names(prefix: str) -> NameMap:
    return NameMap("open_clip", prefix, "text tower", "transformer.resblocks.", _OUTER, _INNER, _LEFT_OUT)


def open_clip_folder(given: str, folder: Path, values: Mapping[str, Any]) -> Source:
    """Return the vision tower of a folder with open_clip_config.json."""
    model = values.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        raise MismatchError("open_clip_config.json has no model_cfg.vision_cfg", "it says what the tower is")
    if name := vision.get("timm_model_name"):
        raise MismatchError(
            f"its vision tower is timm's '{name}'",
            "of open_clip's folders, only its own towers are read",
            fix="start from timm's folder of that tower, or from the same model in transformers, e.g. google/siglip-…",
        )
    for key, why in _UNLIKE.items():
        if vision.get(key):
            raise MismatchError(f"vision_cfg.{key} is {vision[key]!r}", why)
    pre_norm, preprocess = not vision.get("no_ln_pre"), values.get("preprocess_cfg") or {}
    config = (CLIPVisionConfig if pre_norm else ViTConfig)(**_shape(vision), hidden_act=_activation(model, vision))
    return replace(
        vit_source(given, folder, _names("visual."), config),
        constants=() if pre_norm else (NO_PATCH_BIAS,),
        normalisation=normalisation(preprocess.get("mean"), preprocess.get("std")),
    )


def _activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    if model.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_pytorch_tanh" if (vision.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def _shape(vision: Mapping[str, Any]) -> dict[str, Any]:
    try:
        width, layers, patch, side = (int(vision[key]) for key in ("width", "layers", "patch_size", "image_size"))
        hidden = int(width * float(vision.get("mlp_ratio", 4.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(
            f"vision_cfg has no plain {error}", "width, layers, patch_size and image_size are one number each"
        ) from None
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // int(vision.get("head_width", 64)),
        "intermediate_size": hidden,
        "layer_norm_eps": float((vision.get("norm_kwargs") or {}).get("eps", 1e-5)),
        "patch_size": patch,
        "image_size": side // patch * patch,
    }
