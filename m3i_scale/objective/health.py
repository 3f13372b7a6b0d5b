"""Is the representation alive? Spread and effective rank of features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_health(features_ND: Tensor, limit: int = 4096) -> dict[str, Tensor]:
    """`std`: mean over channels of the standard deviation over samples; `rank`: the effective rank.

    The effective rank is exp of the entropy of the normalised eigenvalues of the covariance: 1 when all features lie
    on a line, D when all directions carry the same variance. At most `limit` rows are read.
    """
    x_ND = features_ND.detach().float()[:limit]
    centered_ND = x_ND - x_ND.mean(dim=0)
    covariance_DD = centered_ND.T @ centered_ND / max(len(x_ND) - 1, 1)  # a single sample has no spread, not NaN
    if not covariance_DD.isfinite().all():  # the decomposition would raise, on one rank alone
        return {"std": covariance_DD.new_tensor(torch.nan), "rank": covariance_DD.new_tensor(torch.nan)}
    eigenvalues_D = torch.linalg.eigvalsh(covariance_DD).clamp(min=0)
    share_D = eigenvalues_D / eigenvalues_D.sum().clamp(min=1e-12)
    entropy = -(share_D * share_D.clamp(min=1e-12).log()).sum()
    return {"std": covariance_DD.diagonal().sqrt().mean(), "rank": entropy.exp()}


@torch.no_grad()
def target_health(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Is a group's target alive?

    Args:
        parts: `z` (…, E): targets; `assignment` (B, K): distributions over prototypes; `scale` (1): 1/τ.

    Returns:
        `spread`: 1 − ‖mean unit target‖², 0 when all samples have the same target, near 1 when they point everywhere;
        `evenness`: entropy of the mean assignment over log K; `scale`.
    """
    found: dict[str, Tensor] = {}
    if "z" in parts:
        z_NE = F.normalize(parts["z"].detach().float().flatten(0, -2), dim=-1)
        # Without a sample of this kind there is nothing to see: not collapsed.
        mean_E = z_NE.mean(dim=0) if len(z_NE) else z_NE.new_zeros(z_NE.shape[-1])
        found["spread"] = (1 - mean_E.square().sum()).clamp(min=0)  # rounding may leave less than nothing
    if "assignment" in parts:
        mean_K = parts["assignment"].float().mean(dim=0)
        found["evenness"] = -torch.special.xlogy(mean_K, mean_K).sum() / math.log(len(mean_K))
    if "scale" in parts:
        found["scale"] = parts["scale"].detach().float().squeeze()
    return found
