"""A centred, sharp target, or prototypes used alike, keep distributions over prototypes from collapsing."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.distributions.base import Loss
from m3i_scale.objective.distributions.boltzmann import Boltzmann
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.regularizers.base import Regularizer
from m3i_scale.objective.regularizers.memory import Center, Memory


class PrototypeRegularizer(Regularizer):
    """Regularises targets that are distributions over the prototypes of their head."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    encoders: ClassVar[tuple[str, ...]] = ("momentum",)
    averages_prototypes: ClassVar[bool] = False
    """Whether targets are compared with the averaged copy of the prototypes, not with those that are trained."""

    def memory(self, width: int, prototypes: int) -> Memory:
        """Return what the head remembers of earlier batches."""
        return Memory(width)

    def fault(self, p: Boltzmann) -> str | None:
        """Return why the target would collapse beside that distribution; None where it would not."""
        return None

    def loss(self, p: Boltzmann, logits_BK: Tensor, target_BK: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return the cross-entropy to the target's distribution, with the regularisation.

        Args:
            p: its temperature has divided `logits_BK`.
            logits_BK: of the prediction.
            target_BK: cosines of the target, without gradient.
            memory: what `memory` gave, shared by all targets of the head.
            ranks: other ranks.
        """
        raise NotImplementedError


class Centering(PrototypeRegularizer):
    """Centres and sharpens the target (DINO)."""

    kind: ClassVar[str] = "centering"
    memory_fields: ClassVar[tuple[str, ...]] = ("momentum",)
    averages_prototypes: ClassVar[bool] = True
    target_temperature: float = Field(default=0.04, gt=0)
    """Temperature of the target's distribution."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """m of the center's moving average over batches."""

    def memory(self, width: int, prototypes: int) -> Memory:
        """Return a `Center`."""
        return Center(width, prototypes, self.momentum)

    def fault(self, p: Boltzmann) -> str | None:
        """Return why the target would collapse beside that distribution; None where it would not."""
        if self.target_temperature >= p.temperature:
            return "`target_temperature` must be below `temperature`: a target that is not sharper becomes uniform"
        return None

    def loss(self, p: Boltzmann, logits_BK: Tensor, target_BK: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −Σ_k p_k log p̂_k with p = softmax((cosines − c) / τ')."""
        probabilities_BK = ((target_BK.float() - memory.center_K) / self.target_temperature).softmax(dim=-1)
        value, nats = p.over_prototypes(logits_BK, probabilities_BK, ranks)
        return Loss(value, nats, remember=target_BK, watched={"assignment": probabilities_BK})


class MeanEntropy(PrototypeRegularizer):
    """Raises the entropy of the mean prediction over the global batch (MSN)."""

    kind: ClassVar[str] = "mean_entropy"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    within_batch: ClassVar[bool] = True
    target_temperature: float = Field(default=0.04, gt=0, lt=1)
    """T, which sharpens the target's distribution."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the entropy."""

    def loss(self, p: Boltzmann, logits_BK: Tensor, target_BK: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −Σ_k p_k log p̂_k + weight · (log K − H(mean p̂)) with p = softmax(cosines / τ)^(1/T), normalised."""
        probabilities_BK = ((target_BK / p.temperature).float() / self.target_temperature).softmax(dim=-1)
        value, nats = p.over_prototypes(logits_BK, probabilities_BK, ranks)
        predicted_BK = logits_BK.softmax(dim=-1)
        mean_K = ranks.sum_with_gradient(predicted_BK.sum(dim=0)) / (len(predicted_BK) * ranks.world_size)
        negative_entropy = torch.special.xlogy(mean_K, mean_K).sum()  # log K − H is 0 where all are used alike
        value = value + self.weight * (negative_entropy + math.log(len(mean_K)))
        return Loss(value, nats, watched={"assignment": probabilities_BK})
