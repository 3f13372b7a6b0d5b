"""Collapse prevention for prototype assignments: centering, Sinkhorn, or the entropy of the mean prediction."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config.sections import MAX_LAYERS, Kind
from m3i_scale.objective.distributions import Assigned, Boltzmann, Loss
from m3i_scale.objective.ranks import Ranks, mean_row
from m3i_scale.objective.regularizers import Center, Memory, Regularizer
from m3i_scale.objective.schedule import Positive, Scheduled, always_below, number, values_of

_LEAST_TEMPERATURE = 0.025
"""exp(−2 / 0.025) is a normal number of fp32."""
BelowOne = Annotated[float, Field(gt=0, lt=1)]


class PrototypeRegularizer(Regularizer):
    """Collapse prevention for distributions over the prototypes of a head.

    Rows are images or masked patches. `share_N` is the weight of every row in the loss: 0 for patches that are not
    masked; None means equal weights.
    """

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    encoders: ClassVar[tuple[str, ...]] = ("ema",)
    averages_prototypes: ClassVar[bool] = False
    """Whether targets are compared with the EMA copy of the prototypes instead of the trained ones."""

    def memory(self, width: int, prototypes: int) -> Memory:
        """Return the head's memory of earlier batches."""
        return Memory(width)

    def error(self, p: Boltzmann) -> str | None:
        """Return why the target would collapse with this distribution, or None."""
        return None

    @abstractmethod
    def assign(self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None) -> Tensor:
        """Return the target's distributions over prototypes, fp32 (N, K). Called once per target.

        Args:
            target_NK: cosines of the target, without gradient.
            memory: result of `memory`, shared by all targets of the head.
            share_N: weight of every row.
        """

    def remembered(self, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None) -> Tensor | None:
        """Return the values for `Memory.update` after the batch."""
        return None

    def loss(self, p: Boltzmann, logits_NK: Tensor, target: Assigned, ranks: Ranks) -> Loss:
        """Return the cross-entropy −Σ_k p_k log p̂_k with the target's distribution, plus the regularization. The
        temperature of `p` is already applied to `logits_NK`."""
        value, nats = p.over_prototypes(logits_NK, target)
        return Loss(value, nats, watched={"assignment": target.probabilities_NK})


class Sharpened(PrototypeRegularizer):
    """Base class for targets sharper than the prediction, with EMA prototypes. Subclasses balance the prototypes."""

    averages_prototypes: ClassVar[bool] = True
    target_temperature: Scheduled[Positive] = 0.04
    """Temperature of the target's distribution: a number, or a schedule."""

    def error(self, p: Boltzmann) -> str | None:
        if not always_below(self.target_temperature, p.temperature):
            return "`target_temperature` must be below `temperature`: a target that is not sharper becomes uniform"
        return None


class Centering(Sharpened):
    """Centering and sharpening of the target (DINO)."""

    kind: ClassVar[str] = "centering"
    memory_fields: ClassVar[tuple[str, ...]] = ("momentum",)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay m of the center's moving average over batches."""

    def memory(self, width: int, prototypes: int) -> Memory:
        return Center(width, prototypes, self.momentum)

    def assign(self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None) -> Tensor:
        """Return softmax((cosines − c) / τ')."""
        return ((target_NK.float() - memory.center_K) / number(self.target_temperature)).softmax(dim=-1)

    def remembered(self, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None) -> Tensor:
        """Return cosines (1 or N, K); their mean updates the center. If all weights are 0, return the center itself."""
        if share_N is None:
            return target_NK
        mean_K, counted = mean_row(target_NK.float(), share_N, ranks)
        return torch.where(cast(Tensor, counted) > 1e-6, mean_K, memory.center_K)[None]


class Sinkhorn(Sharpened):
    """Balanced assignment of all prototypes to the targets of the global batch (SwAV, DINOv2).

    The targets of one view are one batch, as in SwAV. DINOv2 combines both of its global crops.
    """

    kind: ClassVar[str] = "sinkhorn"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    within_batch: ClassVar[bool] = True
    iterations: int = Field(default=3, ge=1, le=MAX_LAYERS)
    """Number of iterations that normalize prototypes, then targets."""

    def error(self, p: Boltzmann) -> str | None:
        """Return why the target would collapse or exceed the range of fp32, or None."""
        if min(values_of(self.target_temperature)) < _LEAST_TEMPERATURE:
            return (
                f"`target_temperature` of sinkhorn is {_LEAST_TEMPERATURE} or more: below, exp(cosine / "
                "target_temperature) of a target that is near no prototype is 0 in fp32"
            )
        return super().error(p)

    def assign(self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None) -> Tensor:
        """Return exp(cosines / τ'), with prototypes and rows normalized alternately (Sinkhorn-Knopp). Rows with weight
        0 are 0 and do not contribute."""
        # The largest cosine is 1, so exp fits in fp32. Common factors cancel, including the numbers of prototypes and
        # targets, by which the published code divides.
        scaled_NK = ((target_NK.float() - 1) / number(self.target_temperature)).exp()
        if share_N is not None:
            scaled_NK = scaled_NK * (share_N > 0)[:, None]
        return sinkhorn(scaled_NK, self.iterations, ranks)


def sinkhorn(shares_XNK: Tensor, iterations: int, ranks: Ranks) -> Tensor:
    """Normalize columns (over the rows of all ranks) and rows of positive numbers (…, N, K) alternately
    (Sinkhorn-Knopp). Rows sum to 1. Leading dimensions are normalized separately."""
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        shares_XNK = shares_XNK / ranks.sum(shares_XNK.sum(dim=-2, keepdim=True)).clamp(min=tiny)
        shares_XNK = shares_XNK / shares_XNK.sum(dim=-1, keepdim=True).clamp(min=tiny)
    return shares_XNK


class MeanEntropy(PrototypeRegularizer):
    """Entropy maximization of the mean prediction over the global batch (MSN)."""

    kind: ClassVar[str] = "mean_entropy"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    within_batch: ClassVar[bool] = True
    target_temperature: Scheduled[BelowOne] = 0.04
    """T, which sharpens the target's distribution: a number, or a schedule."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the entropy."""

    def assign(self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None) -> Tensor:
        """Return softmax(cosines / τ)^(1/T), normalized."""
        return ((target_NK / number(p.temperature)).float() / number(self.target_temperature)).softmax(dim=-1)

    def loss(self, p: Boltzmann, logits_NK: Tensor, target: Assigned, ranks: Ranks) -> Loss:
        """Return −Σ_k p_k log p̂_k + weight · (log K − H(mean p̂))."""
        loss = super().loss(p, logits_NK, target, ranks)
        mean_K, _ = mean_row(logits_NK.softmax(dim=-1), target.share_N, ranks, ranks.sum_with_gradient)
        negative_entropy = torch.special.xlogy(mean_K, mean_K).sum()  # log K − H is 0 for evenly used prototypes
        loss.value = loss.value + self.weight * (negative_entropy + math.log(len(mean_K)))
        return loss
