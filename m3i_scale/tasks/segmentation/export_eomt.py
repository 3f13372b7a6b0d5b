"""Conversion of a plain Transformer and its mask queries to the standard EoMT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from transformers import Dinov2Config, EomtForUniversalSegmentation, ViTConfig

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.errors import ExportError
from m3i_scale.export.joint import part_of, vision_names
from m3i_scale.export.source import Source
from m3i_scale.export.tensors import VISION, ExportedModule, TensorSource, empty, label_maps
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.segmentation.mask_queries import MaskQueries, query_config
from m3i_scale.tasks.segmentation.segmentation_heads import EomtSegmentation

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
"""Names of EoMT's parts, by the keys of `TokenFamily.parts`."""
_HEAD = ("query.", "upscale_block.", "mask_head.", "class_predictor.")


def eomt_part(source: Source, spec: EomtSegmentation, target: str) -> ExportedModule:
    """Return backbone and queries as `EomtForUniversalSegmentation`; `target` is the name of the head's target."""
    config, (names,) = backbone_config(source.run.backbone), source.label_sets.values()
    shape = query_config(spec, config, len(names))
    shape.mlp_ratio = _mlp_ratio(config)
    shape.update(label_maps(names))
    model = empty(lambda: EomtForUniversalSegmentation(shape))
    tensors = _backbone_tensors(config)
    for name in model.state_dict():
        if name.startswith(_HEAD):
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
        "segmenter", model, tensors, auto=auto, output="masks_queries_logits", resize="windows", trained=_trained
    )


def _trained(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    queries = cast(MaskQueries, objective.reader)
    return {"masks_queries_logits": queries.encode_view(objective.student, pixels_BCHW, 1.0)[1][-1]}


def _mlp_ratio(config: VisionConfig) -> int:
    if not isinstance(config, ViTConfig | Dinov2Config):
        raise no_class(f"an EoMT of a {config.model_type} is not written here")
    dinov2 = isinstance(config, Dinov2Config)
    ratio = float(config.mlp_ratio) if dinov2 else config.intermediate_size / config.hidden_size
    if (dinov2 and config.use_swiglu_ffn) or not config.qkv_bias or not ratio.is_integer():
        raise no_class("EoMT has biases, no gates in its MLP, and its width is a multiple of that of the model")
    return int(ratio)


def _backbone_tensors(config: VisionConfig) -> dict[str, TensorSource]:
    width, tensors = config.hidden_size, {}
    own = token_family(config).parts
    for name in vision_names(config):
        part, number, suffix = part_of(name, own)
        if part in _EOMT:
            tensors[_EOMT[part].format(number) + suffix] = TensorSource((VISION + name,))
    token, positions = VISION + own["class"], VISION + own["positions"]
    # EoMT adds position embeddings to patches only, so the class token's position embedding is added to the token.
    tensors["embeddings.cls_token"] = TensorSource((token, positions), _with_position)
    tensors["embeddings.position_embeddings.weight"] = TensorSource((positions,), lambda table_1LD: table_1LD[0, 1:])
    if not isinstance(config, Dinov2Config):
        for layer in range(config.num_hidden_layers):
            for part in ("scale1", "scale2"):
                tensors[_EOMT[part].format(layer)] = TensorSource((), lambda: torch.ones(width))
    return tensors


def _with_position(token_11D: Tensor, positions_1LD: Tensor) -> Tensor:
    return token_11D + positions_1LD[:, :1]


def no_class(why: str) -> ExportError:
    """Return the error for a segmenter that no standard class can represent."""
    return ExportError(
        f"no stock class for segmentation computes what was trained: {why}",
        fix="--task features: heads/ holds the head",
    )
