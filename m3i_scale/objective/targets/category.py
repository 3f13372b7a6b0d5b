"""The annotated category."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from m3i_scale.backbones.presets import VisionConfig
from m3i_scale.data.batch import Batch
from m3i_scale.objective.decoders import pool
from m3i_scale.objective.distributions.base import Loss
from m3i_scale.objective.distributions.classes import BoltzmannClasses, ClassDistribution
from m3i_scale.objective.regularizers.base import CandidateRegularizer, OtherCandidates
from m3i_scale.objective.targets.base import Context, Encoded, Given, Target


class Category(Target):
    """Which class of its label set the image shows."""

    kind: ClassVar[str] = "category"
    modality: ClassVar[str] = "category"
    representation: ClassVar[str] = "category embedding"
    a_target: ClassVar[str] = "a category"
    encoder: Literal["embedding"] = "embedding"
    distribution: ClassDistribution = BoltzmannClasses()
    regularizer: CandidateRegularizer = OtherCandidates()

    @property
    def compares_samples(self) -> bool:
        """Return False: classes are compared, not samples."""
        return False

    def build_head(
        self, width: int, config: VisionConfig, label_sets: dict[str, list[str]], teacher_width: int | None
    ) -> nn.Module:
        """Return a `CategoryHead`."""
        return CategoryHead(width, [len(names) for names in label_sets.values()])

    def present(self, batch: Batch) -> Tensor:
        """See `Target`."""
        return (batch.labels_B >= 0) & (batch.label_sets_B >= 0)

    def loss(self, given: Given, context: Context, encoded: Encoded) -> Loss:
        """Return the sum over label sets, weighted by their labelled samples: a mean over all labelled samples."""
        batch, ranks = context.batch, given.ranks
        pooled_BD = pool(given.decoder, encoded.cls_B1D, encoded.tokens_BLD)
        labelled_B = self.present(batch)
        total = ranks.sum(labelled_B.sum().float()).clamp(min=1)
        loss, nats = torch.zeros((), device=total.device), torch.zeros((), device=total.device)
        for number, logits_BK in enumerate(given.head(pooled_BD)):
            valid_B = labelled_B & (batch.label_sets_B == number)
            share = ranks.sum(valid_B.sum().float()) / total
            labels_B = batch.labels_B.where(valid_B, 0)  # another set's label may be out of this set's range
            set_loss, set_nats = self.distribution.loss(logits_BK, labels_B, valid_B, ranks)
            loss, nats = loss + share * set_loss, nats + share * set_nats
        return Loss(loss, nats)


class Classifier(nn.Linear):
    """Logits over one label set. Small at first, so that no class is preferred before anything was seen."""

    def reset_parameters(self) -> None:
        """First values: a deviation of 0.02, no bias."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class CategoryHead(nn.Module):
    """Logits over each label set: ẑ_y against the category embeddings, which are the rows of a linear classifier."""

    def __init__(self, input_width: int, classes: list[int]) -> None:
        super().__init__()
        self.sets = nn.ModuleList([Classifier(input_width, count) for count in classes])

    def forward(self, pooled_BD: Tensor) -> list[Tensor]:
        """(B, D) → for every label set, logits (B, K)."""
        return [classifier(pooled_BD) for classifier in self.sets]
