"""P̂ of a category: a softmax over the classes of a label set."""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from m3i_scale.config.kinds import Kind
from m3i_scale.objective.ranks import Ranks, global_mean


class ClassDistribution(Kind):
    """P̂ of a category target."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    bounds_information: ClassVar[bool] = True

    def loss(self, logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Return −log P̂ and its bound in nats, mean over the samples with a label.

        Args:
            logits_BK: ẑ against the embedding of every class.
            labels_B: the class of every sample; any number where there is none.
            valid_B: bool, whether there is one.
            ranks: for the mean over all samples.
        """
        raise NotImplementedError


class BoltzmannClasses(ClassDistribution):
    """A softmax over K classes."""

    kind: ClassVar[str] = "boltzmann"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    def loss(self, logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy, and log K − the plain one, also where labels are smoothed."""
        logits_BK = logits_BK.float()
        safe_B = labels_B.clamp(min=0)
        loss_B = F.cross_entropy(logits_BK, safe_B, reduction="none", label_smoothing=self.label_smoothing)
        loss = global_mean(loss_B, valid_B, ranks)
        plain_B = F.cross_entropy(logits_BK.detach(), safe_B, reduction="none")
        return loss, global_mean(math.log(logits_BK.shape[1]) - plain_B, valid_B, ranks)
