"""Distributions of image targets: base classes, densities over vectors, and the result of losses.

All losses are negative log-likelihoods in fp32. Each is this rank's share: its mean over ranks is the loss of the
global batch. The same holds for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.diagnostics import Moments
from m3i_scale.objective.ranks import Ranks


@dataclass
class Loss:
    """−log P̂ of one target from one input, including its collapse prevention."""

    value: Tensor
    nats: Tensor | None = None
    """A lower bound of the mutual information, if the distribution has one."""
    moments: Moments | None = None
    """Moments to estimate the mutual information on logged steps, if there is no bound."""
    remember: Tensor | None = None
    """Values to store in the memory of the target's head after the batch."""
    watched: dict[str, Tensor] = field(default_factory=dict)
    """Tensors from which `target_health` detects collapse."""
    top_1: Tensor | None = None
    """Top-1 accuracy of a classification target in evaluation mode."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Terms of the loss by name, if it is a sum."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Predictions in evaluation mode by name, from which the target computes its scores."""


class Distribution(Kind):
    """Base class of P̂ for image targets."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    bounds_information: ClassVar[bool] = False
    """Whether every loss has a bound in nats. Otherwise nats are estimated on logged steps."""


class Density(Distribution):
    """A distribution over vectors; its loss measures the distance between target and prediction. Patch-level targets
    need `maps`, image-level targets `vectors`."""

    kinds: ClassVar[dict[str, type[Kind]]] = Distribution.kinds

    def maps(self, prediction_BND: Tensor, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ per dimension, averaged over tokens and samples."""
        raise NotImplementedError

    def vectors(self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ of vectors on the unit sphere: sum over dimensions, mean over samples."""
        raise NotImplementedError


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


def unit(x_BE: Tensor) -> Tensor:
    """Normalize rows to unit length, in fp32."""
    return F.normalize(x_BE.float(), dim=-1)
