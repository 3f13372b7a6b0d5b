"""Export of a plain vision Transformer with timm's names, for timm and for the timm wrapper of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTConfig,
)

from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.config import AugmentConfig
from m3i_scale.errors import ExportError
from m3i_scale.exports.tensors import VISION, ExportedModule, TensorSource, Trained, empty
from m3i_scale.objective.decoders import DecoderSpec, MeanPoolSpec
from m3i_scale.objective.information import Objective

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_POOL_EPS = 1e-6
"""Epsilon of the norm after a mean pool."""


def _tokens(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    return {"last_hidden_state": torch.cat(objective.student.encode_whole(pixels_BCHW), dim=1)}


def timm_part(
    config: VisionConfig,
    augment: AugmentConfig,
    decoder: DecoderSpec | None = None,
    norm: str = "",
    head: str | None = None,
    labels: Sequence[str] = (),
    trained: Trained = _tokens,
) -> ExportedModule:
    """Return the export part of a folder that `timm.create_model("local-dir:…", pretrained=True)` loads.

    Args:
        decoder: pooling before the classifier; None for features only.
        norm: prefix of the mean pool's norm in the checkpoint.
        head: prefix of the classifier in the checkpoint; None for features only.
        trained: outputs of the classifier.
    """
    architecture, arguments, tensors = _model(config, decoder, norm)
    if head is not None:
        tensors |= {f"head.{suffix}": TensorSource((head + suffix,)) for suffix in ("weight", "bias")}
    wrapped = TimmWrapperConfig(architecture=architecture, model_args=arguments)
    if labels:
        wrapped.id2label = dict(enumerate(labels))
    classes = TimmWrapperForImageClassification if head is not None else TimmWrapperModel
    model = empty(lambda: classes(wrapped))
    document = {  # that both timm and `transformers` can read
        "architecture": architecture,
        "architectures": [type(model).__name__],
        "model_type": TimmWrapperConfig.model_type,
        "num_classes": len(labels),
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": _pretrained_cfg(config, augment) | {"num_classes": len(labels)},
        "label_names": list(labels),
    }
    return ExportedModule(
        "classifier" if head is not None else "tokens",
        model,
        {f"timm_model.{name}": made for name, made in tensors.items()},
        trained,
        auto="AutoModelForImageClassification" if head is not None else "AutoModel",
        output="logits" if head is not None else "last_hidden_state",
        native="timm",
        strip="timm_model.",
        config=document,
    )


def timm_vision(
    config: VisionConfig, decoder: DecoderSpec, norm: str, augment: AugmentConfig, prefix: str
) -> tuple[dict[str, Any], dict[str, TensorSource]]:
    """Return configuration and tensors of a vision model with the normalized mean patch token as `pooler_output`. Name
    prefixes are `norm` for the mean pool's norm in the checkpoint, and `prefix` for all tensors in the export."""
    architecture, arguments, tensors = _model(config, decoder, norm)
    values = {
        "model_type": TimmWrapperConfig.model_type,
        "architecture": architecture,
        "model_args": arguments,
        "hidden_size": config.hidden_size,
        "num_labels": 0,
        "pretrained_cfg": _pretrained_cfg(config, augment),
    }
    return values, {prefix + name: made for name, made in tensors.items()}


def _model(
    config: VisionConfig, decoder: DecoderSpec | None, norm: str
) -> tuple[str, dict[str, Any], dict[str, TensorSource]]:
    if not isinstance(config, ViTConfig | Dinov2Config | CLIPVisionConfig):
        raise _not_supported(f"{config.model_type} is not written in timm's form")
    if config.hidden_act not in _ACTIVATIONS:
        raise _not_supported(f"timm has no activation '{config.hidden_act}'")
    if decoder is not None and decoder.kind == "attention_pool":
        raise _not_supported("no model of timm pools by attention with the mean token as its query")
    if isinstance(decoder, MeanPoolSpec):
        return _eva(config, norm, final_norm=decoder.final_norm)
    return _vit(config)


def _common(config: VisionConfig, hidden: float) -> dict[str, Any]:
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        # half a unit more, because timm truncates the product to an integer
        "mlp_ratio": (hidden + 0.5) / config.hidden_size,
        "qkv_bias": bool(getattr(config, "qkv_bias", True)),
    }
    if isinstance(config, Dinov2Config):
        arguments["init_values"] = config.layerscale_value
    return arguments


