"""Weigh the groups by w_k of equation (6): fixed, learned, or following the gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.schedule import value_at
from m3i_scale.objective.state import Fp32State


class GroupWeights(Fp32State):
    """Holds w_k as the recipe says; subclasses change them.

    Args:
        weights: numbers, or schedules: see `schedule.Scheduled`.
    """

    needs_gradients = False
    given_K: Tensor

    def __init__(self, weights: list[float | list[tuple[float, float]]]) -> None:
        super().__init__()
        self.schedules = {group: weight for group, weight in enumerate(weights) if isinstance(weight, list)}
        self.register_constant("given_K", [value_at(weight, 0.0) for weight in weights])

    def set_progress(self, progress: float) -> None:
        """Give the weights that are schedules the values of when a share of the training is over."""
        if not self.schedules:
            return
        given_K = self.given_K.clone()  # the backward pass of the batch before may still need the old values
        for group, schedule in self.schedules.items():
            given_K[group].fill_(value_at(schedule, progress))  # an assignment would copy it from the host
        self.given_K = given_K

    def forward(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total of the groups' losses, and the factors they got (K).

        Args:
            losses_K: loss of every group.
            present_K: bool, whether any sample of any rank has the target.
        """
        return (self.given_K * losses_K).sum(), self.given_K

    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """Take in the squared gradient norm of every group at the encoder output, on this rank, after a backward pass
        (only where `needs_gradients`).
        """


class LearnedWeights(GroupWeights):
    """Treats every group as a distribution whose own variance is learnt: w_k (L_k / σ_k² + log σ_k).

    For a Gaussian that is its likelihood with the variance it has; for a Boltzmann distribution, σ² is a temperature
    (Kendall, Gal and Cipolla, 2018). σ_k² settles at 2 L_k, and the factor of the group at w_k / 2 L_k.
    """

    def __init__(self, weights: list[float | list[tuple[float, float]]]) -> None:
        super().__init__(weights)
        self.log_sigma_K = nn.Parameter(torch.zeros(len(weights)))

    def reset_parameters(self) -> None:
        """Start with σ = 1."""
        nn.init.zeros_(self.log_sigma_K)

    def forward(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `GroupWeights` returns. σ of a group without samples stays: its loss of 0 is no likelihood."""
        log_sigma_K = self.log_sigma_K.float()
        terms_K = self.given_K * ((-2 * log_sigma_K).exp() * losses_K + log_sigma_K)
        return terms_K.masked_fill(~present_K, 0.0).sum(), (self.given_K * (-2 * log_sigma_K).exp()).detach()


class GradientNormWeights(GroupWeights):
    """Keeps factors under which the groups' gradients at the encoder output have the lengths that the weights ask for.

    Weight 1 stands for the geometric mean of the plain gradients.
    """

    needs_gradients = True
    log_norm_K: Tensor
    """Moving average of the logarithm of each group's plain (unweighted) gradient norm."""
    seen_K: Tensor
    """How often each group was seen."""
    factors_K: Tensor

    def __init__(self, weights: list[float | list[tuple[float, float]]], momentum: float) -> None:
        super().__init__(weights)
        self.momentum = momentum
        self.register_buffer("log_norm_K", torch.zeros(len(weights)))
        self.register_buffer("seen_K", torch.zeros(len(weights)))
        self.register_buffer("factors_K", self.given_K.clone())

    def forward(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return total and factors as `GroupWeights` does."""
        factors_K = self.factors_K.clone()  # `observe` changes the buffer before the backward pass of the next batch
        return (factors_K * losses_K).sum(), factors_K

    @torch.no_grad()
    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """Update the gradient lengths, and the factors with them. A group without samples in the batch, and so
        without a gradient, keeps what it had; so do all when a gradient has overflowed in fp16. The trainer undoes
        the others of a step that is skipped.
        """
        # A group whose weight is 0 has no gradient: it counts as one without samples.
        norm_K = ranks.sum(squared_norms_K.float()).sqrt() / self.factors_K.clamp(min=torch.finfo(torch.float32).tiny)
        now_K = (norm_K > 0) & norm_K.isfinite().all()
        # A plain mean until there are as many values as the momentum averages over: first gradients say little.
        kept_K = (self.seen_K / (self.seen_K + 1)).clamp(max=self.momentum)
        mixed_K = torch.lerp(norm_K.clamp(min=torch.finfo(torch.float32).tiny).log(), self.log_norm_K, kept_K)
        self.log_norm_K.copy_(torch.where(now_K, mixed_K, self.log_norm_K))
        self.seen_K += now_K
        known_K = self.seen_K > 0
        typical = (self.log_norm_K * known_K).sum() / known_K.sum().clamp(min=1)
        wanted_K = self.given_K * (typical - self.log_norm_K).exp()
        self.factors_K.copy_(torch.where(known_K, wanted_K, self.given_K))


class BalanceSpec(Kind):
    """Says how the weights of the groups come about."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    module: ClassVar[type[GroupWeights]] = GroupWeights
    """Is built with the weights that the recipe gives, and the fields."""


class FixedSpec(BalanceSpec):
    """Takes `weight` of every target as it stands."""

    kind: ClassVar[str] = "fixed"


class UncertaintyWeightingSpec(BalanceSpec):
    """Gives every group a σ of its own, which is trained: weight × (loss / σ² + log σ)."""

    kind: ClassVar[str] = "learned"
    module: ClassVar[type[GroupWeights]] = LearnedWeights


class GradientNormSpec(BalanceSpec):
    """Scales the groups so that their gradients at the encoder output stand to each other as the weights do."""

    kind: ClassVar[str] = "gradient_norm"
    module: ClassVar[type[GroupWeights]] = GradientNormWeights
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the measured norms over micro-batches: they are averaged over the last 1 / (1 − momentum)."""
