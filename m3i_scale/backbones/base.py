"""Define what the objective asks of a backbone f_θ, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tokens = tuple[Tensor, Tensor]
"""Class token (B, 1, D), or the mean token where the backbone has none, and patch tokens (B, L, D)."""


class MaskToken(nn.Module):
    """Takes the place of hidden tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, width))

    def reset_parameters(self) -> None:
        """Draw the first value."""
        nn.init.normal_(self.token, std=0.02)

    def forward(self, map_BHWC: Tensor, shown_BHW: Tensor) -> Tensor:
        """Return the map, with the token wherever `shown_BHW` is False."""
        return torch.where(shown_BHW[..., None], map_BHWC, self.token.to(map_BHWC.dtype))


@dataclass
class MaskedPatches:
    """Says which patches of inputs are mask tokens."""

    token: MaskToken
    shown: list[Tensor | None]
    """By input, which patches are shown as they are: bool (B, N); None: all."""


class Backbone(nn.Module, ABC):
    """Adapts a stock vision model, `model`, that is shown a part of its patches or patches of several images."""

    model: Any
    """The `transformers` model: what an export writes."""

    @property
    @abstractmethod
    def has_class_token(self) -> bool:
        """Return whether the first of `Tokens` is a token of its own, not the mean of the others."""

    @property
    @abstractmethod
    def own_attention(self) -> bool:
        """Return whether the images of a mix can be kept apart. Where not, they are mixed pixel by pixel."""

    @property
    def width(self) -> int:
        """Return D, the channels of a token."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """Return the side of the images of the configuration in pixels; others may be encoded too."""
        return int(self.model.config.image_size)

    @property
    def patch_size(self) -> int:
        """Return the side in pixels of what one token stands for."""
        return int(self.model.config.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patch tokens of images of that size."""
        side = self.image_size // self.patch_size
        return side, side

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patch tokens of these images, (…, H, W)."""
        height, width = images.shape[-2:]
        return height // self.patch_size, width // self.patch_size

    @property
    def cell(self) -> int:
        """Return the side, in tokens, of the squares that are hidden or shown as a whole."""
        return 1

    @property
    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """Return the layers, in order."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the compute type of the parameters."""
        first: nn.Parameter = next(self.model.parameters())
        return first.dtype

    @abstractmethod
    def encode_own(
        self,
        views: dict[int, Tensor],
        view_of: Sequence[int],
        visible: Sequence[Tensor],
        masked: MaskedPatches | None = None,
    ) -> list[Tokens]:
        """Encode inputs that see nothing of each other.

        Args:
            views: normalised images (B, 3, H, W) by view.
            view_of: by input, the view that it shows a part of.
            visible: by input, the visible patches: int64 (B, L), ascending.
            masked: the patches that are mask tokens, where there are any.

        Returns:
            By input, the tokens of its visible patches, in the order of `visible`.
        """

    @abstractmethod
    def encode_mixed(
        self, views: dict[int, Tensor], view_of: Sequence[int], visible: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> list[Tokens]:
        """Encode images of a mix that see each other: one input a row.

        Args:
            views: normalised images by view.
            view_of: by place in the mix, the view.
            visible: by place, the patches that are shown there: int64 (B, L), by image.
            rows: by place, which image sits there in row i: int64 (B).

        Returns:
            By place, the tokens by row.
        """

    def encode_whole(self, images_BCHW: Tensor, blocks: int = 1) -> Tokens:
        """Encode normalised images, nothing hidden: class or mean token (B, 1, D), and those of all patches (B, N, D),
        row by row.

        Args:
            images_BCHW: normalised.
            blocks: the class tokens of so many last layers, (B, blocks, D), each normalised as the last one is.

        Raises:
            ValueError: several are asked for, and the backbone has no class token.
        """
        if blocks > 1:
            raise ValueError("the backbone has no class token")
        return self.encode_maps(images_BCHW, ())[0]

    def encode_attending(self, images_BCHW: Tensor) -> tuple[Tokens, Tensor | None]:
        """Encode as `encode_whole` does, and return what the class token attends to in the last layer, by head: fp32
        (B, H, N); None where there is none."""
        return self.encode_whole(images_BCHW), None

    @property
    @abstractmethod
    def stage_widths(self) -> list[int]:
        """Return the channels of the maps of stride 4, 8, 16 and 32 that the stages give; nothing where there are no
        stages, and every layer has the same grid."""

    @abstractmethod
    def encode_maps(self, images_BCHW: Tensor, layers: Sequence[int]) -> tuple[Tokens, list[Tensor]]:
        """Encode as `encode_whole` does, and keep maps on the way.

        Args:
            images_BCHW: normalised.
            layers: by number from 1, whose outputs are kept; of a backbone with stages those of all stages are.

        Returns:
            The tokens, and the maps (B, C, H, W) as the layers give them, before the last norm.
        """

    @abstractmethod
    def last_hidden_state(self, images_BCHW: Tensor) -> Tensor:
        """Return what `model` calls its last hidden state, as the objective computes it."""


def gather_tokens(tokens_BND: Tensor, index_BL: Tensor) -> Tensor:
    """Return the tokens at `index_BL`: (B, L, D)."""
    return tokens_BND.gather(1, index_BL[..., None].expand(-1, -1, tokens_BND.shape[-1]))
