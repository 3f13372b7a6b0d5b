"""Contrastive image-text loss with the text tower's embedding of the caption, and its P̂: a softmax (Boltzmann, CLIP) or
sigmoids (Bernoulli, SigLIP) over the texts of the global batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.config.sections import MAX_WIDTH, Kind
from m3i_scale.data.batch import Batch
from m3i_scale.objective.distributions import Loss
from m3i_scale.objective.ranks import Ranks, global_mean
from m3i_scale.objective.regularizers import OtherCandidates
from m3i_scale.objective.targets.base import Context, Encoded, Sizes, Target, TargetModules


@dataclass
class PairTargets:
    """The targets of the global batch, to which every prediction of this rank is compared."""

    own_BE: Tensor
    """L2-normalized z of this rank's samples."""
    all_GE: Tensor
    """Embeddings of all ranks, with gradient."""
    valid_B: Tensor
    """bool: which of this rank's samples have a target."""
    column_B: Tensor
    """int64: column of each of this rank's samples in the global batch."""
    out_BG: Tensor
    """bool: columns that are neither negatives of a sample nor its target."""
    count: Tensor
    """fp32: number of samples with a target over all ranks."""


def gather_targets(target_BE: Tensor, item_B: Tensor, valid_B: Tensor, ranks: Ranks) -> PairTargets:
    """Gather the L2-normalized targets of all ranks, once per micro-batch for any number of inputs. Samples with the
    same `item_B` (int64, not negative, only read if valid) are not negatives of each other."""
    all_items_G = ranks.gather(item_B.masked_fill(~valid_B, -1))
    all_valid_G = all_items_G >= 0
    own_B = torch.arange(len(item_B), device=item_B.device) + ranks.rank * len(item_B)
    # Samples without a target, and other samples with the same target, are excluded from the softmax. A sample's column
    # stays, so that its row is finite before masking even without a target.
    out_BG = ~all_valid_G | (item_B[:, None] == all_items_G)
    out_BG.scatter_(1, own_B[:, None], False)
    count = all_valid_G.sum(dtype=torch.float32)
    return PairTargets(target_BE, ranks.gather(target_BE), valid_B, own_B, out_BG, count)


class PairDistribution(Kind):
    """Base class of P̂ for text targets."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    bounds_information: ClassVar[bool] = True
    temperature: float = Field(default=0.07, gt=0)
    """Init value of the learned τ."""

    max_scale: ClassVar[float] = 100.0
    """Upper limit of 1/τ, as in CLIP."""

    @property
    def first_bias(self) -> float | None:
        """Return the init value of the learned logit bias, or None without bias."""
        return None

    @abstractmethod
    def loss(
        self, prediction_BE: Tensor, targets: PairTargets, scale: Tensor, bias: Tensor | None, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Return −log P̂ over the global batch and its bound in nats.

        Args:
            prediction_BE: L2-normalized ẑ of this rank's samples.
            scale: 1/τ, one element.
            bias: bias of all logits, one element; None without `first_bias`.
        """


