"""Build configurations and modules from the `backbone` section of a config, and initialize modules."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, ViTConfig
from transformers.activations import ACT2FN

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.families import (
    DEFAULT_PRESET,
    PRESETS,
    TokenFamily,
    VisionConfig,
    family_of,
    preset_config,
)
from m3i_scale.backbones.families.base import MAX_COUNTS, check_counts
from m3i_scale.backbones.families.internimage import MapBackbone
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.backbones.sources import Source, find_source
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError, did_you_mean

Initialize = Callable[[nn.Module, nn.Module], None]
"""Called with (owner, submodule). The owner is the nearest parent `transformers` model, or the submodule itself."""
DERIVED_FIELDS = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "model_type")
"""Fields that a configuration computes when it is created."""
FROZEN_PARTS = {"patch_embeddings": "patch", "position_embeddings": "positions", "final_norm": "norm"}
"""Keys of `Family.parts` by value of `backbone.freeze`; `all` has none. The recipe decides about the final norm."""


def backbone_config(backbone: BackboneConfig, *, where: str = "backbone") -> VisionConfig:
    """Return the `transformers` configuration of a backbone section."""
    if backbone.from_pretrained is not None:
        config = _pretrained_config(backbone, where)
    else:
        name = backbone.preset or DEFAULT_PRESET
        if name not in PRESETS:
            raise ConfigError(f"unknown backbone '{name}'", where=f"{where}.preset", fix=did_you_mean(name, PRESETS))
        config = preset_config(name)
    config = _override(config, backbone.config, where)
    family = family_of(config)
    family.check(config, where)
    if isinstance(family, TokenFamily):
        config._attn_implementation = backbone.attention_kernel
    elif backbone.attention_kernel != "sdpa":
        raise ConfigError(
            "`attention_kernel` has no effect: this backbone has no attention",
            where=f"{where}.attention_kernel",
            fix=f"leave out {where}.attention_kernel",
        )
    elif backbone.weight_init != "default":
        raise ConfigError(
            f"`weight_init: {backbone.weight_init}` is for vision Transformers, and this backbone is an {family.name}",
            where=f"{where}.weight_init",
            fix=f"set {where}.weight_init=default",
        )
    absent = [part for part in backbone.freeze if part != "all" and FROZEN_PARTS[part] not in family.parts]
    for part in absent:
        raise ConfigError(
            f"`freeze: [{part}]` has no effect: {family.name} has no {part.replace('_', ' ')}",
            where=f"{where}.freeze",
            fix=f"set {where}.freeze={[other for other in backbone.freeze if other not in absent]}",
        )
    return config


def backbone_source(backbone: BackboneConfig, where: str = "backbone") -> Source:
    """Return the pretrained weights of a backbone section."""
    return find_source(backbone.from_pretrained or "", backbone.config, f"{where}.from_pretrained")


def _pretrained_config(backbone: BackboneConfig, where: str) -> VisionConfig:
    """Return the configuration of the source. The image size may differ: position embeddings are resized."""
    source = backbone_source(backbone, where)
    for key in family_of(source.config).shape_fields:
        here, there = backbone.config.get(key), getattr(source.config, key)
        same = list(here) == list(there) if isinstance(here, list | tuple) else here == there
        if key in backbone.config and key not in ("image_size", *source.assumed) and not same:
            raise ConfigError(
                f"'{key}' must be {there!r} as in '{source.given}', got {here!r}",
                where=f"{where}.config.{key}",
                why="the pretrained weights do not fit another value",
                fix=f"leave out {where}.config.{key}",
            )
    return source.config


def _override(config: VisionConfig, fields: dict[str, Any], where: str) -> VisionConfig:
    family = family_of(config)
    known = family.shape_fields + family.training_fields
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(
                f"unknown field '{key}' of {family.name}", where=f"{where}.config", fix=did_you_mean(key, known)
            )
        set_field(config, key, value, f"{where}.config")
    if isinstance(config, ViTConfig) and "hidden_size" in fields and "pooler_output_size" not in fields:
        config.pooler_output_size = config.hidden_size
    if not family.derives:
        return config
    # Derived fields are only computed when a configuration is created.
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in DERIVED_FIELDS}
    try:
        return type(config)(**kept)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(
            str(error), where=f"{where}.config", fix=f"correct the named field under {where}.config"
        ) from None


def set_field(config: PretrainedConfig, key: str, value: Any, where: str) -> None:
    """Set a field of a `transformers` configuration, and reject values that would break its model."""
    before, place = getattr(config, key), f"{where}.{key}: {value!r}"
    number = isinstance(before, int | float) and not isinstance(before, bool)
    if number and (isinstance(value, bool) or not isinstance(value, int | float | None)):  # null: the family's default
        raise ConfigError(
            f"'{key}' must be one number, got {value!r}", where=place, fix=f"set {where}.{key}={before}, for example"
        )
    if key in MAX_COUNTS and value is not None:  # before `transformers` creates a list of layer names
        check_counts({key: value}, where)
    if isinstance(before, list | tuple) and not _are_counts(value):
        raise ConfigError(
            f"'{key}' must be a list of numbers, got {value!r}",
            where=place,
            fix=f"set {where}.{key}={[*before]}, for example",
        )
    if number and isinstance(value, int | float):
        rate = "dropout" in key or key.endswith(("_prob", "drop_path_rate"))
        if rate and not 0 <= value < 1:
            raise ConfigError(
                f"'{key}' must be a probability from 0 to below 1, got {value!r}",
                where=place,
                fix=f"set {where}.{key}={before}, for example",
            )
        if (key.endswith("_eps") and value <= 0) or (key == "initializer_range" and value < 0):
            raise ConfigError(
                f"'{key}' must be > 0, got {value!r}", where=place, fix=f"set {where}.{key}={before}, for example"
            )
    if key == "hidden_act" and (not isinstance(value, str) or value not in ACT2FN):
        raise ConfigError(f"unknown activation '{value}'", where=place, fix=did_you_mean(str(value), ACT2FN))
    try:
        setattr(config, key, value)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(
            f"'{key}' must be a valid value, got {value!r}: {error}",
            where=where,
            fix=f"set {where}.{key}={before}, for example",
        ) from None


def _are_counts(value: Any) -> bool:
    counts = value if isinstance(value, list | tuple | range) else [value]
    return value is None or all(isinstance(count, int) and not isinstance(count, bool) for count in counts)


def build_backbone(config: VisionConfig, freeze: Sequence[str] = (), student: Backbone | None = None) -> Backbone:
    """Build the backbone without initializing it.

    Args:
        freeze: keys of `FROZEN_PARTS`: parts without gradient, if the backbone has them.
        student: shares its frozen parts with the new backbone. An EMA of constants is these constants.
    """
    backbone = MapBackbone(config) if isinstance(config, InternImageConfig) else TokenBackbone(config)
    parts = family_of(config).parts
    frozen = tuple(
        "" if part == "all" else parts[FROZEN_PARTS[part]]
        for part in freeze
        if FROZEN_PARTS.get(part, "") in ("", *parts)
    )
    for name, parameter in list(backbone.model.named_parameters()):
        if name.startswith(frozen):
            parameter.requires_grad_(False)
            if student is not None:
                module, _, attribute = name.rpartition(".")
                setattr(backbone.model.get_submodule(module), attribute, student.model.get_parameter(name))
    return backbone


def vision_class(config: VisionConfig) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """Return the class of the exported model, and its constructor's other arguments."""
    family = family_of(config)
    return family.model_class, family.options


