"""Masks of single patches and of rectangles."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from m3i_scale.objective.masks.base import Mask, hash_uniform

_BLOCKS = 24
"""Rectangles drawn for a block mask: enough to cover 3/4 of a grid with probability near 1."""


class RandomMask(Mask):
    """Independent patches."""

    kind: ClassVar[str] = "random"

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return the patches in random order."""
        return hash_uniform(seeds_B, grid[0] * grid[1], stream).argsort(dim=1)


class BlockMask(Mask):
    """A union of rectangles."""

    kind: ClassVar[str] = "block"

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return the patches by the first rectangle that covers them; those of the very first come last."""
        rows, columns = grid
        noise_BN = hash_uniform(seeds_B, rows * columns, stream)
        u_B4K = hash_uniform(seeds_B, 4 * _BLOCKS, stream + 1).view(-1, 4, _BLOCKS)
        # Area 1/12 to 1/3 of the grid, aspect 0.3 to 3.3, as block masking is usually drawn.
        area_BK = rows * columns * (1 / 12 + u_B4K[:, 0] / 4)
        aspect_BK = torch.exp((u_B4K[:, 1] * 2 - 1) * 1.2)
        height_BK = (area_BK * aspect_BK).sqrt().round().clamp(1, rows)
        width_BK = (area_BK / aspect_BK).sqrt().round().clamp(1, columns)
        top_BK = (u_B4K[:, 2] * (rows - height_BK + 1)).floor()
        left_BK = (u_B4K[:, 3] * (columns - width_BK + 1)).floor()
        row_N = torch.arange(rows, device=seeds_B.device).repeat_interleave(columns)
        column_N = torch.arange(columns, device=seeds_B.device).repeat(rows)
        inside_BKN = (
            (row_N >= top_BK[..., None])
            & (row_N < (top_BK + height_BK)[..., None])
            & (column_N >= left_BK[..., None])
            & (column_N < (left_BK + width_BK)[..., None])
        )
        number_K1 = torch.arange(_BLOCKS, device=seeds_B.device)[:, None]
        first_BN = torch.where(inside_BKN, number_K1, _BLOCKS).amin(dim=1)
        return (noise_BN - first_BN).argsort(dim=1)
