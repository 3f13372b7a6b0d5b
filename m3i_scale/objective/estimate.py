"""Estimate how many nats of a Gaussian target the prediction holds. Boltzmann groups bound theirs by their loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3i_scale.objective.ranks import Ranks

_ROWS_PER_COMPONENT = 20
"""An eigenvalue of a sample covariance is near the true one when there are many rows a component."""


@dataclass(frozen=True)
class Moments:
    """Holds second moments over rows of all ranks, the same on all of them."""

    covariance_DD: Tensor
    """Of the target, fp32."""
    error_DD: Tensor
    """Mean of e eᵀ of the errors e = z − ẑ, fp32."""
    components: int
    """So many leading components have enough rows."""


@torch.no_grad()
def gaussian_moments(prediction_ND: Tensor, target_ND: Tensor, ranks: Ranks, limit: int = 4096) -> Moments | None:
    """Return what the information of a Gaussian target is estimated of; None where there are fewer than 20 rows, too
    few for one component.

    Args:
        prediction_ND: ẑ, one row a token or sample.
        target_ND: z, same shape.
        ranks: whose rows count too.
        limit: at most so many rows are read, over all ranks.
    """
    rows = min(len(target_ND), max(limit // ranks.world_size, 1))
    z_ND, predicted_ND = target_ND.detach().float()[:rows], prediction_ND.detach().float()[:rows]
    count = rows * ranks.world_size
    components = min(z_ND.shape[1], count // _ROWS_PER_COMPONENT)
    if components == 0:
        return None
    centered_ND, error_ND = z_ND - ranks.sum(z_ND.sum(dim=0)) / count, z_ND - predicted_ND
    covariance_DD, error_DD = ranks.sum(torch.stack([centered_ND.T @ centered_ND, error_ND.T @ error_ND])).unbind()
    return Moments(covariance_DD / (count - 1), error_DD / count, components)


def gaussian_information(moments: Moments) -> float:
    """Return Σ_i ½ ln(λ_i / e_i) over the leading principal components i of the target, in nats per row; NaN where
    moments are not finite or the decomposition does not converge.

    λ_i is the target's variance along component i, e_i the mean squared error of the prediction along it. For a
    Gaussian target this is a lower bound on the information: components are independent, errors that correlate are
    counted as if they did not, and components that are left out or predicted worse than by their mean count 0. For
    other targets it is an estimate.

    Args:
        moments: on the host.
    """
    if not (moments.covariance_DD.isfinite().all() and moments.error_DD.isfinite().all()):
        return math.nan
    try:
        eigenvalues_D, vectors_DD = torch.linalg.eigh(moments.covariance_DD)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return math.nan
    leading_C, vectors_DC = eigenvalues_D[-moments.components :], vectors_DD[:, -moments.components :]
    error_C = ((moments.error_DD @ vectors_DC) * vectors_DC).sum(dim=0)
    floor = leading_C[-1].clamp(min=1e-12) * 1e-6  # LayerNorm leaves a direction without variance
    ratio_C = leading_C.clamp(min=floor) / error_C.clamp(min=floor)
    return float(0.5 * ratio_C.log().clamp(min=0).sum())


def mean_information(name: str, components: list[int], *moments_DD: Tensor) -> dict[str, float]:
    """Return the mean over several predictions of one target.

    Args:
        name: of the figure.
        components: of every prediction.
        moments_DD: covariance and error of every prediction in turn, on the host.
    """
    found = [
        gaussian_information(Moments(covariance_DD, error_DD, count))
        for covariance_DD, error_DD, count in zip(moments_DD[::2], moments_DD[1::2], components, strict=True)
    ]
    return {name: sum(found) / len(found)}
