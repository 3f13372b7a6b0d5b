"""Base classes of the distributions of image targets, and the result of losses.

All losses are negative log-likelihoods in fp32. Each is this rank's share: its mean over ranks is the loss of the
global batch. The same holds for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.estimate import Moments
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
    """A distribution over vectors; its loss measures the distance between target and prediction."""

    kinds: ClassVar[dict[str, type[Kind]]] = Distribution.kinds

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Return the missing methods: `maps` is for patches, `vectors` for pooled targets; one of them is required."""
        neither = cls.maps is Density.maps and cls.vectors is Density.vectors
        return ["maps or vectors"] if neither else super().missing_methods()

    def maps(self, prediction_BND: Tensor, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ per dimension, averaged over tokens and samples."""
        raise NotImplementedError

    def vectors(self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ of vectors on the unit sphere: sum over dimensions, mean over samples."""
        raise NotImplementedError


def unit(x_BE: Tensor) -> Tensor:
    """Normalize rows to unit length, in fp32."""
    return F.normalize(x_BE.float(), dim=-1)
