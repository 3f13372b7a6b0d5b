"""Conversion of a plain Transformer and its segmentation head to standard classes: UPerNet on a BEiT, or EoMT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    Dinov2Config,
    EomtForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
)

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.errors import ExportError
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import VISION, ExportedModule, TensorSource, backbone_tensors, empty, label_maps
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.segmentation.mask_queries import MaskQueries, query_config
from m3i_scale.tasks.segmentation.pixel_heads import read_layers, segment
from m3i_scale.tasks.segmentation.segmentation_heads import EomtSegmentation, SegmentationHead, UperNetSegmentation

_BEIT = {
    "patch": "embeddings.patch_embeddings.projection",
    "class": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "norm1": "layers.{}.layernorm_before",
    **{part: f"layers.{{}}.attention.{part}_proj" for part in "qkvo"},
    "scale1": "layers.{}.lambda_1",
    "norm2": "layers.{}.layernorm_after",
    **{part: f"layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
    "scale2": "layers.{}.lambda_2",
}
"""Names of BEiT's parts, by the keys of `TokenFamily.parts`; without the final norm, which feature maps do not use."""
_EOMT = {
    "patch": "embeddings.patch_embeddings.projection",
    "norm1": "layers.{}.norm1",
    **{part: f"layers.{{}}.attention.{part}_proj" for part in "qkv"},
    "o": "layers.{}.attention.out_proj",
    "scale1": "layers.{}.layer_scale1.lambda1",
    "norm2": "layers.{}.norm2",
    **{part: f"layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
    "scale2": "layers.{}.layer_scale2.lambda1",
    "norm": "layernorm",
}
"""Names of EoMT's parts, by the same keys."""
_EOMT_HEAD = ("query.", "upscale_block.", "mask_head.", "class_predictor.")


def upernet_part(source: Source, spec: SegmentationHead, target: str) -> ExportedModule:
    """Return backbone and head as `UperNetForSemanticSegmentation`; `target` is the name of the head's target."""
    config, (names,) = backbone_config(source.run.backbone), source.label_sets.values()
    if not isinstance(spec, UperNetSegmentation):
        raise _no_class(f"none has a head of kind {spec.kind}")
    upernet = UperNetConfig(
        backbone_config=_as_beit(config, spec),
        hidden_size=spec.channels,
        use_auxiliary_head=spec.auxiliary_weight > 0,
        auxiliary_loss_weight=spec.auxiliary_weight,
        auxiliary_in_channels=None,
        **label_maps(names),
    )
    model = empty(lambda: UperNetForSemanticSegmentation(upernet))
    head, beit = f"heads.{target}.", "backbone.beit."
    tensors = backbone_tensors(config, _BEIT, beit)
    for layer in range(config.num_hidden_layers):
        # The bias of keys shifts all logits of a query equally, which softmax ignores; BEiT does not have it.
        del tensors[beit + _BEIT["k"].format(layer) + ".bias"]
    for name in model.state_dict():
        if name.endswith("num_batches_tracked"):
            tensors[name] = TensorSource((), lambda: torch.zeros((), dtype=torch.int64))
        elif name.startswith("backbone.fpn."):
            tensors[name] = TensorSource((head + "neck." + name.removeprefix("backbone.fpn."),))
        elif not name.startswith("backbone."):
            tensors[name] = TensorSource((head + name,))
    return ExportedModule(
        "segmenter",
        model,
        tensors,
        auto="AutoModelForSemanticSegmentation",
        output="logits",
        resize="whole",
        trained=lambda objective, pixels_BCHW: {"logits": segment(objective, pixels_BCHW)},
    )


def eomt_part(source: Source, spec: EomtSegmentation, target: str) -> ExportedModule:
    """Return backbone and queries as `EomtForUniversalSegmentation`; `target` is the name of the head's target."""
    config, (names,) = backbone_config(source.run.backbone), source.label_sets.values()
    shape = query_config(spec, config, len(names))
    ratio = _mlp_width(config, "EoMT") / config.hidden_size
    if not ratio.is_integer():
        raise _no_class("the MLP width of an EoMT is a multiple of the model width")
    shape.mlp_ratio = int(ratio)
    shape.update(label_maps(names))
    model = empty(lambda: EomtForUniversalSegmentation(shape))
    tensors = backbone_tensors(config, _EOMT)
    parts = token_family(config).parts
    token, positions = VISION + parts["class"], VISION + parts["positions"]
    # EoMT adds position embeddings to patches only, so the class token's position embedding is added to the token.
    tensors["embeddings.cls_token"] = TensorSource(
        (token, positions), lambda token_11D, positions_1LD: token_11D + positions_1LD[:, :1]
    )
    tensors["embeddings.position_embeddings.weight"] = TensorSource((positions,), lambda table_1LD: table_1LD[0, 1:])
    for name in model.state_dict():
        if name.startswith(_EOMT_HEAD):
            tensors[name] = TensorSource((f"heads.{target}.{name}",))
    weights = torch.ones(len(names) + 1)
    weights[-1] = spec.no_object_weight
    tensors |= {
        "criterion.empty_weight": TensorSource((), lambda: weights),
        "attn_mask_probs": TensorSource((), lambda: torch.zeros(spec.blocks)),
        "embeddings.register_tokens": TensorSource((), lambda: torch.zeros(1, 0, config.hidden_size)),
    }
    auto = "AutoModelForUniversalSegmentation"
    return ExportedModule(
        "segmenter", model, tensors, auto=auto, output="masks_queries_logits", resize="windows", trained=_trained_eomt
    )


def _trained_eomt(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    queries = cast(MaskQueries, objective.reader)
    return {"masks_queries_logits": queries.encode_view(objective.student, pixels_BCHW, 1.0)[1][-1]}


def _as_beit(config: VisionConfig, spec: UperNetSegmentation) -> BeitConfig:
    return BeitConfig(
        intermediate_size=_mlp_width(config, "BEiT"),
        **{
            key: getattr(config, key)
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
        },
        **{key: getattr(config, key) for key in ("image_size", "patch_size", "num_channels")},
        use_absolute_position_embeddings=True,
        use_relative_position_bias=False,
        use_mask_token=False,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
        add_fpn=True,
        batch_norm_eps=1e-5,  # the same in every version; transformers 4 reads it here and has no default
        out_indices=list(read_layers(spec, config.num_hidden_layers)),
    )


def _mlp_width(config: VisionConfig, model: str) -> int:
    """Return the MLP width of a backbone, which must be one that `model` (BEiT or EoMT) can represent."""
    if not isinstance(config, ViTConfig | Dinov2Config):
        raise _no_class(f"{model} cannot represent a {config.model_type}")
    gated = isinstance(config, Dinov2Config) and config.use_swiglu_ffn
    if gated or not config.qkv_bias:
        raise _no_class(f"{model} has biases, and no gates in its MLP")
    dinov2 = isinstance(config, Dinov2Config)
    return int(config.hidden_size * config.mlp_ratio if dinov2 else config.intermediate_size)


def _no_class(why: str) -> ExportError:
    return ExportError(
        f"no Transformers class computes this segmenter: {why}",
        fix="use --task features; heads/ then has the segmentation head",
    )
