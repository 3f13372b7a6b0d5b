"""Configuration of the text encoder from the `text` section, and its agreement with the tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import AutoConfig, CLIPTextConfig, PreTrainedTokenizerBase

from m3i_scale.backbones.build import set_field
from m3i_scale.backbones.families.base import check_counts
from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.backbones.sources.files import read_config
from m3i_scale.config import TextConfig
from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.objective.text_tower import TEXT_FAMILIES, text_family

_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_TOKEN_IDS = ("pad_token_id", "eos_token_id")
"""Fields that the tokenizer decides (see `with_token_ids`)."""


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
    _set_fields(config, text.config, (*family.shape_fields, *family.training_fields), config.model_type)
    if family.has_projection:
        config.projection_size = width
    return config


def _pretrained(text: TextConfig, vocab_size: int, width: int) -> Any:
    place, where = str(text.from_pretrained), f"text.from_pretrained: {text.from_pretrained}"
    config = copy.deepcopy(read_text_config(place))  # the cached one stays as it is in the file
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
    """Check that a text encoder and its tokenizer have the same special tokens. Return the section. For a new encoder,
    and for SigLIP with its published tokenizer, it includes the ids of the tokenizer."""
    config = None if text.from_pretrained is None else read_text_config(text.from_pretrained)
    family = TEXT_FAMILIES[text.model_type or "bert"] if config is None else text_family(config)
    given = family.token_ids(tokenizer)
    if family.fixed_length and text.tokenizer is None and not _names_padding(text):
        return text.model_copy(update={"config": text.config | given})
    expected = family.expected_ids if config is None else {key: getattr(config, key) for key in given}
    for key, value in expected.items():
        if given[key] != value and (key, value) != ("eos_token_id", 2):
            raise ConfigError(
                f"the {key} of the tokenizer must be {value}, as in the text encoder, got {given[key]}",
                where="text.tokenizer",
                fix="use the tokenizer that `shards make` trains, or that of BERT"
                if config is None
                else "leave out text.tokenizer, to use the tokenizer next to the weights",
            )
    if (expected or given).get("eos_token_id") == 2 and given["eos_token_id"] != max(tokenizer.get_vocab().values()):
        raise ConfigError(
            f"a CLIP text encoder with eos_token_id 2 cannot read captions that end with token {given['eos_token_id']}",
            where="text.tokenizer" if config is None else f"text.from_pretrained: {text.from_pretrained}",
            why="transformers takes 2 for an unset id, and reads the token with the highest id, as in published models",
            fix="use the tokenizer that `shards make` trains, or that of a CLIP model"
            if config is None
            else "use a model and its tokenizer, whose end token has the highest id",
        )
    if config is not None or expected:
        return text
    return text.model_copy(update={"config": text.config | given})


def _names_padding(text: TextConfig) -> bool:
    """Return whether config.json names a padding token, unlike SigLIP 2. `transformers` then sets another one."""
    if text.from_pretrained is None:
        return True
    values = read_config(pretrained_folder(text.from_pretrained, "text.from_pretrained") / "config.json")
    return "pad_token_id" in values.get("text_config", values)


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
