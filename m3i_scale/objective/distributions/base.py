"""Distributions of image targets share a base, and losses give back one kind of result.

All losses are negative log-likelihoods in fp32 and give this rank's share: its mean over ranks is the loss of the
global batch, and so is that of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.estimate import Moments
from m3i_scale.objective.ranks import Ranks

if TYPE_CHECKING:
    from m3i_scale.objective.detection.modeling_mask_rcnn import Detections


@dataclass
class Loss:
    """Holds −log P̂ of one target from one input, with what keeps the target from collapsing."""

    value: Tensor
    nats: Tensor | None = None
    """A lower bound of the information, where the distribution has one."""
    moments: Moments | None = None
    """On logged steps, where it has none: what the information is estimated of."""
    remember: Tensor | None = None
    """Values that the memory of the target's head takes over after the batch."""
    watched: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that tell whether the group is alive: see `target_health`."""
    top_1: Tensor | None = None
    """Of a target that names classes, outside of training: the share of samples whose class is the likeliest."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Of a loss that is a sum: what it is the sum of, by name."""
    overlaps_3K: Tensor | None = None
    """Of a target that counts pixels, outside of training: see `segmentation.overlaps`."""
    detections: list[Detections] | None = None
    """Of a target that finds objects, outside of training: by sample."""


class Distribution(Kind):
    """Describes P̂ of an image target; subclasses compute it."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    bounds_information: ClassVar[bool] = False
    """Whether every loss comes with a bound in nats. Else they are estimated on logged steps."""


class Density(Distribution):
    """Describes a distribution over vectors: its loss says how far the target lies from its prediction."""

    kinds: ClassVar[dict[str, type[Kind]]] = Distribution.kinds

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Return what the class must define: `maps` is for patches, `vectors` for pooled targets."""
        neither = cls.maps is Density.maps and cls.vectors is Density.vectors
        return ["maps or vectors"] if neither else super().missing_methods()

    def maps(self, prediction_BND: Tensor, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ per dimension, mean over tokens and samples."""
        raise NotImplementedError

    def vectors(self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return −log P̂ of vectors, compared on the unit sphere: sum over dimensions, mean over samples."""
        raise NotImplementedError


def unit(x_BE: Tensor) -> Tensor:
    """Return rows on the unit sphere, in fp32."""
    return F.normalize(x_BE.float(), dim=-1)
