"""How many nats of a Gaussian target the prediction holds. Boltzmann groups bound theirs by their loss."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_PER_COMPONENT = 20
"""An eigenvalue of a sample covariance is near the true one when there are many rows a component."""


@torch.no_grad()
def gaussian_information(prediction_ND: Tensor, target_ND: Tensor, limit: int = 4096) -> Tensor | None:
    """Σ_i ½ ln(λ_i / e_i) over the leading principal components i of the target, in nats per row.

    λ_i is the target's variance along component i, e_i the mean squared error of the prediction along it. For a
    Gaussian target this is a lower bound on the information: components are independent, errors that correlate are
    counted as if they did not, and components that are left out or predicted worse than by their mean count 0. For
    other targets it is an estimate.

    Args:
        prediction_ND: ẑ, one row a token or sample.
        target_ND: z, same shape.
        limit: at most so many rows are read.

    Returns:
        None where there are fewer than 20 rows: too few for one component.
    """
    z_ND, predicted_ND = target_ND.detach().float()[:limit], prediction_ND.detach().float()[:limit]
    components = min(z_ND.shape[1], len(z_ND) // _ROWS_PER_COMPONENT)
    if components == 0:
        return None
    centered_ND = z_ND - z_ND.mean(dim=0)
    covariance_DD = centered_ND.T @ centered_ND / max(len(z_ND) - 1, 1)
    error_ND = z_ND - predicted_ND
    if not bool(covariance_DD.isfinite().all() & error_ND.isfinite().all()):
        return z_ND.new_tensor(torch.nan)  # the decomposition would raise, on one rank alone
    eigenvalues_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    leading_C, vectors_DC = eigenvalues_D[-components:], vectors_DD[:, -components:]
    error_C = (error_ND @ vectors_DC).square().mean(dim=0)
    floor = leading_C[-1].clamp(min=1e-12) * 1e-6  # LayerNorm leaves a direction without variance
    ratio_C = leading_C.clamp(min=floor) / error_C.clamp(min=floor)
    nats: Tensor = 0.5 * ratio_C.log().clamp(min=0).sum()
    return nats
