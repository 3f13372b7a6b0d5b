"""f_φ of captions: a stock text encoder, from scratch or pretrained, with the pooling of its authors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers.initialization import no_init_weights

from m3i_scale.backbones.base import attend, split_heads

_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"),
    *("hidden_act", "layer_norm_eps"),
)


class TextFamily(ABC):
    """One architecture of text encoders in `transformers`."""

    config_class: ClassVar[type[Any]]
    model_class: ClassVar[type[PreTrainedModel]]
    options: ClassVar[dict[str, Any]] = {}
    """Other arguments of the model class."""
    auto: ClassVar[str] = "AutoModel"
    """The class of `transformers` that loads an export."""
    defaults: ClassVar[dict[str, Any]] = {}
    """Fields that differ from the defaults of `config_class`."""
    shape_fields: ClassVar[tuple[str, ...]] = _SHAPE
    training_fields: ClassVar[tuple[str, ...]] = ("attention_dropout",)
    """Fields that `text.config` may set, without and with effect on the shapes. Others have no effect or break the
    export."""
    has_projection: ClassVar[bool] = False
    """Whether the stock model ends with the projection into the joint space."""
    fixed_length: ClassVar[bool] = False
    """Whether every caption is padded to `max_position_embeddings`, and padding takes part in attention."""
    expected_ids: ClassVar[dict[str, int]] = {}
    """Token ids that a new encoder requires of the tokenizer. Other ids are taken from the tokenizer."""

    @abstractmethod
    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """Return the tokenizer's ids of the special tokens that the encoder reads, by configuration field."""

    @abstractmethod
    def pooled(self, model: Any, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Return the model's vector of every caption: (B, D)."""

    def prepare(self, model: Any) -> None:
        """Mark the layers that other parts of the package must treat differently."""
        model.embeddings.reads_shapes = True  # compares the length of captions with the table of positions
        for layer in model.encoder.layers:
            layer.varies_in_length = not self.fixed_length


class Bert(TextFamily):
    """BERT (Devlin et al.; BERT-Base is the paper's text encoder), read at the first token."""

    config_class, model_class = BertConfig, BertModel
    options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    # Dropout is off by default: its random numbers would make the loss depend on the number of ranks.
    defaults: ClassVar[dict[str, Any]] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape_fields = (*_SHAPE, "type_vocab_size")
    training_fields = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
    expected_ids: ClassVar[dict[str, int]] = {"pad_token_id": 0}

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        return {"pad_token_id": int(cast(int, tokenizer.pad_token_id))}

    def prepare(self, model: Any) -> None:
        model.encoder.layer[-1].called_in_parts = True  # runs without activation checkpointing
        for layer in model.encoder.layer:
            layer.varies_in_length = True

    def pooled(self, model: Any, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Return the first token of the last layer; see `TextFamily`."""
        hidden_BTD = model.embeddings(input_ids=text_ids_BT)
        # The mask function of `transformers` checks on the device whether any token is padding, which synchronizes.
        lowest = torch.finfo(hidden_BTD.dtype).min
        mask_B11T = torch.zeros_like(text_mask_BT, dtype=hidden_BTD.dtype).masked_fill(~text_mask_BT, lowest)
        mask_B11T = mask_B11T[:, None, None]
        *layers, last = model.encoder.layer
        for layer in layers:
            hidden_BTD = layer(hidden_BTD, mask_B11T)
        return _read_first(last, hidden_BTD, text_mask_BT)


class ClipText(TextFamily):
    """Text encoder of CLIP (Radford et al.): causal attention, read at the end token."""

    config_class, model_class = CLIPTextConfig, CLIPTextModel
    defaults: ClassVar[dict[str, Any]] = {"hidden_act": "gelu"}  # as the presets of its vision encoder
    training_fields = ("attention_dropout", "initializer_range", "initializer_factor")

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        return {"eos_token_id": int(tokenizer("a")["input_ids"][-1])}

    def pooled(self, model: Any, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Return the normalized end token; see `TextFamily`. Attention is causal, so padding after it needs no mask."""
        pooled_BD: Tensor = model(input_ids=text_ids_BT).pooler_output
        return pooled_BD


class SiglipText(TextFamily):
    """Text encoder of SigLIP (Zhai et al.) and SigLIP 2: read at the last position, which may be padding."""

    config_class, model_class = SiglipTextConfig, SiglipTextModel
    defaults: ClassVar[dict[str, Any]] = {"bos_token_id": None, "eos_token_id": None}
    auto = "SiglipTextModel"  # AutoModel does not know it
    has_projection, fixed_length = True, True

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        return {"pad_token_id": int(cast(int, tokenizer.pad_token_id))}

    def pooled(self, model: Any, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Return the projected last position of captions padded to full length; see `TextFamily`."""
        config = model.config
        ids_BT = text_ids_BT.masked_fill(~text_mask_BT, config.pad_token_id)
        ids_BT = F.pad(ids_BT, (0, config.max_position_embeddings - ids_BT.shape[1]), value=config.pad_token_id)
        pooled_BE: Tensor = model(input_ids=ids_BT).pooler_output
        return pooled_BE


TEXT_FAMILIES = {family.config_class.model_type: family for family in (Bert(), ClipText(), SiglipText())}
"""Families by `model_type` of their configuration."""


def text_family(config: Any) -> TextFamily:
    """Return the family of a text configuration."""
    return TEXT_FAMILIES[config.model_type]


class TextTower(nn.Module):
    """A text encoder; z_y is its pooled vector, projected into the joint space and normalized to unit length."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.family = text_family(config)
        with no_init_weights():
            self.model = self.family.model_class(config, **self.family.options)
        self.family.prepare(self.model)
        self.projection = None if self.family.has_projection else nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, text_ids_BT: Tensor, text_mask_BT: Tensor) -> Tensor:
        """Encode tokens (B, T) with their mask as unit vectors, fp32 (B, E)."""
        pooled_BD = self.family.pooled(self.model, text_ids_BT, text_mask_BT)
        return F.normalize((pooled_BD if self.projection is None else self.projection(pooled_BD)).float(), dim=-1)


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
    return cast(Tensor, layer.feed_forward_chunk(tokens_B1D)[:, 0])
