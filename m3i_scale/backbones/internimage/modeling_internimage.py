"""InternImage (Wang et al., CVPR 2023) in plain PyTorch, without compiled extensions.

Parameters have the names of the published Hub folders. Internal maps are (B, H, W, C).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention, ImageClassifierOutputWithNoAttention

from .configuration_internimage import InternImageConfig

_POINTS = 9
_CORNERS = 4


def dcnv3(value_BHWC: Tensor, offset_BHWO: Tensor, weight_BHWP: Tensor, groups: int, offset_scale: float) -> Tensor:
    """Compute y(p₀) = Σ_k w_gk(p₀) · x_g(p₀ + s·(p_k + Δp_gk(p₀))): deformable convolution, version 3.

    Points are enumerated x outer, y inner; values outside the map are zero.

    Args:
        value_BHWC: x, in `groups` groups of channels.
        offset_BHWO: Δp as (x, y): (B, H, W, groups · 9 · 2).
        weight_BHWP: w: (B, H, W, groups · 9); the nine weights of each group sum to 1.
        groups: G.
        offset_scale: s.

    Returns:
        (B, H, W, C), in the dtype of `value_BHWC`. Computed in fp32 or higher precision, because bf16 cannot
        distinguish neighboring coordinates of a large map.
    """
    batch, height, width, _ = value_BHWC.shape
    wide = torch.promote_types(value_BHWC.dtype, torch.float32)
    offset_BNGK2 = offset_BHWO.reshape(batch, height * width, groups, _POINTS, 2).to(wide)
    weight_BNGK = weight_BHWP.reshape(batch, height * width, groups, _POINTS).to(wide)
    near = torch.arange(-1, 2, device=value_BHWC.device, dtype=wide)
    x_N = torch.arange(width, device=near.device, dtype=wide).repeat(height)[:, None, None]
    y_N = torch.arange(height, device=near.device, dtype=wide).repeat_interleave(width)[:, None, None]
    x_BNGK = x_N + offset_scale * (near.repeat_interleave(3) + offset_BNGK2[..., 0])
    y_BNGK = y_N + offset_scale * (near.repeat(3) + offset_BNGK2[..., 1])
    # `grid_sample` sums its gradients in no fixed order; torch has no deterministic backward pass of it on GPUs.
    deterministic = torch.are_deterministic_algorithms_enabled()
    formulation = sum_by_bag if deterministic else FORMULATIONS.get(value_BHWC.device.type, sum_by_bag)
    return formulation(value_BHWC.to(wide), x_BNGK, y_BNGK, weight_BNGK).to(value_BHWC.dtype)


def sum_by_bag(value_BHWC: Tensor, x_BNGK: Tensor, y_BNGK: Tensor, weight_BNGK: Tensor) -> Tensor:
    """Return the weighted sums (B, H, W, C) of 9 points × 4 neighbors with `embedding_bag`, which does not store
    samples. Its backward pass sorts all neighbors on a GPU.

    Args:
        value_BHWC: the map.
        x_BNGK: column of every point, for N = H · W positions and G groups.
        y_BNGK: row of every point.
        weight_BNGK: weight of every point.
    """
    batch, height, width, channels = value_BHWC.shape
    groups = x_BNGK.shape[2]
    rows_RE = value_BHWC.reshape(batch, height * width, groups, -1).transpose(1, 2).reshape(-1, channels // groups)
    left_BNGK, top_BNGK = x_BNGK.floor(), y_BNGK.floor()
    right_share, lower_share = x_BNGK - left_BNGK, y_BNGK - top_BNGK
    first_row_BG = torch.arange(batch * groups, device=rows_RE.device).view(batch, 1, groups, 1) * (height * width)
    index, share = [], []
    for down in (0, 1):
        for along in (0, 1):
            x, y = left_BNGK + along, top_BNGK + down
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            part = (right_share if along else 1 - right_share) * (lower_share if down else 1 - lower_share)
            share.append(part * weight_BNGK * inside)
            # Clamp before conversion to int: a diverged offset may exceed int64. A NaN offset makes its share, and so
            # the output, NaN; the index must be a valid integer anyway.
            row = y.nan_to_num(0.0).clamp(0, height - 1).long() * width + x.nan_to_num(0.0).clamp(0, width - 1).long()
            index.append(row + first_row_BG)
    bag = _POINTS * _CORNERS
    index_NP = torch.stack(index, dim=-1).view(-1, bag)
    share_NP = torch.stack(share, dim=-1).view(-1, bag)
    return F.embedding_bag(index_NP, rows_RE, per_sample_weights=share_NP, mode="sum").view_as(value_BHWC)


def sum_by_grid(value_BHWC: Tensor, x_BNGK: Tensor, y_BNGK: Tensor, weight_BNGK: Tensor) -> Tensor:
    """Compute `sum_by_bag` with `grid_sample`. The backward pass recomputes the nine samples per position, which would
    take the memory of nine maps."""
    batch, height, width, channels = value_BHWC.shape
    groups, places = x_BNGK.shape[2], height * width
    maps_MEHW = value_BHWC.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    # `grid_sample` takes coordinates from -1 to 1. With power-of-two sizes, integers are converted exactly. Between two
    # cells the gradient jumps, and initial offsets are zero.
    high, wide = (1 << (side - 1).bit_length() for side in (height, width))
    maps_MEHW = F.pad(maps_MEHW, (0, wide - width, 0, high - height))
    grid_BNGK2 = torch.stack([(2 * x_BNGK + 1) / wide, (2 * y_BNGK + 1) / high], dim=-1) - 1
    # GPUs sample zero at a NaN coordinate, but the output must be NaN.
    weight_BNGK = weight_BNGK + 0 * (x_BNGK + y_BNGK)
    grid_MNK2 = grid_BNGK2.transpose(1, 2).reshape(-1, places, _POINTS, 2)
    weight_MNK = weight_BNGK.transpose(1, 2).reshape(-1, places, _POINTS)
    inputs = (maps_MEHW, grid_MNK2, weight_MNK)
    summed_MEN = cast(Tensor, checkpoint(_sample, *inputs, use_reentrant=False, preserve_rng_state=False))
    return summed_MEN.view(batch, channels, places).transpose(1, 2).reshape(value_BHWC.shape)


def _sample(maps_MEHW: Tensor, grid_MNK2: Tensor, weight_MNK: Tensor) -> Tensor:
    sampled_MENK = F.grid_sample(maps_MEHW, grid_MNK2, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (sampled_MENK * weight_MNK[:, None]).sum(dim=-1)


FORMULATIONS = {"cuda": sum_by_grid}
"""Formulation by device type; others use `sum_by_bag`, which is faster on CPUs."""


class Permute(nn.Module):
    """Change of layout: (0, 2, 3, 1) from (B, C, H, W) to (B, H, W, C), (0, 3, 1, 2) back."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return the map with its dimensions in the given order."""
        return x.permute(self.dims)


