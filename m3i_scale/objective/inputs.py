"""t_x: select the patches that the backbone sees, by masking and by image mixing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from m3i_scale.config import FixableError, Section
from m3i_scale.config.sections import MAX_VIEWS
from m3i_scale.objective.masks import BeitBlocks, Mask, RandomMask, hash_uniform
from m3i_scale.objective.state import Fp32State


def _is_ratio(value: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(value, tuple):
        if not 0 <= value[0] < value[1] < 1:
            raise ValueError(f"[{value[0]:g}, {value[1]:g}] is no range of shares of patches: ascending, below 1")
    elif not 0 < value < 1:
        raise ValueError(f"{value:g} is no share of hidden patches: above 0, below 1")
    return value


class MaskSpec(Section):
    """Which patches of an input are masked."""

    form: Mask = RandomMask()
    """random: independent patches; block: a union of rectangles; beit_blocks: BEiT's rectangles; inverse_block: all but
    one rectangle; target_blocks: rectangles predicted one by one; or a class."""
    ratio: Annotated[float | tuple[float, float], AfterValidator(_is_ratio)]
    """Mask ratio. The number of masked patches is rounded and is the same for every sample. With mask tokens, a range
    [smallest, largest] is possible; the ratio is drawn per sample."""
    masked: Literal["drop", "mask_token"] = "drop"
    """drop: the encoder does not see masked patches. mask_token: it sees a learned mask token in their positions."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Mask probability: the fraction of samples that are masked, drawn per sample. Below 1 only with mask tokens."""
    count: int = Field(default=1, ge=1, le=MAX_VIEWS)
    """Number of masks of the same view; each makes a separate input."""

    @model_validator(mode="after")
    def _fits_its_form(self) -> Self:
        if self.masked == "drop" and self.varies:
            raise ValueError(
                "`masked: drop` needs the same number of masked patches in every sample; use `masked: mask_token`"
            )
        if isinstance(self.ratio, tuple) and isinstance(self.form, BeitBlocks):
            raise FixableError(
                f"masks of form beit_blocks are drawn for one ratio, got {list(self.ratio)}", "form: block for a range"
            )
        least = self.form.least_ratio
        if least and self.masked == "mask_token":
            raise FixableError(f"the encoder does not see the target blocks of '{self.form.kind}'", "masked: drop")
        if isinstance(self.ratio, float) and self.ratio < least - 1e-9:
            raise FixableError(
                f"the target blocks of '{self.form.kind}' may cover {least:g} of the patches, and {self.ratio:g} are "
                "masked",
                f"ratio: {least:g} or more",
            )
        return self

    @property
    def ratios(self) -> tuple[float, float]:
        """Return the smallest and the largest mask ratio of masked samples."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio, self.ratio)

    @property
    def varies(self) -> bool:
        """Return whether the number of masked patches differs between samples."""
        return isinstance(self.ratio, tuple) or self.share < 1

    @property
    def amount(self) -> str:
        """Return mask ratio, probability and count as text."""
        ratio = f"{self.ratio:g}" if isinstance(self.ratio, float) else "{:g} to {:g}".format(*self.ratio)
        samples = f" in {self.share:g} of the samples" if self.share < 1 else ""
        return ratio + samples + (f", × {self.count}" if self.count > 1 else "")


class InputSpec(Section):
    """One input x of the backbone, or several with the same role."""

    name: str = Field(min_length=1)
    """Name that targets refer to."""
    view: int = Field(ge=1, le=MAX_VIEWS)
    """Augmented view of the image, from 1."""
    views: int = Field(default=1, ge=1, le=MAX_VIEWS)
    """Number of consecutive views from `view` on; each makes a separate input."""
    mask: MaskSpec | None = None
    """Mask of the input. Default: all patches are visible."""

    @property
    def seen(self) -> range:
        """Return the views, from 1."""
        return range(self.view, self.view + self.views)


class MixSpec(Section):
    """Mixing of several images into one input with complementary patch masks (paper, Fig. 2).

    The inputs show equal shares of the patches, without overlap. They come from different images of the local batch.
    """

    inputs: list[str] = Field(min_length=2, max_length=4)
    """Names of the inputs that are mixed."""
    form: Mask = RandomMask()
    """Mask that distributes the patches among the images."""

    @field_validator("form")
    @classmethod
    def _has_no_blocks(cls, form: Mask) -> Mask:
        if form.least_ratio:
            raise FixableError(
                f"a mix must not have the target blocks of '{form.kind}'", "form: random, block or inverse_block"
            )
        return form


@dataclass
class EncodedInput:
    """The patches of one view that the encoder sees as one input."""

    name: str
    view: int
    """View index from 0."""
    visible_BL: Tensor
    """int64 (B, L): indices of the visible patches, ascending."""
    hidden_BM: Tensor
    """int64 (B, M): indices of the masked patches, ascending; M may be 0."""
    image_of_row_B: Tensor
    """int64 (B): image in this slot of row i of the mix. Without a mix, the image itself."""
    row_of_image_B: Tensor
    """int64 (B): the inverse of `image_of_row_B`."""
    masked_BM: Tensor | None = None
    """bool (B, M): masked patches among `hidden_BM`, for mask tokens with a varying mask ratio. None: all."""
    masked_N: Tensor | None = None
    """int64 (N): indices of the masked patches in the flattened `masked_BM`, ascending. None without `masked_BM`."""
    shown_BN: Tensor | None = None
    """bool (B, N), for mask tokens: patches without mask token. `visible_BL` then contains all patches."""
    blocks_BKT: Tensor | None = None
    """int64 (B, K, T): the masked patches of every target block, ascending. None if the mask has no target blocks."""


def mix_partners(batch: int, images: int, device: torch.device) -> list[Tensor]:
    """Return the image in row i of the batch for each slot r of a mix: int64 (B) each.

    Rows are grouped by `images` neighbors (the last group takes the remainder) and rotated within the group. Every
    image serves once in every slot and never meets itself. A group never spans micro-batches of two ranks.
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
    device: torch.device | None = None,
) -> list[EncodedInput]:
    """Return the inputs of a recipe for one micro-batch, each indexed by image (not by row of the mix).

    Parts of one input are consecutive: by view, and by mask of the view. `cell` is the size, in patches, of the squares
    that are masked together; it must divide rows and columns of the grid. `small` are the grids of local crops, by view
    from 1. Masks are drawn on `device`. Pass `seeds_B` on the CPU, so that mask sizes are known without a device
    synchronization.
    """
    if cell > 1:
        coarse = grid[0] // cell, grid[1] // cell
        return [_refine(spec, coarse, cell) for spec in build_inputs(specs, mix, seeds_B, coarse, device=device)]
    host_seeds_B, seeds_B = seeds_B, seeds_B.to(device or seeds_B.device, non_blocking=True)
    patches = grid[0] * grid[1]
    if mix is None:
        parts = [
            (spec, view) for spec in specs for view in spec.seen for _ in range(spec.mask.count if spec.mask else 1)
        ]
        return [
            _single(spec, view - 1, seeds_B, host_seeds_B, small.get(view, grid), number)
            for number, (spec, view) in enumerate(parts)
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


def _single(
    spec: InputSpec, view: int, seeds_B: Tensor, host_seeds_B: Tensor, grid: tuple[int, int], number: int
) -> EncodedInput:
    patches = grid[0] * grid[1]
    itself_B = torch.arange(len(seeds_B), device=seeds_B.device)
    every_BN = torch.arange(patches, device=seeds_B.device).expand(len(seeds_B), -1)
    if spec.mask is None:
        return EncodedInput(spec.name, view, every_BN, every_BN[:, :0], itself_B, itself_B)
    visible = min(max(patches - round(spec.mask.ratios[1] * patches), 1), patches - 1)
    order_BN = spec.mask.form.order_for(patches - visible, seeds_B, grid, 16 * number)
    if spec.mask.masked == "drop":
        seen = _split(spec.name, view, order_BN, visible, itself_B, itself_B)
        return replace(seen, blocks_BKT=spec.mask.form.target_blocks(seeds_B, grid, 16 * number))
    hidden_BM, first_BM = order_BN[:, visible:].flip(1).sort(dim=1)
    masked_BM = masked_N = None
    if spec.mask.varies:
        # Samples with fewer masked patches mask the first in order.
        masked_BM = first_BM < _masked_patches(spec.mask, seeds_B, patches, number)[:, None]
        counts_B = _masked_patches(spec.mask, host_seeds_B, patches, number).clamp(max=patches - visible)
        # `plan` estimates memory on `meta`, for the largest masks.
        count = masked_BM.numel() if counts_B.is_meta else int(counts_B.sum())
        masked_N = (~masked_BM).flatten().byte().argsort(stable=True)[:count]
    hides_BM = torch.ones_like(hidden_BM, dtype=torch.bool) if masked_BM is None else masked_BM
    shown_BN = torch.ones_like(every_BN, dtype=torch.bool).scatter(1, hidden_BM, ~hides_BM)
    return EncodedInput(spec.name, view, every_BN, hidden_BM, itself_B, itself_B, masked_BM, masked_N, shown_BN)


def _masked_patches(mask: MaskSpec, seeds_B: Tensor, patches: int, number: int) -> Tensor:
    """Draw the number of masked patches of every sample: fp32 (B). It is the same on every device."""
    low, high = mask.ratios
    share_B, size_B = hash_uniform(seeds_B, 2, -1 - number).unbind(1)  # a random stream that no mask uses
    return ((low + (high - low) * size_B) * patches).round() * (share_B < mask.share)


def _split(
    name: str, view: int, order_BN: Tensor, visible: int, image_of_row_B: Tensor, row_of_image_B: Tensor
) -> EncodedInput:
    visible_BL, hidden_BM = order_BN[:, :visible].sort(dim=1).values, order_BN[:, visible:].sort(dim=1).values
    return EncodedInput(name, view, visible_BL, hidden_BM, image_of_row_B, row_of_image_B)


def _refine(spec: EncodedInput, grid: tuple[int, int], cell: int) -> EncodedInput:
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
    """Per-channel normalization of images."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_constant("mean_C", mean)
        self.register_constant("std_C", std)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalize per channel, (x/255 − mean) / std: uint8 (B, 3, H, W) → float32."""
        mean_C11, std_C11 = (255.0 * values_C[:, None, None] for values_C in (self.mean_C, self.std_C))
        return (images_BCHW.to(torch.float32) - mean_C11) / std_C11


def normalize(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalize per channel, (x/255 − mean) / std: uint8 (B, 3, H, W) → float32."""
    pixels_BCHW: Tensor = PixelNorm(mean, std).to(images_BCHW.device)(images_BCHW)
    return pixels_BCHW
