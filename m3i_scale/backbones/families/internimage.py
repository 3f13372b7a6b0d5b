"""InternImage (deformable convolutions, four stages). It encodes full images, so masking and mixing modify pixels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from m3i_scale.backbones.base import Backbone, MaskedPatches, MaskToken, Tokens, Views, gather_tokens
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
_STEM_STRIDE, _LAST_STRIDE = 4, 32
_LEVEL = re.compile(r"levels\.(\d+)\.(\w+)(?:\.(\d+))?")
_DCN = ("offset", "center_feature_scale_proj")
"""Substrings in the names of weights of a deformable convolution's offsets and scale."""


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
                f"'fusion_width' must be a multiple of 4, got {config.fusion_width}",
                where=f"{where}.config.fusion_width",
                why="dense targets need the fused map of stride 16",
                fix=f"set {where}.config.fusion_width=256, for example",
            )
        check_side(config.image_size, _LAST_STRIDE, "the stride of the last stage, 32", where)

    def lr_scales(self, model: Any, decay: float, *, dense: bool = False, dcn: float = 1.0) -> dict[str, float]:
        """See `Family`. Layers as in InternImage's `classification/models/intern_image.py` and `optimizer.py`, or with
        `dense` as in its `mmcv_custom/custom_layer_decay_optimizer_constructor.py`."""
        depths, names = tuple(model.config.depths), [name for name, _ in model.named_parameters()]
        scales = {name: decay ** (sum(depths) + dense - _block_of(name, depths, dense)) for name in names}
        return {name: scale * (dcn if any(part in name for part in _DCN) else 1.0) for name, scale in scales.items()}


def _block_of(name: str, depths: tuple[int, ...], dense: bool) -> int:
    """Return the number of a block over all stages, from 1. Downsampling and norm after a stage count as the next
    block. Classification: the stem counts as the first block, and all others as the last block. Dense: the stem is 0,
    downsampling and norm after the last stage count as its first block, and others outside of stages are behind all."""
    if name.startswith("patch_embed"):
        return 0 if dense else 1
    level = _LEVEL.match(name)
    if level is None:
        return sum(depths) + dense
    stage, part, last = int(level[1]), level[2], len(depths) - 1
    if part in ("downsample", "norm") and (dense or stage < last):
        return sum(depths[: min(stage + 1, last)]) + 1
    if part == "blocks" or dense:
        return sum(depths[:stage]) + int(level[3] or 0) + 1
    return sum(depths)


def fusion_width(config: InternImageConfig) -> int:
    """Return the default width of the fusion head: the channels of stage 4, at most 1024 as in the published head."""
    return min(config.stage_channels[-1], 1024)


class MapBackbone(Backbone):
    """Adapter of a hierarchical convolutional network; uses its fused map of stride 16.

    Masks consist of squares of 32 pixels, the stride of the last stage. Masked pixels are zero (the mean color), and
    masked positions of the stem's map are a learned token, so no masked content leaks. Mixed images share one input and
    see each other, since convolutions do not operate on sequences.
    """

    has_class_token = False

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        with no_init_weights():
            self.model = InternImageModel(config)
        self.mask_token = MaskToken(config.channels)

    @property
    def cell(self) -> int:
        return _LAST_STRIDE // self.patch_size

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for level in self.model.levels for layer in level.blocks]

    @property
    def stage_widths(self) -> list[int]:
        return list(self.model.config.stage_channels)

    def encode_own(
        self,
        views: Views,
        view_of: Sequence[int],
        visible: Sequence[Tensor],
        masked: MaskedPatches | None = None,
        *,
        norm: bool = True,
    ) -> list[Tokens]:
        """Encode every input as a separate image, in one batch. `masked` is ignored: the stem has a mask token. `norm`
        is ignored: the fused map has no norm of its own."""
        images_BCHW = torch.cat([views[view] for view in view_of])
        shown_BHW = torch.cat([self._shown(visible_BL, images_BCHW) for visible_BL in visible])
        map_BND = self._encode(images_BCHW * _enlarged(shown_BHW, self.patch_size)[:, None], shown_BHW)
        parts = map_BND.split(len(visible[0]))
        return [_tokens(part, visible_BL) for part, visible_BL in zip(parts, visible, strict=True)]

    def encode_mixed(
        self, views: Views, view_of: Sequence[int], visible: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> list[Tokens]:
        """Encode one image per row, composed of the visible squares of its images."""
        by_row = [visible_BL[row_B] for visible_BL, row_B in zip(visible, rows, strict=True)]
        mixed = torch.zeros_like(views[view_of[0]])
        for view, row_B, visible_BL in zip(view_of, rows, by_row, strict=True):
            shown_BHW = self._shown(visible_BL, mixed)
            mixed = mixed + views[view][row_B] * _enlarged(shown_BHW, self.patch_size)[:, None]
        map_BND = self._encode(mixed, self._shown(torch.cat(by_row, dim=1), mixed))
        return [_tokens(map_BND, visible_BL) for visible_BL in by_row]

    def encode_maps(self, images_BCHW: Tensor, layers: Sequence[int]) -> tuple[Tokens, list[Tensor]]:
        maps = self._stages(images_BCHW)
        tokens_BND = self.model.fuse(maps).flatten(2).transpose(1, 2)
        return (tokens_BND.mean(dim=1, keepdim=True), tokens_BND), [x.permute(0, 3, 1, 2) for x in maps]

    def stage_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return only the maps of the four stages: (B, C, H, W) each."""
        return [x.permute(0, 3, 1, 2) for x in self._stages(images_BCHW)]

    def last_hidden_state(self, images_BCHW: Tensor) -> Tensor:
        """Return the fused map: (B, D, H/16, W/16)."""
        model: InternImageModel = self.model
        return model.fuse(self._stages(images_BCHW))

    def _stages(self, images_BCHW: Tensor) -> list[Tensor]:
        model: InternImageModel = self.model
        return model.stages(model.patch_embed(images_BCHW.to(self.dtype)))

    def _encode(self, shown_BCHW: Tensor, shown_BHW: Tensor) -> Tensor:
        """Encode images, with zeros at masked pixels, as tokens of the full grid (B, N, D)."""
        model: InternImageModel = self.model
        stem_BHWC = model.patch_embed(shown_BCHW.to(self.dtype))
        stem_BHWC = self.mask_token(stem_BHWC, _enlarged(shown_BHW, self.patch_size // _STEM_STRIDE))
        return model.fuse(model.stages(stem_BHWC)).flatten(2).transpose(1, 2)

    def _shown(self, visible_BL: Tensor, images_BCHW: Tensor) -> Tensor:
        """Return which tokens are visible: bool (B, H, W)."""
        rows, columns = self.grid_of(images_BCHW)
        nothing = torch.zeros(len(visible_BL), rows * columns, dtype=torch.bool, device=visible_BL.device)
        shown_BHW: Tensor = torch.scatter(nothing, 1, visible_BL, True).unflatten(1, (rows, columns))
        return shown_BHW


def _enlarged(shown_BHW: Tensor, times: int) -> Tensor:
    return shown_BHW.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


def _tokens(map_BND: Tensor, visible_BL: Tensor) -> Tokens:
    tokens_BLD = gather_tokens(map_BND, visible_BL)
    return tokens_BLD.mean(dim=1, keepdim=True), tokens_BLD
