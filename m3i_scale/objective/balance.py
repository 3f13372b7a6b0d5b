"""w_k of equation (6): fixed, learned, or following the gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_scale.objective.heads import Fp32State
from m3i_scale.objective.ranks import Ranks


class FixedWeights(nn.Module):
    """w_k as the recipe says."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.given = weights

    def forward(self, losses_K: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the groups → total, and the factors they got (K)."""
        factors_K = torch.tensor(self.given, device=losses_K.device)
        return (factors_K * losses_K).sum(), factors_K

    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """Told after every backward pass: squared gradient norm of every group at the encoder output, on this rank."""


class LearnedWeights(nn.Module):
    """Every group is a distribution whose own variance is learnt: w_k L_k / σ_k² + log σ_k.

    For a Gaussian that is its likelihood with the variance it has; for a Boltzmann distribution, σ² is a temperature
    (Kendall, Gal and Cipolla, 2018).
    """

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.given = weights
        self.log_sigma_K = nn.Parameter(torch.zeros(len(weights)))

    def reset_parameters(self) -> None:
        """σ = 1."""
        nn.init.zeros_(self.log_sigma_K)

    def forward(self, losses_K: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the groups → total, and the factors they got (K)."""
        log_sigma_K = self.log_sigma_K.float()
        factors_K = torch.tensor(self.given, device=losses_K.device) * (-2 * log_sigma_K).exp()
        return (factors_K * losses_K + log_sigma_K).sum(), factors_K.detach()

    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """See `FixedWeights`."""


class GradientNormWeights(Fp32State):
    """Factors under which the groups' gradients at the encoder output have the lengths that the weights ask for."""

    share_K: Tensor
    """Moving average of each group's share of the plain (unweighted) gradient; 0 before the group was seen."""
    seen_K: Tensor
    """How often each group was seen."""
    factors_K: Tensor

    def __init__(self, weights: list[float], momentum: float) -> None:
        super().__init__()
        self.given, self.momentum = weights, momentum
        self.register_buffer("share_K", torch.zeros(len(weights)))
        self.register_buffer("seen_K", torch.zeros(len(weights)))
        self.register_buffer("factors_K", torch.tensor(weights, dtype=torch.float32))

    def forward(self, losses_K: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the groups → total, and the factors they got (K)."""
        factors_K = self.factors_K.clone()  # `observe` changes the buffer before the backward pass of the next batch
        return (factors_K * losses_K).sum(), factors_K

    @torch.no_grad()
    def observe(self, squared_norms_K: Tensor, ranks: Ranks) -> None:
        """See `FixedWeights`. A group without samples in the batch, and so without a gradient, keeps what it had."""
        plain_K = ranks.sum(squared_norms_K.float()).sqrt() / self.factors_K
        if not bool(plain_K.isfinite().all()):
            return  # an overflowing fp16 step; the optimizer skips it too
        share_K = plain_K / plain_K.sum().clamp(min=1e-30)
        now_K = share_K > 0
        # A plain mean until there are as many values as the momentum averages over: first gradients say little.
        kept_K = (self.seen_K / (self.seen_K + 1)).clamp(max=self.momentum)
        self.share_K.copy_(torch.where(now_K, torch.lerp(share_K, self.share_K, kept_K), self.share_K))
        self.seen_K += now_K
        known_K = self.share_K > 0
        if not bool(known_K.any()):
            return
        # The mean of the known shares is the length that weight 1 stands for, so the total stays where it was.
        typical = self.share_K[known_K].log().mean().exp()
        given_K = torch.tensor(self.given, device=self.share_K.device)
        self.factors_K.copy_(torch.where(known_K, given_K * typical / self.share_K.clamp(min=1e-6), given_K))


Weights = FixedWeights | LearnedWeights | GradientNormWeights
