"""Learning-rate scales of every parameter equal those of published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABEL_SETS, VOCABULARY, tiny_run
from weights import started, timm_folder, timm_model

from m3i_scale.backbones.build import build_backbone
from m3i_scale.backbones.families import family_of, preset_config
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.objective.build import build_objective, scales_of

DECAY = 0.65


def published_plain(name: str, depth: int) -> float:
    """MAE, `get_layer_id_for_vit`; timm, `param_groups_layer_decay`, for the norm that it puts before the layers."""
    layer = depth + 1
    if name in ("cls_token", "pos_embed", "reg_token") or name.startswith(("patch_embed", "norm_pre")):
        layer = 0
    elif name.startswith("blocks"):
        layer = int(name.split(".")[1]) + 1
    return DECAY ** (depth + 1 - layer)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 1.0},
        {"pre_norm": True},
        {"architecture": "vit_small_patch14_reg4_dinov2", "init_values": 1.0},
        {"architecture": "vit_small_patch16_dinov3"},
        {"architecture": "vit_base_patch16_siglip_224"},
    ],
    ids=["ViT", "DINOv2", "CLIP", "registers", "DINOv3", "SigLIP"],
)
def test_plain_transformers_have_the_scales_of_mae(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The published model's parameters have their scales as values, and a backbone is started from it."""
    published = timm_model(depth=3, **arguments)
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            parameter.fill_(published_plain(name, 3))
    model = started(timm_folder(tmp_path / "model", published)).model
    scales = family_of(model.config).lr_scales(model, DECAY)
    assert len(set(scales.values())) == 5  # embeddings, three layers, the rest
    for name, parameter in model.named_parameters():
        if parameter.any():  # what the published model lacks starts at zero, e.g. the class token's row of positions
            assert parameter[parameter != 0].unique().tolist() == pytest.approx([scales[name]]), name


def published_classification(name: str, depths: tuple[int, ...]) -> float:
    """InternImage, `lr_decay_keywards` and `set_weight_decay_and_lr`: the first keyword within a name decides."""
    blocks = [(level, block) for level in range(4) for block in range(depths[level])]
    keywords = {f"levels.{level}.blocks.{block}.": DECAY**k for k, (level, block) in enumerate(reversed(blocks))}
    first = {level: keywords[f"levels.{level}.blocks.0."] for level in range(4)}
    keywords["patch_embed"] = first[0]
    for level in range(3):
        keywords[f"levels.{level}.downsample"] = keywords[f"levels.{level}.norm"] = first[level + 1]
    scale = next((value for keyword, value in keywords.items() if keyword in name), 1.0)
    slow = ("offset", "attention_weights", "center_feature_scale_proj", "alpha_beta")
    return scale * (0.1 if any(part in name for part in slow) else 1.0)


def published_dense(name: str, depths: tuple[int, ...]) -> float:
    """InternImage, `get_num_layer_for_swin` of detection and segmentation, on names below `backbone.`."""
    layers, words = sum(depths) + 2, f"backbone.{name}".split(".")
    layer = layers - 1
    if words[1] == "patch_embed":
        layer = 0
    elif words[1] == "levels":
        stage = int(words[2])
        if words[3] in ("downsample", "norm"):
            layer = 1 + sum(depths[: {0: 1, 1: 2, 2: 3, 3: 3}[stage]])
        else:
            layer = int(words[4]) + 1 + sum(depths[:stage])
    return DECAY ** (layers - layer - 1)


@pytest.mark.parametrize("preset", ["internimage-t", "internimage-h"])
def test_internimage_has_the_scales_of_both_published_variants(preset: str) -> None:
    config = preset_config(preset)
    assert isinstance(config, InternImageConfig)
    with torch.device("meta"):
        model = build_backbone(config).model
    classification = family_of(model.config).lr_scales(model, DECAY, dense=False, dcn=0.1)
    dense = family_of(model.config).lr_scales(model, DECAY, dense=True)
    for name, _ in model.named_parameters():
        assert classification[name] == pytest.approx(published_classification(name, config.depths)), name
        assert dense[name] == pytest.approx(published_dense(name, config.depths)), name
    if preset == "internimage-h":
        late = [name for name in dense if ".post_norms." in name]
        assert late
        assert all(classification[name] == 1 for name in late)
        assert any(dense[name] < DECAY**10 for name in late)


def test_a_recipe_decays_its_backbone_and_nothing_else() -> None:
    run = tiny_run("m3i", "optim.layer_decay=0.5")
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    rate_of = {
        id(parameter): group["lr_scale"]
        for group in parameter_groups(objective, 0.05, scales_of(objective, run))
        for parameter in group["params"]
    }
    rates = {name: rate_of[id(value)] for name, value in objective.named_parameters() if value.requires_grad}
    inside = {name: rate for name, rate in rates.items() if name.startswith("student.")}
    assert {rate for name, rate in rates.items() if name not in inside} == {1.0}
    assert set(inside.values()) == {0.125, 0.25, 0.5, 1.0}  # embeddings, two layers, the last norm
    assert {rate for name, rate in inside.items() if ".embeddings." in name} == {0.125}
    assert scales_of(objective, tiny_run("m3i")) == {}
