"""Centring, Sinkhorn or the entropy of the mean prediction keep distributions over prototypes from collapsing."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.config.limits import MAX_LAYERS
from m3i_scale.objective.distributions.base import Loss
from m3i_scale.objective.distributions.boltzmann import Assigned, Boltzmann
from m3i_scale.objective.ranks import Ranks, mean_row
from m3i_scale.objective.regularizers.base import Regularizer
from m3i_scale.objective.regularizers.memory import Center, Memory
from m3i_scale.objective.schedule import Positive, Scheduled, always_below, number, values_of

_LEAST_TEMPERATURE = 0.025
"""exp(−2 / 0.025) is a normal number of fp32."""
BelowOne = Annotated[float, Field(gt=0, lt=1)]


class PrototypeRegularizer(Regularizer):
    """Regularises targets that are distributions over the prototypes of their head.

    Rows are images, or hidden patches. `share_N` says what every row counts in the loss: nothing, where it stands for a
    patch that is not hidden; None: all count alike.
    """

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

    @abstractmethod
    def assign(
        self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None = None
    ) -> Tensor:
        """Return the target's distributions over prototypes, fp32 (N, K). Called once for a target.

        Args:
            p: its distribution.
            target_NK: cosines of the target, without gradient.
            memory: what `memory` gave, shared by all targets of the head.
            ranks: other ranks.
            share_N: what every row counts.
        """
        raise NotImplementedError

    def remembered(
        self, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None = None
    ) -> Tensor | None:
        """Return what the memory takes over of the targets after the batch."""
        return None

    def loss(self, p: Boltzmann, logits_NK: Tensor, target: Assigned, ranks: Ranks) -> Loss:
        """Return the cross-entropy −Σ_k p_k log p̂_k to the target's distribution, with the regularisation.

        Args:
            p: its temperature has divided `logits_NK`.
            logits_NK: of the prediction.
            target: what `assign` gave.
            ranks: other ranks.
        """
        value, nats = p.over_prototypes(logits_NK, target)
        return Loss(value, nats, watched={"assignment": target.probabilities_NK})


class Sharpened(PrototypeRegularizer):
    """Needs a target that is sharper than its prediction, compared with averaged prototypes; subclasses say how the
    prototypes come to be used evenly."""

    averages_prototypes: ClassVar[bool] = True
    target_temperature: Scheduled[Positive] = 0.04
    """Temperature of the target's distribution: a number, or a schedule."""

    def fault(self, p: Boltzmann) -> str | None:
        """Return why the target would collapse beside that distribution; None where it would not."""
        if not always_below(self.target_temperature, p.temperature):
            return "`target_temperature` must be below `temperature`: a target that is not sharper becomes uniform"
        return None


class Centering(Sharpened):
    """Centres and sharpens the target (DINO)."""

    kind: ClassVar[str] = "centering"
    memory_fields: ClassVar[tuple[str, ...]] = ("momentum",)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """m of the center's moving average over batches."""

    def memory(self, width: int, prototypes: int) -> Memory:
        """Return a `Center`."""
        return Center(width, prototypes, self.momentum)

    def assign(
        self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None = None
    ) -> Tensor:
        """Return softmax((cosines − c) / τ')."""
        return ((target_NK.float() - memory.center_K) / number(self.target_temperature)).softmax(dim=-1)

    def remembered(self, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None = None) -> Tensor:
        """Return cosines (1 or N, K), whose mean moves the center; the center itself where no row counts."""
        if share_N is None:
            return target_NK
        mean_K, counted = mean_row(target_NK.float(), share_N, ranks)
        return torch.where(cast(Tensor, counted) > 1e-6, mean_K, memory.center_K)[None]


class Sinkhorn(Sharpened):
    """Lets all prototypes be assigned alike to the targets of the global batch (SwAV, DINOv2).

    The targets of a view are one batch. DINOv2 takes both of its large views together, SwAV each for itself.
    """

    kind: ClassVar[str] = "sinkhorn"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    within_batch: ClassVar[bool] = True
    iterations: int = Field(default=3, ge=1, le=MAX_LAYERS)
    """How often prototypes, then targets are brought to the same sum."""

    def fault(self, p: Boltzmann) -> str | None:
        """Return why the target would collapse, or lie beyond fp32; None where it would not."""
        if min(values_of(self.target_temperature)) < _LEAST_TEMPERATURE:
            return (
                f"`target_temperature` of sinkhorn is {_LEAST_TEMPERATURE} or more: below, exp(cosine / "
                "target_temperature) of a target that is near no prototype is 0 in fp32"
            )
        return super().fault(p)

    def assign(
        self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None = None
    ) -> Tensor:
        """Return exp(cosines / τ'), scaled in turn so that all prototypes, and so that all rows have one sum (Sinkhorn
        and Knopp). Rows that count nothing get nothing, and give nothing.
        """
        # 1 is the largest cosine: exp stays in fp32. A factor that all have in common cancels, and so do the number of
        # prototypes and that of targets, by which the published code divides.
        scaled_NK = ((target_NK.float() - 1) / number(self.target_temperature)).exp()
        if share_N is not None:
            scaled_NK = scaled_NK * (share_N > 0)[:, None]
        return sinkhorn(scaled_NK, self.iterations, ranks)


def sinkhorn(shares_XNK: Tensor, iterations: int, ranks: Ranks) -> Tensor:
    """Return positive numbers (…, N, K), scaled in turn so that columns, and so that rows have one sum, which is 1 for
    rows (Sinkhorn and Knopp).

    Args:
        shares_XNK: rows are those of this rank; what stands before them is scaled each for itself.
        iterations: how often.
        ranks: other ranks, whose rows count in the columns.
    """
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        shares_XNK = shares_XNK / ranks.sum(shares_XNK.sum(dim=-2, keepdim=True)).clamp(min=tiny)
        shares_XNK = shares_XNK / shares_XNK.sum(dim=-1, keepdim=True).clamp(min=tiny)
    return shares_XNK


class MeanEntropy(PrototypeRegularizer):
    """Raises the entropy of the mean prediction over the global batch (MSN)."""

    kind: ClassVar[str] = "mean_entropy"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    within_batch: ClassVar[bool] = True
    target_temperature: Scheduled[BelowOne] = 0.04
    """T, which sharpens the target's distribution: a number, or a schedule."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the entropy."""

    def assign(
        self, p: Boltzmann, target_NK: Tensor, memory: Memory, ranks: Ranks, share_N: Tensor | None = None
    ) -> Tensor:
        """Return softmax(cosines / τ)^(1/T), normalised."""
        return ((target_NK / number(p.temperature)).float() / number(self.target_temperature)).softmax(dim=-1)

    def loss(self, p: Boltzmann, logits_NK: Tensor, target: Assigned, ranks: Ranks) -> Loss:
        """Return −Σ_k p_k log p̂_k + weight · (log K − H(mean p̂))."""
        loss = super().loss(p, logits_NK, target, ranks)
        mean_K, _ = mean_row(logits_NK.softmax(dim=-1), target.share_N, ranks, ranks.sum_with_gradient)
        negative_entropy = torch.special.xlogy(mean_K, mean_K).sum()  # log K − H is 0 where all are used alike
        loss.value = loss.value + self.weight * (negative_entropy + math.log(len(mean_K)))
        return loss
