"""Conversion of both encoders of a text target to a stock model for zero-shot classification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import VisionConfig
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.config import RunConfig
from m3i_scale.errors import ExportError
from m3i_scale.exports.as_timm import timm_vision
from m3i_scale.exports.joint import no_class
from m3i_scale.exports.source import Source, target_of
from m3i_scale.exports.tensors import TEXT, VISION, ExportedModule, TensorSource, copied, empty, vision_names
from m3i_scale.objective.build import joint_width
from m3i_scale.objective.decoders import ClassTokenSpec, DecoderSpec, MapHeadSpec
from m3i_scale.objective.information import Objective
from m3i_scale.objective.pretrained import MAP_HEAD
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.targets.text import Text
from m3i_scale.objective.text_config import text_config
from m3i_scale.objective.text_tower import text_family

Parts = tuple[PreTrainedModel, dict[str, TensorSource]]
"""A model with empty weights, and the sources of its tensors."""

TANH_SCALE = 2.0**-10
"""BERT's pooling layer ends with tanh, which training here does not have. For arguments scaled down this much, tanh is
the identity: at 10 the error is 3·10⁻⁵. A power of two is exact in every dtype."""


def zero_shot_part(source: Source, vocab_size: int) -> ExportedModule:
    """Return both encoders with their projections and temperature as a stock model: `CLIPModel` or `SiglipModel` if all
    parts are theirs, otherwise `VisionTextDualEncoderModel`."""
    target = cast(Text, target_of(source, "text"))
    decoder = source.recipe.decoders[target.decoder]
    vision, text = backbone_config(source.run.backbone), text_encoder_config(source, vocab_size)
    biased, of_siglip = target.distribution.first_bias is not None, isinstance(text, SiglipTextConfig)
    head = f"heads.{target.name}."
    if of_siglip and biased and isinstance(vision, SiglipVisionConfig) and isinstance(decoder, MapHeadSpec):
        model, tensors = _siglip(vision, text, target)
    elif of_siglip or biased or target.width is None:
        raise ExportError(
            f"no Transformers class has these parts: a {vision.model_type} that is pooled by {decoder.kind}, a "
            f"{text.model_type}, and a {target.distribution.kind} text target",
            where=f"recipe.targets: {target.name}",
            why="a SiglipModel needs a SigLIP backbone, the decoder map_head, `width: null`, a SigLIP text encoder and "
            "the distribution bernoulli; any other model has none of them",
            fix="train with all of these parts, as the recipe siglip does, or use --task features; heads/ then has the "
            "rest",
        )
    else:
        scale = TensorSource((head + "log_scale",), lambda log_scale: _bounded(log_scale, target).reshape(()))
        if isinstance(vision, CLIPVisionConfig) and isinstance(text, CLIPTextConfig) and _reads_class_token(decoder):
            model, tensors = _clip(vision, text, target.width)
        else:
            model, tensors = _dual(source, vision, text, target)
        tensors |= {
            "text_projection.weight": TensorSource(("text.projection.weight",)),
            "visual_projection.weight": TensorSource((head + "projection.weight",)),
            "logit_scale": scale,
        }
    tensors |= copied(_text_names(text), TEXT, "text_model.")

    def trained(
        objective: Objective, pixels_BCHW: Tensor, input_ids_TL: Tensor, attention_mask_TL: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        images_BE, scale, bias = objective.heads[target.name](objective.pooled(target.decoder, pixels_BCHW))
        mask_TL = torch.ones_like(input_ids_TL) if attention_mask_TL is None else attention_mask_TL
        texts_TE = objective.embed_text(input_ids_TL, mask_TL.bool())
        return {"logits_per_image": scale * (images_BE @ texts_TE.T) + (0.0 if bias is None else bias)}

    return ExportedModule(
        "zero_shot",
        model,
        tensors,
        trained,
        auto=type(model).__name__,
        inputs=("pixel_values", *text_inputs(text)),
        output="logits_per_image",
    )


def zero_shot_warnings(run: RunConfig, recipe: Recipe, vocab_size: int) -> list[str]:
    """Return a warning if a run with a frozen backbone (LiT) or a pretrained text encoder has no zero-shot export."""
    if not recipe.uses_text_tower or not ("all" in run.backbone.freeze or run.text.from_pretrained):
        return []
    try:
        zero_shot_part(Source(run.output_dir, run, recipe, 0, {}, []), vocab_size)
    except ExportError as error:
        fix = "use the decoder class_token (SigLIP: map_head), or only --task features"
        return [f"the run cannot be exported with --task zero_shot: {error.what}. Fix: {fix}"]
    return []


def text_encoder_config(source: Source, vocab_size: int) -> Any:
    """Return the `transformers` configuration of the run's text encoder."""
    with torch.device("meta"):
        vision = backbone_config(source.run.backbone)
        decoders = {name: spec.build(vision) for name, spec in source.recipe.decoders.items()}
    return text_config(source.run.text, vocab_size, joint_width(source.recipe, nn.ModuleDict(decoders)))


