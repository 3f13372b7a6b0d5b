"""The Gaussian P̂ = N(z_y; ẑ_y, σ²I)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from m3i_scale.objective.distributions.base import Density, unit
from m3i_scale.objective.ranks import Ranks


class Gaussian(Density):
    """Mean squared error: −log P̂ = ‖z − ẑ‖² / 2σ², without its constant."""

    kind: ClassVar[str] = "gaussian"
    sigma2: float = Field(default=0.5, gt=0)
    """σ²; with ½ the loss is the squared error."""

    def maps(self, prediction_BND: Tensor, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return ‖z − ẑ‖² / (2σ²D), averaged over tokens and samples."""
        error_B = (prediction_BND.float() - target_BND.float()).square().mean(dim=(1, 2)) / (2 * self.sigma2)
        return error_B.mean()

    def vectors(self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return ‖z − ẑ‖² / 2σ² on the unit sphere, averaged over samples: (2 − 2 cos) / 2σ² (BYOL, SimSiam)."""
        error_B = (unit(prediction_BE) - unit(target_BE)).square().sum(dim=-1) / (2 * self.sigma2)
        return error_B.mean()
