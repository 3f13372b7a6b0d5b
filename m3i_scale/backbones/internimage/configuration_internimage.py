"""Configuration of InternImage (Wang et al., CVPR 2023), with the field names of the published Hub folders."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_FIXED = {"core_op": "DCNv3", "act_layer": "GELU", "norm_layer": "LN", "remove_center": False}


class InternImageConfig(PretrainedConfig):
    """Configuration of an InternImage. The defaults are InternImage-T.

    Args:
        channels: channels of the first stage; every stage doubles them.
        depths: layers of every stage.
        groups: groups of the deformable operator, by stage.
        dw_kernel_size: kernel size of the depthwise convolution that predicts offsets and weights; None: 3.
        mlp_ratio: hidden width of an MLP over its channels.
        layer_scale: init value of the learned scale per channel of every residual branch; None: no scale.
        offset_scale: scales the sampled points around their center, including the 3 × 3 grid.
        post_norm: LayerNorm after operator and MLP, instead of before.
        res_post_norm: LayerNorm before and after operator and MLP (H).
        level2_post_norm: additional LayerNorm after some layers of the third stage (H, G).
        level2_post_norm_block_ids: indices of these layers, from 0.
        center_feature_scale: mix the sampled value with the center value, with a gate per group (H, G).
        fusion_width: channels of the head that fuses stages 3 and 4 at stride 16. None: no head, and the model ends
            with stage 4 at stride 32. Folders of H and G contain such a head with 1024 channels.
        drop_path_rate: maximum probability that a sample skips a residual branch.
        drop_path_type: linear (grows from 0 with depth) or uniform.
        image_size: size of the training images in pixels; inputs may have any multiple of 32.
    """

    model_type = "internimage"

    def __init__(
        self,
        channels: int = 64,
        depths: tuple[int, ...] | list[int] = (4, 4, 18, 4),
        groups: tuple[int, ...] | list[int] = (4, 8, 16, 32),
        dw_kernel_size: int | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        res_post_norm: bool = False,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: tuple[int, ...] | list[int] | None = None,
        center_feature_scale: bool = False,
        fusion_width: int | None = None,
        drop_path_rate: float = 0.0,
        drop_path_type: str = "linear",
        image_size: int = 224,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        # Published folders contain fields that are constant here; another value is another architecture.
        for field, only in _FIXED.items():
            value = kwargs.pop(field, only)
            if value != only:
                raise ValueError(f"{field} is {value!r}, and this InternImage has {only!r}")
        if kwargs.pop("drop_rate", 0.0):
            raise ValueError("this InternImage has no dropout: drop_rate must be 0")
        for field in ("with_cp", "cls_scale", "num_classes"):  # runtime options, and an unused classifier
            kwargs.pop(field, None)
        if kwargs.pop("use_clip_projector", False) and fusion_width is None:
            fusion_width = 1024
        self.channels, self.depths, self.groups = channels, list(depths), list(groups)
        self.dw_kernel_size = 3 if dw_kernel_size is None else dw_kernel_size
        self.mlp_ratio, self.layer_scale, self.offset_scale = mlp_ratio, layer_scale, offset_scale
        self.post_norm, self.res_post_norm = post_norm, res_post_norm
        self.level2_post_norm = level2_post_norm
        self.level2_post_norm_block_ids = list(level2_post_norm_block_ids or []) if level2_post_norm else None
        self.center_feature_scale = center_feature_scale
        self.fusion_width = fusion_width
        self.drop_path_rate, self.drop_path_type = drop_path_rate, drop_path_type
        self.image_size, self.num_channels = image_size, 3
        self.initializer_range, self.layer_norm_eps = initializer_range, layer_norm_eps
        self.check()
        super().__init__(**kwargs)

    def check(self) -> None:
        """Check that the fields are consistent.

        Raises:
            ValueError: they are not.
        """
        if len(self.depths) != 4 or len(self.groups) != 4:
            raise ValueError(f"InternImage has four stages; got depths {self.depths} and groups {self.groups}")
        if any(number < 1 for number in (*self.depths, *self.groups, self.channels)):
            raise ValueError("channels, depths and groups must be at least 1")
        for width, groups in zip(self.stage_channels, self.groups, strict=True):
            if width % groups:
                raise ValueError(f"{width} channels are no multiple of their {groups} groups")
        if self.dw_kernel_size < 1 or self.dw_kernel_size % 2 == 0:
            raise ValueError(f"dw_kernel_size must be odd, so that a place has a middle; got {self.dw_kernel_size}")
        if self.level2_post_norm and not self.level2_post_norm_block_ids:
            raise ValueError("level2_post_norm has no effect without level2_post_norm_block_ids")
        if self.channels % 2:
            raise ValueError(f"channels must be even, for the two steps of the stem; got {self.channels}")
        if self.post_norm and self.res_post_norm:
            raise ValueError("post_norm and res_post_norm exclude each other")
        if self.res_post_norm and self.layer_scale is not None:
            raise ValueError("res_post_norm and layer_scale exclude each other")
        if self.drop_path_type not in ("linear", "uniform"):
            raise ValueError(f"drop_path_type is linear or uniform, not {self.drop_path_type!r}")
        late = [number for number in self.level2_post_norm_block_ids or [] if number >= self.depths[2]]
        if late:
            raise ValueError(f"level2_post_norm_block_ids {late} lie beyond the {self.depths[2]} layers of stage 3")

    @property
    def stage_channels(self) -> list[int]:
        """Return the channels of the four stages."""
        return [self.channels * 2**stage for stage in range(4)]

    @property
    def hidden_size(self) -> int:
        """Return the channels of the last map: of the fusion head, or of stage 4 without it."""
        return self.fusion_width or self.stage_channels[-1]

    @property
    def patch_size(self) -> int:
        """Return the stride of the last map in pixels."""
        return 16 if self.fusion_width else 32

    @property
    def num_hidden_layers(self) -> int:
        """Return the number of layers of all stages."""
        return sum(self.depths)
