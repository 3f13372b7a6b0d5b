"""List published sizes by name."""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import CLIPVisionConfig, Dinov2Config, ViTConfig

from m3i_scale.backbones.internimage import InternImageConfig

VisionConfig: TypeAlias = ViTConfig | Dinov2Config | CLIPVisionConfig | InternImageConfig

_VIT = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}
"""Width, depth, heads, MLP (Zhai et al., Scaling Vision Transformers; H: Dosovitskiy et al.)."""

_PLAIN_VIT = {"mini": (192, 6, 3, 768), **_VIT}
"""`mini` is half a Ti, ours, for a first run."""

_DINOV2 = {"s": (384, 12, 6, False), "b": (768, 12, 12, False), "l": (1024, 24, 16, False), "g": (1536, 40, 24, True)}
"""Width, depth, heads, SwiGLU (Oquab et al.)."""

_CLIP_PATCHES = {"b": (16, 32), "l": (14,), "h": (14,), "g": (14,), "G": (14,)}
"""Patch sizes of published CLIP towers (Radford et al.; Cherti et al.): ViTs with a norm before the first layer."""

_POST_NORM = {"layer_scale": 1e-5, "post_norm": True}
_HUGE = {"dw_kernel_size": 5, "center_feature_scale": True, "level2_post_norm": True}
_INTERNIMAGE: dict[str, dict[str, Any]] = {
    "t": {"channels": 64, "depths": (4, 4, 18, 4), "groups": (4, 8, 16, 32)},
    "s": {"channels": 80, "depths": (4, 4, 21, 4), "groups": (5, 10, 20, 40), **_POST_NORM},
    "b": {"channels": 112, "depths": (4, 4, 21, 4), "groups": (7, 14, 28, 56), **_POST_NORM},
    "l": {"channels": 160, "depths": (5, 5, 22, 5), "groups": (10, 20, 40, 80), **_POST_NORM, "offset_scale": 2.0},
    "xl": {"channels": 192, "depths": (5, 5, 24, 5), "groups": (12, 24, 48, 96), **_POST_NORM, "offset_scale": 2.0},
    "h": {
        **{"channels": 320, "depths": (6, 6, 32, 6), "groups": (10, 20, 40, 80), "res_post_norm": True},
        **_HUGE,
        "level2_post_norm_block_ids": range(5, 32, 6),
    },
    "g": {
        **{"channels": 512, "depths": (2, 2, 48, 4), "groups": (16, 32, 64, 128), "post_norm": True},
        **_HUGE,
        "level2_post_norm_block_ids": range(5, 48, 6),
    },
}
"""The published configurations (Wang et al., and the Hub folders of OpenGVLab)."""

_EVA_STD = 0.015
"""Of the first weights of EVA's billion parameters (Fang et al.)."""

PRESETS = (
    *(f"vit-{size}/{patch}" for size in _PLAIN_VIT for patch in (14, 16, 32)),
    "eva-g/14",
    *(f"clip-{size}/{patch}" for size, patches in _CLIP_PATCHES.items() for patch in patches),
    *(f"dinov2-{size}/14" for size in _DINOV2),
    *(f"internimage-{size}" for size in _INTERNIMAGE),
)
DEFAULT_PRESET = "vit-b/16"


def preset_config(name: str) -> VisionConfig:
    """Return the configuration of a name in `PRESETS`, at 224 pixels."""
    kind, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if kind == "clip":
        width, depth, heads, mlp = _VIT[size]
        return CLIPVisionConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            patch_size=int(patch),
            hidden_act="gelu",
        )
    if kind in ("vit", "eva"):
        width, depth, heads, mlp = _PLAIN_VIT[size]
        return ViTConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            patch_size=int(patch),
            layer_norm_eps=1e-6,
            initializer_range=_EVA_STD if kind == "eva" else 0.02,
        )
    if kind == "dinov2":
        width, depth, heads, swiglu = _DINOV2[size]
        return Dinov2Config(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            patch_size=int(patch),
            use_swiglu_ffn=swiglu,
            use_mask_token=False,
        )
    config = InternImageConfig(**_INTERNIMAGE[size])
    config.fusion_width = fusion_width(config)
    return config


def published_heads(width: int, depth: int) -> int | None:
    """Return the heads of the published ViT or DINOv2 of that size; None where there is none."""
    sizes = {size[:2]: size[2] for size in (*_VIT.values(), *_DINOV2.values())}
    return sizes.get((width, depth))


def fusion_width(config: InternImageConfig) -> int:
    """Return the default channels of the fusion head: those of stage 4, but no more than the published head's."""
    return min(config.stage_channels[-1], 1024)
