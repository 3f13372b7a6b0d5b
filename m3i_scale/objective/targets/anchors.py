"""Distill features of another encoder patch by patch, without a trained decoder or head: the features themselves, or
their similarities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.errors import ConfigError
from m3i_scale.objective.distributions import Gaussian, Loss, unit
from m3i_scale.objective.regularizers.dense import DenseStopGradient
from m3i_scale.objective.targets.base import Context, Encoded, ImageTarget, Parts, Sizes, TargetModules
from m3i_scale.objective.targets.dense import standardize_tokens


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
        """Return this rank's share of −log P̂ of the input's visible patches."""
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
    representation: ClassVar[str] = "dense feature"
    encoder: Literal["teacher"] = "teacher"

    def build_head(self, sizes: Sizes) -> nn.Module:
        if sizes.encoded != sizes.decoded:
            raise ConfigError(
                f"target '{self.name}' compares {sizes.decoded} channels of the backbone with {sizes.encoded} of "
                f"teacher '{self.teacher}'",
                where="recipe.targets",
                why="no layer stands between the features of an anchor",
                fix="`kind: dense`, which has one; `kind: gram`, which compares no channels; or the teacher `student`",
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
