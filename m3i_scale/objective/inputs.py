"""t_x: normalised views, masks and the mixing of images.

Masks are drawn from the seed of the sample by a counter-based generator, so they are the same on any device and for
any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m3i_scale.objective.recipe import MaskSpec, Recipe

_BLOCKS = 24
"""Rectangles drawn for a block mask: enough to cover 3/4 of a grid with probability near 1."""


def hash_uniform(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Uniform numbers in [0, 1): float32 (B, count), a pure function of (seed, stream, index).

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
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def patch_order(seeds_B: Tensor, grid: tuple[int, int], form: str, stream: int) -> Tensor:
    """A permutation of the patches per sample: int64 (B, N). A mask of any ratio hides a tail of it.

    With `block`, the tail is a union of rectangles; the patch that the first rectangle covers comes last.
    """
    rows, columns = grid
    noise_BN = hash_uniform(seeds_B, rows * columns, stream)
    if form == "random":
        return noise_BN.argsort(dim=1)
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


@dataclass
class EncodedInput:
    """Where one input lies: which patches of which view the encoder sees."""

    name: str
    view: int
    """From 0."""
    visible_BL: Tensor
    """int64 (B, L): indices of the visible patches, ascending."""
    hidden_BM: Tensor
    """int64 (B, M): indices of the hidden patches, ascending; M may be 0."""
    image_of_row_B: Tensor
    """int64 (B): which image sits at this place in row i of a mix; the image itself without a mix."""
    row_of_image_B: Tensor
    """int64 (B): the inverse of `image_of_row_B`."""


def mix_partners(batch: int, images: int, device: torch.device) -> list[Tensor]:
    """For each place r of a mix, which image of the batch sits there in row i: int64 (B) each.

    Rows are cut into groups of `images` neighbours (the last group takes the remainder) and rotated within the group:
    every image serves once in every place, never meets itself, and a group never spans two ranks' micro-batches.
    """
    group_count = max(batch // images, 1)
    row_B = torch.arange(batch, device=device)
    start_B = (row_B // images).clamp(max=group_count - 1) * images
    size_B = torch.where(start_B == (group_count - 1) * images, batch - (group_count - 1) * images, images)
    return [start_B + (row_B - start_B + place) % size_B for place in range(images)]


def build_inputs(recipe: Recipe, seeds_B: Tensor, grid: tuple[int, int], cell: int = 1) -> list[EncodedInput]:
    """The inputs of a recipe for one micro-batch, each indexed by image (not by row of the mix).

    Args:
        recipe: the recipe.
        seeds_B: seed of every sample.
        grid: rows and columns of patches.
        cell: side, in patches, of the squares that masks are made of; divides both sides of the grid.

    Raises:
        ValueError: a mix of more images than the micro-batch holds.
    """
    if cell > 1:
        coarse = grid[0] // cell, grid[1] // cell
        return [_refine(spec, coarse, cell) for spec in build_inputs(recipe, seeds_B, coarse)]
    patches = grid[0] * grid[1]
    if recipe.mix is None:
        return [
            _single(spec.name, spec.view - 1, spec.mask, seeds_B, grid, 16 * k) for k, spec in enumerate(recipe.inputs)
        ]
    places = len(recipe.mix.inputs)
    if len(seeds_B) < places:
        raise ValueError(f"a mix of {places} images needs a micro-batch of at least {places}, got {len(seeds_B)}")
    order_BN = patch_order(seeds_B, grid, recipe.mix.form, 0)
    bounds = [patches * place // places for place in range(places + 1)]
    partners = mix_partners(len(seeds_B), places, seeds_B.device)
    inputs = []
    for place, name in enumerate(recipe.mix.inputs):
        row_of_image_B = partners[place].argsort()
        mine_BN = order_BN[row_of_image_B].roll(-bounds[place], dims=1)
        visible = bounds[place + 1] - bounds[place]
        inputs.append(_split(name, recipe.input(name).view - 1, mine_BN, visible, partners[place], row_of_image_B))
    return inputs


def _single(
    name: str, view: int, mask: MaskSpec | None, seeds_B: Tensor, grid: tuple[int, int], stream: int
) -> EncodedInput:
    patches = grid[0] * grid[1]
    itself_B = torch.arange(len(seeds_B), device=seeds_B.device)
    if mask is None:
        every_BN = torch.arange(patches, device=seeds_B.device).expand(len(seeds_B), -1)
        return EncodedInput(name, view, every_BN, every_BN[:, :0], itself_B, itself_B)
    visible = min(max(patches - round(mask.ratio * patches), 1), patches - 1)
    return _split(name, view, patch_order(seeds_B, grid, mask.form, stream), visible, itself_B, itself_B)


def _split(
    name: str, view: int, order_BN: Tensor, visible: int, image_of_row_B: Tensor, row_of_image_B: Tensor
) -> EncodedInput:
    visible_BL, hidden_BM = order_BN[:, :visible].sort(dim=1).values, order_BN[:, visible:].sort(dim=1).values
    return EncodedInput(name, view, visible_BL, hidden_BM, image_of_row_B, row_of_image_B)


def _refine(spec: EncodedInput, grid: tuple[int, int], cell: int) -> EncodedInput:
    """Every index of a cell becomes those of its cell × cell patches."""
    device = spec.visible_BL.device
    inner = torch.arange(cell, device=device)
    inside_K = (inner[:, None] * (grid[1] * cell) + inner).flatten()

    def fine(index_BL: Tensor) -> Tensor:
        first_BL = (index_BL // grid[1]) * (cell * grid[1] * cell) + (index_BL % grid[1]) * cell
        return (first_BL[..., None] + inside_K).flatten(1).sort(dim=1).values

    return replace(spec, visible_BL=fine(spec.visible_BL), hidden_BM=fine(spec.hidden_BM))


def normalize(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, 3, H, W) → float32, channel-wise (x/255 − mean) / std."""
    mean_C11 = torch.tensor(mean, device=images_BCHW.device, dtype=torch.float32)[:, None, None] * 255.0
    std_C11 = torch.tensor(std, device=images_BCHW.device, dtype=torch.float32)[:, None, None] * 255.0
    return (images_BCHW.to(torch.float32) - mean_C11) / std_C11
