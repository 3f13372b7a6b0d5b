"""Loss weighting with w_k of equation (6): fixed, uncertainty weighting, or gradient norm balancing."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.config.sections import Kind
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.schedule import value_at
from m3i_scale.objective.state import Fp32State


class GroupWeights(Fp32State):
    """Fixed loss weights w_k of the recipe: numbers or schedules (`schedule.Scheduled`). Subclasses adapt them."""

    needs_gradients = False
    given_K: Tensor

    def __init__(self, weights: list[float | list[tuple[float, float]]]) -> None:
        super().__init__()
        self.schedules = {group: weight for group, weight in enumerate(weights) if isinstance(weight, list)}
        self.register_constant("given_K", [value_at(weight, 0.0) for weight in weights])

    def set_progress(self, progress: float) -> None:
        """Update scheduled weights for the given fraction of the training."""
        if not self.schedules:
            return
        given_K = self.given_K.clone()  # the backward pass of the previous batch may still need the old values
        for group, schedule in self.schedules.items():
            given_K[group].fill_(value_at(schedule, progress))  # an assignment would copy from the CPU
        self.given_K = given_K

    def forward(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the loss terms, and the weight factors (K). `present_K`: bool, whether any sample
        of any rank has the target."""
        return (self.given_K * losses_K).sum(), self.given_K

    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """Record this rank's squared gradient norm of every loss term at the encoder output, after a backward pass.
        Only called if `needs_gradients` is set."""


class LearnedWeights(GroupWeights):
    """Uncertainty weighting with a learned variance per loss term: w_k (L_k / σ_k² + log σ_k).

    For a Gaussian, this is the likelihood with learned variance; for a Boltzmann distribution, σ² is a temperature
    (Kendall, Gal and Cipolla, 2018). σ_k² converges to 2 L_k, and the factor of the loss term to w_k / 2 L_k.
    """

    def __init__(self, weights: list[float | list[tuple[float, float]]]) -> None:
        super().__init__(weights)
        self.log_sigma_K = nn.Parameter(torch.zeros(len(weights)))

    def reset_parameters(self) -> None:
        """Initialize with σ = 1."""
        nn.init.zeros_(self.log_sigma_K)

    def forward(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return total and factors. σ of a term without samples does not change: its loss of 0 is not a likelihood."""
        log_sigma_K = self.log_sigma_K.float()
        terms_K = self.given_K * ((-2 * log_sigma_K).exp() * losses_K + log_sigma_K)
        return terms_K.masked_fill(~present_K, 0.0).sum(), (self.given_K * (-2 * log_sigma_K).exp()).detach()


class GradientNormWeights(GroupWeights):
    """Gradient norm balancing: scales loss terms so that their gradients at the encoder output match the weights.
    Weight 1 corresponds to the geometric mean of the unweighted gradients."""

    needs_gradients = True
    log_norm_K: Tensor
    """Moving average of the log of each term's unweighted gradient norm."""
    seen_K: Tensor
    factors_K: Tensor

    def __init__(self, weights: list[float | list[tuple[float, float]]], momentum: float) -> None:
        super().__init__(weights)
        self.momentum = momentum
        self.register_buffer("log_norm_K", torch.zeros(len(weights)))
        self.register_buffer("seen_K", torch.zeros(len(weights)))
        self.register_buffer("factors_K", self.given_K.clone())

    def forward(self, losses_K: Tensor, present_K: Tensor) -> tuple[Tensor, Tensor]:
        factors_K = self.factors_K.clone()  # `observe` changes the buffer before the backward pass of the next batch
        return (factors_K * losses_K).sum(), factors_K

    @torch.no_grad()
    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """Update the gradient norms and the factors. A term without samples in the batch does not change; if a gradient
        has overflowed in fp16, no term changes. The trainer undoes the update of a skipped step."""
        # A loss term with weight 0 has no gradient and counts as a term without samples.
        norm_K = ranks.sum(squared_norms_K.float()).sqrt() / self.factors_K.clamp(min=torch.finfo(torch.float32).tiny)
        now_K = (norm_K > 0) & norm_K.isfinite().all()
        # A plain mean until the momentum's averaging window is full, since the first gradients are not representative.
        kept_K = (self.seen_K / (self.seen_K + 1)).clamp(max=self.momentum)
        mixed_K = torch.lerp(norm_K.clamp(min=torch.finfo(torch.float32).tiny).log(), self.log_norm_K, kept_K)
        self.log_norm_K.copy_(torch.where(now_K, mixed_K, self.log_norm_K))
        self.seen_K += now_K
        known_K = self.seen_K > 0
        typical = (self.log_norm_K * known_K).sum() / known_K.sum().clamp(min=1)
        wanted_K = self.given_K * (typical - self.log_norm_K).exp()
        self.factors_K.copy_(torch.where(known_K, wanted_K, self.given_K))


class BalanceSpec(Kind):
    """Configuration of loss weighting."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    module: ClassVar[type[GroupWeights]] = GroupWeights
    """Module class, built with the recipe's weights and the fields."""


class FixedSpec(BalanceSpec):
    """Fixed weights: `weight` of every target."""

    kind: ClassVar[str] = "fixed"


class UncertaintyWeightingSpec(BalanceSpec):
    """Uncertainty weighting with a trained σ per loss term: weight × (loss / σ² + log σ)."""

    kind: ClassVar[str] = "learned"
    module: ClassVar[type[GroupWeights]] = LearnedWeights


class GradientNormSpec(BalanceSpec):
    """Gradient norm balancing: gradients at the encoder output are proportional to the weights."""

    kind: ClassVar[str] = "gradient_norm"
    module: ClassVar[type[GroupWeights]] = GradientNormWeights
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the norms over micro-batches; the averaging window is 1 / (1 − momentum)."""
