"""Measure whether the representation is alive: spread and effective rank of features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.ranks import Ranks


@torch.no_grad()
def feature_health(features_ND: Tensor, limit: int = 4096) -> dict[str, Tensor]:
    """Return `std`, the mean over channels of the standard deviation over samples, and `rank`, the effective rank.

    The effective rank is exp of the entropy of the normalised eigenvalues of the covariance: 1 when all features lie
    on a line, D when all directions carry the same variance. At most `limit` rows are read. Both are NaN where the
    covariance is not finite, the rank alone where its decomposition does not converge: an error would end one rank,
    and the others would wait for it in their next collective.
    """
    x_ND = features_ND.detach().float()[:limit]
    centered_ND = x_ND - x_ND.mean(dim=0)
    covariance_DD = centered_ND.T @ centered_ND / max(len(x_ND) - 1, 1)  # a single sample has no spread, not NaN
    nan = covariance_DD.new_tensor(torch.nan)
    if not covariance_DD.isfinite().all():
        return {"std": nan, "rank": nan}
    std = covariance_DD.diagonal().sqrt().mean()
    try:
        eigenvalues_D = torch.linalg.eigvalsh(covariance_DD).clamp(min=0)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return {"std": std, "rank": nan}
    share_D = eigenvalues_D / eigenvalues_D.sum().clamp(min=1e-12)
    entropy = -(share_D * share_D.clamp(min=1e-12).log()).sum()
    return {"std": std, "rank": entropy.exp()}


@torch.no_grad()
def target_health(parts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Measure whether a group's target is alive, over the samples of all ranks.

    Args:
        parts: `z` (…, E): targets; `assignment` (B, K): distributions over prototypes; `scale` (1): 1/τ.
        ranks: other ranks.

    Returns:
        `spread`: 1 − ‖mean unit target‖², 0 when all samples have the same target, near 1 when they point everywhere;
        `evenness`: entropy of the mean assignment over log K; `scale`. A spread of fewer than two targets is left out.
    """
    figures: dict[str, Tensor] = {}
    if "z" in parts:
        z_NE = F.normalize(parts["z"].detach().float().flatten(0, -2), dim=-1)
        count = ranks.sum(z_NE.new_tensor(float(len(z_NE))))
        mean_E = ranks.sum(z_NE.sum(dim=0)) / count.clamp(min=1)
        if float(count) > 1:  # the same on all ranks
            figures["spread"] = (1 - mean_E.square().sum()).clamp(min=0)  # rounding may leave less than nothing
    if "assignment" in parts:
        probabilities_BK = parts["assignment"].float()
        mean_K = ranks.sum(probabilities_BK.sum(dim=0)) / (len(probabilities_BK) * ranks.world_size)
        figures["evenness"] = -torch.special.xlogy(mean_K, mean_K).sum() / math.log(len(mean_K))
    if "scale" in parts:
        figures["scale"] = parts["scale"].detach().float().squeeze()
    return figures
