"""Image-level (global) features: predicted, or only kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from m3i_scale.config.sections import Kind
from m3i_scale.objective.decoders import ClassToken, pool
from m3i_scale.objective.diagnostics import gaussian_moments
from m3i_scale.objective.distributions import Distribution, Gaussian, Loss
from m3i_scale.objective.heads import HeadSpec
from m3i_scale.objective.regularizers.pooled import KoLeo, PooledRegularizer
from m3i_scale.objective.targets.base import Context, Encoded, HeadTarget, Sizes, Target, TargetModules


class Pooled(HeadTarget):
    """An image-level (global) feature."""

    kind: ClassVar[str] = "pooled"
    is_image_level: ClassVar[bool] = True
    representation: ClassVar[str] = "global feature"
    distribution: Distribution = Gaussian()
    regularizer: PooledRegularizer

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        prediction_BE = given.head(encoded.pooled(given.decoder), predict=True)
        target_BE = pooled_target(self, given, context)
        loss = self.regularizer.loss(self.distribution, prediction_BE, target_BE, given.memory, given.ranks)
        if loss.nats is None and context.measures:
            with torch.no_grad():
                predicted_BE = self.regularizer.compared(prediction_BE, given.ranks)
                z_BE = self.regularizer.compared(target_BE, given.ranks)
            loss.moments = gaussian_moments(predicted_BE, z_BE, given.ranks)
        loss.watched = loss.watched or {"z": target_BE}
        return loss

    def _head_errors(self, head: HeadSpec) -> Iterator[str]:
        yield from super()._head_errors(head)
        wanted = self.regularizer.distribution
        if not isinstance(self.distribution, wanted):
            valid = [name for name, kind in self.kinds_of("distribution").items() if issubclass(kind, wanted)]
            yield (
                f"'{self.regularizer.kind}' does not go with a {self.distribution.kind} distribution; valid: "
                f"{' or '.join(valid)}"
            )
        if self.regularizer.needs_predictor and self.encoder != "teacher" and not head.predictor_depth:
            yield "a stop gradient alone lets a pooled target collapse: give its head a predictor, `predictor_depth: 2`"


def pooled_target(target: HeadTarget, given: TargetModules, context: Context) -> Tensor:
    """Return z_y (B, E), with gradient only if the regularizer trains the target."""
    if target.encoder == "online":
        shown = context.whole[target.view].tapped(given.squared_norms)
        z_BE: Tensor = given.head(shown.pooled(given.decoder), predict=False)
        return z_BE if target.regularizer.trains_target else z_BE.detach()
    cls_B1D, tokens_BND = context.encoded_views[target.encoder_key, target.view]
    if target.encoder == "teacher":
        return cls_B1D[:, 0] if isinstance(given.decoder, ClassToken) else tokens_BND.mean(dim=1)
    with torch.no_grad():
        pooled_BD = pool(given.momentum.pools[target.decoder], cls_B1D, tokens_BND)
        averaged_BE: Tensor = given.momentum.heads[target.head](pooled_BD, predict=False)
    return averaged_BE


class NoDistribution(Kind):
    """Placeholder for targets that predict nothing."""

    kind: ClassVar[str] = "none"
    bounds_information: ClassVar[bool] = False


class Spread(Target):
    """KoLeo loss, the entropy term of equation (2) alone: pushes a decoder's outputs for different images apart, before
    any head.

    DINOv2 combines it with distributions over prototypes, for the class tokens of its global crops.
    """

    kind: ClassVar[str] = "spread"
    is_image_level: ClassVar[bool] = True
    representation: ClassVar[str] = "global feature"
    encoder: Literal["online"] = "online"
    distribution: NoDistribution = NoDistribution()
    regularizer: KoLeo = KoLeo()

    def build_head(self, sizes: Sizes) -> nn.Module:
        """Return a module without weights: the decoder's output is used directly."""
        return nn.Identity()

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of the negative entropy estimate, without its constant and factor."""
        return Loss(self.regularizer.loss(encoded.pooled(given.decoder), given.ranks))
