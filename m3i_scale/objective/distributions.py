"""P̂(z_y | ẑ_y) as negative log-likelihoods in fp32: the two distributions of the paper, and the Bernoulli of SigLIP.

All functions give this rank's share: its mean over ranks is the loss of the global batch, and so is that of gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.ranks import Ranks, global_mean

_BLOCK = 2**23
"""Logits of a queue that are held at a time: 32 MB."""

_SAFE_BOUND = 40.0
"""Where cosines over the temperature stay within this, exp(logit − bound) neither overflows nor vanishes in fp32."""


def gaussian(prediction_BND: Tensor, target_BND: Tensor, sigma2: float, ranks: Ranks) -> Tensor:
    """−log N(z; ẑ, σ²I) without its constant, per dimension: ‖z − ẑ‖² / (2σ²D), mean over tokens and samples."""
    error_B = (prediction_BND.float() - target_BND.float()).square().mean(dim=(1, 2)) / (2 * sigma2)
    return global_mean(error_B, torch.ones_like(error_B), ranks)


def boltzmann_classes(
    logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor, label_smoothing: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy over K classes and its bound log K − loss on the mutual information in nats.

    Rows without a label are masked. The bound uses the plain cross-entropy even where labels are smoothed.
    """
    logits_BK = logits_BK.float()
    safe_B = labels_B.clamp(min=0)
    loss_B = F.cross_entropy(logits_BK, safe_B, reduction="none", label_smoothing=label_smoothing)
    loss = global_mean(loss_B, valid_B, ranks)
    plain_B = F.cross_entropy(logits_BK.detach(), safe_B, reduction="none")
    nats = global_mean(math.log(logits_BK.shape[1]) - plain_B, valid_B, ranks)
    return loss, nats


@dataclass
class PairTargets:
    """Targets of the global batch, which every prediction of this rank is compared with."""

    own_BE: Tensor
    """L2-normalised z of this rank's samples."""
    all_GE: Tensor
    """Those of all ranks, with gradient."""
    valid_B: Tensor
    """bool: which of this rank's samples have a target."""
    column_B: Tensor
    """int64: where this rank's samples lie among all."""
    out_BG: Tensor
    """bool: what is no negative of a sample, nor its own target."""


def gather_targets(target_BE: Tensor, item_B: Tensor, valid_B: Tensor, ranks: Ranks) -> PairTargets:
    """Gathered once for a micro-batch, however many inputs predict them.

    Args:
        target_BE: L2-normalised z of this rank's samples.
        item_B: identity of the target; equal items of other samples are not negatives. Only read where valid.
        valid_B: bool, whether the sample has a target.
        ranks: other ranks, whose samples are negatives too.
    """
    all_items_G = ranks.gather(item_B)
    all_valid_G = ranks.gather(valid_B)
    own_B = torch.arange(len(item_B), device=item_B.device) + ranks.rank * len(item_B)
    # Out of the softmax: samples without a target, and other samples with the same target. Own columns stay, so that
    # the row of a sample without target is finite before it is masked.
    out_BG = ~all_valid_G | (item_B[:, None] == all_items_G)
    out_BG[torch.arange(len(own_B), device=own_B.device), own_B] = False
    return PairTargets(target_BE, ranks.gather(target_BE), valid_B, own_B, out_BG)