class BoltzmannPairs(PairDistribution):
    """InfoNCE: a softmax over the texts of the batch, and one over its images (mean over both directions)."""

    kind: ClassVar[str] = "boltzmann"
    direction: Literal["both", "forward"] = "both"
    """both: image-to-text and text-to-image (CLIP); forward: image-to-text only, −log P̂(z_y | ẑ_y) of equation (2)."""

    def loss(
        self, prediction_BE: Tensor, targets: PairTargets, scale: Tensor, bias: Tensor | None, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy, and log K − cross-entropy."""
        directions = [(prediction_BE, targets.all_GE)]
        if self.direction == "both":
            directions.append((targets.own_BE, ranks.gather(prediction_BE)))
        losses = []
        for query_BE, keys_GE in directions:
            logits_BG = scale.float() * query_BE.float() @ keys_GE.float().T
            logits_BG = logits_BG.masked_fill(targets.out_BG, -torch.inf)
            losses.append(F.cross_entropy(logits_BG, targets.column_B, reduction="none"))
        loss_B = sum(losses[1:], losses[0]) / len(losses)
        loss = global_mean(loss_B, targets.valid_B, ranks, targets.count)
        candidates_B = (~targets.out_BG).sum(dim=1)
        return loss, global_mean(candidates_B.float().log() - loss_B.detach(), targets.valid_B, ranks, targets.count)


class BernoulliPairs(PairDistribution):
    """Sigmoid loss: each image-text pair either matches or not (SigLIP). Sum over texts, mean over images."""

    kind: ClassVar[str] = "bernoulli"
    bias: float = -10.0
    """Init value of the learned bias."""
    max_scale: ClassVar[float] = math.inf

    @property
    def first_bias(self) -> float:
        return self.bias

    def loss(
        self, prediction_BE: Tensor, targets: PairTargets, scale: Tensor, bias: Tensor | None, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Return −Σ log σ(±logit). Any critic gives a bound, so the bound is from a softmax over these logits."""
        offset = 0.0 if bias is None else bias.float()
        logits_BG = scale.float() * prediction_BE.float() @ targets.all_GE.float().T + offset
        sign_BG = -torch.ones_like(logits_BG)
        sign_BG.scatter_(1, targets.column_B[:, None], 1.0)
        loss_B = -(F.logsigmoid(sign_BG * logits_BG).masked_fill(targets.out_BG, 0.0)).sum(dim=1)
        loss = global_mean(loss_B, targets.valid_B, ranks, targets.count)
        kept_BG = logits_BG.detach().masked_fill(targets.out_BG, -torch.inf)
        plain_B = F.cross_entropy(kept_BG, targets.column_B, reduction="none")
        candidates_B = (~targets.out_BG).sum(dim=1)
        return loss, global_mean(candidates_B.float().log() - plain_B, targets.valid_B, ranks, targets.count)


class Text(Target):
    """Image-text contrastive loss: which text of the global batch belongs to the image."""

    kind: ClassVar[str] = "text"
    is_image_level: ClassVar[bool] = True
    modality: ClassVar[str] = "text"
    representation: ClassVar[str] = "text embedding"
    encoder: Literal["text_tower"] = "text_tower"
    distribution: PairDistribution = BoltzmannPairs()
    regularizer: OtherCandidates = OtherCandidates()
    width: int | None = Field(default=512, ge=8, le=MAX_WIDTH)
    """Dimension of the shared embedding space. null: the decoder's width, without projection (SigLIP)."""

    def build_head(self, sizes: Sizes) -> nn.Module:
        return TextHead(sizes.decoded, self.width, self.distribution)

    def present(self, batch: Batch) -> Tensor:
        return batch.has_text_B

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        texts: PairTargets = context.text
        prediction_BE, scale, bias = given.head(encoded.pooled(given.decoder))
        value, nats = self.distribution.loss(prediction_BE, texts, scale, bias, given.ranks)
        return Loss(value, nats, watched={"z": texts.own_BE, "valid": texts.valid_B, "scale": scale})


class TextHead(nn.Module):
    """Projection of ẑ_y onto the unit sphere, with the learned temperature (and bias) of the loss."""

    def __init__(self, input_width: int, width: int | None, distribution: PairDistribution) -> None:
        super().__init__()
        self.projection = None if width is None else nn.Linear(input_width, width, bias=False)
        self.first_temperature, self.first_bias = distribution.temperature, distribution.first_bias
        self.max_scale = distribution.max_scale
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1)) if self.first_bias is not None else None

    def reset_parameters(self) -> None:
        """Initialize the temperature, and the bias of a Bernoulli target."""
        nn.init.constant_(self.log_scale, math.log(1 / self.first_temperature))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return unit vectors fp32 (B, E), 1/τ (1), and the bias (1) of a Bernoulli target."""
        projected_BE = pooled_BD if self.projection is None else self.projection(pooled_BD)
        prediction_BE = F.normalize(projected_BE.float(), dim=-1)
        log_scale = self.log_scale.float()
        # Straight-through: a hard clamp has no gradient above the limit, so one overshoot would freeze τ permanently.
        bounded = log_scale + (log_scale.clamp(max=math.log(self.max_scale)) - log_scale).detach()
        # The parameter is an offset to the initial bias: bf16 has steps of 1/16 near −10.
        bias = None if self.bias is None or self.first_bias is None else self.bias.float() + self.first_bias
        return prediction_BE, bounded.exp(), bias
