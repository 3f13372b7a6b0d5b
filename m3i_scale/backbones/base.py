"""Interface of a backbone f_θ, and functions for tokens: their grid, selection and attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = tuple[Tensor, Tensor]
"""Class token (B, 1, D), or the mean token if there is none, and patch tokens (B, L, D)."""
Views = dict[int, Tensor]
"""Normalized images (B, 3, H, W) by view."""


class MaskToken(nn.Module):
    """A learned token that replaces masked tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, width))

    def reset_parameters(self) -> None:
        """Initialize the token."""
        nn.init.normal_(self.token, std=0.02)

    def forward(self, map_BHWC: Tensor, shown_BHW: Tensor) -> Tensor:
        """Return the map with the token at all positions with `shown_BHW` False."""
        return torch.where(shown_BHW[..., None], map_BHWC, self.token.to(map_BHWC.dtype))


@dataclass
class MaskedPatches:
    """Mask tokens of inputs."""

    token: MaskToken
    shown: list[Tensor | None]
    """Visible patches by input: bool (B, N); None: all."""


class Backbone(nn.Module, ABC):
    """Adapter of a stock vision model, `model`, for subsets of patches and patches of several images."""

    model: Any
    """The `transformers` model that is exported."""
    has_class_token: bool
    """Whether the first token of `Tokens` is a class token. Otherwise, it is the mean of the patch tokens."""

    @property
    def width(self) -> int:
        """Return D, the channels of a token."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """Return the configured image size in pixels; other sizes can be encoded too."""
        return int(self.model.config.image_size)

    @property
    def patch_size(self) -> int:
        """Return the patch size in pixels."""
        return int(self.model.config.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patch tokens at the configured image size."""
        side = self.image_size // self.patch_size
        return side, side

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patch tokens of these images, (…, H, W)."""
        return patch_grid(images, self.patch_size)

    @property
    def cell(self) -> int:
        """Return the size, in tokens, of the squares that are masked together."""
        return 1

    @property
    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """Return the layers, in order."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the parameters."""
        first: nn.Parameter = next(self.model.parameters())
        return first.dtype

    @abstractmethod
    def encode_own(
        self,
        views: Views,
        view_of: Sequence[int],
        visible: Sequence[Tensor],
        masked: MaskedPatches | None = None,
        *,
        norm: bool = True,
    ) -> list[Tokens]:
        """Encode inputs independently of each other (within-image attention): tokens by input, ordered as `visible`.

        Args:
            view_of: view of each input.
            visible: visible patches of each input: int64 (B, L), ascending.
            norm: apply the final norm of a vision Transformer.
        """

    def normed(self, tokens_BLD: Tensor) -> Tensor:
        """Apply the final norm, which `norm=False` leaves out."""
        return tokens_BLD

    @abstractmethod
    def encode_mixed(
        self, views: Views, view_of: Sequence[int], visible: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> list[Tokens]:
        """Encode mixed images with cross-image attention: one input per row. Return the tokens by slot and row.

        Args:
            view_of: view of each slot of the mix.
            visible: visible patches of each slot: int64 (B, L), by image.
            rows: image in row i of each slot: int64 (B).
        """

    def encode_whole(self, images_BCHW: Tensor, blocks: int = 1, *, norm: bool = True) -> Tokens:
        """Encode normalized images without masking: class or mean token (B, 1, D), and all patch tokens (B, N, D), row
        by row.

        Return the class tokens of the last `blocks` layers, (B, blocks, D), each after the final norm. If `blocks` is
        above 1 and there is no class token, raise a ValueError.
        """
        if blocks > 1:
            raise ValueError("the backbone has no class token")
        return self.encode_maps(images_BCHW, ())[0]

    @property
    @abstractmethod
    def stage_widths(self) -> list[int]:
        """Return the channels of the stages' maps of stride 4, 8, 16 and 32; empty if all layers have the same grid."""

    @abstractmethod
    def encode_maps(self, images_BCHW: Tensor, layers: Sequence[int]) -> tuple[Tokens, list[Tensor]]:
        """Encode as `encode_whole`. Also return the maps (B, C, H, W) of `layers`, from 1, before the final norm; a
        backbone with stages returns the maps of all stages."""

    @abstractmethod
    def last_hidden_state(self, images_BCHW: Tensor) -> Tensor:
        """Return the last hidden state of `model`, computed as the objective does."""


def patch_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of these images, (…, H, W)."""
    height, width = images.shape[-2:]
    return height // patch_size, width // patch_size


def gather_tokens(tokens_BND: Tensor, index_BL: Tensor) -> Tensor:
    """Return the tokens at `index_BL`: (B, L, D)."""
    return tokens_BND.gather(1, index_BL[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    """Split channels into heads: (B, L, H·D) → (B, H, L, D)."""
    x_BHLD: Tensor = x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x_BHLD


def attend(
    query_BHQD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    kernel: str,
    *,
    mask_B11L: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(QKᵀ/√D)V: (B, H, Q, D). Queries may be a subset of the tokens. `kernel`, that of the surrounding
    stock layers, is sdpa (fused) or eager. Each row of the bool mask needs at least one True key; False keys are
    masked."""
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(query_BHQD, key_BHLD, value_BHLD, attn_mask=mask_B11L, dropout_p=dropout)
    scores_BHQL = query_BHQD @ key_BHLD.transpose(2, 3) * query_BHQD.shape[-1] ** -0.5
    if mask_B11L is not None:
        scores_BHQL = scores_BHQL.masked_fill(~mask_B11L, -torch.inf)
    return F.dropout(scores_BHQL.softmax(dim=-1), dropout) @ value_BHLD