class ZeroLinear(nn.Linear):
    """A linear layer initialized with zeros: no offsets and equal weights initially."""


class ProjectionLinear(nn.Linear):
    """A linear layer with Xavier uniform initialization."""


def _norm(config: InternImageConfig, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels, eps=config.layer_norm_eps))


class DCNv3(nn.Module):
    """Deformable convolution v3, the core operator: predicts sampling offsets and weights from the input."""

    def __init__(self, config: InternImageConfig, channels: int, groups: int) -> None:
        super().__init__()
        self.groups, self.offset_scale = groups, config.offset_scale
        side = config.dw_kernel_size
        norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, side, padding=(side - 1) // 2, groups=channels),
            nn.Sequential(Permute(0, 2, 3, 1), norm),
            nn.GELU(),
        )
        self.offset = ZeroLinear(channels, groups * _POINTS * 2)
        self.mask = ZeroLinear(channels, groups * _POINTS)
        self.input_proj = ProjectionLinear(channels, channels)
        self.output_proj = ProjectionLinear(channels, channels)
        self.center_feature_scale_proj_weight = self.center_feature_scale_proj_bias = None
        if config.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Apply the operator to a map (B, H, W, C) without changing its shape."""
        value_BHWC = self.input_proj(x_BHWC)
        around_BHWC = self.dw_conv(x_BHWC.permute(0, 3, 1, 2))
        weight_BHWGK = self.mask(around_BHWC).unflatten(-1, (self.groups, _POINTS)).float().softmax(dim=-1)
        output_BHWC = dcnv3(
            value_BHWC, self.offset(around_BHWC), weight_BHWGK.flatten(-2), self.groups, self.offset_scale
        )
        if self.center_feature_scale_proj_weight is not None:
            gate_BHWG = F.linear(
                around_BHWC, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
            gate_BHWC = gate_BHWG.repeat_interleave(x_BHWC.shape[-1] // self.groups, dim=-1)
            output_BHWC = torch.lerp(output_BHWC, value_BHWC, gate_BHWC)
        return cast(Tensor, self.output_proj(output_BHWC))


class MLPLayer(nn.Module):
    """Two linear layers with GELU in between."""

    def __init__(self, config: InternImageConfig, channels: int) -> None:
        super().__init__()
        inner = int(channels * config.mlp_ratio)
        self.fc1 = nn.Linear(channels, inner)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(inner, channels)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Apply the MLP to a map (B, H, W, C) without changing its shape."""
        return cast(Tensor, self.fc2(self.act(self.fc1(x_BHWC))))


