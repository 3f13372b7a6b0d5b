"""Attention windows of the layers of a plain Transformer, with validation."""

from __future__ import annotations

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.errors import ConfigError
from m3i_scale.tasks.detection.detection_heads import Windows
from m3i_scale.tasks.detection.modeling_mask_rcnn import KERNEL, WindowedLayers


def windowed_layers(spec: Windows, backbone: Backbone) -> WindowedLayers:
    """Return windowed layers for a plain Transformer as in ViTDet; most layers use windows. The backbone's attention
    function is replaced.

    Export, layer decay, drop path and activation checkpointing work as without windows, since the layers are those of
    the stock model.
    """
    if not isinstance(backbone, TokenBackbone):
        raise ConfigError("windows are for a plain Transformer", where="task.head.windows", fix="leave it out")
    if backbone.prefix != 1:
        raise ConfigError(
            f"no Mask R-CNN is published on a {backbone.model.config.model_type}: its windows leave out one class"
            f" token, and this backbone has {backbone.prefix} tokens before the patches",
            where="task.head.windows",
            fix="a ViT, DINOv2 or CLIP as backbone",
        )
    config, (side, _), depth = backbone.model.config, backbone.grid, len(backbone.layers)
    if config._attn_implementation not in ("sdpa", KERNEL):
        raise ConfigError(
            "windows have an attention of their own, which is SDPA",
            where=f"backbone.attention_kernel: {config._attn_implementation}",
            fix="leave it out",
        )
    if spec.size >= side:
        raise ConfigError(
            f"a window of {spec.size} tokens has no effect on an image of {side} × {side}",
            where="task.head.windows.size",
            fix="task.head.windows.size=0, or a smaller one",
        )
    layers = default_global_layers(depth) if spec.global_layers is None else spec.global_layers
    if max(layers, default=0) >= depth:
        raise ConfigError(f"the layers are 0 to {depth - 1}", where="task.head.windows.global_layers")
    if spec.size and spec.global_layers is not None and len(layers) == depth:
        raise ConfigError(
            f"a window of {spec.size} tokens has no effect: all layers see the whole image",
            where="task.head.windows.global_layers",
            fix="task.head.windows.size=0",
        )
    config._attn_implementation = KERNEL
    width = config.hidden_size // config.num_attention_heads
    windows = [spec.size if spec.size and number not in layers else side for number in range(depth)]
    return WindowedLayers(side, windows, width, relative=spec.relative_positions)


def default_windows(side: int) -> Windows:
    """Return ViTDet's windows for a grid of `side` tokens. Grids smaller than two windows get neither windows nor
    relative positions, like the backbone."""
    usual = Windows()
    return usual if side >= 2 * usual.size else Windows(size=0, relative_positions=False)


def default_global_layers(depth: int) -> tuple[int, ...]:
    """Return the last layer of every quarter."""
    return tuple(sorted({max(round(depth * quarter / 4), 1) - 1 for quarter in (1, 2, 3, 4)}))
