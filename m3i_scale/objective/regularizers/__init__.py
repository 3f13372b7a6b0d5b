"""Regularizers prevent the collapse of target representations: the entropy term of equation (2).

Their `loss` returns both terms of the equation: −log P̂ and this one.
This file has their base class, regularizers of patches, texts and categories, and memories of earlier batches.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from m3i_scale.config.sections import Kind
from m3i_scale.objective.distributions import Density
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.state import Fp32State


class Regularizer(Kind):
    """Collapse prevention of a target."""

    encoders: ClassVar[tuple[str, ...]] = ("ema", "online", "teacher")
    """Target encoders for which it has an effect and prevents collapse."""
    trains_target: ClassVar[bool] = True
    """Whether the target gets gradients if the student encodes it (`encoder: online`)."""
    memory_fields: ClassVar[tuple[str, ...] | None] = None
    """Fields on which a head's memory depends. Targets that share the head must agree in them. None: all fields."""
    within_batch: ClassVar[bool] = False
    """Whether the regularizer compares samples of a batch, and so needs at least two samples."""


class OtherCandidates(Regularizer):
    """Contrast with the other candidates of P̂: the other texts of the batch, or the other classes."""

    kind: ClassVar[str] = "negatives"
    encoders: ClassVar[tuple[str, ...]] = ("text_tower", "embedding")
    within_batch: ClassVar[bool] = True


class DenseRegularizer(Regularizer):
    """Collapse prevention for pixels and dense image targets."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    @property
    def has_statistics(self) -> bool:
        """Return whether the class defines `statistics`."""
        return type(self).statistics is not DenseRegularizer.statistics

    def statistics(self, target_BND: Tensor, ranks: Ranks) -> Tensor | None:
        """Return the statistics over all patches of the view that `loss` needs, computed once per batch. They must be
        means over patches: `contrastive_batch: global` averages those of the micro-batches."""
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


class Memory(Fp32State):
    """Statistics of earlier batches that a head keeps, identical on all ranks. The base class keeps nothing.

    Every memory has all of these buffers, since checkpoints refer to their names. Unused ones are empty. User-defined
    memories may have more.

    Args:
        width: dimension of z_y.
        momentum: decay m of moving averages over batches.
        sizes: shapes of the buffers that are not empty.
    """

    center_K: Tensor
    correlation_EE: Tensor
    queue_QE: Tensor
    filled: Tensor
    next_row: Tensor
    updates: Tensor

    def __init__(self, width: int, momentum: float = 0.9, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.momentum = momentum
        empty = {"center_K": (0,), "correlation_EE": (0, 0), "queue_QE": (0, width)}
        for name, size in (empty | sizes).items():
            self.register_buffer(name, torch.zeros(size))
        for name in ("filled", "next_row", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        """Update the memory with the `remember` values of a training batch. Called after all loss terms, with the
        targets of all views."""


class Center(Memory):
    """Mean of the targets' logits over K prototypes (DINO)."""

    def __init__(self, width: int, prototypes: int, momentum: float) -> None:
        super().__init__(width, momentum, center_K=(prototypes,))

    @torch.no_grad()
    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        """Set c ← m c + (1 − m) · mean of the targets' logits over all ranks."""
        mean_K = ranks.sum(values_BE.float().sum(dim=0)) / (len(values_BE) * ranks.world_size)
        self.center_K.lerp_(mean_K, 1 - self.momentum)


class Correlation(Memory):
    """F, the correlation matrix of unit targets (UniGrad)."""

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__(width, momentum, correlation_EE=(width, width))

    @torch.no_grad()
    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        """Set F ← m F + (1 − m) · mean of z zᵀ over all ranks; the first batch has weight 1."""
        unit_BE = values_BE.float()
        mean_EE = ranks.sum(unit_BE.T @ unit_BE) / (len(unit_BE) * ranks.world_size)
        weight = (self.updates == 0).float().clamp(min=1 - self.momentum)
        self.correlation_EE.copy_(torch.lerp(self.correlation_EE, mean_EE, weight))
        self.updates += 1


class Queue(Memory):
    """A queue of recent unit targets of all ranks (MoCo)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, queue_QE=(size, width))

    @torch.no_grad()
    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        rows_GE = ranks.gather(values_BE.detach().float())[-len(self.queue_QE) :]
        size, count = len(self.queue_QE), len(rows_GE)
        place_G = (self.next_row + torch.arange(count, device=rows_GE.device)) % size
        self.queue_QE[place_G] = rows_GE
        self.next_row.copy_((self.next_row + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))
