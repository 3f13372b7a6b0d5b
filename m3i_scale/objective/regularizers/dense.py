"""Dense regularisers keep the patches of an image from collapsing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.distributions.base import Density
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.regularizers.base import Regularizer


class DenseRegularizer(Regularizer):
    """Regularises pixels and dense image targets."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    def statistics(self, target_BND: Tensor, ranks: Ranks) -> Tensor | None:
        """Return what `loss` needs to know of all patches of the view: computed once a batch."""
        return None

    def loss(self, p: Density, prediction_BQD: Tensor, target_BQD: Tensor, statistics: Any, ranks: Ranks) -> Tensor:
        """Return −log P̂ and the regularisation of the patches that are asked for.

        Args:
            p: the distribution.
            prediction_BQD: ẑ_y.
            target_BQD: z_y, the same patches.
            statistics: what `statistics` gave.
            ranks: other ranks.
        """
        return p.maps(prediction_BQD, target_BQD, ranks)


class NoRegularizer(DenseRegularizer):
    """Adds nothing: pixels are fixed and cannot collapse."""

    kind: ClassVar[str] = "none"
    encoders: ClassVar[tuple[str, ...]] = ("patchify",)


class DenseStopGradient(DenseRegularizer):
    """Lets no gradient reach the target; a decoder stands between it and the prediction."""

    kind: ClassVar[str] = "stop_gradient"
    encoders: ClassVar[tuple[str, ...]] = ("momentum", "teacher")


class DenseUniGrad(DenseRegularizer):
    """Moves predictions away from directions that many patches share: the dense negative of UniGrad as SIM uses it."""

    kind: ClassVar[str] = "unigrad"
    encoders: ClassVar[tuple[str, ...]] = ("momentum",)
    strength: float = Field(default=0.02, gt=0)
    """λ."""

    @torch.no_grad()
    def statistics(self, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return C = (1/N) Σ z̄ z̄ᵀ over the tokens of all ranks: (D, D)."""
        flat_ND = target_BND.flatten(0, 1).float()
        return ranks.sum(flat_ND.T @ flat_ND) / (len(flat_ND) * ranks.world_size)

    def loss(self, p: Density, prediction_BQD: Tensor, target_BQD: Tensor, statistics: Any, ranks: Ranks) -> Tensor:
        """Return −log P̂ + λ (1/N) Σ ẑᵀ C ẑ / D.

        Computed as ((Ẑ C) ⊙ Ẑ): O(N·D²), without the N × N matrix whose diagonal it is.
        """
        flat_ND = prediction_BQD.flatten(0, 1).float()
        quadratic_N: Tensor = ((flat_ND @ statistics) * flat_ND).sum(dim=-1)
        negative = self.strength * quadratic_N.mean() / flat_ND.shape[1]
        return p.maps(prediction_BQD, target_BQD, ranks) + negative
