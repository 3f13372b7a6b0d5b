"""Collapse prevention for patch-level targets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config.sections import Kind
from m3i_scale.objective.distributions import Density
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.regularizers.base import Regularizer


class DenseRegularizer(Regularizer):
    """Collapse prevention for pixels and dense image targets."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    def statistics(self, target_BND: Tensor, ranks: Ranks) -> Tensor | None:
        """Return the statistics over all patches of the view that `loss` needs, computed once per batch."""
        return None

    def loss(self, p: Density, prediction_BQD: Tensor, target_BQD: Tensor, statistics: Any, ranks: Ranks) -> Tensor:
        """Return −log P̂ and the regularization of the predicted patches.

        Args:
            prediction_BQD: ẑ_y.
            target_BQD: z_y of the same patches.
            statistics: result of `statistics`.
        """
        return p.maps(prediction_BQD, target_BQD, ranks)


class NoRegularizer(DenseRegularizer):
    """No regularization: pixels are constant and cannot collapse."""

    kind: ClassVar[str] = "none"
    encoders: ClassVar[tuple[str, ...]] = ("patchify",)


class DenseStopGradient(DenseRegularizer):
    """Stop-gradient on the target, with a decoder between target and prediction."""

    kind: ClassVar[str] = "stop_gradient"
    encoders: ClassVar[tuple[str, ...]] = ("ema", "teacher")


class DenseUniGrad(DenseRegularizer):
    """Dense negative term of UniGrad as in SIM: pushes predictions away from directions that many patches share."""

    kind: ClassVar[str] = "unigrad"
    encoders: ClassVar[tuple[str, ...]] = ("ema",)
    strength: float = Field(default=0.02, gt=0)
    """λ."""

    @torch.no_grad()
    def statistics(self, target_BND: Tensor, ranks: Ranks) -> Tensor:
        """Return C = (1/N) Σ z̄ z̄ᵀ over the tokens of all ranks: (D, D)."""
        flat_ND = target_BND.flatten(0, 1).float()
        return ranks.sum(flat_ND.T @ flat_ND) / (len(flat_ND) * ranks.world_size)

    def loss(self, p: Density, prediction_BQD: Tensor, target_BQD: Tensor, statistics: Any, ranks: Ranks) -> Tensor:
        """Return −log P̂ + λ (1/N) Σ ẑᵀ C ẑ / D, computed as ((Ẑ C) ⊙ Ẑ): O(N·D²), without an N × N matrix."""
        flat_ND = prediction_BQD.flatten(0, 1).float()
        quadratic_N: Tensor = ((flat_ND @ statistics) * flat_ND).sum(dim=-1)
        negative = self.strength * quadratic_N.mean() / flat_ND.shape[1]
        return p.maps(prediction_BQD, target_BQD, ranks) + negative
