"""Keep the patches of an input near what another encoder makes of them: their features, or how alike they are.

Neither has a decoder or a head of its own: what is compared is what leaves the two encoders, patch by patch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.errors import ConfigError
from m3i_scale.objective.decoders import PointwiseSpec
from m3i_scale.objective.distributions.base import Loss, unit
from m3i_scale.objective.distributions.gaussian import Gaussian
from m3i_scale.objective.regularizers.dense import DenseStopGradient
from m3i_scale.objective.targets.base import Context, Encoded, ImageTarget, Parts, Sizes, TargetModules


class ShownPatches(ImageTarget):
    """Compares the patches that an input shows with the same patches of the whole view, as f_φ encodes it."""

    dense: ClassVar[bool] = True
    tokens: ClassVar[str] = "shown"
    distribution: Gaussian = Gaussian()
    regularizer: DenseStopGradient = DenseStopGradient()

    def build_head(self, sizes: Sizes) -> nn.Module:
        """Return a module without weights: tokens are compared as they are."""
        return nn.Identity()

    @abstractmethod
    def compared(self, tokens_BLD: Tensor) -> Tensor:
        """Return what is compared of the patches: fp32 (B, L, …)."""
        raise NotImplementedError

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return −log P̂ of what the input's own patches have, this rank's share."""
        tokens_BND = context.encoded_views[self.encoder_key, self.view][1]
        with torch.no_grad():
            wanted = self.compared(gather_tokens(tokens_BND, encoded.where.visible_BL))
        predicted = self.compared(given.decoder(encoded.tokens_BLD))
        return Loss(self.distribution.maps(predicted, wanted, given.ranks), watched={"z": tokens_BND})

    def _faults(self, parts: Parts) -> Iterator[str]:
        yield from super()._faults(parts)
        decoder = parts.decoders[self.decoder]
        if not isinstance(decoder, PointwiseSpec):
            yield f"{self.title} compares backbone tokens: the decoder must be pointwise, not {decoder.kind}"
        if any(view != self.view for _, view in self.predicted_from(parts)):
            yield (
                f"{self.title} compares patches of one view: inputs of view {self.view}, or `pairs: own` where they "
                "have several"
            )


class Anchor(ShownPatches):
    """Keeps the feature of every patch, standardised over its channels, near that of a frozen teacher of equal width.

    The teacher is the backbone as it was at the start, where training goes on from published weights: value and
    gradient are 0 then for an input that shows the whole view.
    """

    kind: ClassVar[str] = "anchor"
    representation: ClassVar[str] = "dense feature"
    encoder: Literal["teacher"] = "teacher"

    def build_head(self, sizes: Sizes) -> nn.Module:
        """Return a module without weights."""
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
        """Return each token at mean 0 and variance 1 over its channels: fp32 (B, L, D)."""
        return F.layer_norm(tokens_BLD.float(), (tokens_BLD.shape[-1],), eps=1e-5)


class Gram(ShownPatches):
    """Keeps the similarities between the patches of an image where another encoder has them: ‖X Xᵀ − Z Zᵀ‖²_F / L² of
    unit vectors X and Z by patch (Gram anchoring; Siméoni et al., 2025, DINOv3).

    Features may turn and change as long as patches stay as alike as they were. Every image has its own matrix, and
    negative similarities count, as in DINOv3's training.
    """

    kind: ClassVar[str] = "gram"
    representation: ClassVar[str] = "Gram matrix"
    encoder: Literal["momentum", "teacher"]

    @property
    def collapses_alone(self) -> bool:
        """Return whether it is all the same to the loss where all patches become alike, in both encoders."""
        return self.encoder == "momentum"

    def compared(self, tokens_BLD: Tensor) -> Tensor:
        """Return the cosine of every pair of patches of an image: fp32 (B, L, L)."""
        unit_BLD = unit(tokens_BLD)
        return unit_BLD @ unit_BLD.transpose(1, 2)
