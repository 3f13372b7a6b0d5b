"""Is the representation alive? Spread and effective rank of features."""

from __future__ import annotations

import torch
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
