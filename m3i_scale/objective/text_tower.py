"""f_φ of captions: a stock text encoder, from scratch or pretrained, with the pooling of its authors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
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
from m3i_scale.backbones.build import set_field
from m3i_scale.backbones.families.base import check_counts
from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.config import TextConfig
from m3i_scale.errors import ConfigError, did_you_mean

_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_SHAPE = (*_COUNTS, "hidden_act", "layer_norm_eps")
_TOKEN_IDS = ("pad_token_id", "eos_token_id")
"""Fields that the tokenizer decides (see `with_token_ids`)."""


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


def text_config(text: TextConfig, vocab_size: int, width: int, kernel: str = "sdpa") -> Any:
    """Return the `transformers` configuration of a text encoder.

    Args:
        vocab_size: size of the tokenizer's vocabulary.
        width: E, the width of the joint space.
    """
    if text.from_pretrained is not None:
        config = _pretrained(text, vocab_size, width)
    else:
        config = _from_scratch(text, vocab_size, width)
    counts = [*_COUNTS, *(key for key in ("type_vocab_size",) if hasattr(config, key))]
    check_counts({key: getattr(config, key) for key in counts}, "text.config")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"'hidden_size' must be a multiple of the {config.num_attention_heads} heads, got {config.hidden_size}",
            where="text.config.hidden_size",
            fix="change hidden_size or num_attention_heads; 64 channels per head are usual",
        )
    positions = config.max_position_embeddings
    if text.max_tokens > positions or (text_family(config).fixed_length and text.max_tokens != positions):
        most = "at most" if text.max_tokens > positions else "equal to"
        raise ConfigError(
            f"text.max_tokens must be {most} the text tower's {positions} positions, got {text.max_tokens}",
            where="text.max_tokens",
            fix=f"set text.max_tokens={positions}"
            if text.from_pretrained
            else f"lower it, or set text.config.max_position_embeddings={text.max_tokens}",
        )
    config._attn_implementation = kernel
    return config


def _from_scratch(text: TextConfig, vocab_size: int, width: int) -> Any:
    family = TEXT_FAMILIES[text.model_type or "bert"]
    fields: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None}
    fields["eos_token_id"] = vocab_size - 1  # until the tokenizer is known, see `with_token_ids`
    if family.fixed_length:
        fields["max_position_embeddings"] = text.max_tokens
    config = family.config_class(**fields | family.defaults)
    _set_fields(config, text.config, (*family.shape_fields, *family.training_fields), f"a {config.model_type}")
    if family.has_projection:
        config.projection_size = width
    return config


def _pretrained(text: TextConfig, vocab_size: int, width: int) -> Any:
    place, where = str(text.from_pretrained), f"text.from_pretrained: {text.from_pretrained}"
    config = read_text_config(place)
    family = text_family(config)
    for key, value in family.defaults.items():
        if key in family.training_fields:
            set_field(config, key, value, "text.config")
    _set_fields(config, text.config, family.training_fields, "a pretrained text encoder")
    if vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer must have at most the {config.vocab_size} tokens of the text encoder, got {vocab_size}",
            where=where,
            fix="leave out text.tokenizer, to use the tokenizer next to the weights",
        )
    joint = config.projection_size if family.has_projection else getattr(config, "projection_dim", width)
    if joint != width and (family.has_projection or isinstance(config, CLIPTextConfig)):
        raise ConfigError(
            f"the width of the text target must be {joint}, as in the pretrained projection, got {width}",
            where=where,
            fix=f"set `width: {joint}` in the text target of the recipe",
        )
    return config


@cache
def read_text_config(place: str) -> Any:
    """Return the configuration of the text encoder in a folder or Hub repository."""
    where = f"text.from_pretrained: {place}"
    folder = pretrained_folder(place, "text.from_pretrained")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a text encoder: {str(error).splitlines()[0]}",
            where=where,
            fix="use a folder with config.json and model.safetensors, or a Hub id",
        ) from None
    joint = getattr(config, "projection_dim", None)
    config = getattr(config, "text_config", config)
    if config.model_type not in TEXT_FAMILIES:
        raise ConfigError(
            f"a text encoder must be a CLIP, SigLIP or BERT model, got {config.model_type}",
            where=where,
            fix="use the folder of such a model, or leave text.from_pretrained out",
        )
    if isinstance(config, CLIPTextConfig) and joint is not None:
        config.projection_dim = joint  # CLIPModel projects to the width of the complete configuration
    return config


def _set_fields(config: Any, fields: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for key, value in fields.items():
        if key not in (*known, *_TOKEN_IDS, "vocab_size"):
            hint = did_you_mean(key, known)
            raise ConfigError(f"unknown field '{key}' of {what}", where="text.config", fix=hint)
        if key == "vocab_size" and (not isinstance(value, int) or value < config.vocab_size):
            raise ConfigError(
                f"vocab_size must be at least the {config.vocab_size} tokens of the tokenizer, got {value}",
                where="text.config.vocab_size",
                fix="leave it out; the tokenizer sets it",
            )
        set_field(config, key, value, "text.config")


def with_token_ids(text: TextConfig, tokenizer: PreTrainedTokenizerBase) -> TextConfig:
    """Check that a text encoder and its tokenizer have the same special tokens. Return the section; that of a new
    encoder includes the ids of the tokenizer."""
    config = None if text.from_pretrained is None else read_text_config(text.from_pretrained)
    family = TEXT_FAMILIES[text.model_type or "bert"] if config is None else text_family(config)
    here = family.token_ids(tokenizer)
    there = family.expected_ids if config is None else {key: getattr(config, key) for key in here}
    for key, value in there.items():
        # CLIP's published configurations name token 2, with which transformers reads the token of the highest id.
        if here[key] != value and (key, value) != ("eos_token_id", 2):
            raise ConfigError(
                f"the {key} of the tokenizer must be {value}, as in the text encoder, got {here[key]}",
                where="text.tokenizer",
                fix="use the tokenizer that `shards make` trains, or that of BERT"
                if config is None
                else "leave out text.tokenizer, to use the tokenizer next to the weights",
            )
    if config is not None or there:
        return text
    if here.get("eos_token_id") == 2:
        raise ConfigError(
            "a new CLIP text encoder cannot read captions that end with token 2",
            where="text.tokenizer",
            why="transformers takes this id for an unset one, and reads another token",
            fix="use the tokenizer that `shards make` trains, or that of a CLIP model",
        )
    return text.model_copy(update={"config": text.config | here})


def text_identity(text: TextConfig) -> dict[str, Any]:
    """Return the fields that shape a text encoder: `text.config`, with `model_type` unless it is a new BERT."""
    if text.from_pretrained is None:
        return text.config | ({} if text.model_type is None else {"model_type": text.model_type})
    config = read_text_config(text.from_pretrained)
    family = text_family(config)
    shape = (*family.shape_fields, *_TOKEN_IDS, "vocab_size")
    return {"model_type": config.model_type, **{key: getattr(config, key) for key in shape}, **text.config}


def without_source(text: TextConfig, identity: Mapping[str, Any] | None) -> TextConfig:
    """Return a section with the fields of `text_identity`, if there are any, instead of the path of pretrained
    weights."""
    if text.from_pretrained is None or identity is None:
        return text
    fields = {key: value for key, value in identity.items() if key != "model_type"}
    kept = {"from_pretrained": None, "freeze": False, "model_type": identity["model_type"], "config": fields}
    return text.model_copy(update=kept)


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
