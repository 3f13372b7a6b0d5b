"""Distributions over the prototypes of a head, for the image or for every masked patch, or over clusters of patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.backbones.base import gather_tokens
from m3i_scale.config.sections import MAX_CANDIDATES
from m3i_scale.objective.distributions import Assigned, Boltzmann, Loss, assigned, unit
from m3i_scale.objective.heads import HeadSpec, PrototypeLayer
from m3i_scale.objective.regularizers import Memory
from m3i_scale.objective.regularizers.prototypes import PrototypeRegularizer, Sinkhorn, sinkhorn
from m3i_scale.objective.schedule import number
from m3i_scale.objective.targets.base import Context, Encoded, HeadTarget, Parts, Sizes, TargetModules
from m3i_scale.objective.targets.patches import PatchTarget
from m3i_scale.objective.targets.pooled import pooled_target

_LARGEST_EXPONENT = 50.0
"""fp32 can represent sums of exp(50), and values down to 137 below in the exponent."""


class Prototypes(HeadTarget):
    """A distribution over the prototypes of the head (DINO, SwAV, MSN)."""

    kind: ClassVar[str] = "prototypes"
    is_image_level: ClassVar[bool] = True
    representation: ClassVar[str] = "global feature"
    encoder: Literal["ema"] = "ema"
    distribution: Boltzmann = Boltzmann()
    regularizer: PrototypeRegularizer

    def build_memory(self, spec: HeadSpec) -> Memory:
        return self.regularizer.memory(spec.width, spec.prototypes)

    @property
    def averages_prototypes(self) -> bool:
        return self.regularizer.averages_prototypes

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        return self.losses(given, context, [encoded])[0]

    def losses(self, given: TargetModules, context: Context, parts: list[Encoded]) -> list[Loss]:
        """Return `loss` of every part. The head runs once on all parts, so it reads its prototypes once."""
        target, remember = self._assign(given, pooled_target(self, given, context))
        pooled = [part.pooled(given.decoder) for part in parts]
        if given.head.compares_rows:
            prediction_NE = torch.cat([given.head(pooled_BD, predict=True) for pooled_BD in pooled])
        else:
            prediction_NE = given.head(torch.cat(pooled), predict=True)
        logits_NK = self._logits(given, prediction_NE)
        return [self._loss(given, logits_BK, target, remember) for logits_BK in logits_NK.split(len(pooled[0]))]

    def _assign(
        self, given: TargetModules, target_NE: Tensor, share_N: Tensor | None = None
    ) -> tuple[Assigned, Tensor | None]:
        with torch.no_grad():
            head = given.momentum.heads[self.head] if self.averages_prototypes else given.head
            target_NK = head.prototypes(target_NE)
            probabilities_NK = self.regularizer.assign(self.distribution, target_NK, given.memory, given.ranks, share_N)
            remember = self.regularizer.remembered(target_NK, given.memory, given.ranks, share_N)
            return assigned(probabilities_NK, given.ranks, share_N), remember

    def _logits(self, given: TargetModules, prediction_NE: Tensor) -> Tensor:
        logits_NK: Tensor = given.head.prototypes(prediction_NE) / number(self.distribution.temperature)
        return logits_NK

    def _loss(self, given: TargetModules, logits_NK: Tensor, target: Assigned, remember: Tensor | None) -> Loss:
        loss = self.regularizer.loss(self.distribution, logits_NK, target, given.ranks)
        loss.remember = remember
        return loss

    def _head_errors(self, head: HeadSpec) -> Iterator[str]:
        if head.prototypes < 2:
            yield f"a distribution over prototypes needs `prototypes` in head '{self.head}', at least 2, e.g. 4096"
        error = self.regularizer.error(self.distribution)
        if error:
            yield error


class DensePrototypes(PatchTarget, Prototypes):
    """iBOT loss: the student predicts the EMA teacher's prototype assignment of every masked patch in the same view.

    The head has separate memories for patches and for images.
    """

    kind: ClassVar[str] = "dense_prototypes"
    representation: ClassVar[str] = "patch features"
    compares_tokens: ClassVar[bool] = True
    weighs_patches: ClassVar[bool] = True
    # Declared again, since pydantic prefers the fields of the first base class.
    encoder: Literal["ema"] = "ema"
    distribution: Boltzmann = Boltzmann()
    regularizer: PrototypeRegularizer

    @property
    def memory_name(self) -> str:
        return f"{self.head}/patches"

    def losses(self, given: TargetModules, context: Context, parts: list[Encoded]) -> list[Loss]:
        return [self.loss(given, context, part) for part in parts]

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of −log P̂ of the patches: mean over patches of an image, then over images. Images
        without masked patches add 0 (as in the code of iBOT and DINOv2)."""
        query_BQ, decoded_BQD = self.decode(given, context, encoded)
        tokens_BND = context.encoded_views[self.encoder_key, self.view][1]
        decoded_ND, target_ND = decoded_BQD.flatten(0, 1), gather_tokens(tokens_BND, query_BQ).flatten(0, 1)
        share_N, where = None, encoded.where
        if self.tokens == "masked" and where.masked_BM is not None and where.masked_N is not None:
            share_N = share_of_hidden(where.masked_BM).flatten()
            if not given.head.compares_rows:  # batch norm needs the same number of rows on every rank
                share_N, decoded_ND, target_ND = (
                    x.index_select(0, where.masked_N) for x in (share_N, decoded_ND, target_ND)
                )
        with torch.no_grad():
            wanted_NE = given.momentum.heads[self.head](target_ND, predict=False)
        target, remember = self._assign(given, wanted_NE, share_N)
        return self._loss(given, self._logits(given, given.head(decoded_ND, predict=True)), target, remember)


