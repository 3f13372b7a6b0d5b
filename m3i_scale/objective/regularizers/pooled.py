"""Collapse prevention for image-level targets: negatives, stop-gradient, decorrelation or entropy.

Gradients in comparison (UniGrad; u₁ online, u₂ target, v other samples): contrastive −u₂ + λ Σ s_v v; asymmetric −u₂ +
λ Σ ρ_v (u₁·v) v; decorrelation −u₂ + λ Σ (u₂·v₂/N) v₁; UniGrad −u₂ + λ F u₁.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from m3i_scale.config.sections import MAX_CANDIDATES, Kind
from m3i_scale.objective.distributions import Boltzmann, Density, Distribution, Loss, unit
from m3i_scale.objective.ranks import Ranks, standardize
from m3i_scale.objective.regularizers import Correlation, Memory, Queue, Regularizer


class PooledRegularizer(Regularizer):
    """Collapse prevention for image-level targets."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    distribution: ClassVar[type[Distribution]] = Density
    """Required base class of the distribution."""
    needs_predictor: ClassVar[bool] = False
    """Whether trained targets collapse without a predictor."""

    def memory(self, width: int) -> Memory:
        """Return the head's memory of earlier batches, for targets with `width` channels."""
        return Memory(width)

    @abstractmethod
    def loss(self, p: Any, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −log P̂ with the regularization.

        Args:
            p: an instance of `distribution`.
            prediction_BE: ẑ_y of this rank's samples.
            target_BE: z_y, with gradient if the student encodes it and `trains_target` is set.
            memory: result of `memory`, shared by all targets of the head.
        """

    def compared(self, x_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return prediction or target as P̂ compares it, for estimating the information of a density."""
        return unit(x_BE)


class StopGradient(PooledRegularizer):
    """Stop-gradient on the target, with a predictor (BYOL, SimSiam) or a fixed target."""

    kind: ClassVar[str] = "stop_gradient"
    needs_predictor: ClassVar[bool] = True
    trains_target: ClassVar[bool] = False

    def loss(self, p: Density, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −log P̂ on the unit sphere."""
        return Loss(p.vectors(prediction_BE, target_BE, ranks))


class UniGrad(PooledRegularizer):
    """UniGrad: pushes predictions away from the dominant directions of the targets' correlation F."""

    kind: ClassVar[str] = "unigrad"
    memory_fields: ClassVar[tuple[str, ...]] = ("momentum",)
    encoders: ClassVar[tuple[str, ...]] = ("ema",)
    strength: float = Field(default=0.02, gt=0)
    """λ."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay m of the moving average F over batches."""

    def memory(self, width: int) -> Memory:
        return Correlation(width, self.momentum)

    def loss(self, p: Density, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −log P̂ + λ ẑᵀ F ẑ on the unit sphere, averaged over samples. With ‖z − ẑ‖², its gradient is twice the
        gradient −u₂ + λ F u₁ of UniGrad."""
        value = p.vectors(prediction_BE, target_BE, ranks)
        unit_BE = unit(prediction_BE)
        quadratic_B = ((unit_BE @ memory.correlation_EE.clone()) * unit_BE).sum(dim=-1)
        value = value + self.strength * quadratic_B.mean()
        return Loss(value, remember=unit(target_BE))


class CrossCorrelation(PooledRegularizer):
    """Barlow Twins: correlates each channel only with itself. Replaces −log P̂, so the distribution has no effect."""

    kind: ClassVar[str] = "cross_correlation"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[tuple[str, ...]] = ("online",)
    within_batch: ClassVar[bool] = True
    offdiagonal_weight: float = Field(default=0.005, gt=0)
    """λ."""

    def loss(self, p: Density, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return Σ (1 − c_dd)² + λ Σ_{d≠e} c_de² of the cross-correlation over the global batch (algorithm 1)."""
        one_BE, other_BE = self.compared(prediction_BE, ranks), self.compared(target_BE, ranks)
        diagonal_E, squares = _product(one_BE, other_BE, len(one_BE) * ranks.world_size, ranks)
        off = squares - diagonal_E.square().sum()
        return Loss((1 - diagonal_E).square().sum() + self.offdiagonal_weight * off)

    def compared(self, x_BE: Tensor, ranks: Ranks) -> Tensor:
        """Standardize every channel to mean 0 and variance 1 over the global batch."""
        return standardize(x_BE.float(), ranks)


class VarianceCovariance(PooledRegularizer):
    """VICReg: every channel varies, and no two channels correlate."""

    kind: ClassVar[str] = "variance_covariance"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[tuple[str, ...]] = ("online",)
    within_batch: ClassVar[bool] = True
    variance_weight: float = Field(default=25.0, gt=0)
    """μ."""
    covariance_weight: float = Field(default=1.0, gt=0)
    """ν."""

    def loss(self, p: Density, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −log P̂ of the unnormalized vectors plus the terms of prediction and target."""
        value = p.maps(prediction_BE[:, None], target_BE[:, None], ranks)
        for side_BE in (prediction_BE, target_BE):
            value = value + self.side(side_BE, ranks)
        return Loss(value)

    def side(self, z_BE: Tensor, ranks: Ranks) -> Tensor:
        """Return μ/2 · mean_d max(0, 1 − √(var_d + 1e-4)) + ν/D · Σ_{d≠e} cov_de² over the global batch."""
        z_BE = z_BE.float()
        count = len(z_BE) * ranks.world_size
        centered_BE = z_BE - ranks.sum_with_gradient(z_BE.sum(dim=0)) / count
        variance_E, squares = _product(centered_BE, centered_BE, max(count - 1, 1), ranks)
        hinge = F.relu(1 - (variance_E + 1e-4).sqrt()).mean()
        off = (squares - variance_E.square().sum()) / z_BE.shape[1]
        return self.variance_weight / 2 * hinge + self.covariance_weight * off

    def compared(self, x_BE: Tensor, ranks: Ranks) -> Tensor:
        return x_BE


class Negatives(PooledRegularizer):
    """Negatives from the other samples of the global batch (SimCLR)."""

    kind: ClassVar[str] = "negatives"
    memory_fields: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[tuple[str, ...]] = ("ema", "online")
    distribution: ClassVar[type[Distribution]] = Boltzmann
    within_batch: ClassVar[bool] = True
    candidates: Literal["target", "both"] = "target"
    """Negatives: the other samples' targets, or also their predictions."""

    def loss(self, p: Boltzmann, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −log P̂ among the samples of the batch."""
        return Loss(*p.among_samples(prediction_BE, target_BE, ranks, both=self.candidates == "both"))


class QueuedNegatives(PooledRegularizer):
    """Negatives from targets of earlier batches (MoCo)."""

    kind: ClassVar[str] = "queued_negatives"
    memory_fields: ClassVar[tuple[str, ...]] = ("size",)
    encoders: ClassVar[tuple[str, ...]] = ("ema", "online")
    distribution: ClassVar[type[Distribution]] = Boltzmann
    size: int = Field(ge=1, le=MAX_CANDIDATES)
    """Capacity of the queue, which starts empty."""

    def memory(self, width: int) -> Memory:
        return Queue(width, self.size)

    def loss(self, p: Boltzmann, prediction_BE: Tensor, target_BE: Tensor, memory: Memory, ranks: Ranks) -> Loss:
        """Return −log P̂ with a clone of the queue, because it changes before the next micro-batch's backward pass."""
        queue_QE, filled = memory.queue_QE.clone(), memory.filled.clone()
        return Loss(*p.among_queue(prediction_BE, target_BE, queue_QE, filled), remember=unit(target_BE))


class KoLeo(Regularizer):
    """The Kozachenko-Leonenko entropy estimate of vectors on the sphere, which uses nearest neighbors. It is a loss
    term without −log P̂: `kind: spread`."""

    kind: ClassVar[str] = "koleo"
    encoders: ClassVar[tuple[str, ...]] = ("online",)
    within_batch: ClassVar[bool] = True

    def loss(self, pooled_BD: Tensor, ranks: Ranks, eps: float = 1e-8) -> Tensor:
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


def _product(one_BE: Tensor, other_BE: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the diagonal (E) of C = (1/n) Σ_b one_b other_bᵀ over all ranks, and the sum of all its squares.

    Channels often outnumber samples (8,192 vs. some hundred). Then C (E × E) is never computed: ‖AᵀB‖² is ⟨AAᵀ, BBᵀ⟩, a
    product of two samples × samples matrices. Every rank computes the rows of its samples.
    """
    if 2 * len(one_BE) * ranks.world_size >= one_BE.shape[1]:
        product_EE = ranks.sum_with_gradient(one_BE.T @ other_BE) / count
        return product_EE.diagonal(), product_EE.square().sum()
    diagonal_E = ranks.sum_with_gradient((one_BE * other_BE).sum(dim=0)) / count
    one_GE = ranks.gather(one_BE)
    other_GE = one_GE if other_BE is one_BE else ranks.gather(other_BE)
    one_BG = one_BE @ one_GE.T
    other_BG = one_BG if other_BE is one_BE else other_BE @ other_GE.T
    return diagonal_E, ranks.sum_with_gradient((one_BG * other_BG).sum()) / count**2