def text_inputs(text: Any) -> tuple[str, ...]:
    """Return what a stock text encoder reads from its tokenizer."""
    return ("input_ids",) if text_family(text).fixed_length else ("input_ids", "attention_mask")


def _text_names(text: Any) -> list[str]:
    family = text_family(text)
    return list(empty(lambda: family.model_class(text, **family.options)).state_dict())


def _clip(vision: CLIPVisionConfig, text: CLIPTextConfig, width: int) -> Parts:
    config = CLIPConfig(
        vision_config=_public_values(vision.to_dict()), text_config=_public_values(text.to_dict()), projection_dim=width
    )
    return empty(lambda: CLIPModel(config)), copied(vision_names(vision), VISION, "vision_model.")


def _siglip(vision: SiglipVisionConfig, text: SiglipTextConfig, target: Text) -> Parts:
    of_vision = _public_values(vision.to_dict()) | {"vision_use_head": True}
    config = SiglipConfig(vision_config=of_vision, text_config=_public_values(text.to_dict()))
    head, first = f"heads.{target.name}.", target.distribution.first_bias
    tensors = copied(vision_names(vision), VISION, "vision_model.") | _map_head(target)
    tensors["logit_scale"] = TensorSource((head + "log_scale",))
    tensors["logit_bias"] = TensorSource((head + "bias",), lambda bias: bias + (first or 0.0))
    return empty(lambda: SiglipModel(config)), tensors


def _map_head(target: Text) -> dict[str, TensorSource]:
    """Return the tensors of SigLIP's pooling head."""
    tensors = {}
    for theirs, ours in MAP_HEAD.items():
        sources = tuple(f"decoders.{target.decoder}.{name}" for name in ours)
        make = (lambda *parts: torch.cat(parts)) if len(ours) > 1 else None
        tensors[f"vision_model.head.{theirs}"] = TensorSource(sources, make)
    return tensors


def _dual(source: Source, vision: VisionConfig, text: Any, target: Text) -> Parts:
    decoder = source.recipe.decoders[target.decoder]
    if isinstance(vision, SiglipVisionConfig) and isinstance(decoder, MapHeadSpec):
        values = _public_values(vision.to_dict()) | {"vision_use_head": True}
        tensors = copied(vision_names(vision), VISION, "vision_model.") | _map_head(target)
    else:
        values, tensors = _pooled_vision(source, vision, decoder, f"decoders.{target.decoder}.norm.")
    config = VisionTextDualEncoderConfig(
        vision_config=values, text_config=_public_values(text.to_dict()), projection_dim=target.width
    )
    if isinstance(text, BertConfig):
        width = text.hidden_size
        tensors |= {
            "text_model.pooler.dense.weight": TensorSource((), lambda: TANH_SCALE * torch.eye(width)),
            "text_model.pooler.dense.bias": TensorSource((), lambda: torch.zeros(width)),
        }
    return empty(lambda: VisionTextDualEncoderModel(config)), tensors


def _bounded(log_scale: Tensor, target: Text) -> Tensor:
    return log_scale.clamp(max=math.log(target.distribution.max_scale))


def _reads_class_token(decoder: DecoderSpec) -> bool:
    return isinstance(decoder, ClassTokenSpec) and decoder.alone


def _pooled_vision(
    source: Source, config: VisionConfig, decoder: DecoderSpec, norm: str
) -> tuple[dict[str, Any], dict[str, TensorSource]]:
    """Return configuration and tensors of a vision model with the output of the recipe's decoder as `pooler_output`."""
    pools_mean = decoder.kind == "mean_pool"
    if isinstance(config, InternImageConfig) or not (pools_mean or _reads_class_token(decoder)):
        raise no_class(config, decoder, "a dual encoder")
    if pools_mean:
        return timm_vision(config, decoder, norm, source.run.data.augment, "vision_model.timm_model.")
    tensors = copied(vision_names(config), VISION, "vision_model.")
    values = _public_values(config.to_dict())
    if isinstance(config, ViTConfig):
        width = config.hidden_size
        values |= {"pooler_act": "linear", "pooler_output_size": width}
        tensors |= {
            "vision_model.pooler.dense.weight": TensorSource((), lambda: torch.eye(width)),
            "vision_model.pooler.dense.bias": TensorSource((), lambda: torch.zeros(width)),
        }
    return values, tensors


def _public_values(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("_")}
