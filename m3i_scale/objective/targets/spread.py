"""KoLeo loss: the entropy term of equation (2) alone."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.distributions.base import Loss, unit
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.regularizers.base import Regularizer
from m3i_scale.objective.targets.base import Context, Encoded, Sizes, Target, TargetModules


class NoDistribution(Kind):
    """Placeholder for targets that predict nothing."""

    kind: ClassVar[str] = "none"
    bounds_information: ClassVar[bool] = False


class KoLeo(Regularizer):
    """The Kozachenko-Leonenko entropy estimate of vectors on the sphere, which uses nearest neighbors."""

    kind: ClassVar[str] = "koleo"
    encoders: ClassVar[tuple[str, ...]] = ("online",)
    within_batch: ClassVar[bool] = True


class Spread(Target):
    """KoLeo loss: pushes a decoder's outputs for different images apart, before any head.

    DINOv2 combines it with distributions over prototypes, for the class tokens of its global crops.
    """

    kind: ClassVar[str] = "spread"
    representation: ClassVar[str] = "global feature"
    encoder: Literal["online"] = "online"
    distribution: NoDistribution = NoDistribution()
    regularizer: KoLeo = KoLeo()

    def build_head(self, sizes: Sizes) -> nn.Module:
        """Return a module without weights: the decoder's output is used directly."""
        return nn.Identity()

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of the negative entropy estimate, without its constant and factor."""
        return Loss(koleo(encoded.pooled(given.decoder), given.ranks))


def koleo(pooled_BD: Tensor, ranks: Ranks, eps: float = 1e-8) -> Tensor:
    """Return −mean log distance of a unit vector to its nearest neighbor in the global batch (Sablayrolles et al.,
    2019, Spreading vectors for similarity search). DINOv2's code only searches the images of one device."""
    own_BD = unit(pooled_BD)
    all_GD = ranks.gather(own_BD)
    with torch.no_grad():
        cosines_BG = own_BD @ all_GD.T
        itself_B1 = torch.arange(len(own_BD), device=own_BD.device)[:, None] + ranks.rank * len(own_BD)
        nearest_B = cosines_BG.scatter(1, itself_B1, -2.0).argmax(dim=1)
    distance_B = F.pairwise_distance(own_BD, all_GD[nearest_B], eps=eps)
    return -(distance_B + eps).log().mean()
