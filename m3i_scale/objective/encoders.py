"""f_φ: trained target encoders (the text tower, the EMA teacher), and the sections of a recipe for them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.initialization import no_init_weights
from typing_extensions import Self

from m3i_scale.backbones.base import Backbone, Tokens, attend, split_heads
from m3i_scale.backbones.build import set_field
from m3i_scale.backbones.families.base import check_counts
from m3i_scale.config import FixableError, Section
from m3i_scale.config.sections import MAX_LAYERS
from m3i_scale.errors import ConfigError, did_you_mean


class EmaSpec(Section):
    """Configuration of the EMA teacher for image targets."""

    start: float = Field(default=0.995, ge=0, lt=1)
    """EMA decay m at the first step; rises to `end` with a cosine schedule."""
    end: float = Field(default=1.0, gt=0, le=1)
    """EMA decay m at the last step."""
    projector_depth: int = Field(default=2, ge=0, le=MAX_LAYERS)
    """Residual MLP blocks after the backbone for dense targets, in student and EMA teacher; 0 for none."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.end < self.start:
            raise FixableError(
                f"end ({self.end:g}) is below start ({self.start:g}): the average would forget faster and faster",
                f"end: {self.start:g} for a constant one, or 1, the default",
            )
        return self

    def decay_at(self, step: int, steps: int) -> float:
        """Return the EMA decay, a half cosine from `start` to `end` over the run. `step` counts from 0."""
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2


class TeacherSpec(Section):
    """A frozen vision model as encoder of image targets."""

    from_pretrained: str
    """A local `transformers` folder or a Hub id; `student` means the model in `backbone.from_pretrained`."""

    @property
    def is_start(self) -> bool:
        """Return whether the teacher is the backbone with its pretrained weights."""
        return self.from_pretrained == "student"


_TEXT_COUNTS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size"),
)
_TEXT_FIELDS = (
    *_TEXT_COUNTS,
    *("hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
)
"""Fields of the text tower that a config may set. Other fields of `BertConfig` have no effect or break the export."""


def text_config(fields: dict[str, Any], vocab_size: int, max_tokens: int, kernel: str = "sdpa") -> BertConfig:
    """Return the BERT-Base configuration of the paper with `fields` overridden. Dropout is off by default: its random
    numbers would make the loss depend on the number of ranks."""
    config = BertConfig(
        vocab_size=vocab_size, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    for key, value in fields.items():
        if key not in _TEXT_FIELDS:
            hint = (
                "leave it out; the tokenizer sets vocab_size"
                if key == "vocab_size"
                else did_you_mean(key, _TEXT_FIELDS)
            )
            raise ConfigError(f"unknown field '{key}' of BERT", where="text.config", fix=hint)
        set_field(config, key, value, "text.config")
    check_counts({key: getattr(config, key) for key in _TEXT_COUNTS}, "text.config")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"'hidden_size' must be a multiple of the {config.num_attention_heads} heads, got {config.hidden_size}",
            where="text.config.hidden_size",
            fix="change hidden_size or num_attention_heads; 64 channels per head are usual",
        )
    if max_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"text.max_tokens must be at most the text tower's {config.max_position_embeddings} positions, got "
            f"{max_tokens}",
            where="text.max_tokens",
            fix=f"lower it, or set text.config.max_position_embeddings={max_tokens}",
        )
    config._attn_implementation = kernel
    return config


class TextTower(nn.Module):
    """A BERT-like text encoder, trained jointly; z_y is its first token, projected and normalized to unit length."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        with no_init_weights():
            self.model = BertModel(config, add_pooling_layer=False)
        self.model.encoder.layer[-1].called_in_parts = True  # runs without activation checkpointing
        for layer in self.model.encoder.layer:
            layer.varies_in_length = True
        self.projection = nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Encode tokens (B, T) with their mask as unit vectors, fp32 (B, E)."""
        hidden_BTD = self.model.embeddings(input_ids=text_ids_BT)
        # The mask function of `transformers` checks on the device whether any token is padding, which synchronizes.
        lowest = torch.finfo(hidden_BTD.dtype).min
        mask_B11T = torch.zeros_like(text_mask_BT, dtype=hidden_BTD.dtype).masked_fill(~text_mask_BT, lowest)
        mask_B11T = mask_B11T[:, None, None]
        *layers, last = self.model.encoder.layer
        for layer in layers:
            hidden_BTD = layer(hidden_BTD, mask_B11T)
        return F.normalize(self.projection(_read_first(last, hidden_BTD, text_mask_BT)).float(), dim=-1)


def _read_first(layer: Any, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return exactly `layer(hidden, mask)[:, 0]` of a BERT layer, without queries and MLP of the other tokens."""
    attention: Any = layer.attention
    own: Any = attention.self
    heads = own.num_attention_heads
    mixed_BH1D = attend(
        split_heads(own.query(hidden_BTD[:, :1]), heads),
        split_heads(own.key(hidden_BTD), heads),
        split_heads(own.value(hidden_BTD), heads),
        own.config._attn_implementation,
        mask_B11L=mask_BT[:, None, None],
        dropout=own.dropout.p if own.training else 0.0,
    )
    tokens_B1D = attention.output(mixed_BH1D.transpose(1, 2).flatten(2), hidden_BTD[:, :1])
    output_B1D: Tensor = layer.feed_forward_chunk(tokens_B1D)
    return output_B1D[:, 0]


class Projector(nn.Module):
    """Residual MLP blocks in front of a dense target, so that the backbone features need not equal the target."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
                )
                for _ in range(depth)
            ]
        )

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Project tokens: (B, L, D) → (B, L, D)."""
        for block in self.blocks:
            tokens_BLD = tokens_BLD + block(tokens_BLD)
        return tokens_BLD


class EmaTeacher(nn.Module):
    """EMA teacher: EMA copies of the backbone, the projector, and the pools and heads of image targets. It is never
    trained. The owner of the parameters updates it."""

    def __init__(
        self,
        backbone: Backbone,
        projector_depth: int,
        pools: nn.ModuleDict,
        heads: nn.ModuleDict,
        target_heads: nn.ModuleDict | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.kept = range(len(backbone.layers) - layers + 1, len(backbone.layers) + 1) if layers > 1 else range(0)
        """Numbers of the last layers that targets average, from 1."""
        self.projector = Projector(self.backbone.width, projector_depth)
        self.pools = pools
        self.heads = heads
        self.target_heads = target_heads or nn.ModuleDict()
        """By the name of a target with a separate head. A fine-tuning task uses EMA for all trained parameters."""
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> tuple[Tokens, list[Tensor]]:
        """Encode normalized images as class token (B, 1, D) and all patch tokens (B, N, D). Also returns the outputs of
        the last layers, (B, D, H, W) each, if targets average them."""
        if self.kept:
            return self.backbone.encode_maps(images_BCHW, self.kept)
        return self.backbone.encode_whole(images_BCHW), []