class InternImageLayer(GradientCheckpointingLayer):
    """Residual branches of operator and MLP, with norms before, after, or on both sides."""

    def __init__(self, config: InternImageConfig, channels: int, groups: int, drop_path: float) -> None:
        super().__init__()
        self.after, self.both, self.drop_path = config.post_norm, config.res_post_norm, drop_path
        self.norm1 = _norm(config, channels)
        self.dcn = DCNv3(config, channels, groups)
        self.norm2 = _norm(config, channels)
        self.mlp = MLPLayer(config, channels)
        self.layer_scale1 = self.layer_scale2 = None
        if config.layer_scale is not None:
            self.layer_scale1 = nn.Parameter(torch.ones(channels))
            self.layer_scale2 = nn.Parameter(torch.ones(channels))
        if self.both:
            self.res_post_norm1, self.res_post_norm2 = _norm(config, channels), _norm(config, channels)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Apply the layer to a map (B, H, W, C) without changing its shape."""
        if self.after:
            first = self._branch(self.norm1(self.dcn(x_BHWC)), self.layer_scale1)
            x_BHWC = x_BHWC + first
            return x_BHWC + self._branch(self.norm2(self.mlp(x_BHWC)), self.layer_scale2)
        first = self.dcn(self.norm1(x_BHWC))
        x_BHWC = x_BHWC + self._branch(self.res_post_norm1(first) if self.both else first, self.layer_scale1)
        second = self.mlp(self.norm2(x_BHWC))
        return x_BHWC + self._branch(self.res_post_norm2(second) if self.both else second, self.layer_scale2)

    def _branch(self, x_BHWC: Tensor, scale_C: Tensor | None) -> Tensor:
        if scale_C is not None:
            x_BHWC = x_BHWC * scale_C
        if not self.training or self.drop_path == 0:
            return x_BHWC
        kept_B = torch.rand(len(x_BHWC), device=x_BHWC.device) >= self.drop_path
        return x_BHWC * (kept_B / (1 - self.drop_path)).to(x_BHWC.dtype)[:, None, None, None]


class StemLayer(nn.Module):
    """Stem of two convolutions of stride 2: pixels to the first map, of stride 4."""

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        half, full, eps = config.channels // 2, config.channels, config.layer_norm_eps
        self.conv1 = nn.Conv2d(config.num_channels, half, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(half, eps=eps), Permute(0, 3, 1, 2))
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, full, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(full, eps=eps))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the first map: (B, 3, 4H, 4W) → (B, H, W, C)."""
        return cast(Tensor, self.norm2(self.conv2(self.act(self.norm1(self.conv1(pixels_BCHW))))))


class DownsampleLayer(nn.Module):
    """A convolution of stride 2 that doubles the channels."""

    def __init__(self, config: InternImageConfig, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(2 * channels, eps=config.layer_norm_eps))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Downsample the map: (B, H, W, C) → (B, H/2, W/2, 2C)."""
        return cast(Tensor, self.norm(self.conv(x_BHWC.permute(0, 3, 1, 2))))


class InternImageBlock(nn.Module):
    """Layers of one stage."""

    def __init__(self, config: InternImageConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        channels = config.stage_channels[stage]
        self.blocks = nn.ModuleList(
            [InternImageLayer(config, channels, config.groups[stage], drop_path) for drop_path in drop_paths]
        )
        self.norm = _norm(config, channels) if not config.post_norm or config.center_feature_scale else None
        extra = config.level2_post_norm_block_ids if stage == 2 else None
        self.extra_norms = {number: place for place, number in enumerate(extra or [])}
        if extra is not None:
            self.post_norms = nn.ModuleList([_norm(config, channels) for _ in extra])
        self.downsample = DownsampleLayer(config, channels) if stage < 3 else None

    def forward(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Return this stage's map and the next stage's input, for (B, H, W, C)."""
        for number, layer in enumerate(self.blocks):
            x_BHWC = layer(x_BHWC)
            if number in self.extra_norms:
                x_BHWC = self.post_norms[self.extra_norms[number]](x_BHWC)
        if self.norm is not None:
            x_BHWC = self.norm(x_BHWC)
        return x_BHWC, x_BHWC if self.downsample is None else self.downsample(x_BHWC)


