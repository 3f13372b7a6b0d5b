"""Distributions P̂ of image targets, one class per kind, and the result of losses.

All losses are negative log-likelihoods in fp32. Each is this rank's share: its mean over ranks is the loss of the
global batch. The same holds for gradients.

`Density` is over vectors. `Boltzmann`, P̂ = exp(ẑ·z/τ) / Σ_z' exp(ẑ·z'/τ), is over samples, a queue or prototypes. For K
candidates, log K − loss is the InfoNCE lower bound on the mutual information in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from m3i_scale.config.sections import FixableError, Kind
from m3i_scale.objective.diagnostics import Moments
from m3i_scale.objective.ranks import Ranks, mean_row
from m3i_scale.objective.schedule import Positive, Scheduled, number

_BLOCK = 2**23
"""Maximum number of a queue's logits in memory: 32 MB."""


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
    """P̂, the distribution of an image target."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    bounds_information: ClassVar[bool] = False
    """Whether every loss has a bound in nats. Otherwise nats are estimated on logged steps."""


class Density(Distribution):
    """A distribution over vectors; its loss measures the distance between target and prediction. Patch-level targets
    need `maps`, image-level targets `vectors`."""

    kinds: ClassVar[dict[str, type[Kind]]] = Distribution.kinds

    @model_validator(mode="after")
    def _defines_a_loss(self) -> Self:
        if type(self).maps is Density.maps and type(self).vectors is Density.vectors:
            raise FixableError(f"'{self.kind}' does not define maps or vectors", "define one of them in the class")
        return self

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


@dataclass(frozen=True)
class Assigned:
    """The distributions of a target over K prototypes, with statistics over all ranks."""

    probabilities_NK: Tensor
    share_N: Tensor | None
    """Weight of every row in the loss; None: 1/N each."""
    entropy: Tensor
    """Entropy H of the mean over all rows, in nats."""
    counted: Tensor | None
    """Mean over ranks of the sum of `share_N`, or None without `share_N`."""


def assigned(probabilities_NK: Tensor, ranks: Ranks, share_N: Tensor | None = None) -> Assigned:
    """Return the distributions of a target. Uses one collective for any number of inputs."""
    mean_K, counted = mean_row(probabilities_NK, share_N, ranks)
    return Assigned(probabilities_NK, share_N, -torch.special.xlogy(mean_K, mean_K).sum(), counted)


class Boltzmann(Distribution):
    """A softmax over candidates of the regularizer."""

    kind: ClassVar[str] = "boltzmann"
    bounds_information: ClassVar[bool] = True
    temperature: Scheduled[Positive] = 0.07
    """Fixed temperature τ: a number, or a schedule."""

    def among_samples(
        self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks, *, both: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return InfoNCE with the global batch's targets as candidates. With `both`, the other samples' predictions are
        negatives too (NT-Xent of SimCLR)."""
        query_BE, key_BE, temperature = unit(prediction_BE), unit(target_BE), number(self.temperature)
        own_B = torch.arange(len(query_BE), device=query_BE.device) + ranks.rank * len(query_BE)
        logits_BG = query_BE @ ranks.gather(key_BE).T / temperature
        candidates = logits_BG.shape[1]
        if both:
            itself_BG = query_BE @ ranks.gather(query_BE).T / temperature
            logits_BG = torch.cat([logits_BG, itself_BG.scatter(1, own_B[:, None], -torch.inf)], dim=1)
            candidates = 2 * candidates - 1
        return _with_bound(F.cross_entropy(logits_BG, own_B, reduction="none"), math.log(candidates))

    def among_queue(
        self, prediction_BE: Tensor, target_BE: Tensor, queue_QE: Tensor, filled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return InfoNCE with targets of earlier batches as negatives (MoCo). The first `filled` rows of the queue are
        valid unit vectors."""
        temperature = number(self.temperature)
        query_BE, key_BE = unit(prediction_BE) / temperature, unit(target_BE)
        own_B = (query_BE * key_BE).sum(dim=1)
        # Finite, to avoid inf − inf with an empty queue.
        mask_Q = torch.zeros(len(queue_QE), device=queue_QE.device)
        mask_Q = mask_Q.masked_fill(torch.arange(len(queue_QE), device=queue_QE.device) >= filled, -1e30)
        others_B: Tensor = _LogSumExp.apply(query_BE, queue_QE.float(), mask_Q)  # type: ignore[no-untyped-call]
        return _with_bound(torch.logaddexp(own_B, others_B) - own_B, (filled + 1).log())

    def over_prototypes(self, logits_NK: Tensor, target: Assigned) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy with the target's distribution over K prototypes. `logits_NK` are cosines over τ.

        The mutual information between the input and the target's prototype is at least H(mean target) − loss. This
        equals log K − loss for evenly used prototypes.
        """
        loss_N = -(target.probabilities_NK * F.log_softmax(logits_NK.float(), dim=-1)).sum(dim=-1)
        loss = loss_N.mean() if target.share_N is None else (loss_N * target.share_N).sum()
        own = loss.detach() if target.counted is None else loss.detach() / target.counted
        return loss, target.entropy - own


def _with_bound(loss_B: Tensor, log_candidates: Tensor | float) -> tuple[Tensor, Tensor]:
    loss = loss_B.mean()
    return loss, log_candidates - loss.detach()


class _LogSumExp(torch.autograd.Function):
    """log Σ_q exp(ẑ·z_q + mask_q) per row: (B), without ever storing (B, Q).

    For a dense loss term, B is all patches of a micro-batch and Q the queue. With 128 images of 196 patches and 65,536
    targets, the logits take 6.6 GB, and every step of a plain softmax takes the same again. Logits, sum and gradient
    (softmax · queue; targets have none) are therefore computed in blocks of rows.
    """

    @staticmethod
    def forward(ctx: Any, query_BE: Tensor, queue_QE: Tensor, mask_Q: Tensor) -> Tensor:
        with_ones_QF = torch.cat([queue_QE, torch.ones_like(queue_QE[:, :1])], dim=1)
        sums, gradients = [], []
        for block_NE in query_BE.split(max(1, _BLOCK // max(1, len(queue_QE)))):
            logits_NQ = torch.addmm(mask_Q, block_NE, queue_QE.T)
            largest_N1 = logits_NQ.amax(dim=1, keepdim=True)
            weighted_NF = logits_NQ.sub_(largest_N1).exp_() @ with_ones_QF
            sum_N1 = weighted_NF[:, -1:]
            sums.append((largest_N1 + sum_N1.log())[:, 0])
            if ctx.needs_input_grad[0]:
                gradients.append(weighted_NF[:, :-1] / sum_N1)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None, None]:
        return gradient_B[:, None] * ctx.saved_tensors[0], None, None
