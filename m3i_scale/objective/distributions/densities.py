"""Densities P̂ over vectors: Gaussian, and smooth L1, a Gaussian with the tails of a Laplace distribution."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from m3i_scale.objective.distributions.base import Density, unit
from m3i_scale.objective.ranks import Ranks


class Gaussian(Density):
    """Mean squared error, P̂ = N(z_y; ẑ_y, σ²I): −log P̂ = ‖z − ẑ‖² / 2σ², without its constant."""

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


class SmoothL1(Density):
    """Smooth L1 loss (I-JEPA): −log P̂ of e = z − ẑ by component, without constant: e² / 2β below β, |e| − β/2
    above."""

    kind: ClassVar[str] = "smooth_l1"
    beta: float = Field(default=1.0, gt=0)
    """β: transition from the squared to the absolute error."""

    def maps(self, prediction_BND: Tensor, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ per dimension, averaged over tokens and samples."""
        return F.smooth_l1_loss(prediction_BND.float(), target_BND.float(), beta=self.beta)

    def vectors(self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ on the unit sphere: sum over dimensions, mean over samples."""
        error_BE = F.smooth_l1_loss(unit(prediction_BE), unit(target_BE), reduction="none", beta=self.beta)
        return error_BE.sum(dim=-1).mean()