def draw_first_values(
    module: nn.Module,
    initialize: Initialize,
    *,
    seed: int,
    skip: tuple[str, ...] = (),
    whole: Callable[[list[nn.Parameter]], AbstractContextManager[None]] = lambda parameters: contextlib.nullcontext(),
) -> None:
    """Initialize all parameters from (seed, name of the module). The state of all random generators is restored.

    Random numbers are drawn on the CPU in fp32, so they are the same on every device and in every dtype, up to
    rounding. Submodules with a prefix in `skip` are skipped. `whole` gathers partitioned parameters to their full
    shape.
    """
    owners = [(name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)]
    # CPU only: by default, `fork_rng` copies the states of all GPUs of the machine.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, child in module.named_modules():
            parameters = list(child.parameters(recurse=False))
            if not parameters or name.startswith(skip):
                continue
            above = [owner for prefix, owner in owners if name == prefix or name.startswith(f"{prefix}.")]
            # `torch.manual_seed` would also seed GPUs. The CPU generator uses 32 bits of a seed.
            torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            with whole(parameters), _on_host_in_fp32(child):
                initialize(above[-1] if above else child, child)


@contextlib.contextmanager
def _on_host_in_fp32(module: nn.Module) -> Iterator[None]:
    """Replace the parameters of a module by fp32 copies on the CPU, and copy their values back at the end.

    Random numbers differ between CPU and GPU, and between GPU models. In bf16, torch maps uniform numbers that round to
    the upper bound to the lower bound: one weight in a thousand would have the wrong sign.
    """
    originals = dict(module.named_parameters(recurse=False))
    for name, parameter in originals.items():
        setattr(module, name, nn.Parameter(parameter.data.to("cpu", torch.float32), requires_grad=False))
    try:
        yield
    finally:
        drawn = dict(module.named_parameters(recurse=False))
        for name, parameter in originals.items():
            setattr(module, name, parameter)
    for name, parameter in originals.items():
        parameter.data.copy_(drawn[name])
