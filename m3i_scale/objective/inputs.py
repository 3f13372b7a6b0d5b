"""t_x: choose what the backbone sees of normalised views, by masks and by the mixing of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from m3i_scale.config import FixableError, Section
from m3i_scale.config.limits import MAX_VIEWS
from m3i_scale.objective.masks import Mask, RandomMask, hash_uniform
from m3i_scale.objective.state import Fp32State


def _is_ratio(value: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(value, tuple):
        if not 0 <= value[0] < value[1] < 1:
            raise ValueError(f"[{value[0]:g}, {value[1]:g}] is no range of shares of patches: ascending, below 1")
    elif not 0 < value < 1:
        raise ValueError(f"{value:g} is no share of hidden patches: above 0, below 1")
    return value


class MaskSpec(Section):
    """Says which patches of an input are hidden."""

    form: Mask = RandomMask()
    """random: independent patches; block: a union of rectangles; inverse_block: all but one rectangle; target_blocks:
    rectangles that are predicted one by one; or a class of one's own."""
    ratio: Annotated[float | tuple[float, float], AfterValidator(_is_ratio)]
    """Share of hidden patches; the count is rounded to a whole patch and is the same for every sample. Of mask tokens
    also [smallest, largest]: every sample draws its own."""
    hidden: Literal["dropped", "token"] = "dropped"
    """dropped: the encoder does not see hidden patches; token: it sees a learnt token at their places."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the samples that hide anything, drawn by sample; below 1 only with mask tokens."""
    count: int = Field(default=1, ge=1, le=MAX_VIEWS)
    """So many masks of the same view, each an input of its own."""

    @model_validator(mode="after")
    def _keeps_a_shape(self) -> Self:
        if self.hidden == "dropped" and self.varies:
            raise ValueError("samples hide as many patches each where these are dropped: take `hidden: token`")
        return self

    @model_validator(mode="after")
    def _hides_its_blocks(self) -> Self:
        least = self.form.least_ratio
        if least and self.hidden == "token":
            raise FixableError(f"the encoder does not see the target blocks of '{self.form.kind}'", "hidden: dropped")
        if isinstance(self.ratio, float) and self.ratio < least - 1e-9:
            raise FixableError(
                f"the target blocks of '{self.form.kind}' may cover {least:g} of the patches, and {self.ratio:g} are "
                "hidden",
                f"ratio: {least:g} or more",
            )
        return self

    @property
    def varies(self) -> bool:
        """Return whether samples hide different numbers of patches."""
        return isinstance(self.ratio, tuple) or self.share < 1

    @property
    def amount(self) -> str:
        """Return in words how much it hides, and how often."""
        ratio = f"{self.ratio:g}" if isinstance(self.ratio, float) else "{:g} to {:g}".format(*self.ratio)
        samples = f" in {self.share:g} of the samples" if self.share < 1 else ""
        return ratio + samples + (f", × {self.count}" if self.count > 1 else "")


class InputSpec(Section):
    """Describes one input x of the backbone, or several that targets have the same use for."""

    name: str = Field(min_length=1)
    """The name that targets refer to."""
    view: int = Field(ge=1, le=MAX_VIEWS)
    """Augmented view of the image, from 1."""
    views: int = Field(default=1, ge=1, le=MAX_VIEWS)
    """So many views from that one on, each an input of its own."""
    mask: MaskSpec | None = None

    @property
    def seen(self) -> range:
        """Return the views, from 1."""
        return range(self.view, self.view + self.views)


