"""Compute the Boltzmann P̂ = exp(ẑ·z/τ) / Σ_z' exp(ẑ·z'/τ) of image targets: among samples, a queue or prototypes.

For K candidates, log K − loss is the InfoNCE lower bound on the mutual information in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.distributions.base import Distribution, unit
from m3i_scale.objective.ranks import Ranks, mean_row
from m3i_scale.objective.schedule import Positive, Scheduled, number

_BLOCK = 2**23
"""Logits of a queue that are held at a time: 32 MB."""

_SAFE_BOUND = 40.0
"""Where cosines over the temperature stay within this, exp(logit − bound) neither overflows nor vanishes in fp32."""


@dataclass(frozen=True)
class Assigned:
    """Holds the distributions of a target over K prototypes, and what those of all ranks have in common."""

    probabilities_NK: Tensor
    share_N: Tensor | None
    """What every row counts in the loss; None: all alike, 1/N."""
    entropy: Tensor
    """H of the mean of all rows, in nats."""
    counted: Tensor | None
    """Sum of the shares of a rank, in the mean over ranks; None where they are not given."""


def assigned(probabilities_NK: Tensor, ranks: Ranks, share_N: Tensor | None = None) -> Assigned:
    """Return the distributions of a target: one collective, however many inputs predict it."""
    mean_K, counted = mean_row(probabilities_NK, share_N, ranks)
    return Assigned(probabilities_NK, share_N, -torch.special.xlogy(mean_K, mean_K).sum(), counted)


class Boltzmann(Distribution):
    """Applies a softmax over candidates of the regulariser. Methods return −log P̂ and its bound in nats."""

    kind: ClassVar[str] = "boltzmann"
    bounds_information: ClassVar[bool] = True
    temperature: Scheduled[Positive] = 0.07
    """τ, which is not learnt: a number, or a schedule."""

    def among_samples(
        self, prediction_BE: Tensor, target_BE: Tensor, ranks: Ranks, *, both: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Ask which of the global batch's targets belongs to the prediction (InfoNCE).

        Args:
            prediction_BE: ẑ of this rank's samples.
            target_BE: z of this rank's samples, in the same order.
            ranks: other ranks, whose samples are negatives too.
            both: the other samples' predictions are negatives too (NT-Xent of SimCLR).
        """
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
        """Ask which of its own target and those of earlier batches belongs to the prediction (MoCo).

        Args:
            prediction_BE: ẑ of this rank's samples.
            target_BE: z of this rank's samples, in the same order.
            queue_QE: earlier targets, unit vectors.
            filled: how many rows of the queue count.
        """
        temperature = number(self.temperature)
        query_BE, key_BE = unit(prediction_BE) / temperature, unit(target_BE)
        own_B = (query_BE * key_BE).sum(dim=1)
        # Finite, so that an empty queue leaves no inf − inf behind.
        mask_Q = torch.zeros(len(queue_QE), device=queue_QE.device)
        mask_Q = mask_Q.masked_fill(torch.arange(len(queue_QE), device=queue_QE.device) >= filled, -1e30)
        bound = 1 / temperature if 1 / temperature <= _SAFE_BOUND else None
        others_B: Tensor = _LogSumExp.apply(query_BE, queue_QE.float(), mask_Q, bound)  # type: ignore[no-untyped-call]
        return _with_bound(torch.logaddexp(own_B, others_B) - own_B, (filled + 1).log())

    def over_prototypes(self, logits_NK: Tensor, target: Assigned) -> tuple[Tensor, Tensor]:
        """Ask for the target's distribution over K prototypes.

        The information between the input and the target's prototype is at least H(mean target) − loss, which is log K −
        loss where the prototypes are used evenly.

        Args:
            logits_NK: cosines of the prediction over τ.
            target: what is predicted.
        """
        loss_N = -(target.probabilities_NK * F.log_softmax(logits_NK.float(), dim=-1)).sum(dim=-1)
        loss = loss_N.mean() if target.share_N is None else (loss_N * target.share_N).sum()
        own = loss.detach() if target.counted is None else loss.detach() / target.counted
        return loss, target.entropy - own


def _with_bound(loss_B: Tensor, log_candidates: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the mean loss, and log K − loss."""
    loss = loss_B.mean()
    return loss, log_candidates - loss.detach()


class _LogSumExp(torch.autograd.Function):
    """Computes log Σ_q exp(ẑ·z_q + mask_q) per row: (B), without ever holding (B, Q).

    In a dense group B is all patches of a micro-batch and Q the queue: 128 images of 196 patches against 65,536 targets
    are 6.6 GB of logits, as much again in every step of a plain softmax. Here a block of rows at a time makes its
    logits, its sum and its gradient, which for targets without gradient is softmax · queue.

    Cosines over a temperature have a known largest value, `bound`: subtracted with the mask, it saves looking for the
    largest of every row and a pass over all logits. One product gives sum and gradient. What is left is one exponential
    a logit, which no count of FLOPs knows. Without a bound the largest of each row is looked for.
    """

    @staticmethod
    def forward(ctx: Any, query_BE: Tensor, queue_QE: Tensor, mask_Q: Tensor, bound: float | None) -> Tensor:
        shifted_Q = mask_Q - (bound or 0.0)
        with_ones_QF = torch.cat([queue_QE, torch.ones_like(queue_QE[:, :1])], dim=1)
        sums, gradients = [], []
        for block_NE in query_BE.split(max(1, _BLOCK // max(1, len(queue_QE)))):
            logits_NQ = torch.addmm(shifted_Q, block_NE, queue_QE.T)
            largest_N1: Tensor | float = bound or 0.0
            if bound is None:
                largest_N1 = logits_NQ.amax(dim=1, keepdim=True)
                logits_NQ.sub_(largest_N1)
            weighted_NF = logits_NQ.exp_() @ with_ones_QF
            sum_N1 = weighted_NF[:, -1:].clamp(min=torch.finfo(weighted_NF.dtype).tiny)  # 0 where nothing is queued
            sums.append((largest_N1 + sum_N1.log())[:, 0])
            if ctx.needs_input_grad[0]:
                gradients.append(weighted_NF[:, :-1] / sum_N1)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient_B[:, None] * ctx.saved_tensors[0], None, None, None
