"""Detect `transformers` folders: published models, and exports of runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPConfig, PreTrainedModel, SiglipConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, rename_source_key

from m3i_scale.backbones.families import FAMILIES, TokenFamily, find_family
from m3i_scale.backbones.families.internimage import fusion_width
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.backbones.sources.base import Place, Placement, Source, Unused, normalisation
from m3i_scale.backbones.sources.files import read_config
from m3i_scale.errors import ConfigError

MODEL_TYPES = ("clip", "siglip", *(family.config_class.model_type for family in FAMILIES))
"""Types of configurations that are for a backbone or contain one."""
_LEFT_OUT = (
    (r"(text_model|text_projection)\.", "text tower"),
    (r"(vision_model\.)?head\.(probe$|(attention|layernorm|mlp)\.)", "attention pooling: recipes pool by decoders"),
    (r"(.*\.)?pooler\.", "pooling layer"),
    (r"(.*\.)?(classifier|cls_classifier|head|fc)\.", "classifier"),
    (r"pool_norm\.", "norm before InternImage's classifier"),
    (r"(.*\.)?embeddings\.mask_token$", "mask token: the recipe trains a new one for inputs with mask tokens"),
    (r"decoder\.", "decoder of its pre-training"),
    (r"(.*\.)?position_ids$", "no weight"),
    (r"visual_projection\.|logit_(scale|bias)$", "projection into the joint space"),
)


_NAFLEX = (
    "a SigLIP 2 of a fixed size, e.g. google/siglip2-base-patch16-256, which is a siglip; that of NaFlex reads packed"
    " patches of images of any shape"
)
_FIXES = {
    "upernet": "export the run of the segmenter by --task features",
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), _NAFLEX),
}


def hub_source(given: str, folder: Path, where: str) -> Source:
    """Return the source for a folder with a `transformers` config.json."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a model from '{folder}': {str(error).splitlines()[0]}",
            where=where,
            fix="use a folder with config.json and model.safetensors, or a Hub id (needs a network); export the run "
            "of a detector with --task features",
        ) from None
    if isinstance(config, CLIPConfig | SiglipConfig):
        config = config.vision_config
    family = find_family(config)
    if family is None:
        *others, last = MODEL_TYPES
        raise ConfigError(
            f"'{folder}' is a {config.model_type}; a backbone must be a {', '.join(others)} or {last}",
            where=where,
            fix=_FIXES.get(config.model_type, "use a model of one of these families"),
        )
    family.adapt(config)
    assumed = {}
    if isinstance(config, InternImageConfig) and config.fusion_width is None:
        config.fusion_width = fusion_width(config)
        assumed["fusion_width"] = "the source has no fusion head"
    values = read_config(folder / "preprocessor_config.json")
    return Source(
        given,
        "transformers",
        folder,
        config,
        hub_places,
        assumed=assumed,
        class_row=family.has_class_token,
        antialias=isinstance(family, TokenFamily) and family.antialias,
        normalisation=normalisation(values.get("image_mean"), values.get("image_std")),
    )


def hub_places(model: PreTrainedModel) -> Placement:
    """Return a function that maps names in a file to parameters of the model, as `transformers` does."""
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    known = {name: True for name, _ in model.named_parameters()}
    ignored = getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()

    def place(name: str) -> Place:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if pattern is not None:
            return _split(renamed, next(item for item in converters if pattern in item.source_patterns), name)
        if renamed in known:
            return (renamed,)
        if any(re.search(pattern, name) for pattern in ignored):
            return Unused("classifier")
        return next((Unused(reason) for pattern, reason in _LEFT_OUT if re.match(pattern, name)), None)

    return place


def _split(renamed: str, converter: WeightConverter, name: str) -> tuple[str, ...]:
    operation = converter.operations[0]
    if len(converter.operations) != 1 or not isinstance(operation, Chunk) or operation.dim:
        raise ConfigError(
            f"'{name}' cannot be read directly: transformers converts it with {type(operation).__name__} when it "
            "loads the model",
            where="from_pretrained",
            why="weights are read one at a time",
            fix="load the model with transformers and save it with save_pretrained",
        )
    first, *_ = converter.target_patterns
    return tuple(renamed.replace(first, target, 1) for target in converter.target_patterns)
