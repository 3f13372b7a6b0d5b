"""Estimate how many nats of a Gaussian target the prediction holds. Boltzmann groups bound theirs by their loss."""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_scale.objective.ranks import Ranks

_ROWS_PER_COMPONENT = 20
"""An eigenvalue of a sample covariance is near the true one when there are many rows a component."""


@torch.no_grad()
def gaussian_information(prediction_ND: Tensor, target_ND: Tensor, ranks: Ranks, limit: int = 4096) -> Tensor | None:
    """Return Σ_i ½ ln(λ_i / e_i) over the leading principal components i of the target, in nats per row.

    λ_i is the target's variance along component i, e_i the mean squared error of the prediction along it. For a
    Gaussian target this is a lower bound on the information: components are independent, errors that correlate are
    counted as if they did not, and components that are left out or predicted worse than by their mean count 0. For
    other targets it is an estimate.

    Args:
        prediction_ND: ẑ, one row a token or sample.
        target_ND: z, same shape.
        ranks: whose rows count too.
        limit: at most so many rows are read, over all ranks.

    Returns:
        The same on all ranks. None where there are fewer than 20 rows: too few for one component.
    """
    rows = min(len(target_ND), max(limit // ranks.world_size, 1))
    z_ND, predicted_ND = target_ND.detach().float()[:rows], prediction_ND.detach().float()[:rows]
    count = rows * ranks.world_size
    components = min(z_ND.shape[1], count // _ROWS_PER_COMPONENT)
    if components == 0:
        return None
    centered_ND = z_ND - ranks.sum(z_ND.sum(dim=0)) / count
    covariance_DD = ranks.sum(centered_ND.T @ centered_ND) / (count - 1)
    error_ND = z_ND - predicted_ND
    finite = ranks.sum(error_ND.isfinite().all().float()) == ranks.world_size
    if not bool(covariance_DD.isfinite().all() & finite):
        return z_ND.new_tensor(torch.nan)  # the decomposition would raise
    eigenvalues_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    leading_C, vectors_DC = eigenvalues_D[-components:], vectors_DD[:, -components:]
    error_C = ranks.sum((error_ND @ vectors_DC).square().sum(dim=0)) / count
    floor = leading_C[-1].clamp(min=1e-12) * 1e-6  # LayerNorm leaves a direction without variance
    ratio_C = leading_C.clamp(min=floor) / error_C.clamp(min=floor)
    nats: Tensor = 0.5 * ratio_C.log().clamp(min=0).sum()
    return nats
