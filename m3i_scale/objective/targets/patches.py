"""Base class of targets that predict patches with a decoder, and targets that distill the visible patches of another
encoder without a trained decoder or head: the features themselves, or their similarities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.data.batch import Batch
from m3i_scale.errors import ConfigError
from m3i_scale.objective.convolution import ConvolutionSpec
from m3i_scale.objective.decoders import (
    Pointwise,
    PointwiseSpec,
    SiameseDecoder,
    TransformerDecoder,
    TransformerSpec,
)
from m3i_scale.objective.distributions import Gaussian, Loss, unit
from m3i_scale.objective.masks import TargetBlocks
from m3i_scale.objective.positions import relative_position
from m3i_scale.objective.regularizers import DenseStopGradient
from m3i_scale.objective.targets.base import Context, Encoded, ImageTarget, Parts, Sizes, TargetModules

PredictedPatches = Literal["masked", "blocks", "all"]


class PatchTarget(ImageTarget):
    """A target that predicts patches of a view."""

    dense: ClassVar[bool] = True
    is_image_level: ClassVar[bool] = False
    weighs_patches: ClassVar[bool] = False
    """Whether the loss supports a number of masked patches that differs between samples."""
    tokens: PredictedPatches
    """Predicted patches: those that the input masks; those of its target blocks, one block at a time; or all."""

    @property
    def finds_places(self) -> bool:
        """Return whether patches are matched by similarity instead of position."""
        return False

    def decode(self, given: TargetModules, context: Context, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return the indices of the predicted patches of the target view (B, Q), and the decoder's outputs (B, Q,
        D)."""
        cls_B1D, tokens_BLD, where = encoded.cls_BND, encoded.tokens_BLD, encoded.where
        if self.tokens == "all":
            patches = given.grid[0] * given.grid[1]
            query_BQ = torch.arange(patches, device=tokens_BLD.device).expand(len(tokens_BLD), -1)
        else:
            query_BQ = where.hidden_BM
        if isinstance(given.decoder, Pointwise):
            predicted_BQD = gather_tokens(tokens_BLD, query_BQ) if self.tokens == "masked" else tokens_BLD
            return query_BQ, given.decoder(predicted_BQD)
        of_input, of_target = _positions(given.decoder, context.batch, where.view, self.view - 1, given.grid)
        if self.tokens == "blocks" and where.blocks_BKT is not None:
            return _decode_blocks(given, encoded, where.blocks_BKT, of_input)
        return query_BQ, given.decoder(cls_B1D, tokens_BLD, where.visible_BL, query_BQ, given.grid, of_input, of_target)

    def _errors(self, parts: Parts) -> Iterator[str]:
        yield from super()._errors(parts)
        pairs, decoder = self.predicted_from(parts), parts.decoders[self.decoder]
        other_view = any(view != self.view for _, view in pairs)
        if self.tokens != "all" and other_view:
            yield f"`tokens: {self.tokens}` counts the hidden patches of the input's own view: use `all` between views"
        if self.tokens == "masked" and parts.mix is None and any(spec.mask is None for spec, _ in pairs):
            yield "`tokens: masked`, but the input hides no patch"
        if self.tokens == "blocks":
            if any(spec.mask is None or not isinstance(spec.mask.form, TargetBlocks) for spec, _ in pairs):
                yield "`tokens: blocks`, but the input has no target blocks: `mask: {form: target_blocks, ratio: 0.7}`"
            if not isinstance(decoder, TransformerSpec):
                yield f"`tokens: blocks` asks for one block at a time: use a transformer, not {decoder.kind}"
        if isinstance(decoder, TransformerSpec) and decoder.position == "absolute" and other_view:
            yield "absolute positions do not say where another view lies: use `position: relative`"
        if isinstance(decoder, ConvolutionSpec) and other_view:
            yield "a convolution knows its own view alone: use a transformer"
        if isinstance(decoder, PointwiseSpec):
            if parts.mix is not None or any(spec.mask and spec.mask.masked == "drop" for spec, _ in pairs):
                yield "a pointwise decoder has no answer for masked patches: use a transformer, or `masked: mask_token`"
            if other_view and not self.finds_places:
                yield "a pointwise decoder knows its own view alone: use a transformer, or `match: similarity`"
            if not other_view and self.finds_places:
                yield "`match: similarity` has no effect within one view"
        varies = any(spec.mask and spec.mask.varies for spec, _ in pairs)
        if self.tokens == "masked" and varies and not self.weighs_patches:
            yield f"{self.title} counts as many hidden patches of every sample: give the mask one ratio, no share"


