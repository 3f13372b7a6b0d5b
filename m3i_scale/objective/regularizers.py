"""What keeps the target representation from collapsing, where negatives or a fixed target do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.heads import standardize
from m3i_scale.objective.ranks import Ranks, global_mean


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


def pooled_unigrad(unit_BE: Tensor, correlation_EE: Tensor, strength: float, ranks: Ranks) -> Tensor:
    """λ ẑᵀ F ẑ, mean over samples: its gradient beside that of ‖z − ẑ‖² is the −u₂ + λ F u₁ of UniGrad, twice.

    Args:
        unit_BE: predictions on the unit sphere.
        correlation_EE: F, the moving average of z zᵀ.
        strength: λ.
        ranks: for the mean over all samples.
    """
    quadratic_B = ((unit_BE @ correlation_EE) * unit_BE).sum(dim=-1)
    return strength * global_mean(quadratic_B, torch.ones_like(quadratic_B), ranks)


def cross_correlation(prediction_BE: Tensor, target_BE: Tensor, offdiagonal_weight: float, ranks: Ranks) -> Tensor:
    """Σ (1 − c_dd)² + λ Σ_{d≠e} c_de² of the cross-correlation over the global batch (Barlow Twins, algorithm 1)."""
    one_BE, other_BE = standardize(prediction_BE.float(), ranks), standardize(target_BE.float(), ranks)
    count = len(one_BE) * ranks.world_size
    diagonal_E, squares = _product(one_BE, other_BE, count, ranks)
    off = squares - diagonal_E.square().sum()
    return (1 - diagonal_E).square().sum() + offdiagonal_weight * off


def _product(one_BE: Tensor, other_BE: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Of C = (1/n) Σ_b one_b other_bᵀ over all ranks: its diagonal (E), and the sum of all its squares.

    Channels often outnumber samples (8,192 to some hundred). Then C, which is E × E, is never made: ‖AᵀB‖² is
    ⟨AAᵀ, BBᵀ⟩, two matrices of samples × samples, of which every rank makes the rows of its own samples.
    """
    if 2 * len(one_BE) * ranks.world_size >= one_BE.shape[1]:
        product_EE = ranks.sum_with_gradient(one_BE.T @ other_BE) / count
        return product_EE.diagonal(), product_EE.square().sum()
    diagonal_E = ranks.sum_with_gradient((one_BE * other_BE).sum(dim=0)) / count
    one_GE = ranks.gather(one_BE)
    other_GE = one_GE if other_BE is one_BE else ranks.gather(other_BE)
    one_BG = one_BE @ one_GE.T
    other_BG = one_BG if other_BE is one_BE else other_BE @ other_GE.T
    return diagonal_E, ranks.sum_with_gradient((one_BG * other_BG).sum()) / count**2


def variance_covariance(z_BE: Tensor, variance_weight: float, covariance_weight: float, ranks: Ranks) -> Tensor:
    """Hinge on the standard deviation of every channel, and squared covariances, over the global batch (VICReg).

    μ/2 · mean_d max(0, 1 − √(var_d + 1e-4)) + ν/D · Σ_{d≠e} cov_de², which VICReg takes of either side.
    """
    z_BE = z_BE.float()
    count = len(z_BE) * ranks.world_size
    centered_BE = z_BE - ranks.sum_with_gradient(z_BE.sum(dim=0)) / count
    variance_E, squares = _product(centered_BE, centered_BE, max(count - 1, 1), ranks)
    hinge = F.relu(1 - (variance_E + 1e-4).sqrt()).mean()
    off = (squares - variance_E.square().sum()) / z_BE.shape[1]
    return variance_weight / 2 * hinge + covariance_weight * off


def mean_entropy(probabilities_BK: Tensor, ranks: Ranks) -> Tensor:
    """log K − H(mean prediction over the global batch): 0 when all prototypes are used alike (MSN)."""
    count = len(probabilities_BK) * ranks.world_size
    mean_K = ranks.sum_with_gradient(probabilities_BK.sum(dim=0)) / count
    negative_entropy: Tensor = torch.special.xlogy(mean_K, mean_K).sum()
    return negative_entropy + math.log(len(mean_K))


def centered_probabilities(logits_BK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """softmax((logits − c) / τ) of a target, no gradient (DINO)."""
    return ((logits_BK.detach().float() - center_K) / temperature).softmax(dim=-1)


def sharpened_probabilities(logits_BK: Tensor, temperature: float) -> Tensor:
    """softmax(logits)^(1/T), normalised, no gradient (MSN)."""
    return (logits_BK.detach().float() / temperature).softmax(dim=-1)