class MixSpec(Section):
    """Puts several images into one input with complementary patch masks (paper, Fig. 2).

    The first input shows the share of patches that its equal part is, the second one what the first left over, and so
    on; all inputs of a mix come from different images of the local batch.
    """

    inputs: list[str] = Field(min_length=2, max_length=4)
    form: Mask = RandomMask()
    """The law by which patches are dealt to the images, as the hidden ones of a mask are chosen."""

    @model_validator(mode="after")
    def _deals_all(self) -> Self:
        if self.form.least_ratio:
            raise FixableError(f"a mix has no use for the target blocks of '{self.form.kind}'", "form: random or block")
        return self


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
    masked_BM: Tensor | None = None
    """Where hidden patches are mask tokens, and samples hide different numbers of them, bool (B, M): which of
    `hidden_BM` are hidden; None: all."""
    shown_BN: Tensor | None = None
    """Where hidden patches are mask tokens, bool (B, N): which patches are none. `visible_BL` are all patches then."""
    blocks_BKT: Tensor | None = None
    """int64 (B, K, T): the hidden patches of every target block, ascending; None where the mask has no such blocks."""

    def shown_patches(self, sample: int) -> Tensor:
        """Return which patches of a sample, on the host, are neither dropped nor mask tokens: int64 (L)."""
        return self.visible_BL[sample] if self.shown_BN is None else self.shown_BN[sample].nonzero()[:, 0]


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
    specs: list[InputSpec],
    mix: MixSpec | None,
    seeds_B: Tensor,
    grid: tuple[int, int],
    cell: int = 1,
    small: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> list[EncodedInput]:
    """Return the inputs of a recipe for one micro-batch, each indexed by image (not by row of the mix).

    Args:
        specs: the recipe's inputs. Several parts of one follow each other: by view, and by mask of the view.
        mix: how they share a grid, where they do.
        seeds_B: seed of every sample.
        grid: rows and columns of patches.
        cell: side, in patches, of the squares that masks are made of; divides both sides of the grid.
        small: grids of the views that have another one, by view from 1.

    Raises:
        ValueError: a mix of more images than the micro-batch holds.
    """
    if cell > 1:
        coarse = grid[0] // cell, grid[1] // cell
        return [_refine(spec, coarse, cell) for spec in build_inputs(specs, mix, seeds_B, coarse)]
    patches = grid[0] * grid[1]
    if mix is None:
        parts = [
            (spec, view) for spec in specs for view in spec.seen for _ in range(spec.mask.count if spec.mask else 1)
        ]
        return [
            _single(spec, view - 1, seeds_B, small.get(view, grid), number) for number, (spec, view) in enumerate(parts)
        ]
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


def _single(spec: InputSpec, view: int, seeds_B: Tensor, grid: tuple[int, int], number: int) -> EncodedInput:
    patches = grid[0] * grid[1]
    itself_B = torch.arange(len(seeds_B), device=seeds_B.device)
    every_BN = torch.arange(patches, device=seeds_B.device).expand(len(seeds_B), -1)
    if spec.mask is None:
        return EncodedInput(spec.name, view, every_BN, every_BN[:, :0], itself_B, itself_B)
    ratio = spec.mask.ratio
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    visible = min(max(patches - round(high * patches), 1), patches - 1)
    order_BN = spec.mask.form.order(seeds_B, grid, 16 * number)
    if spec.mask.hidden == "dropped":
        seen = _split(spec.name, view, order_BN, visible, itself_B, itself_B)
        return replace(seen, blocks_BKT=spec.mask.form.target_blocks(seeds_B, grid, 16 * number))
    hidden_BM, first_BM = order_BN[:, visible:].flip(1).sort(dim=1)
    masked_BM = None
    if spec.mask.varies:
        # Of a stream that no mask has. Whoever hides fewer patches hides those that are hidden first.
        share_B, size_B = hash_uniform(seeds_B, 2, -1 - number).unbind(1)
        count_B = ((low + (high - low) * size_B) * patches).round() * (share_B < spec.mask.share)
        masked_BM = first_BM < count_B[:, None]
    hides_BM = torch.ones_like(hidden_BM, dtype=torch.bool) if masked_BM is None else masked_BM
    shown_BN = torch.ones_like(every_BN, dtype=torch.bool).scatter(1, hidden_BM, ~hides_BM)
    return EncodedInput(spec.name, view, every_BN, hidden_BM, itself_B, itself_B, masked_BM, shown_BN)


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

    blocks_BKT = spec.blocks_BKT
    if blocks_BKT is not None:
        blocks_BKT = fine(blocks_BKT.flatten(0, 1)).unflatten(0, blocks_BKT.shape[:2])
    return replace(spec, visible_BL=fine(spec.visible_BL), hidden_BM=fine(spec.hidden_BM), blocks_BKT=blocks_BKT)


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
