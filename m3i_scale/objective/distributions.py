"""P̂(z_y | ẑ_y): the two distributions of the paper, as negative log-likelihoods in fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.objective.ranks import Ranks, global_mean


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


def boltzmann_pairs(prediction_BE: Tensor, targets: PairTargets, scale: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over the global batch, and its bound in nats (mean of both directions).

    Args:
        prediction_BE: L2-normalised ẑ of this rank's samples.
        targets: what they are to be found among.
        scale: 1/τ, one element.
        ranks: other ranks, whose samples are negatives too.
    """
    losses = []
    for query_BE, keys_GE in ((prediction_BE, targets.all_GE), (targets.own_BE, ranks.gather(prediction_BE))):
        logits_BG = scale.float() * query_BE.float() @ keys_GE.float().T
        logits_BG = logits_BG.masked_fill(targets.out_BG, -torch.inf)
        losses.append(F.cross_entropy(logits_BG, targets.column_B, reduction="none"))
    loss_B = (losses[0] + losses[1]) / 2
    loss = global_mean(loss_B, targets.valid_B, ranks)
    candidates_B = (~targets.out_BG).sum(dim=1)
    nats = global_mean(candidates_B.float().log() - loss_B.detach(), targets.valid_B, ranks)
    return loss, nats
