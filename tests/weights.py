"""Small models of other code bases, saved as these save them, and backbones that start from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.build import backbone_config, backbone_source, build_backbone
from m3i_scale.backbones.load_plan import LoadPlan, plan_load
from m3i_scale.config import BackboneConfig

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def shaken(model: nn.Module) -> nn.Module:
    """All parameters at random, so that none of them can be lost without a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def timm_model(architecture: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    return shaken(timm.create_model(architecture, **{**SMALL, "num_classes": 5, **arguments}))


def timm_folder(folder: Path, model: nn.Module) -> Path:
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def open_clip_model(quick_gelu: bool = False, **vision: Any) -> tuple[nn.Module, dict[str, Any]]:
    config = {"embed_dim": 24, "vision_cfg": {**VISION, **vision}, "text_cfg": TEXT}
    model = open_clip.CLIP(**config, quick_gelu=quick_gelu, output_dict=True)
    return shaken(model), config | ({"quick_gelu": True} if quick_gelu else {})


def open_clip_folder(folder: Path, model: nn.Module, config: dict[str, Any], *, pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"model_cfg": config, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    if pickled:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def section(given: Path | str, **config: Any) -> BackboneConfig:
    return BackboneConfig(from_pretrained=str(given), config=config)


def planned(given: Path | str, **config: Any) -> LoadPlan:
    asked = section(given, **config)
    return plan_load(backbone_source(asked), backbone_config(asked))


def started(given: Path | str, **config: Any) -> Backbone:
    """A backbone that holds the weights, every one of them."""
    backbone, plan = build_backbone(backbone_config(section(given, **config))), planned(given, **config)
    backbone.model.load_state_dict(dict(zip(plan.names, plan.tensors(), strict=True)), strict=True)
    return backbone.eval()
