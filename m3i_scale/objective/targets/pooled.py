"""Predict one vector for the whole view: a global feature, or a distribution over prototypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from m3i_scale.objective.decoders import ClassToken, pool
from m3i_scale.objective.distributions.base import Distribution, Loss
from m3i_scale.objective.distributions.boltzmann import Boltzmann
from m3i_scale.objective.distributions.gaussian import Gaussian
from m3i_scale.objective.estimate import gaussian_moments
from m3i_scale.objective.heads import HeadSpec
from m3i_scale.objective.regularizers.memory import Memory
from m3i_scale.objective.regularizers.pooled import PooledRegularizer
from m3i_scale.objective.regularizers.prototypes import PrototypeRegularizer
from m3i_scale.objective.targets.base import Context, Encoded, HeadTarget, TargetModules


class Pooled(HeadTarget):
    """Predicts a global feature."""

    kind: ClassVar[str] = "pooled"
    representation: ClassVar[str] = "global feature"
    distribution: Distribution = Gaussian()
    regularizer: PooledRegularizer

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return −log P̂ of the view's vector, this rank's share."""
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

    def _head_faults(self, head: HeadSpec) -> Iterator[str]:
        yield from super()._head_faults(head)
        wanted = self.regularizer.distribution
        if not isinstance(self.distribution, wanted):
            valid = [name for name, kind in self.kinds_of("distribution").items() if issubclass(kind, wanted)]
            yield (
                f"'{self.regularizer.kind}' does not go with a {self.distribution.kind} distribution; valid: "
                f"{' or '.join(valid)}"
            )
        if self.regularizer.needs_predictor and self.encoder != "teacher" and not head.predictor_depth:
            yield "a stop gradient alone lets a pooled target collapse: give its head a predictor, `predictor_depth: 2`"
        idle = sorted(self.distribution.model_fields_set) if self.regularizer.replaces_likelihood else []
        if idle:
            yield f"`{idle[0]}` has no effect: '{self.regularizer.kind}' takes the place of the likelihood"


class Prototypes(HeadTarget):
    """Predicts a distribution over the prototypes of the head."""

    kind: ClassVar[str] = "prototypes"
    representation: ClassVar[str] = "global feature"
    encoder: Literal["momentum"] = "momentum"
    distribution: Boltzmann = Boltzmann()
    regularizer: PrototypeRegularizer

    def build_memory(self, spec: HeadSpec) -> Memory:
        """Return what the head remembers of earlier batches."""
        return self.regularizer.memory(spec.width, spec.prototypes)

    @property
    def averages_prototypes(self) -> bool:
        """Return whether z_y is compared with the averaged copy of its head's prototypes."""
        return self.regularizer.averages_prototypes

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return −log P̂ of the view's distribution over prototypes, this rank's share."""
        prediction_BE = given.head(encoded.pooled(given.decoder), predict=True)
        target_BE = pooled_target(self, given, context)
        logits_BK = given.head.prototypes(prediction_BE) / self.distribution.temperature
        with torch.no_grad():
            head = given.momentum.heads[self.head] if self.averages_prototypes else given.head
            target_BK = head.prototypes(target_BE)
        return self.regularizer.loss(self.distribution, logits_BK, target_BK, given.memory, given.ranks)

    def _head_faults(self, head: HeadSpec) -> Iterator[str]:
        if not head.prototypes:
            yield f"a distribution over prototypes needs `prototypes` in head '{self.head}', e.g. 4096"
        if head.prototypes == 1:
            yield "`prototypes: 1`: all samples would have it"
        fault = self.regularizer.fault(self.distribution)
        if fault:
            yield fault


def pooled_target(target: HeadTarget, given: TargetModules, context: Context) -> Tensor:
    """Return z_y (B, E), with gradient only where the regulariser lets the target learn."""
    if target.encoder == "online":
        shown = context.whole[target.view].tapped(given.squared_norms)
        z_BE: Tensor = given.head(shown.pooled(given.decoder), predict=False)
        return z_BE if target.regularizer.trains_target else z_BE.detach()
    cls_B1D, tokens_BND = context.encoded_views[target.encoder, target.view]
    if target.encoder == "teacher":
        return cls_B1D[:, 0] if isinstance(given.decoder, ClassToken) else tokens_BND.mean(dim=1)
    with torch.no_grad():
        pooled_BD = pool(given.momentum.pools[target.decoder], cls_B1D, tokens_BND)
        averaged_BE: Tensor = given.momentum.heads[target.head](pooled_BD, predict=False)
    return averaged_BE
