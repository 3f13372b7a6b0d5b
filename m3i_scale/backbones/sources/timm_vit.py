"""Detect vision Transformers of timm: ViT (also files of MAE and DINOv2), SigLIP and EVA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from m3i_scale.backbones.sources.base import MismatchError, NameMap, Shapes, Source, normalisation
from m3i_scale.backbones.sources.plain import Facts, plain_source

TIMM_MARK = "patch_embed.proj.weight"
TIMM_PREFIXES = ("", "module.", "model.", "visual.", "module.visual.")
_REFUSED = (
    (r"dist_token|head_dist", "it has a distillation token beside the class token"),
    (r".*(q_norm|k_norm)", "it normalizes queries and keys"),
    (r".*(rel_pos|relative_position)", "its attention adds relative positions"),
    (r".*(attn|mlp)\.norm", "it has a norm inside attention or MLP"),
    (r"patch_embed\.", "its patches pass more than one convolution"),
    (r".*mlp\.(fc1_|w12|w3)", "its MLP is gated by layers of their own"),
    (r"storage_tokens|rope_embed", "it has the names of DINOv3's own code; transformers and timm have its weights too"),
)
_LEFT_OUT = (
    (r"head(\.|_drop|s\.)", "classifier"),
    (r"fc_norm\.", "norm of the classifier"),
    (r"attn_pool\.", "attention pooling: recipes pool by decoders"),
    (r"(projector_|predictor_)?decoder_|decoder\.|student_norm\.", "decoder of its pre-training"),
    (r"mm_", "EMA teacher of its pre-training"),  # SIM
    (r"mask_token$", "mask token: the recipe trains a new one for inputs with mask tokens"),
    (r"lm_head\.", "head of its pre-training"),
)
_NO_EVA02 = "transformers has no class with the rotary positions, gates and norms of EVA-02's layers"
_INSTEAD = "EVA-01 (eva_giant_patch14_224), or with rotary positions DINOv3 (vit_*_dinov3)"
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def timm_source(
    given: str, place: Path, prefix: str, shapes: Shapes, fields: Mapping[str, Any], facts: Facts | None = None
) -> Source:
    """Return the source for tensors with timm's names after a prefix. `shapes` are from a header or a model on the meta
    device; `facts` is None for a bare file."""
    names = _names(prefix, shapes)
    if f"{prefix}blocks.0.mlp.norm.weight" in shapes:
        raise MismatchError("it has a norm inside its MLP, as EVA-02 has", _NO_EVA02, fix=_INSTEAD)
    # SIM's pre-trained model has EMA copies of its blocks (mm_), MAE's and SIM's fine-tuned ones have fc_norm.
    other_norm = any(f"{prefix}{name}" in shapes for name in ("fc_norm.weight", "mm_cls_token"))
    facts = replace(facts or Facts(), final_norm=f"{prefix}norm.weight" in shapes or not other_norm)
    return plain_source(given, place, names, shapes, facts, fields, _REFUSED)


def _names(prefix: str, shapes: Shapes) -> NameMap:
    scaled = any(f"{prefix}blocks.0.{name}" in shapes for name in ("ls1.gamma", "gamma_1"))
    first, second = (shapes.get(f"{prefix}blocks.0.mlp.{name}.weight", (0, 0)) for name in ("fc1", "fc2"))
    gated = scaled and first[0] == 2 * second[1]
    # DINOv3's gate is a separate layer. So is EVA-02's, but a model with learned position embeddings is not supported.
    own_gate = f"{prefix}reg_token" in shapes and f"{prefix}pos_embed" not in shapes
    return NameMap(
        "timm",
        prefix,
        outside="not of the vision tower" if prefix else "",
        block="blocks.",
        outer={
            "patch_embed.proj": "patch",
            "cls_token": "class",
            **dict.fromkeys(("reg_token", "register_tokens"), "registers"),
            "pos_embed": "positions",
            "norm_pre": "pre_norm",
            "norm": "norm",
        },
        inner={
            "norm1": ("norm1",),
            "attn.qkv": ("q", "k", "v"),
            "attn.q_bias": ("q.bias",),
            "attn.v_bias": ("v.bias",),
            **{f"attn.{part}_proj": (part,) for part in "qkv"},
            "attn.proj": ("o",),
            **dict.fromkeys(("ls1.gamma", "gamma_1"), ("scale1",)),
            "norm2": ("norm2",),
            # GluMlp packs both halves into one layer, the gate first.
            "mlp.fc1": ("gate_proj", "up_proj") if gated else ("fc1",),
            "mlp.fc2": ("down_proj",) if gated else ("fc2",),
            **({"mlp.fc1_g": ("gate_proj",), "mlp.fc1_x": ("up_proj",)} if own_gate else {}),
            **dict.fromkeys(("ls2.gamma", "gamma_2"), ("scale2",)),
        },
        left_out=_LEFT_OUT,
    )


def timm_folder(given: str, folder: Path, config: Mapping[str, Any], fields: Mapping[str, Any]) -> Source:
    """Return the source for a folder written by timm; `config.json` names the architecture."""
    architecture, arguments = str(config["architecture"]), dict(config.get("model_args") or {})
    shapes, facts = _empty_model(architecture, json.dumps(arguments, sort_keys=True))
    source = timm_source(given, folder, "", shapes, fields, facts)
    cfg = config.get("pretrained_cfg") or {}
    return replace(source, normalisation=normalisation(cfg.get("mean"), cfg.get("std")))


@lru_cache(maxsize=8)
def _empty_model(architecture: str, arguments: str) -> tuple[Shapes, Facts]:
    try:
        import timm
        from timm.models.eva import Eva, EvaBlock
        from timm.models.vision_transformer import Block, VisionTransformer
    except ImportError:
        raise MismatchError(
            f"only timm knows what '{architecture}' is, and it is not installed",
            "heads, activation and norms follow from the name",
            fix="run `pip install -e '.[timm]'`",
        ) from None
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, **json.loads(arguments))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise MismatchError(f"timm makes no '{architecture}': {error}", "its config.json names it") from None
    if type(model) not in (VisionTransformer, Eva):
        raise MismatchError(f"'{architecture}' is a {type(model).__name__}", "a backbone is a plain ViT")
    if type(model.blocks[0]) not in (Block, EvaBlock):
        raise MismatchError(f"'{architecture}' has a {type(model.blocks[0]).__name__}", "a plain ViT has none")
    rope = getattr(model, "rope", None)
    if rope is not None and not _turns_as_dinov3(model, rope):
        raise MismatchError(
            f"'{architecture}' rotates queries and keys by position, and not as the stock DINOv3ViTModel does",
            _NO_EVA02 if architecture.startswith("eva02") else "no other stock model here rotates them",
            fix=_INSTEAD,
        )
    rows, columns = model.patch_embed.grid_size
    if rows != columns:
        raise MismatchError(f"its images have {rows} × {columns} patches", "a backbone's grid is square")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, _facts(model)


def _facts(model: Any) -> Facts:
    from timm.layers import GluMlp

    block = model.blocks[0]
    act = type(block.mlp.act).__name__
    if act == "GELU" and block.mlp.act.__dict__.get("approximate", "none") == "tanh":
        act = "GELUTanh"
    if act not in _ACTIVATIONS:
        raise MismatchError(f"its MLP computes {act}", "no stock configuration names it")
    if isinstance(block.mlp, GluMlp) and act != "SiLU":
        raise MismatchError(
            f"its MLP is gated by {act}", "a gate of the stock models is SiLU whatever `hidden_act` says"
        )
    return Facts(
        heads=int(block.attn.num_heads),
        hidden_act=_ACTIVATIONS[act],
        layer_norm_eps=float(block.norm1.eps),
        class_row=not model.no_embed_class,
        rope_theta=model.rope.temperature if getattr(model, "rope", None) is not None else None,
        side=model.patch_embed.grid_size[0],
    )


def _turns_as_dinov3(model: Any, rope: Any) -> bool:
    """Return whether rotary positions match the stock DINOv3: patch centers from −1 to 1."""
    from timm.layers import RotaryEmbeddingDinoV3

    return (
        isinstance(rope, RotaryEmbeddingDinoV3)
        and (rope.normalize_coords, rope.grid_offset, rope.grid_indexing) == ("separate", 0, "ij")
        and (rope.min_period, rope.max_period) == (None, None)
        and model.blocks[0].attn.rotate_half
        and model.pos_embed is None
    )
