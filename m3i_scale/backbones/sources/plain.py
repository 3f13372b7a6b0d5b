"""Infer the configuration of a plain vision Transformer from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from m3i_scale.backbones.families import FAMILIES, TokenFamily, VisionConfig, published_heads, token_family
from m3i_scale.backbones.sources.base import MismatchError, NameMap, Shapes, Source, square_side

_ROLES = {
    part: f"{{}}.{part}" if "{}" in name else part
    for family in FAMILIES
    if isinstance(family, TokenFamily)
    for part, name in family.parts.items()
}
_POST_NORM = {(1792, 64): "EVA-02-E"}
"""Published models with norms after attention and MLP, by width and depth. No name or shape differs."""

NO_KEY_BIAS = (r".*\.k_proj\.bias$", 0.0, "no bias of keys: it would shift all scores of a query alike")
NO_MASK_TOKEN = (r"embeddings\.mask_token$", 0.0, "no mask token: no input reads it")
NO_FINAL_NORM = "no final norm. It starts with weight 1 and bias 0; `final_norm: false` and recipe `sim` do not use it"
NO_PATCH_BIAS = (r".*patch_embedding(s\.projection)?\.bias$", 0.0, "no bias of the patch embedding")


@dataclass(frozen=True)
class Facts:
    """Settings that cannot be inferred from shapes. None: the source does not contain it."""

    heads: int | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    class_row: bool | None = None
    """Whether the position embeddings have a row for the class token."""
    rope_theta: float | None = None
    final_norm: bool = True
    """False for SIM, and for models of MAE, SIM and timm that normalize the pooled features instead."""
    side: int | None = None
    """Patches per image side, for models without learned position embeddings."""


def plain_source(
    given: str,
    place: Path,
    names: NameMap,
    shapes: Shapes,
    facts: Facts,
    fields: Mapping[str, Any],
    refused: tuple[tuple[str, str], ...],
) -> Source:
    """Return the source with the stock configuration that matches the tensors exactly.

    `facts` are known from other sources; `fields` (`backbone.config`) are for settings that are known from nowhere
    else. `refused`: (pattern, reason) of tensors that no configuration here supports.
    """
    parts = _parts(names, shapes, refused)
    rotary = "registers" in parts and "positions" not in parts
    _require(parts, rotary, facts)
    width, depth = parts["0.norm1.weight"][-1], 1 + max(int(part.split(".")[0]) for part in parts if part[0].isdigit())
    if (width, depth) in _POST_NORM:
        raise MismatchError(
            f"{depth} layers of width {width} are {_POST_NORM[width, depth]}: its norms come after attention and MLP",
            "in the stock models, norms come before them",
        )
    patch = parts["patch.weight"][-1]
    assumed: dict[str, str] = {}
    side = facts.side if rotary and facts.side else _grid_side(parts, facts)
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "patch_size": patch,
        "image_size": patch * side,
    }
    if facts.class_row is None and not rotary:
        beside = " beside the class token" if "class" in parts else ""
        assumed["image_size"] = (
            f"a bare file does not say its grid: its {side * side} places{beside} as {side} × {side}, "
            "which is another model where it was trained on images that are not square"
        )
    # This error comes first: a model that no stock class matches needs no number of heads.
    config_class, specific = _class_of(parts, rotary, width)
    common["num_attention_heads"] = _heads(width, depth, facts, fields, assumed)
    common["hidden_act"] = _activation(parts, facts, fields, assumed)
    common["layer_norm_eps"] = facts.layer_norm_eps or (1e-5 if "pre_norm.weight" in parts else 1e-6)
    if facts.layer_norm_eps is None:
        assumed["layer_norm_eps"] = (
            "a bare file does not say it; the default of its code base. Norms are assumed to come before attention and "
            "MLP (pre-norm): a post-norm model has the same names and shapes"
        )
    if rotary:
        specific["rope_theta"] = facts.rope_theta
    config = config_class(**common, **specific)
    token_family(config).adapt(config)
    constants = [NO_KEY_BIAS] if "0.q.bias" in parts and "0.k.bias" not in parts else []
    constants += [NO_PATCH_BIAS] if "patch.bias" not in parts else []
    constants += [NO_MASK_TOKEN] if "registers" in parts else []
    if not facts.final_norm:
        norm = re.escape(token_family(config).parts["norm"])
        constants += [(rf"{norm}\.{part}$", value, NO_FINAL_NORM) for part, value in (("weight", 1.0), ("bias", 0.0))]
    class_row = token_family(config).has_class_token and facts.class_row is not False
    source = vit_source(given, place, names, config)
    return replace(source, assumed=assumed, constants=tuple(constants), class_row=class_row)


def vit_source(given: str, place: Path, names: NameMap, config: VisionConfig) -> Source:
    """Return the source of a plain vision Transformer."""
    ours = token_family(config).parts
    return Source(given, names.kind, place, config, lambda _: lambda name: names.place(name, ours))


def _parts(names: NameMap, shapes: Shapes, refused: tuple[tuple[str, str], ...]) -> dict[str, tuple[int, ...]]:
    """Return shapes by part, e.g. `3.q.weight`."""
    shape_of: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        placed = names.place(name, _ROLES)
        if isinstance(placed, tuple):
            share = (shape[0] // len(placed), *shape[1:]) if shape else shape
            shape_of |= dict.fromkeys(placed, share)
        elif placed is None:
            inner = name.removeprefix(names.prefix)
            reason = next((reason for pattern, reason in refused if re.match(pattern, inner)), None)
            raise MismatchError(f"no backbone here has its '{name}' {shape}", reason or "it would be lost")
    return shape_of


def _require(parts: Shapes, rotary: bool, facts: Facts) -> None:
    if rotary and facts.rope_theta is None:
        raise MismatchError(
            "it has registers and no table of positions, and a bare file does not say how its positions are rotated",
            "no shape tells the frequencies",
            fix="give a folder with this file as model.safetensors and a config.json that tells timm what it is:"
            ' {"architecture": "vit_small_patch16_dinov3"}',
        )
    if "registers" in parts and ("class" not in parts or "0.scale1" not in parts or "pre_norm.weight" in parts):
        raise MismatchError("it has registers, and is no DINOv2 or DINOv3", "no other stock model here has them")
    for part, why in (
        ("patch.weight", "it has no patch embedding"),
        ("0.norm1.weight", "it has no layers"),
        ("positions", "it has no table of positions"),
        ("norm.weight", "it has no final norm, and no norm of pooled features"),
    ):
        optional = (rotary and part == "positions") or (part == "norm.weight" and not facts.final_norm)
        if part not in parts and not optional:
            raise MismatchError(why, "another model than the one that was trained would start")


def _grid_side(parts: Shapes, facts: Facts) -> int:
    rows = parts["positions"][-2]
    if "class" in parts and facts.class_row is None and math.isqrt(rows) ** 2 == rows:
        side = math.isqrt(rows)
        raise MismatchError(
            f"its table of positions has {rows} rows, and a bare file does not say what they are",
            f"{side} × {side} places, or a class token and {rows - 1} places of images that are not square",
            fix="give a folder with this file as model.safetensors or pytorch_model.bin, and a config.json that tells"
            ' timm what it is: {"architecture": "deit3_base_patch16_224"}',
        )
    places = rows - ("class" in parts and facts.class_row is not False)
    grid_side = square_side(places)
    if grid_side is None:
        raise MismatchError(f"its table of positions has {places} places", "a backbone's grid is square")
    return grid_side


def _heads(width: int, depth: int, facts: Facts, fields: Mapping[str, Any], assumed: dict[str, str]) -> int:
    heads = facts.heads or fields.get("num_attention_heads") or published_heads(width, depth)
    if not isinstance(heads, int):
        raise MismatchError(
            f"its tensors are those of {depth} layers of width {width}, which is no published size, and nothing tells "
            "its number of heads",
            "queries, keys and values have the same shapes for any number",
            fix="backbone.config.num_attention_heads=…",
        )
    if facts.heads is None:
        assumed["num_attention_heads"] = f"a bare file does not say it; {depth} layers of width {width}"
    return heads


def _activation(parts: Shapes, facts: Facts, fields: Mapping[str, Any], assumed: dict[str, str]) -> str:
    if facts.hidden_act is not None:
        return facts.hidden_act
    name, choices = "", ""
    if "class" not in parts:
        name, choices = "SigLIP", "gelu_pytorch_tanh (as transformers has them) or =gelu (as timm has most of them)"
    elif "pre_norm.weight" in parts:
        name, choices = "CLIP", "quick_gelu (OpenAI, DFN, MetaCLIP 1) or =gelu (LAION, DataComp)"
    if name and "hidden_act" not in fields:
        raise MismatchError(
            f"a bare file of a {name} model does not say which GELU it was trained with",
            "with the other one it is another model, and no shape differs",
            fix=f"backbone.config.hidden_act={choices}",
        )
    assumed["hidden_act"] = "a bare file does not say it"
    return str(fields.get("hidden_act", "gelu"))


def _class_of(parts: Shapes, rotary: bool, width: int) -> tuple[type[VisionConfig], dict[str, Any]]:
    """Return the configuration class, and the fields that not all classes have. Parts without a place in the model of
    that class, and missing ones, are found when tensors and parameters are matched."""
    gated, qkv_bias = "0.gate_proj.weight" in parts, "0.q.bias" in parts
    hidden = parts.get("0.gate_proj.weight" if gated else "0.fc1.weight", (0,))[0]
    if "class" not in parts:
        return SiglipVisionConfig, {"intermediate_size": hidden, "vision_use_head": False}
    if "pre_norm.weight" in parts:
        return CLIPVisionConfig, {"intermediate_size": hidden}
    if rotary:
        biases = {f"{part}_bias": f"0.{part[0]}.bias" in parts for part in ("query", "key", "value")}
        registers = parts["registers"][-2]
        specific = {"intermediate_size": hidden, "use_gated_mlp": gated, "num_register_tokens": registers}
        return DINOv3ViTConfig, specific | biases
    if "0.scale1" not in parts:
        return ViTConfig, {"intermediate_size": hidden, "qkv_bias": qkv_bias}
    for ratio in range(1, 17):
        # Dinov2SwiGLUFFN: two thirds of the hidden width, rounded up to a multiple of 8.
        if hidden == ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio):
            specific = {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "qkv_bias": qkv_bias}
            if "registers" in parts:
                return Dinov2WithRegistersConfig, specific | {"num_register_tokens": parts["registers"][-2]}
            return Dinov2Config, specific | {"use_mask_token": False}
    raise MismatchError(f"its MLP is {hidden} wide at width {width}", "that of Dinov2Model is a whole multiple")
