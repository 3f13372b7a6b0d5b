"""t_x: choose what the backbone sees of normalised views, by masks and by the mixing of images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config import Section
from m3i_scale.objective.masks import Mask, RandomMask
from m3i_scale.objective.state import Fp32State


class MaskSpec(Section):
    """Says which patches of an input the encoder does not see."""

    form: Mask = RandomMask()
    """random: independent patches; block: a union of rectangles; or a class of one's own."""
    ratio: float = Field(gt=0, lt=1)
    """Share of hidden patches; the count is rounded to a whole patch and is the same for every sample."""


class InputSpec(Section):
    """Describes one input x of the backbone."""

    name: str
    """The name that targets refer to."""
    view: int = Field(ge=1)
    """Augmented view of the image, from 1."""
    mask: MaskSpec | None = None


class MixSpec(Section):
    """Puts several images into one input with complementary patch masks (paper, Fig. 2).

    The first input shows the share of patches that its equal part is, the second one what the first left over, and so
    on; all inputs of a mix come from different images of the local batch.
    """

    inputs: list[str] = Field(min_length=2, max_length=4)
    form: Mask = RandomMask()
    """The law by which patches are dealt to the images, as the hidden ones of a mask are chosen."""


@dataclass
class EncodedInput:
    """Says where one input lies: which patches of which view the encoder sees."""

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
    """Return for each place r of a mix which image of the batch sits there in row i: int64 (B) each.

    Rows are cut into groups of `images` neighbours (the last group takes the remainder) and rotated within the group:
    every image serves once in every place, never meets itself, and a group never spans two ranks' micro-batches.
    """
    group_count = max(batch // images, 1)
    row_B = torch.arange(batch, device=device)
    start_B = (row_B // images).clamp(max=group_count - 1) * images
    size_B = images + (start_B == (group_count - 1) * images) * (batch - group_count * images)
    return [start_B + (row_B - start_B + place) % size_B for place in range(images)]


def build_inputs(
    specs: list[InputSpec], mix: MixSpec | None, seeds_B: Tensor, grid: tuple[int, int], cell: int = 1
) -> list[EncodedInput]:
    """Return the inputs of a recipe for one micro-batch, each indexed by image (not by row of the mix).

    Args:
        specs: the recipe's inputs.
        mix: how they share a grid, where they do.
        seeds_B: seed of every sample.
        grid: rows and columns of patches.
        cell: side, in patches, of the squares that masks are made of; divides both sides of the grid.

    Raises:
        ValueError: a mix of more images than the micro-batch holds.
    """
    if cell > 1:
        coarse = grid[0] // cell, grid[1] // cell
        return [_refine(spec, coarse, cell) for spec in build_inputs(specs, mix, seeds_B, coarse)]
    patches = grid[0] * grid[1]
    if mix is None:
        return [_single(spec, seeds_B, grid, 16 * number) for number, spec in enumerate(specs)]
    places = len(mix.inputs)
    if len(seeds_B) < places:
        raise ValueError(f"a mix of {places} images needs a micro-batch of at least {places}, got {len(seeds_B)}")
    order_BN = mix.form.order(seeds_B, grid, 0)
    bounds = [patches * place // places for place in range(places + 1)]
    partners = mix_partners(len(seeds_B), places, seeds_B.device)
    view_of = {spec.name: spec.view - 1 for spec in specs}
    inputs = []
    for place, name in enumerate(mix.inputs):
        row_of_image_B = partners[place].argsort()
        mine_BN = order_BN[row_of_image_B].roll(-bounds[place], dims=1)
        visible = bounds[place + 1] - bounds[place]
        inputs.append(_split(name, view_of[name], mine_BN, visible, partners[place], row_of_image_B))
    return inputs


def _single(spec: InputSpec, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> EncodedInput:
    patches = grid[0] * grid[1]
    itself_B = torch.arange(len(seeds_B), device=seeds_B.device)
    if spec.mask is None:
        every_BN = torch.arange(patches, device=seeds_B.device).expand(len(seeds_B), -1)
        return EncodedInput(spec.name, spec.view - 1, every_BN, every_BN[:, :0], itself_B, itself_B)
    visible = min(max(patches - round(spec.mask.ratio * patches), 1), patches - 1)
    order_BN = spec.mask.form.order(seeds_B, grid, stream)
    return _split(spec.name, spec.view - 1, order_BN, visible, itself_B, itself_B)


def _split(
    name: str, view: int, order_BN: Tensor, visible: int, image_of_row_B: Tensor, row_of_image_B: Tensor
) -> EncodedInput:
    visible_BL, hidden_BM = order_BN[:, :visible].sort(dim=1).values, order_BN[:, visible:].sort(dim=1).values
    return EncodedInput(name, view, visible_BL, hidden_BM, image_of_row_B, row_of_image_B)


def _refine(spec: EncodedInput, grid: tuple[int, int], cell: int) -> EncodedInput:
    """Replace every index of a cell by those of its cell × cell patches."""
    device = spec.visible_BL.device
    inner = torch.arange(cell, device=device)
    inside_K = (inner[:, None] * (grid[1] * cell) + inner).flatten()

    def fine(index_BL: Tensor) -> Tensor:
        first_BL = (index_BL // grid[1]) * (cell * grid[1] * cell) + (index_BL % grid[1]) * cell
        return (first_BL[..., None] + inside_K).flatten(1).sort(dim=1).values

    return replace(spec, visible_BL=fine(spec.visible_BL), hidden_BM=fine(spec.hidden_BM))


class PixelNorm(Fp32State):
    """Normalises images by channel."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_constant("mean_C", mean)
        self.register_constant("std_C", std)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return (x/255 − mean) / std by channel: uint8 (B, 3, H, W) → float32."""
        mean_C11, std_C11 = self._moments()
        return (images_BCHW.to(torch.float32) - mean_C11) / std_C11

    def undo(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the images that normalised pixels show: (B, 3, H, W) → uint8, colours out of range at its ends."""
        mean_C11, std_C11 = self._moments()
        return (pixels_BCHW.float() * std_C11 + mean_C11).round().clamp(0, 255).to(torch.uint8)

    def _moments(self) -> tuple[Tensor, Tensor]:
        mean_C11, std_C11 = (255.0 * values_C[:, None, None] for values_C in (self.mean_C, self.std_C))
        return mean_C11, std_C11


def normalize(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (x/255 − mean) / std by channel: uint8 (B, 3, H, W) → float32."""
    pixels_BCHW: Tensor = PixelNorm(mean, std).to(images_BCHW.device)(images_BCHW)
    return pixels_BCHW
