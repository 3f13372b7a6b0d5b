"""Contrastive image-text loss with the text tower's embedding of the caption."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.config.sections import MAX_WIDTH
from m3i_scale.data.batch import Batch
from m3i_scale.objective.distributions.base import Loss
from m3i_scale.objective.distributions.pairs import BoltzmannPairs, PairDistribution, PairTargets
from m3i_scale.objective.regularizers.base import OtherCandidates
from m3i_scale.objective.targets.base import Context, Encoded, Sizes, Target, TargetModules


class Text(Target):
    """Image-text contrastive loss: which text of the global batch belongs to the image."""

    kind: ClassVar[str] = "text"
    modality: ClassVar[str] = "text"
    representation: ClassVar[str] = "text embedding"
    encoder: Literal["text_tower"] = "text_tower"
    distribution: PairDistribution = BoltzmannPairs()
    regularizer: OtherCandidates = OtherCandidates()
    width: int = Field(default=512, ge=8, le=MAX_WIDTH)
    """Dimension of the shared embedding space."""

    def build_head(self, sizes: Sizes) -> nn.Module:
        return TextHead(sizes.decoded, self.width, self.distribution.temperature, self.distribution.first_bias)

    def present(self, batch: Batch) -> Tensor:
        """Return which samples have a text: bool (B)."""
        return batch.has_text_B

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of −log P̂ of the paired text."""
        texts = cast(PairTargets, context.text)
        prediction_BE, scale, bias = given.head(encoded.pooled(given.decoder))
        value, nats = self.distribution.loss(prediction_BE, texts, scale, bias, given.ranks)
        return Loss(value, nats, watched={"z": texts.own_BE, "valid": texts.valid_B, "scale": scale})


class TextHead(nn.Module):
    """Projection of ẑ_y onto the unit sphere, with the learned temperature (and bias) of the loss."""

    max_scale = 100.0

    def __init__(self, input_width: int, width: int, temperature: float, bias: float | None = None) -> None:
        super().__init__()
        self.projection = nn.Linear(input_width, width, bias=False)
        self.first_temperature, self.first_bias = temperature, bias
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1)) if bias is not None else None

    def reset_parameters(self) -> None:
        """Initialize the temperature, and the bias of a Bernoulli target."""
        nn.init.constant_(self.log_scale, math.log(1 / self.first_temperature))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return unit vectors fp32 (B, E), 1/τ (1), at most 100, and the bias (1) of a Bernoulli target."""
        prediction_BE = F.normalize(self.projection(pooled_BD).float(), dim=-1)
        log_scale = self.log_scale.float()
        # Straight-through: a hard clamp has no gradient above the limit, so one overshoot would freeze τ permanently.
        bounded = log_scale + (log_scale.clamp(max=math.log(self.max_scale)) - log_scale).detach()
        # The parameter is an offset to the initial bias: bf16 has steps of 1/16 near −10.
        bias = None if self.bias is None or self.first_bias is None else self.bias.float() + self.first_bias
        return prediction_BE, bounded.exp(), bias
