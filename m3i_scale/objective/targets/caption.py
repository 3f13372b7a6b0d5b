"""Captioning loss: predict the caption token by token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from m3i_scale.backbones.families import VisionConfig
from m3i_scale.config.sections import Kind
from m3i_scale.data.batch import Batch
from m3i_scale.objective.decoders import LayeredSpec
from m3i_scale.objective.distributions import Loss
from m3i_scale.objective.masks import hash_uniform
from m3i_scale.objective.positions import token_position
from m3i_scale.objective.ranks import Ranks, global_count, global_mean
from m3i_scale.objective.regularizers import OtherCandidates
from m3i_scale.objective.targets.base import Context, Encoded, Sizes, Target, TargetModules

_STREAM = 1 << 20
"""Stream of random numbers that no mask uses."""


class BoltzmannTokens(Kind):
    """P̂ of a token: a softmax over the vocabulary."""

    kind: ClassVar[str] = "boltzmann"
    bounds_information: ClassVar[bool] = False
    """The entropy of captions is unknown."""

    def loss(
        self, logits_BTV: Tensor, tokens_BT: Tensor, valid_BT: Tensor, ranks: Ranks, count: Tensor | None = None
    ) -> Tensor:
        """Return the cross-entropy, averaged over the valid tokens of all ranks, or divided by `count`."""
        loss_N = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten(), reduction="none")
        return global_mean(loss_N, valid_BT.flatten(), ranks, count)


class Caption(Target):
    """Captioning loss: every token after the first, given the image and the tokens before it (CoCa, CapPa)."""

    kind: ClassVar[str] = "caption"
    modality: ClassVar[str] = "caption"
    representation: ClassVar[str] = "token embedding"
    by_token: ClassVar[bool] = True
    encoder: Literal["embedding"] = "embedding"
    distribution: BoltzmannTokens = BoltzmannTokens()
    regularizer: OtherCandidates = OtherCandidates()
    parallel: float = Field(default=0.0, ge=0, le=1)
    """Fraction of samples, drawn per sample, with parallel prediction: the decoder gets positions, no tokens
    (CapPa)."""

    @property
    def compares_samples(self) -> bool:
        """Return False: the other candidates are tokens of the vocabulary."""
        return False

    def build_head(self, sizes: Sizes) -> nn.Module:
        return TokenHead(sizes.vocabulary, sizes.decoded)

    def present(self, batch: Batch) -> Tensor:
        return batch.has_text_B

    @property
    def has_statistics(self) -> bool:
        return True

    def collect(self, given: TargetModules, context: Context) -> None:
        if self._statistics_key not in context.statistics:
            count = global_count(context.batch.text_mask_BT[:, 1:], given.ranks)
            context.statistics[self._statistics_key] = count

    @property
    def _statistics_key(self) -> tuple[str, str, int, int]:
        return "tokens", self.name, 0, 0

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of −log P̂ per token, averaged over the caption tokens of all ranks."""
        self.collect(given, context)
        batch = context.batch
        given_BT, wanted_BT = batch.text_ids_BT[:, :-1], batch.text_ids_BT[:, 1:]
        valid_BT = batch.text_mask_BT[:, 1:]  # a sample without caption has one token, which is never predicted
        embedded_BTD = given.head(given_BT)
        if self.parallel:
            seeds_B = batch.seeds_B.to(embedded_BTD.device, non_blocking=True)
            told_B1 = hash_uniform(seeds_B, 1, _STREAM) >= self.parallel
            embedded_BTD = embedded_BTD * told_B1[..., None]
        decoded_BTD = given.decoder(embedded_BTD, encoded.tokens_BLD)
        logits_BTV = given.head(decoded_BTD, logits=True)
        count = context.statistics[self._statistics_key]
        return Loss(self.distribution.loss(logits_BTV, wanted_BT, valid_BT, given.ranks, count))


class TokenHead(nn.Module):
    """Token embeddings: both the representation z_y and the decoder's input."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight_VD = nn.Parameter(torch.empty(vocabulary, width))

    def reset_parameters(self) -> None:
        """Initialize so that embeddings times √D have a variance of 1."""
        nn.init.normal_(self.weight_VD, std=self.weight_VD.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, *, logits: bool = False) -> Tensor:
        """Return token embeddings times √D: (B, T) → (B, T, D). With `logits`, return logits: (B, T, D) → (B, T, V)."""
        if logits:
            return F.linear(tokens, self.weight_VD)
        embedded_BTD: Tensor = F.embedding(tokens, self.weight_VD) * self.weight_VD.shape[1] ** 0.5
        return embedded_BTD


class CausalTransformer(nn.Module):
    """A Transformer with causal self-attention over caption tokens and cross-attention to visible image tokens."""

    def __init__(self, input_width: int, width: int, depth: int, heads: int, kernel: str = "sdpa") -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(input_width, width)
        config = BertConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
            add_cross_attention=True,
            attn_implementation=kernel,
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([BertLayer(config) for _ in range(depth)])
        layer: Any
        for layer in self.layers:
            layer.varies_in_length = True

    def forward(self, embedded_BTD: Tensor, tokens_BLD: Tensor) -> Tensor:
        """Predict the next token at each position: (B, T, width). Causal attention ignores the padding at the end."""
        count = embedded_BTD.shape[1]
        image_BLD = self.embed(tokens_BLD)
        position_TD = token_position(count, self.width, embedded_BTD.device).to(embedded_BTD.dtype)
        hidden_BTD: Tensor = self.norm(embedded_BTD + position_TD)
        lowest = torch.finfo(hidden_BTD.dtype).min
        mask_11TT = hidden_BTD.new_full((1, 1, count, count), lowest).triu(1)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, mask_11TT, image_BLD)
        return hidden_BTD


class CausalTransformerSpec(LayeredSpec):
    """A decoder that predicts the next caption token from the previous tokens and the image."""

    kind: ClassVar[str] = "causal_transformer"
    by_token: ClassVar[bool] = True

    def build(self, config: VisionConfig) -> nn.Module:
        width, heads = self.shape(config)
        kernel = str(config._attn_implementation or "sdpa")
        return CausalTransformer(config.hidden_size, width, self.depth, heads, kernel)
