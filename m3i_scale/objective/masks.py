"""Masks say in which order the patches of an image are hidden.

They are a pure function of the sample's seed, so they are the same on any device and for any number of ranks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from m3i_scale.config.kinds import Kind

_BLOCKS = 24
"""Rectangles drawn for a block mask: enough to cover 3/4 of a grid with probability near 1."""


class Mask(Kind):
    """Orders the patches of an image by when they are hidden; subclasses say how."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return a permutation of the patches per sample, int64 (B, N). A mask of any ratio hides a tail of it.

        Args:
            seeds_B: seed of every sample.
            grid: rows and columns of patches.
            stream: another one for every input, so that their masks do not depend on each other; a mask may also use
                the 15 that follow.
        """
        raise NotImplementedError


class RandomMask(Mask):
    """Hides patches independently of each other."""

    kind: ClassVar[str] = "random"

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return the patches in random order."""
        # Stable: every device orders equal numbers alike.
        return hash_uniform(seeds_B, grid[0] * grid[1], stream).argsort(dim=1, stable=True)


class BlockMask(Mask):
    """Hides a union of rectangles."""

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
        first_BN = number_K1.masked_fill(~inside_BKN, _BLOCKS).amin(dim=1)
        return (noise_BN - first_BN).argsort(dim=1, stable=True)


def hash_uniform(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Return uniform numbers in [0, 1): float32 (B, count), a pure function of (seed, stream, index).

    The mixing is that of SplitMix64, in wrapping int64 arithmetic, which every device computes alike.
    """
    index_N = torch.arange(1, count + 1, device=seeds_B.device, dtype=torch.int64)
    offset = (stream * 2685821657736338717 + 2**63) % 2**64 - 2**63  # wrapped here: Python integers do not
    state_BN = seeds_B[:, None] + index_N * -7046029254386353131 + offset
    state_BN = (state_BN ^ _shift(state_BN, 30)) * -4658895280553007687
    state_BN = (state_BN ^ _shift(state_BN, 27)) * -7723592293110705685
    state_BN = state_BN ^ _shift(state_BN, 31)
    return _shift(state_BN, 40).to(torch.float32) * 2.0**-24


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right, logically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