class InternImageModel(PreTrainedModel):
    """InternImage with four stages of stride 4, 8, 16 and 32; `fusion_width` adds a fused map at stride 16."""

    config_class = InternImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar = ["InternImageLayer"]
    # Classifier, attention pooling and their norms in published folders are not part of the backbone.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"(^|\.)(conv_head|head|clip_projector|fc_norm)\."]

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__(config)
        self.patch_embed = StemLayer(config)
        rates = _drop_paths(config)
        self.levels = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            start = sum(config.depths[:stage])
            self.levels.append(InternImageBlock(config, stage, rates[start : start + depth]))
        if config.fusion_width is not None:
            last, width = config.stage_channels[-1], config.fusion_width
            self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(last, 4 * width, 1), nn.PixelShuffle(2))
            self.dcnv3_head_x3 = nn.Conv2d(last // 2, width, 1)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[Tensor, ...]:
        """Encode pixels (B, 3, H, W); height and width must be multiples of 32.

        Returns:
            `last_hidden_state`: the last map (B, C, H/32, W/32), with the fusion head (B, C, H/16, W/16);
            `pooler_output`: its mean over all positions (B, C); `hidden_states`, if requested: the maps of the stages.
        """
        if pixel_values.shape[-1] % 32 or pixel_values.shape[-2] % 32:
            raise ValueError(f"both sides must be multiples of 32, got {tuple(pixel_values.shape[-2:])}")
        maps = self.stages(self.patch_embed(pixel_values.to(self.dtype)))
        last_BCHW = self.fuse(maps)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last_BCHW,
            pooler_output=last_BCHW.mean(dim=(2, 3)),
            hidden_states=tuple(x.permute(0, 3, 1, 2) for x in maps) if wanted else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def stages(self, x_BHWC: Tensor) -> list[Tensor]:
        """Return the maps of the four stages, (B, H, W, C) each, from the stem's map."""
        maps = []
        for level in self.levels:
            map_BHWC, x_BHWC = level(x_BHWC)
            maps.append(map_BHWC)
        return maps

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Return the last map (B, C, H, W) from the maps of the stages."""
        third, fourth = (x.permute(0, 3, 1, 2) for x in maps[2:])
        if self.config.fusion_width is None:
            return fourth
        return cast(Tensor, self.dcnv3_head_x4(fourth) + self.dcnv3_head_x3(third))

    def _init_weights(self, module: nn.Module) -> None:
        _initialize(module, self.config)


class InternImageForImageClassification(PreTrainedModel):
    """InternImage with a linear classifier on the normalized mean of the last map."""

    config_class = InternImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar = ["InternImageLayer"]

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = InternImageModel(config)
        self.pool_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Return logits (B, K) for pixels (B, 3, H, W); with `labels` (B) also the cross-entropy."""
        features = self.model(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits_BK = self.classifier(self.pool_norm(features.pooler_output))
        loss = None if labels is None else F.cross_entropy(logits_BK, labels)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits_BK, hidden_states=features.hidden_states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        _initialize(module, self.config)


def _initialize(module: nn.Module, config: InternImageConfig) -> None:
    """Initialize the direct parameters of a module."""
    init = nn.init
    if isinstance(module, ZeroLinear):
        init.zeros_(module.weight)
    elif isinstance(module, ProjectionLinear):
        init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
    elif isinstance(module, nn.Conv2d):
        # As torch initializes convolutions: uniform within 1/√fan-in, including the bias.
        fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
        init.uniform_(module.weight, -(fan_in**-0.5), fan_in**-0.5)
        if module.bias is not None:
            init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
    elif isinstance(module, InternImageLayer | DCNv3):
        first = cast(float, config.layer_scale) if isinstance(module, InternImageLayer) else 0.0
        for parameter in module.parameters(recurse=False):
            init.constant_(parameter, first)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        init.zeros_(module.bias)


def _drop_paths(config: InternImageConfig) -> list[float]:
    layers = sum(config.depths)
    if config.drop_path_type == "uniform":
        return [config.drop_path_rate] * layers
    return torch.linspace(0, config.drop_path_rate, layers, device="cpu").tolist()
