"""Have a plain Transformer attend within windows and know distances in the image, as ViTDet does.

The layers are those of the stock model: what splits, adds and joins is the attention function that they call, so that
export, layer decay, drop path and activation checkpointing hold as for whole images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.config.detection import Windows
from m3i_scale.errors import ConfigError

_KERNEL = "m3i_windows"
"""Name of the attention function among those of `transformers`."""


class WindowAttention(nn.Module):
    """Lets the tokens of one layer attend within windows, or within the whole image."""

    def __init__(self, side: int, window: int, head_width: int, *, relative: bool) -> None:
        super().__init__()
        self.side, self.window = side, window
        count = 2 * window - 1
        self.rows = nn.Parameter(torch.zeros(count, head_width)) if relative else None
        self.columns = nn.Parameter(torch.zeros(count, head_width)) if relative else None
        """What a query is multiplied with, by distance."""

    def reset_parameters(self) -> None:
        """Start without an effect of distance."""
        for table in (self.rows, self.columns):
            if table is not None:
                nn.init.zeros_(table)

    def forward(self, module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float) -> Tensor:
        """Return what tokens read: (B, N, heads, D) of queries, keys and values (B, heads, N, D)."""
        query, key, value = (
            self._split(x, getattr(module, name).bias)
            for x, name in ((query, "q_proj"), (key, "k_proj"), (value, "v_proj"))
        )
        mask = self._distances(query)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        return self._joined(read)

    def _split(self, x_BHND: Tensor, bias: Tensor | None) -> Tensor:
        """Return (windows · B, heads, tokens of a window, D).

        Windows over the edge are filled with what the layer makes of zeros, which tokens attend to: so ViTDet does.
        """
        batch, heads, _, width = x_BHND.shape
        x: Tensor = x_BHND.unflatten(2, (self.side, self.side))
        per_side = -(-self.side // self.window)
        whole = per_side * self.window
        if whole > self.side:
            empty = x.new_zeros(heads * width) if bias is None else bias.to(x.dtype)
            filled = empty.view(1, heads, 1, 1, width).repeat(batch, 1, whole, whole, 1)
            filled[:, :, : self.side, : self.side] = x
            x = filled
        x = x.reshape(batch, heads, per_side, self.window, per_side, self.window, width)
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(batch * per_side**2, heads, self.window**2, width)

    def _joined(self, x: Tensor) -> Tensor:
        per_side = -(-self.side // self.window)
        whole = per_side * self.window
        x = x.unflatten(2, (self.window, self.window)).unflatten(0, (-1, per_side, per_side))
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, whole, whole, x.shape[3], x.shape[6])
        return x[:, : self.side, : self.side].flatten(1, 2)

    def _distances(self, query: Tensor) -> Tensor | None:
        """Return what is added to the products of queries and keys."""
        if self.rows is None or self.columns is None:
            return None
        places = torch.arange(self.window, device=query.device)
        distance = places[:, None] - places[None, :] + self.window - 1
        by_place = query.unflatten(2, (self.window, self.window))
        rows = torch.einsum("bhyxd,ykd->bhyxk", by_place, self.rows[distance])
        columns = torch.einsum("bhyxd,xkd->bhyxk", by_place, self.columns[distance])
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    windows: WindowAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as a layer of `transformers` asks for it; without windows as SDPA does."""
    if windows is None or scaling is None:
        read, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return read, None
    return windows(module, query, key, value, dropout, scaling), None


AttentionInterface.register(_KERNEL, _attend)


class WindowedTransformer(nn.Module):
    """Encodes images by the layers of a plain Transformer without its class token, most of them within windows.

    Args:
        spec: of the windows.
        backbone: whose layers are asked; its attention function is set here.

    Raises:
        ConfigError: it has no layers of that kind, or a setting has no effect.
    """

    def __init__(self, spec: Windows, backbone: Backbone) -> None:
        super().__init__()
        if not isinstance(backbone, TokenBackbone):
            raise ConfigError("windows are for a plain Transformer", where="task.head.windows", fix="leave it out")
        config, (side, _), depth = backbone.model.config, backbone.grid, len(backbone.layers)
        if config._attn_implementation not in ("sdpa", _KERNEL):
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
        config._attn_implementation = _KERNEL
        width = config.hidden_size // config.num_attention_heads
        self.layers = nn.ModuleList(
            WindowAttention(
                side,
                spec.size if spec.size and number not in layers else side,
                width,
                relative=spec.relative_positions,
            )
            for number in range(depth)
        )

    def forward(self, backbone: TokenBackbone, images_BCHW: Tensor) -> Tensor:
        """Return the last layer's map before the last norm: (B, D, H, W)."""
        _, tokens_BND = backbone.embed(images_BCHW)
        for layer, windows in zip(backbone.layers, self.layers, strict=True):
            tokens_BND = layer(tokens_BND, None, windows=windows)
        map_BDHW: Tensor = tokens_BND.transpose(1, 2).unflatten(2, backbone.grid)
        return map_BDHW


def default_windows(side: int) -> Windows:
    """Return the windows of ViTDet for an image of so many tokens a side; one of less than two windows has neither them
    nor relative positions, as the backbone itself."""
    usual = Windows()
    return usual if side >= 2 * usual.size else Windows(size=0, relative_positions=False)


def default_global_layers(depth: int) -> tuple[int, ...]:
    """Return the last layer of every quarter."""
    return tuple(sorted({max(round(depth * quarter / 4), 1) - 1 for quarter in (1, 2, 3, 4)}))
