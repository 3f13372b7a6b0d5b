"""Estimate the mutual information of Gaussian targets in nats. Boltzmann losses have a lower bound instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3i_scale.objective.ranks import Ranks

_ROWS_PER_COMPONENT = 20
"""Minimum ratio of rows to components: eigenvalues of sample covariances are accurate only with many rows."""


@dataclass(frozen=True)
class Moments:
    """Second moments over the rows of all ranks, identical on every rank."""

    covariance_DD: Tensor
    error_DD: Tensor
    """Mean of e eᵀ of the errors e = z − ẑ, fp32."""
    components: int
    """Number of leading components with enough rows."""


@torch.no_grad()
def gaussian_moments(prediction_ND: Tensor, target_ND: Tensor, ranks: Ranks, limit: int = 4096) -> Moments | None:
    """Return the moments for estimating the information of a Gaussian target, over at most `limit` rows (tokens or
    samples) of all ranks. None with fewer than 20 rows, too few for one component."""
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
    """Return Σ_i ½ ln(λ_i / e_i) over the leading principal components i of the target, in nats per row.

    λ_i is the target's variance along component i, e_i the mean squared prediction error along it. For a Gaussian
    target this is a lower bound on the information: components are independent, and correlated errors are treated as
    independent. Omitted components, and those with an error above the variance, count as 0. For other targets it is an
    estimate. NaN if moments are not finite or the decomposition does not converge. `moments` are on the CPU.
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
    """Return the mean estimate over several predictions of one target. `moments_DD`: alternating covariance and error
    matrices of the predictions, on the CPU."""
    found = [
        gaussian_information(Moments(covariance_DD, error_DD, count))
        for covariance_DD, error_DD, count in zip(moments_DD[::2], moments_DD[1::2], components, strict=True)
    ]
    return {name: sum(found) / len(found)}
