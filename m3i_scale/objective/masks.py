"""Masks: the order in which the patches of an image are masked. It is a pure function of the sample's seed, the same on
any device and for any number of ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from m3i_scale.config.sections import MAX_ASPECT, MAX_SIDE, MAX_VIEWS, Kind
from m3i_scale.objective.positions import patch_coordinates

_BLOCKS = 24
"""Rectangles per block mask: enough to cover 3/4 of a grid with probability near 1."""
_ROUNDS, _TRIALS = 16, 10
"""Rectangles of `BeitBlocks`, and draws of each."""


class Mask(Kind):
    """Base class of masks: an order of the patches of an image."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    @property
    def least_ratio(self) -> float:
        """Return the smallest mask ratio that the mask supports."""
        return 0.0

    def target_blocks(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor | None:
        """Return K blocks of T masked patches, each predicted separately: int64 (B, K, T), ascending within a block.
        None if the mask has no target blocks. For the arguments see `order`.

        Raises:
            ValueError: the grid is too small for the blocks.
        """
        return None

    @abstractmethod
    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return a permutation of the patches per sample, int64 (B, N). The last patches are masked, for any ratio.

        Args:
            seeds_B: seed of every sample.
            grid: rows and columns of patches.
            stream: stream of random numbers. It differs per input, so that masks are independent. A mask may also use
                the next 15 streams.
        """

    def order_for(self, masked: int, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return `order` for a mask that depends on the number of masked patches."""
        return self.order(seeds_B, grid, stream)


class RandomMask(Mask):
    """A mask of independently drawn patches."""

    kind: ClassVar[str] = "random"

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        # Stable: every device orders equal numbers alike.
        return hash_uniform(seeds_B, grid[0] * grid[1], stream).argsort(dim=1, stable=True)


class BlockMask(Mask):
    """A mask that is a union of rectangles."""

    kind: ClassVar[str] = "block"

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Order the patches by the first rectangle that covers them; patches of the first rectangle come last."""
        rows, columns = grid
        noise_BN = hash_uniform(seeds_B, rows * columns, stream)
        u_B4K = hash_uniform(seeds_B, 4 * _BLOCKS, stream + 1).view(-1, 4, _BLOCKS)
        # Area 1/12 to 1/3 of the grid, aspect 0.3 to 3.3, as usual for block masking.
        area_BK = rows * columns * (1 / 12 + u_B4K[:, 0] / 4)
        aspect_BK = torch.exp((u_B4K[:, 1] * 2 - 1) * 1.2)
        height_BK = (area_BK * aspect_BK).sqrt().round().clamp(1, rows)
        width_BK = (area_BK / aspect_BK).sqrt().round().clamp(1, columns)
        top_BK = (u_B4K[:, 2] * (rows - height_BK + 1)).floor()
        left_BK = (u_B4K[:, 3] * (columns - width_BK + 1)).floor()
        row_N, column_N = patch_coordinates(grid, seeds_B.device)
        inside_BKN = (
            (row_N >= top_BK[..., None])
            & (row_N < (top_BK + height_BK)[..., None])
            & (column_N >= left_BK[..., None])
            & (column_N < (left_BK + width_BK)[..., None])
        )
        number_K1 = torch.arange(_BLOCKS, device=seeds_B.device)[:, None]
        first_BN = number_K1.masked_fill(~inside_BKN, _BLOCKS).amin(dim=1)
        return (noise_BN - first_BN).argsort(dim=1, stable=True)


class BeitBlocks(Mask):
    """A union of rectangles as in the code of BEiT and SIM: each has at most the patches that are left to mask.

    If ten rectangles in a row mask nothing new or too much, random patches fill up the mask. Here, they also do after
    `_ROUNDS` rectangles; of 20,000 masks of SIM, none has more.
    """

    kind: ClassVar[str] = "beit_blocks"
    smallest: int = Field(default=16, ge=1, le=MAX_SIDE)
    """Smallest number of patches of a rectangle, while that many are left."""

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        return self.order_for(grid[0] * grid[1] // 2, seeds_B, grid, stream)

    def order_for(self, masked: int, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return `order`, with the patches of all rectangles last."""
        place_2N = torch.stack(patch_coordinates(grid, seeds_B.device))
        side_21 = place_2N.amax(dim=1, keepdim=True) + 1
        u_RB4T = hash_uniform(seeds_B, 4 * _ROUNDS * _TRIALS, stream + 1).view(-1, _ROUNDS, 4, _TRIALS).transpose(0, 1)
        half_RB1T = (u_RB4T[:, :, 1:2] - 0.5) * math.log(1 / 0.3)  # log √aspect; the aspect is 0.3 to 1 / 0.3
        stretch_RB2T = torch.cat([half_RB1T, -half_RB1T], dim=2).exp()
        masked_BN = torch.zeros_like(seeds_B, dtype=torch.bool)[:, None].expand(-1, grid[0] * grid[1])
        going_B1 = torch.ones_like(masked_BN[:, :1])
        for u_B4T, stretch_B2T in zip(u_RB4T, stretch_RB2T, strict=True):
            left_B1 = masked - masked_BN.sum(dim=1, keepdim=True)
            area_BT = self.smallest + (left_B1 - self.smallest) * u_B4T[:, 0]
            size_B2T = (area_BT.sqrt()[:, None] * stretch_B2T).round()
            start_B2T1 = (u_B4T[:, 2:] * (side_21 + 1 - size_B2T)).floor()[..., None]
            within_B2TN = (place_2N[:, None] >= start_B2T1) & (place_2N[:, None] < start_B2T1 + size_B2T[..., None])
            new_BTN = within_B2TN.all(dim=1) & ~masked_BN[:, None]
            count_BT = new_BTN.sum(dim=2)
            fits_BT = (size_B2T < side_21).all(dim=1) & (count_BT > 0) & (count_BT <= left_B1)
            first_BT = fits_BT & (fits_BT.cumsum(dim=1) == 1) & going_B1
            going_B1 = going_B1 & fits_BT.any(dim=1, keepdim=True)
            masked_BN = masked_BN | (new_BTN & first_BT[..., None]).any(dim=1)
        noise_BN = hash_uniform(seeds_B, grid[0] * grid[1], stream)
        return (noise_BN + masked_BN).argsort(dim=1, stable=True)


class InverseBlockMask(Mask):
    """A mask of all patches outside of one rectangle, which wraps around at the image border (CAPI)."""

    kind: ClassVar[str] = "inverse_block"

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Order the patches by the smallest rectangle of fixed center and aspect ratio that covers them."""
        rows, columns = grid
        u_B3 = hash_uniform(seeds_B, 3, stream)
        stretch_B1 = torch.exp((u_B3[:, :1] - 0.5) * math.log(2))  # √aspect; the aspect is 0.5 to 2
        row_N, column_N = patch_coordinates(grid, seeds_B.device)
        down_BN = (row_N - u_B3[:, 1:2] * rows).remainder(rows) - rows / 2
        right_BN = (column_N - u_B3[:, 2:] * columns).remainder(columns) - columns / 2
        size_BN = torch.maximum(down_BN.abs() / stretch_B1, right_BN.abs() * stretch_B1)
        return size_BN.argsort(dim=1, stable=True)


class TargetBlocks(Mask):
    """A mask of rectangles that are predicted one by one; a sample of the other patches is visible (I-JEPA).

    Every rectangle has the same number of patches. If height × width exceeds it, the first row begins later or the last
    one ends earlier.
    """

    kind: ClassVar[str] = "target_blocks"
    blocks: int = Field(default=4, ge=1, le=MAX_VIEWS)
    """Number of rectangles per image; they may overlap."""
    scale: float = Field(default=0.175, gt=0, lt=1)
    """Fraction of the patches in one rectangle."""
    aspect: tuple[float, float] = (0.75, 1.5)
    """Smallest and largest aspect ratio (height over width) of a rectangle."""
    context: float = Field(default=0.85, gt=0, le=1)
    """Fraction of the patches in the square from which visible patches are drawn. If the targets leave too few, patches
    outside of it are added."""

    @field_validator("aspect")
    @classmethod
    def _is_a_range(cls, aspect: tuple[float, float]) -> tuple[float, float]:
        if not 1 / MAX_ASPECT <= aspect[0] <= aspect[1] <= MAX_ASPECT:
            raise ValueError(
                f"must be [smallest, largest] height over width, from {1 / MAX_ASPECT:g} to {MAX_ASPECT:g}: {[*aspect]}"
            )
        return aspect

    @property
    def least_ratio(self) -> float:
        return self.blocks * self.scale

    def target_blocks(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return the rectangles: int64 (B, blocks, T), row by row."""
        rows, columns = grid
        patches = int(self.scale * rows * columns)
        if patches == 0:
            raise ValueError(f"{self.scale:g} of {rows * columns} patches is less than one")
        aspect_BK, top_BK, left_BK, end_BK = (
            hash_uniform(seeds_B, 4 * self.blocks, stream + 1).view(-1, 4, self.blocks).unbind(1)
        )
        aspect_BK = self.aspect[0] + (self.aspect[1] - self.aspect[0]) * aspect_BK
        width_BK = (patches / aspect_BK).sqrt().round().clamp(math.ceil(patches / rows), columns).to(torch.int64)
        height_BK = (patches + width_BK - 1) // width_BK
        first_BK = (end_BK < 0.5) * (width_BK * height_BK - patches)
        number_BKT = first_BK[..., None] + torch.arange(patches, device=seeds_B.device)
        down_BKT = _start(top_BK, height_BK, rows)[..., None] + number_BKT // width_BK[..., None]
        across_BKT = _start(left_BK, width_BK, columns)[..., None] + number_BKT % width_BK[..., None]
        return down_BKT * columns + across_BKT

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return the patches in random order: patches only in the square first, patches in rectangles last."""
        rows, columns = grid
        height, width = (max(round(side * self.context**0.5), 1) for side in grid)
        u_B2 = hash_uniform(seeds_B, 2, stream + 2)
        top_B1, left_B1 = _start(u_B2[:, :1], height, rows), _start(u_B2[:, 1:], width, columns)
        row_N, column_N = patch_coordinates(grid, seeds_B.device)
        inside_BN = (row_N >= top_B1) & (row_N < top_B1 + height) & (column_N >= left_B1) & (column_N < left_B1 + width)
        place_BN = hash_uniform(seeds_B, rows * columns, stream) + (~inside_BN).float()  # at most 2
        predicted_BT = self.target_blocks(seeds_B, grid, stream).flatten(1)
        order_BN: Tensor = place_BN.scatter(1, predicted_BT, 3.0).argsort(dim=1, stable=True)
        return order_BN


def _start(u: Tensor, length: Tensor | int, side: int) -> Tensor:
    return (u * (side - length + 1)).floor().to(torch.int64)


def hash_uniform(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Return uniform numbers in [0, 1), float32 (B, count): a pure function of (seed, stream, index). SplitMix64's
    mixing function in wrapping int64 arithmetic is identical on every device."""
    index_N = torch.arange(1, count + 1, device=seeds_B.device, dtype=torch.int64)
    offset = (stream * 2685821657736338717 + 2**63) % 2**64 - 2**63  # wrapped here: Python integers do not wrap
    state_BN = seeds_B[:, None] + index_N * -7046029254386353131 + offset
    state_BN = (state_BN ^ _shift(state_BN, 30)) * -4658895280553007687
    state_BN = (state_BN ^ _shift(state_BN, 27)) * -7723592293110705685
    state_BN = state_BN ^ _shift(state_BN, 31)
    return _shift(state_BN, 40).to(torch.float32) * 2.0**-24


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right, logically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