def _hidden(config: VisionConfig) -> int:
    if isinstance(config, Dinov2Config):
        hidden = int(config.hidden_size * config.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else hidden
    return int(config.intermediate_size)


def _vit(config: VisionConfig) -> tuple[str, dict[str, Any], dict[str, TensorSource]]:
    """Return timm's VisionTransformer with class-token pooling."""
    clip, gated = isinstance(config, CLIPVisionConfig), bool(getattr(config, "use_swiglu_ffn", False))
    _check_eps(config, 1e-5 if clip else 1e-6)
    # SwiGLUPacked counts both halves of the first layer
    arguments = _common(config, 2 * _hidden(config) if gated else _hidden(config)) | {"global_pool": "token"}
    architecture = "vit_base_patch16_224"
    if gated:
        architecture = "vit_giant_patch14_dinov2"
    elif clip:
        architecture = "vit_base_patch16_clip_224"
    if config.hidden_act != "gelu":
        arguments["act_layer"] = _ACTIVATIONS[config.hidden_act]
    layer: dict[str, tuple[str, ...]] = {
        "norm1.": ("norm1",),
        "attn.qkv." if arguments["qkv_bias"] else "attn.qkv.weight": ("q", "k", "v"),
        "attn.proj.": ("o",),
        "norm2.": ("norm2",),
        "ls1.gamma": ("scale1",),
        "ls2.gamma": ("scale2",),
    }
    return architecture, arguments, _tensors(config, layer, gated=gated)


def _eva(config: VisionConfig, norm: str, *, final_norm: bool) -> tuple[str, dict[str, Any], dict[str, TensorSource]]:
    """Return timm's EVA, the only timm model with a norm both before and after mean pooling. Its keys have no bias. A
    key bias shifts all attention scores of a query equally, so it has no effect."""
    _check_eps(config, _POOL_EPS, " in front of and behind the mean")
    gated = bool(getattr(config, "use_swiglu_ffn", False))
    if config.hidden_act != "gelu":
        raise _not_supported(
            f"timm's EVA, which alone pools as the recipe does, has no activation '{config.hidden_act}'"
        )
    arguments = _common(config, _hidden(config)) | {
        "qkv_fused": False,
        "swiglu_mlp": gated,
        "global_pool": "avg",
        "use_fc_norm": True,
        "use_post_transformer_norm": final_norm,
    }
    if isinstance(config, CLIPVisionConfig):
        arguments["use_pre_transformer_norm"] = True
    kinds = "" if arguments["qkv_bias"] else "weight"
    layer: dict[str, tuple[str, ...]] = {
        "norm1.": ("norm1",),
        f"attn.q_proj.{kinds}": ("q",),
        "attn.k_proj.weight": ("k",),
        f"attn.v_proj.{kinds}": ("v",),
        "attn.proj.": ("o",),
        "norm2.": ("norm2",),
        "gamma_1": ("scale1",),
        "gamma_2": ("scale2",),
    }
    tensors = _tensors(config, layer, gated=gated)
    if not final_norm:
        tensors = {name: made for name, made in tensors.items() if not name.startswith("norm.")}
    tensors |= {f"fc_norm.{suffix}": TensorSource((norm + suffix,)) for suffix in ("weight", "bias")}
    return "eva_giant_patch14_224", arguments, tensors


def _tensors(config: VisionConfig, layer: dict[str, tuple[str, ...]], *, gated: bool) -> dict[str, TensorSource]:
    """Return tensors by timm's name; `layer` has the parts of a layer by name. A name that ends with a dot means both
    weight and bias. Parts that the backbone does not have are left out."""
    ours, clip = token_family(config).parts, isinstance(config, CLIPVisionConfig)
    outer: dict[str, tuple[str, ...]] = {
        "patch_embed.proj.weight" if clip else "patch_embed.proj.": ("patch",),
        "norm.": ("norm",),
        **({"norm_pre.": ("pre_norm",)} if clip else {}),
    }
    width = config.hidden_size
    made = {
        "cls_token": TensorSource((VISION + ours["class"],), lambda tensor: tensor.reshape(1, 1, width)),
        "pos_embed": TensorSource((VISION + ours["positions"],), lambda tensor: tensor.reshape(1, -1, width)),
    }
    made |= _expand("", outer, ours, "")
    mlp = {"mlp.fc1.": ("gate_proj", "up_proj"), "mlp.fc2.": ("down_proj",)}
    plain = {"mlp.fc1.": ("fc1",), "mlp.fc2.": ("fc2",)}
    layer = {name: parts for name, parts in layer.items() if parts[0] in ours} | (mlp if gated else plain)
    for number in range(config.num_hidden_layers):
        made |= _expand(f"blocks.{number}.", layer, ours, str(number))
    return made


def _expand(
    prefix: str, table: dict[str, tuple[str, ...]], ours: dict[str, str], number: str
) -> dict[str, TensorSource]:
    made = {}
    for name, parts in table.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("", "weight", "bias"):  # a single parameter, not a module
            made[prefix + name] = TensorSource((VISION + ours[parts[0]].format(number),))
            continue
        for suffix in [kind] if kind else ["weight", "bias"]:
            sources = tuple(f"{VISION}{ours[part].format(number)}.{suffix}" for part in parts)
            make = (lambda *tensors: torch.cat(tensors)) if len(parts) > 1 else None
            made[f"{prefix}{module}.{suffix}"] = TensorSource(sources, make)
    return made


def _check_eps(config: VisionConfig, only: float, where: str = "") -> None:
    if config.layer_norm_eps != only:
        raise _not_supported(
            f"the norms have ε = {config.layer_norm_eps:g}, and those of timm's model {only:g}{where}; its"
            " configuration has no field for it"
        )


def _pretrained_cfg(config: VisionConfig, augment: AugmentConfig) -> dict[str, Any]:
    return {
        "custom_load": False,
        "input_size": [3, config.image_size, config.image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(augment.mean),
        "std": list(augment.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _not_supported(reason: str) -> ExportError:
    return ExportError(
        f"timm has no equivalent of the model: {reason}", fix="use --task features --format transformers"
    )