class Clusters(PatchTarget):
    """Cluster assignments of patches: Sinkhorn assigns the EMA teacher's tokens to clusters (CAPI).

    Sinkhorn runs separately per patch position, over all images of the global micro-batch. Otherwise clusters would
    encode positions.
    """

    kind: ClassVar[str] = "clusters"
    representation: ClassVar[str] = "dense clusters"
    tokens: Literal["masked", "all"]
    clusters: int = Field(default=16384, ge=2, le=MAX_CANDIDATES)
    """Number K of clusters."""
    encoder: Literal["ema"] = "ema"
    distribution: Boltzmann = Boltzmann(temperature=0.12)
    regularizer: Sinkhorn = Sinkhorn(target_temperature=0.06)

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("prediction", "clustering")

    def build_head(self, sizes: Sizes) -> nn.Module:
        return ClusterHead(sizes.decoded, sizes.encoded, self.clusters)

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of −log P̂ of the predicted patches' assignments, plus the clustering loss."""
        query_BQ, decoded_BQD = self.decode(given, context, encoded)
        if self.name not in context.clusters:
            context.clusters[self.name] = self._assign(given, context)
        assigned_BNK, clustering = context.clusters[self.name]
        logits_NK = given.head.prototypes(decoded_BQD).flatten(0, 1) / number(self.distribution.temperature)
        wanted_NK = gather_tokens(assigned_BNK, query_BQ).flatten(0, 1)
        value, nats = self.distribution.over_prototypes(logits_NK, assigned(wanted_NK, given.ranks))
        terms = {"prediction": value, "clustering": clustering}
        return Loss(value + clustering, nats, watched={"assignment": wanted_NK}, terms=terms)

    def _assign(self, given: TargetModules, context: Context) -> tuple[Tensor, Tensor]:
        """Return the assignments of all patches of the view, (B, N, K), and the clustering loss: the cross-entropy of
        the clusters' logits with these assignments."""
        logits_BNK = given.head.clusters(context.encoded_views[self.encoder_key, self.view][1])
        with torch.no_grad():
            scaled_NBK = logits_BNK.transpose(0, 1) / number(self.regularizer.target_temperature)
            # Clusters have any norm, so exp would overflow. A common factor per column cancels.
            scaled_NBK = scaled_NBK - given.ranks.max(scaled_NBK.amax(dim=1, keepdim=True))
            shares_NBK = (scaled_NBK + _LARGEST_EXPONENT).exp()
            assigned_BNK = sinkhorn(shares_NBK, self.regularizer.iterations, given.ranks).transpose(0, 1)
        log_softmax_BNK = F.log_softmax(logits_BNK / number(self.distribution.temperature), dim=-1)
        return assigned_BNK, -(assigned_BNK * log_softmax_BNK).sum(dim=-1).mean()

    def _errors(self, parts: Parts) -> Iterator[str]:
        yield from super()._errors(parts)
        if error := self.regularizer.error(self.distribution):
            yield error


def share_of_hidden(masked_BM: Tensor) -> Tensor:
    """Return the weight of every patch in a mean over masked patches per image, then over images: fp32 (B, M)."""
    hidden_B1 = masked_BM.sum(dim=1, keepdim=True, dtype=torch.float32)
    return masked_BM / (hidden_B1.clamp(min=1) * len(masked_BM))


class ClusterHead(nn.Module):
    """Clusters of the EMA teacher's tokens, and prototypes with which the decoder predicts them."""

    def __init__(self, decoded: int, encoded: int, count: int) -> None:
        super().__init__()
        self.clusters = OnlineClusters(encoded, count)
        self.prototypes = PrototypeLayer(decoded, count)


class OnlineClusters(nn.Module):
    """A linear layer from unit vectors to K clusters."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        self.bias = nn.Parameter(torch.empty(count))

    def reset_parameters(self) -> None:
        """Initialize weights with a variance of 1 per channel, as CAPI does."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return logits in fp32: (B, N, D) → (B, N, K). Tokens get no gradient."""
        return F.linear(unit(tokens_BND.detach()), self.weight.float(), self.bias.float())
