"""One vector for the whole view: a global feature, or a distribution over prototypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from m3i_scale.objective.decoders import ClassToken, pool
from m3i_scale.objective.distributions.base import Distribution, Loss
from m3i_scale.objective.distributions.boltzmann import Boltzmann
from m3i_scale.objective.distributions.gaussian import Gaussian
from m3i_scale.objective.heads import HeadSpec
from m3i_scale.objective.regularizers.memory import Memory
from m3i_scale.objective.regularizers.pooled import PooledRegularizer
from m3i_scale.objective.regularizers.prototypes import PrototypeRegularizer
from m3i_scale.objective.targets.base import Context, Encoded, Given, HeadTarget, need


class Pooled(HeadTarget):
    """A global feature."""

    kind: ClassVar[str] = "pooled"
    representation: ClassVar[str] = "global feature"
    a_target: ClassVar[str] = "a pooled image target"
    distribution: Distribution = Gaussian()
    regularizer: PooledRegularizer

    def loss(self, given: Given, context: Context, encoded: Encoded) -> Loss:
        """See `Target`."""
        pooled_BD = pool(given.decoder, encoded.cls_B1D, encoded.tokens_BLD)
        prediction_BE = given.head(pooled_BD, predict=True)
        target_BE = pooled_target(self, given, context)
        memory = need(given.memory, "the head's memory")
        loss = self.regularizer.loss(self.distribution, prediction_BE, target_BE, memory, given.ranks)
        if loss.nats is None and given.measures:
            with torch.no_grad():
                sides = [self.regularizer.compared(side_BE, given.ranks) for side_BE in (prediction_BE, target_BE)]
            loss.nats = given.information(*sides)
        self._note(loss, context, target_BE)
        return loss

    def described(self) -> dict[str, Any]:
        """See `Target`."""
        return super().described() | {"tokens": "pooled"}

    def _head_faults(self, head: HeadSpec) -> Iterator[str]:
        yield from super()._head_faults(head)
        if self.regularizer.needs_predictor and self.encoder != "teacher" and not head.predictor_depth:
            yield "a stop gradient alone lets a pooled target collapse: give its head a predictor, `predictor_depth: 2`"
        idle = sorted(self.distribution.model_fields_set) if self.regularizer.replaces_likelihood else []
        if idle:
            yield f"`{idle[0]}` has no effect: '{self.regularizer.kind}' takes the place of the likelihood"


class Prototypes(HeadTarget):
    """A distribution over the prototypes of the head."""

    kind: ClassVar[str] = "prototypes"
    representation: ClassVar[str] = "global feature"
    a_target: ClassVar[str] = "a target over prototypes"
    encoder: Literal["momentum"] = "momentum"
    distribution: Boltzmann = Boltzmann()
    regularizer: PrototypeRegularizer

    def build_memory(self, spec: HeadSpec) -> Memory:
        """See `HeadTarget`."""
        return self.regularizer.memory(spec.width, spec.prototypes)

    @property
    def averages_prototypes(self) -> bool:
        """See `HeadTarget`."""
        return self.regularizer.averages_prototypes

    @property
    def may_copy(self) -> bool:
        """Return False for a target that its own center moves away from its prediction."""
        return not self.regularizer.averages_prototypes

    def loss(self, given: Given, context: Context, encoded: Encoded) -> Loss:
        """See `Target`."""
        pooled_BD = pool(given.decoder, encoded.cls_B1D, encoded.tokens_BLD)
        prediction_BE = given.head(pooled_BD, predict=True)
        target_BE = pooled_target(self, given, context)
        logits_BK = given.head.cosines(prediction_BE) / self.distribution.temperature
        averaged = self.regularizer.averages_prototypes
        with torch.no_grad():
            head = need(given.averaged_head, "the averaged head") if averaged else given.head
            target_BK = head.cosines(target_BE)
        memory = need(given.memory, "the head's memory")
        loss = self.regularizer.loss(self.distribution, logits_BK, target_BK, memory, given.ranks)
        self._note(loss, context)
        return loss

    def described(self) -> dict[str, Any]:
        """See `Target`."""
        return super().described() | {"tokens": "pooled"}

    def _head_faults(self, head: HeadSpec) -> Iterator[str]:
        if not head.prototypes:
            yield f"a distribution over prototypes needs `prototypes` in head '{self.head}', e.g. 4096"
        if head.prototypes == 1:
            yield "`prototypes: 1`: all samples would have it"
        fault = self.regularizer.fault(self.distribution)
        if fault:
            yield fault


def pooled_target(target: HeadTarget, given: Given, context: Context) -> Tensor:
    """Return z_y (B, E), with gradient only where the regulariser lets the target learn."""
    if given.shown is not None:
        shown = given.shown()
        pooled_BD = pool(given.decoder, shown.cls_B1D, shown.tokens_BLD)
        z_BE: Tensor = given.head(pooled_BD, predict=False)
        return z_BE if target.regularizer.trains_target else z_BE.detach()
    cls_B1D, tokens_BND = context.encoded_views[target.encoder, target.view]
    if target.encoder == "teacher":
        return cls_B1D[:, 0] if isinstance(given.decoder, ClassToken) else tokens_BND.mean(dim=1)
    with torch.no_grad():
        pooled_BD = pool(need(given.averaged_pool, "the averaged pool"), cls_B1D, tokens_BND)
        averaged_BE: Tensor = need(given.averaged_head, "the averaged head")(pooled_BD, predict=False)
    return averaged_BE