def _decode_blocks(
    given: TargetModules, encoded: Encoded, blocks_BKT: Tensor, position_BNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the patches of all blocks (B, K·T), and the decoder's outputs (B, K·T, D). The decoder sees one block at a
    time, with a K times larger batch."""
    count = blocks_BKT.shape[1]
    cls_B1D, tokens_BLD, visible_BL = (
        part.repeat_interleave(count, dim=0) for part in (encoded.cls_BND, encoded.tokens_BLD, encoded.where.visible_BL)
    )
    if position_BNP is not None:
        position_BNP = position_BNP.repeat_interleave(count, dim=0)
    answers_BTD = given.decoder(
        cls_B1D, tokens_BLD, visible_BL, blocks_BKT.flatten(0, 1), given.grid, position_BNP, position_BNP
    )
    return blocks_BKT.flatten(1), answers_BTD.unflatten(0, (-1, count)).flatten(1, 2)


def _positions(
    decoder: nn.Module, batch: Batch, view: int, target_view: int, grid: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(decoder, TransformerDecoder) or decoder.position != "relative":
        return None, None
    if isinstance(decoder, SiameseDecoder):
        return None, relative_position(batch, view, target_view, grid, decoder.width)
    own = relative_position(batch, view, view, grid, decoder.width)
    return own, own if target_view == view else relative_position(batch, view, target_view, grid, decoder.width)


class ShownPatches(ImageTarget):
    """A target that compares visible patches of an input with the same patches of the full view, encoded by f_φ."""

    dense: ClassVar[bool] = True
    compares_tokens: ClassVar[bool] = True
    tokens: ClassVar[str] = "shown"
    distribution: Gaussian = Gaussian()
    regularizer: DenseStopGradient = DenseStopGradient()

    def build_head(self, sizes: Sizes) -> nn.Module:
        """Return a module without weights: tokens are compared directly."""
        return nn.Identity()

    @abstractmethod
    def compared(self, tokens_BLD: Tensor) -> Tensor:
        """Return the compared quantity of the patches: fp32 (B, L, …)."""

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        tokens_BND = context.encoded_views[self.encoder_key, self.view][1]
        with torch.no_grad():
            wanted = self.compared(gather_tokens(tokens_BND, encoded.where.visible_BL))
        predicted = self.compared(given.decoder(encoded.tokens_BLD))
        return Loss(self.distribution.maps(predicted, wanted, given.ranks), watched={"z": tokens_BND})

    def _errors(self, parts: Parts) -> Iterator[str]:
        yield from super()._errors(parts)
        if any(view != self.view for _, view in self.predicted_from(parts)):
            yield (
                f"{self.title} compares patches of one view: inputs of view {self.view}, or `pairs: own` where they "
                "have several"
            )


class Anchor(ShownPatches):
    """Feature distillation from a frozen teacher of equal width; each patch is standardized over its channels.

    In continued pretraining, the teacher is the initial backbone. Loss and gradient then start at 0 for an input that
    sees the full view.
    """

    kind: ClassVar[str] = "anchor"
    representation: ClassVar[str] = "patch features"
    encoder: Literal["teacher"] = "teacher"

    def build_head(self, sizes: Sizes) -> nn.Module:
        if sizes.encoded != sizes.decoded:
            raise ConfigError(
                f"target '{self.name}' needs equal widths, but the backbone has {sizes.decoded} channels and teacher "
                f"'{self.teacher}' has {sizes.encoded}",
                where="recipe.targets",
                why="an anchor compares features without a projection",
                fix="use `kind: dense`, which has a projection; `kind: gram`, which compares no channels; or the "
                "teacher `student`",
            )
        return super().build_head(sizes)

    def compared(self, tokens_BLD: Tensor) -> Tensor:
        return standardize_tokens(tokens_BLD)


class Gram(ShownPatches):
    """Gram anchoring: ‖X Xᵀ − Z Zᵀ‖²_F / L² of unit vectors X and Z per patch (Siméoni et al., 2025, DINOv3).

    Features may rotate and change if similarities between patches are preserved. Every image has a separate matrix, and
    negative similarities count, as in DINOv3's training.
    """

    kind: ClassVar[str] = "gram"
    representation: ClassVar[str] = "Gram matrix"
    encoder: Literal["ema", "teacher"]

    @property
    def collapses_alone(self) -> bool:
        return self.encoder == "ema"

    def compared(self, tokens_BLD: Tensor) -> Tensor:
        """Return the cosine of every pair of patches of an image: fp32 (B, L, L)."""
        unit_BLD = unit(tokens_BLD)
        return unit_BLD @ unit_BLD.transpose(1, 2)


def standardize_tokens(tokens_BND: Tensor) -> Tensor:
    """Standardize each token to mean 0 and variance 1 over its channels (LayerNorm without affine), fp32. Of a target,
    this is z̄ of SIM."""
    return F.layer_norm(tokens_BND.float(), (tokens_BND.shape[-1],), eps=1e-5)
