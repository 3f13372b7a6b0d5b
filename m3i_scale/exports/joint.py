"""Conversion of a recipe's heads to standard models: classifier, and backbone for detectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.errors import ExportError
from m3i_scale.exports.as_timm import timm_part
from m3i_scale.exports.source import Source, model_files, target_of
from m3i_scale.exports.tensors import (
    VISION,
    ExportedModule,
    TensorSource,
    Trained,
    backbone_tensors,
    copied,
    empty,
    label_maps,
    vision_names,
)
from m3i_scale.objective.decoders import ClassTokenSpec, DecoderSpec
from m3i_scale.objective.information import Objective
from m3i_scale.objective.targets.base import Target
from m3i_scale.objective.targets.category import Category, FeatureNorm


def classifier_part(source: Source, label_set: str, *, timm: bool = False) -> ExportedModule:
    """Return backbone and trained head as an image classifier; arguments as for `_plain_classifier`."""
    target, number = target_of(source, "category"), list(source.label_sets).index(label_set)
    part = _plain_classifier(source, label_set, timm=timm)
    if not isinstance(target, Category) or not target.batch_norm:
        return part
    head = f"heads.{target.name}."
    return _with_norm(part, f"{head}sets.{number}.", f"{head}norm.")


def _with_norm(part: ExportedModule, head: str, norm: str) -> ExportedModule:
    """Fold the batch norm before a classifier into its weight rows and biases."""
    rows, offset = head + "weight", head + "bias"
    statistics = (norm + "running_mean", norm + "running_var")

    def folded(made: TensorSource) -> TensorSource:
        if made.sources == (rows,):
            place = made.make or (lambda weight: weight)
            return TensorSource((rows, *statistics), lambda weight, mean, var: place(_scaled(weight, var)))
        if made.sources == (offset,):
            moved = (offset, rows, *statistics)
            return TensorSource(moved, lambda bias, weight, mean, var: bias - _scaled(weight, var) @ mean)
        return made

    return replace(part, tensors={name: folded(made) for name, made in part.tensors.items()})


def _scaled(rows_KD: Tensor, var_D: Tensor) -> Tensor:
    return rows_KD * (var_D + FeatureNorm.eps).rsqrt()


def _plain_classifier(source: Source, label_set: str, *, timm: bool) -> ExportedModule:
    """Return backbone and trained head as a standard class that pools as the recipe does.

    A class token maps to `ViTForImageClassification` or `Dinov2ForImageClassification`. With the mean patch
    concatenated it maps to the latter, and a ViT is converted to DINOv2. Neither supports normalized mean pooling.
    timm's EVA does, and `transformers` loads it as `TimmWrapperForImageClassification`. With `timm`, timm can load the
    folder as well.
    """
    target, task = target_of(source, "category"), source.run.task
    if task is not None and task.chooses_head and len(source.recipe.targets) > 1:
        raise ExportError(
            f"the best of the {len(source.recipe.targets)} heads of the sweep is known only after training",
            fix="train and evaluate the run, then export it",
        )
    decoder = source.recipe.decoders[target.decoder]
    config, names = backbone_config(source.run.backbone), source.label_sets[label_set]
    number = list(source.label_sets).index(label_set)
    head = f"heads.{target.name}.sets.{number}."

    def trained(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
        logits = objective.heads[target.name](objective.pooled(target.decoder, pixels_BCHW))
        return {"logits": logits[number]}

    if isinstance(config, InternImageConfig):
        if timm:
            raise no_class(config, decoder, "timm")
        return _internimage_classifier(config, target, decoder, head, names, trained)
    if isinstance(decoder, ClassTokenSpec) and (decoder.blocks > 1 or (timm and decoder.mean)):
        raise no_class(config, decoder, "timm" if timm else "image classification")
    if timm or decoder.kind == "mean_pool":
        norm = f"decoders.{target.decoder}.norm."
        part = timm_part(config, source.run.data.augment, decoder, norm, head, names, trained)
        return part if timm else replace(part, native=None)
    if not isinstance(decoder, ClassTokenSpec) or not isinstance(config, ViTConfig | Dinov2Config):
        raise no_class(config, decoder, "image classification")
    tensors = copied(vision_names(config), VISION)
    if decoder.mean and isinstance(config, ViTConfig):
        tensors, config = _as_dinov2(config)
    labelled = config
    labelled.update(label_maps(names))
    dinov2 = isinstance(config, Dinov2Config)
    build = Dinov2ForImageClassification if dinov2 else ViTForImageClassification
    tensors = {f"{'dinov2' if dinov2 else 'vit'}.{name}": made for name, made in tensors.items()}
    # DINOv2's classifier reads [class token | mean patch]; without the mean in training, its weights are zero.
    alone = dinov2 and not decoder.mean
    widen = (lambda weight: torch.cat([weight, torch.zeros_like(weight)], dim=1)) if alone else None
    tensors |= {
        "classifier.weight": TensorSource((head + "weight",), widen),
        "classifier.bias": TensorSource((head + "bias",)),
    }
    return ExportedModule(
        "classifier",
        empty(lambda: build(labelled)),
        tensors,
        trained,
        auto="AutoModelForImageClassification",
        output="logits",
    )


def backbone_part(source: Source) -> ExportedModule:
    """Return the backbone under `AutoBackbone`, for detectors and segmenters: feature maps by stage.

    A ViT is converted to a DINOv2 with layer scales of 1, because `transformers` has no backbone class for ViT. DINOv2
    needs an MLP width that is a multiple of the model width, so the MLP is padded with hidden units that are always
    zero.
    """
    config = backbone_config(source.run.backbone)
    tensors = copied(vision_names(config), VISION)
    if isinstance(config, ViTConfig):
        tensors, config = _as_dinov2(config)
    elif not isinstance(config, Dinov2Config):
        raise ExportError(
            f"a {config.model_type} cannot be exported for AutoBackbone",
            why="AutoBackbone needs one feature map per stage",
            fix="use --task features, which AutoModel loads",
        )
    shape = config
    # The class that AutoBackbone selects. AutoBackbone itself loads only Hub names, not folders.
    model = empty(lambda: Dinov2Backbone(shape))
    return ExportedModule("backbone", model, tensors, _feature_map, auto="Dinov2Backbone", output="feature_maps")


def _feature_map(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    _, tokens_BND = objective.student.encode_whole(pixels_BCHW)
    return {"feature_maps": tokens_BND.transpose(1, 2).unflatten(2, objective.student.grid)}


def _as_dinov2(config: ViTConfig) -> tuple[dict[str, TensorSource], Dinov2Config]:
    width, hidden = config.hidden_size, config.intermediate_size
    ratio = math.ceil(hidden / width)
    shape = Dinov2Config(
        mlp_ratio=ratio,
        use_mask_token=False,
        **{
            key: getattr(config, key)
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
        },
        **{key: getattr(config, key) for key in ("image_size", "patch_size", "num_channels", "qkv_bias")},
    )
    idle = ratio * width - hidden

    theirs = token_family(shape).parts
    tensors = backbone_tensors(config, theirs)
    for layer in range(config.num_hidden_layers) if idle else ():
        first, second = (theirs[part].format(layer) for part in ("fc1", "fc2"))
        for name, padding in (
            (f"{first}.weight", (0, 0, 0, idle)),
            (f"{first}.bias", (0, idle)),
            (f"{second}.weight", (0, idle)),
        ):
            tensors[name] = replace(tensors[name], make=partial(F.pad, pad=padding))
    return tensors, shape


def _internimage_classifier(
    config: InternImageConfig, target: Target, decoder: DecoderSpec, head: str, names: list[str], trained: Trained
) -> ExportedModule:
    from m3i_scale.backbones.internimage.modeling_internimage import InternImageForImageClassification

    if decoder.kind != "mean_pool":
        raise no_class(config, decoder, "image classification")
    tensors = copied(vision_names(config), VISION, "model.")
    norm = f"decoders.{target.decoder}.norm."
    tensors |= {f"pool_norm.{suffix}": TensorSource((norm + suffix,)) for suffix in ("weight", "bias")}
    tensors |= {f"classifier.{suffix}": TensorSource((head + suffix,)) for suffix in ("weight", "bias")}
    auto_map, files = model_files(config)
    config.update({**label_maps(names), "auto_map": auto_map})
    return ExportedModule(
        "classifier",
        empty(lambda: InternImageForImageClassification(config)),
        tensors,
        trained,
        auto="AutoModelForImageClassification",
        output="logits",
        files=files,
    )


def no_class(config: VisionConfig, decoder: DecoderSpec, what: str) -> ExportError:
    """Return the error for a pooling that no class of `transformers` computes."""
    more = isinstance(decoder, ClassTokenSpec) and not decoder.alone
    pools = {
        "attention_pool": "the recipe pools by attention with the mean token as its query",
        "map_head": "the recipe pools by attention with a learned query",
        "mean_pool": "the recipe pools by a normalized mean",
        "class_token": "the recipe reads class tokens of several layers, or the mean of the patches beside it"
        if more
        else "the recipe reads the class token",
    }
    return ExportError(
        f"no Transformers class computes {what} like this model: "
        f"{pools.get(decoder.kind, f'the recipe pools by {decoder.kind}')}, on a {config.model_type} backbone",
        fix="use --task features; heads/ then has the pooling and projection",
    )
