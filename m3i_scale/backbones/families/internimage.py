"""InternImage: deformable convolutions, four stages."""

from __future__ import annotations

from typing import Any

from m3i_scale.backbones.families.base import Family, check_counts, check_side
from m3i_scale.backbones.internimage import InternImageConfig, InternImageModel
from m3i_scale.errors import ConfigError

_POST_NORM = {"layer_scale": 1e-5, "post_norm": True}
_HUGE = {"dw_kernel_size": 5, "center_feature_scale": True, "level2_post_norm": True}
_SIZES: dict[str, dict[str, Any]] = {
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


class InternImage(Family):
    """InternImage (Wang et al.) with the fusion head of its largest sizes."""

    config_class, model_class = InternImageConfig, InternImageModel
    name, first_preset, has_class_token = "InternImage", "internimage-t", False
    shape_fields = (
        *("channels", "depths", "groups", "dw_kernel_size", "mlp_ratio", "layer_scale", "offset_scale", "post_norm"),
        *("res_post_norm", "level2_post_norm", "level2_post_norm_block_ids", "center_feature_scale", "fusion_width"),
        *("layer_norm_eps", "image_size"),
    )
    training_fields = ("drop_path_rate", "drop_path_type", "initializer_range")

    def presets(self) -> dict[str, dict[str, Any]]:
        return {
            f"internimage-{size}": fields | {"fusion_width": fusion_width(InternImageConfig(**fields))}
            for size, fields in _SIZES.items()
        }

    def check(self, config: InternImageConfig, where: str) -> None:
        """Reject maps that are invalid for targets; see `Family`."""
        sizes = {key: getattr(config, key) for key in ("channels", "num_hidden_layers", "image_size")}
        sizes |= {} if config.fusion_width is None else {"fusion_width": config.fusion_width}
        check_counts(sizes, f"{where}.config")
        if config.fusion_width is None or config.fusion_width % 4:
            raise ConfigError(
                f"fusion_width {config.fusion_width}: dense targets need the map of stride 16, a multiple of 4 wide",
                where=f"{where}.config.fusion_width",
            )
        check_side(config.image_size, 32, "the stride of the last stage, 32,", where)


def fusion_width(config: InternImageConfig) -> int:
    """Return the default width of the fusion head: the channels of stage 4, at most 1024 as in the published head."""
    return min(config.stage_channels[-1], 1024)