def boltzmann_pairs(
    prediction_BE: Tensor, targets: PairTargets, scale: Tensor, ranks: Ranks, *, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """InfoNCE over the global batch, and its bound in nats (mean over the directions).

    Args:
        prediction_BE: L2-normalised ẑ of this rank's samples.
        targets: what they are to be found among.
        scale: 1/τ, one element.
        ranks: other ranks, whose samples are negatives too.
        symmetric: a target is also to be found among the predictions (CLIP); without it the loss is −log P̂(z_y | ẑ_y)
            of equation (2) alone.
    """
    directions = [(prediction_BE, targets.all_GE)]
    if symmetric:
        directions.append((targets.own_BE, ranks.gather(prediction_BE)))
    losses = []
    for query_BE, keys_GE in directions:
        logits_BG = scale.float() * query_BE.float() @ keys_GE.float().T
        logits_BG = logits_BG.masked_fill(targets.out_BG, -torch.inf)
        losses.append(F.cross_entropy(logits_BG, targets.column_B, reduction="none"))
    loss_B = sum(losses[1:], losses[0]) / len(losses)
    loss = global_mean(loss_B, targets.valid_B, ranks)
    candidates_B = (~targets.out_BG).sum(dim=1)
    nats = global_mean(candidates_B.float().log() - loss_B.detach(), targets.valid_B, ranks)
    return loss, nats


def bernoulli_pairs(
    prediction_BE: Tensor, targets: PairTargets, scale: Tensor, bias: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Every pair of an image and a text of the global batch is a match or none (SigLIP), and the softmax bound in nats.

    The sum over the texts, mean over the images. Any critic gives a bound, so the softmax one is taken of these logits.

    Args:
        prediction_BE: L2-normalised ẑ of this rank's samples.
        targets: texts that they do or do not belong to.
        scale: 1/τ, one element.
        bias: added to every logit, one element.
        ranks: other ranks, whose texts count too.
    """
    logits_BG = scale.float() * prediction_BE.float() @ targets.all_GE.float().T + bias.float()
    sign_BG = -torch.ones_like(logits_BG)
    sign_BG.scatter_(1, targets.column_B[:, None], 1.0)
    loss_B = -(F.logsigmoid(sign_BG * logits_BG).masked_fill(targets.out_BG, 0.0)).sum(dim=1)
    loss = global_mean(loss_B, targets.valid_B, ranks)
    kept_BG = logits_BG.detach().masked_fill(targets.out_BG, -torch.inf)
    plain_B = F.cross_entropy(kept_BG, targets.column_B, reduction="none")
    candidates_B = (~targets.out_BG).sum(dim=1)
    return loss, global_mean(candidates_B.float().log() - plain_B, targets.valid_B, ranks)


def gaussian_unit(prediction_BE: Tensor, target_BE: Tensor, sigma2: float, ranks: Ranks) -> Tensor:
    """‖z − ẑ‖² / 2σ² of vectors on the unit sphere, mean over samples: (2 − 2 cos) / 2σ² (BYOL, SimSiam)."""
    error_B = (unit(prediction_BE) - unit(target_BE)).square().sum(dim=-1) / (2 * sigma2)
    return global_mean(error_B, torch.ones_like(error_B), ranks)


def boltzmann_samples(
    prediction_BE: Tensor, target_BE: Tensor, temperature: float, ranks: Ranks, *, both: bool = False
) -> tuple[Tensor, Tensor]:
    """Which of the global batch's targets belongs to the prediction (InfoNCE), and its bound log K − loss in nats.

    Args:
        prediction_BE: ẑ of this rank's samples.
        target_BE: z of this rank's samples, in the same order.
        temperature: τ.
        ranks: other ranks, whose samples are negatives too.
        both: the other samples' predictions are negatives too (NT-Xent of SimCLR).
    """
    query_BE, key_BE = unit(prediction_BE), unit(target_BE)
    own_B = torch.arange(len(query_BE), device=query_BE.device) + ranks.rank * len(query_BE)
    logits_BG = query_BE @ ranks.gather(key_BE).T / temperature
    candidates = logits_BG.shape[1]
    if both:
        itself_BG = query_BE @ ranks.gather(query_BE).T / temperature
        logits_BG = torch.cat([logits_BG, itself_BG.scatter(1, own_B[:, None], -torch.inf)], dim=1)
        candidates = 2 * candidates - 1
    return _softmax(logits_BG, own_B, candidates, ranks)


def boltzmann_queue(
    prediction_BE: Tensor, target_BE: Tensor, queue_QE: Tensor, filled: Tensor, temperature: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The own target among those of earlier batches (MoCo), and its bound log K − loss in nats.

    Args:
        prediction_BE: ẑ of this rank's samples.
        target_BE: z of this rank's samples, in the same order.
        queue_QE: earlier targets, unit vectors.
        filled: how many rows of the queue count.
        temperature: τ.
        ranks: for the mean over all samples.
    """
    query_BE, key_BE = unit(prediction_BE) / temperature, unit(target_BE)
    own_B = (query_BE * key_BE).sum(dim=1)
    # Finite, so that an empty queue leaves no inf − inf behind.
    mask_Q = torch.zeros(len(queue_QE), device=queue_QE.device)
    mask_Q = mask_Q.masked_fill(torch.arange(len(queue_QE), device=queue_QE.device) >= filled, -1e30)
    bound = 1 / temperature if 1 / temperature <= _SAFE_BOUND else None
    others_B: Tensor = _LogSumExp.apply(query_BE, queue_QE.float(), mask_Q, bound)  # type: ignore[no-untyped-call]
    loss_B = torch.logaddexp(own_B, others_B) - own_B
    return _with_bound(loss_B, filled + 1, ranks)


class _LogSumExp(torch.autograd.Function):
    """log Σ_q exp(ẑ·z_q + mask_q) per row: (B), without ever holding (B, Q).

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


def boltzmann_soft(logits_BK: Tensor, probabilities_BK: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Cross-entropy to a target distribution over K prototypes, and its bound in nats.

    The information between the input and the target's prototype is at least H(mean target) − loss, which is log K −
    loss where the prototypes are used evenly.
    """
    loss_B = -(probabilities_BK * F.log_softmax(logits_BK.float(), dim=-1)).sum(dim=-1)
    loss = global_mean(loss_B, torch.ones_like(loss_B), ranks)
    mean_K = ranks.sum(probabilities_BK.sum(dim=0)) / (len(probabilities_BK) * ranks.world_size)
    return loss, -torch.special.xlogy(mean_K, mean_K).sum() - loss.detach()


def unit(x_BE: Tensor) -> Tensor:
    """Rows on the unit sphere, in fp32."""
    return F.normalize(x_BE.float(), dim=-1)


def _softmax(logits_BG: Tensor, column_B: Tensor, candidates: Tensor | int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    return _with_bound(F.cross_entropy(logits_BG, column_B, reduction="none"), candidates, ranks)


def _with_bound(loss_B: Tensor, candidates: Tensor | int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The mean loss, and log K − loss."""
    count = torch.as_tensor(candidates, device=loss_B.device, dtype=torch.float32)
    every_B = torch.ones_like(loss_B)
    return global_mean(loss_B, every_B, ranks), global_mean(count.log() - loss_B.detach(), every_B, ranks)
