"""What keeps the target representation from collapsing, where negatives or a fixed target do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.ranks import Ranks


def standardize_target(tokens_BND: Tensor) -> Tensor:
    """z̄: LayerNorm without affine over the channels, fp32, no gradient (SIM)."""
    return F.layer_norm(tokens_BND.detach().float(), (tokens_BND.shape[-1],), eps=1e-5)


def target_correlation(targets_BND: Tensor, ranks: Ranks) -> Tensor:
    """C = (1/N) Σ z̄ z̄ᵀ over the tokens of all ranks: (D, D), no gradient."""
    with torch.no_grad():
        flat_ND = targets_BND.flatten(0, 1).float()
        return ranks.sum(flat_ND.T @ flat_ND) / (len(flat_ND) * ranks.world_size)


def dense_unigrad(prediction_BND: Tensor, correlation_DD: Tensor, strength: float) -> Tensor:
    """λ (1/N) Σ ẑᵀ C ẑ / D, the dense negative of UniGrad as SIM uses it.

    Computed as ((Ẑ C) ⊙ Ẑ): O(N·D²), without the N × N matrix whose diagonal it is.
    """
    flat_ND = prediction_BND.flatten(0, 1).float()
    quadratic_N = ((flat_ND @ correlation_DD) * flat_ND).sum(dim=-1)
    return strength * quadratic_N.mean() / flat_ND.shape[1]
