"""Predict the class label."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.config.sections import Kind
from m3i_scale.data.batch import Batch, MixedBatch
from m3i_scale.data.shards import LABELS
from m3i_scale.objective.distributions import Loss
from m3i_scale.objective.heads import RunningStatistics
from m3i_scale.objective.ranks import Ranks, global_count, global_mean
from m3i_scale.objective.regularizers import OtherCandidates
from m3i_scale.objective.targets.base import Context, Encoded, Sizes, Target, TargetModules


class BoltzmannClasses(Kind):
    """P̂ of a class label: a softmax over the K classes of a label set."""

    kind: ClassVar[str] = "boltzmann"
    bounds_information: ClassVar[bool] = True
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Probability that is spread evenly over all classes."""

    def loss(
        self,
        logits_BK: Tensor,
        labels_B: Tensor,
        valid_B: Tensor,
        ranks: Ranks,
        soft_BK: Tensor | None = None,
        count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy, and log K − the cross-entropy without label smoothing and mixing.

        `soft_BK` are soft labels, already smoothed, instead of `labels_B`. `count` is the divisor of the sums over all
        ranks; default: the number of valid samples.
        """
        count = global_count(valid_B, ranks) if count is None else count
        logits_BK = logits_BK.float()
        safe_B = labels_B.clamp(min=0)
        if soft_BK is None:
            loss_B = F.cross_entropy(logits_BK, safe_B, reduction="none", label_smoothing=self.label_smoothing)
        else:
            loss_B = F.cross_entropy(logits_BK, soft_BK, reduction="none")
        loss = global_mean(loss_B, valid_B, ranks, count)
        plain_B = loss_B.detach()
        if self.label_smoothing or soft_BK is not None:
            plain_B = F.cross_entropy(logits_BK.detach(), safe_B, reduction="none")
        return loss, global_mean(math.log(logits_BK.shape[1]) - plain_B, valid_B, ranks, count)


class Category(Target):
    """Classification: the class of the image within its label set."""

    kind: ClassVar[str] = "category"
    is_image_level: ClassVar[bool] = True
    modality: ClassVar[str] = "category"
    representation: ClassVar[str] = "category embedding"
    labels_file: ClassVar[str | None] = LABELS
    encoder: Literal["embedding"] = "embedding"
    distribution: BoltzmannClasses = BoltzmannClasses()
    regularizer: OtherCandidates = OtherCandidates()
    batch_norm: bool = False
    """Whether a `FeatureNorm` precedes the classifier."""

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("top_1",)

    @property
    def compares_samples(self) -> bool:
        """Return whether batch norm is used. The loss itself compares classes, not samples."""
        return self.batch_norm

    @property
    def covers_steps(self) -> bool:
        """Return whether there is no batch norm, which would update its running statistics once per micro-batch."""
        return not self.batch_norm

    def build_head(self, sizes: Sizes) -> nn.Module:
        norm = FeatureNorm(sizes.decoded, sizes.ranks) if self.batch_norm else None
        return CategoryHead(sizes.decoded, sizes.classes, norm)

    def present(self, batch: Batch) -> Tensor:
        return (batch.labels_B >= 0) & (batch.label_sets_B >= 0)

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return the mean over all labeled samples, as a sum over label sets; in evaluation mode also top-1
        accuracy."""
        batch, ranks = context.batch, given.ranks
        labelled_B, count = self.present(batch), context.counts[self.name]
        losses, nats, top_1 = [], [], []
        for number, logits_BK in enumerate(given.head(encoded.pooled(given.decoder))):
            valid_B = labelled_B & (batch.label_sets_B == number)
            labels_B = batch.labels_B.masked_fill(~valid_B, 0)  # another set's label may be out of this set's range
            soft_BK = batch.soft_labels_BK if isinstance(batch, MixedBatch) else None
            set_loss, set_nats = self.distribution.loss(logits_BK, labels_B, valid_B, ranks, soft_BK, count)
            losses.append(set_loss)
            nats.append(set_nats)
            if not given.head.training:
                top_1.append(global_mean((logits_BK.argmax(dim=1) == labels_B).float(), valid_B, ranks, count))
        return Loss(
            torch.stack(losses).sum(), torch.stack(nats).sum(), top_1=torch.stack(top_1).sum() if top_1 else None
        )


class Classifier(nn.Linear):
    """Linear classifier over one label set. Logits start small, so that no class is preferred initially."""

    def reset_parameters(self) -> None:
        """Initialize weights with a std of 0.02 and biases with 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class FeatureNorm(RunningStatistics):
    """Batch norm of features without learned scale, as MAE and SIM use it before a linear head."""

    eps = 1e-6

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return features of mean 0 and variance 1."""
        centred_BD, var_D = self.centered(x_BD)
        return (centred_BD * (var_D + self.eps).rsqrt()).to(x_BD.dtype)


class CategoryHead(nn.Module):
    """Linear classifiers, one per label set; their rows are the category embeddings."""

    def __init__(self, input_width: int, classes: list[int], norm: FeatureNorm | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.sets = nn.ModuleList([Classifier(input_width, count) for count in classes])

    def forward(self, pooled_BD: Tensor) -> list[Tensor]:
        """Return logits (B, K) for every label set, from (B, D)."""
        features_BD = pooled_BD if self.norm is None else self.norm(pooled_BD)
        return [classifier(features_BD) for classifier in self.sets]
