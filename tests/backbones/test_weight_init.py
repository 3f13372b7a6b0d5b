"""Settings of the backbone's first values: MAE's initialization, and parts that keep them."""

import math

import numpy as np
import pytest
import torch
from tiny import DINOV3, LABEL_SETS, SIGLIP, VOCABULARY, random_batch, tiny_run

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import BackboneConfig, RunConfig, load_run
from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective, update_ema_teacher
from m3i_scale.objective.information import Objective
from m3i_scale.objective.pretrained import start_weights

CLIP = ("backbone.preset=clip-b/16",)
POSITIONS, PATCH = "embeddings.position_embeddings", "embeddings.patch_embeddings.projection"
FROZEN = "backbone.freeze=[position_embeddings, patch_embeddings]"


def started(recipe: str, *overrides: str) -> Objective:
    run = tiny_run(recipe, *overrides)
    objective = build_objective(run, LABEL_SETS, VOCABULARY if "text" in run.model_fields_set else None)
    start_weights(objective, run)
    return objective


def fills(values: torch.Tensor, bound: float) -> bool:
    """Whether values are those of a uniform distribution from −bound to bound."""
    std = float(values.detach().std()) * math.sqrt(3)
    return 0.85 * bound < float(values.detach().abs().max()) <= bound and std == pytest.approx(bound, rel=0.25)


@pytest.mark.parametrize("backbone", [(), CLIP, SIGLIP, DINOV3], ids=["vit", "clip", "siglip", "dinov3"])
def test_weights_start_as_in_the_code_of_mae(backbone: tuple[str, ...]) -> None:
    model = started("mae", *backbone).student.model
    linear = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert len(linear) >= 12
    for name, module in linear.items():
        inputs, outputs = module.in_features, module.out_features
        fused = name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")  # one matrix for three there
        assert fills(module.weight, math.sqrt(6 / (inputs + outputs * (3 if fused else 1)))), name
        assert module.bias is None or not module.bias.any(), name
    (patch,) = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert fills(patch.weight, math.sqrt(6 / (64 + 3 * 8 * 8)))
    assert patch.bias is None or fills(patch.bias, 1 / math.sqrt(3 * 8 * 8))
    tokens = [p.detach() for name, p in model.named_parameters() if name.endswith(("cls_token", "class_embedding"))]
    assert len(tokens) == (backbone != SIGLIP)
    assert all(float(token.std()) == pytest.approx(0.02, rel=0.3) for token in tokens)


def positions_of_mae(width: int, side: int) -> np.ndarray:
    """`get_2d_sincos_pos_embed` with class token, written anew."""
    omega = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    waves = [wave(np.outer(place, omega)) for place in (columns, rows) for wave in (np.sin, np.cos)]
    return np.concatenate([np.zeros((1, width)), np.concatenate(waves, axis=1)])


def train(objective: Objective, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(objective, 0.05), lr=1e-2)
    for step in range(steps):
        objective(random_batch(4, seed=step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema_teacher(objective, 0.5)


def test_positions_are_the_fixed_ones_of_mae() -> None:
    objective = started("mae").train()
    before = objective.student.model.get_parameter(POSITIONS).detach().clone()
    np.testing.assert_allclose(before[0].numpy(), positions_of_mae(64, 4), atol=1e-6)
    trained = objective.student.model.get_parameter(f"{PATCH}.weight").detach().clone()
    train(objective, 2)
    assert torch.equal(objective.student.model.get_parameter(POSITIONS), before)
    assert not torch.equal(objective.student.model.get_parameter(f"{PATCH}.weight"), trained)


def test_the_ema_teacher_has_the_frozen_parts_of_the_student() -> None:
    objective = started("m3i", FROZEN).train()
    names = [POSITIONS, f"{PATCH}.weight", f"{PATCH}.bias"]
    student, teacher = objective.student.model, objective.momentum.backbone.model
    before = [student.get_parameter(name).detach().clone() for name in names]
    train(objective, 2)
    for name, value in zip(names, before, strict=True):
        assert teacher.get_parameter(name) is student.get_parameter(name)
        assert torch.equal(student.get_parameter(name), value)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == set(names)


def test_nothing_is_frozen_and_nothing_drawn_otherwise_by_default() -> None:
    assert (BackboneConfig().freeze, BackboneConfig().weight_init) == ([], "default")
    for name in ("m3i", "clip", "ibot", "in1k_finetune_b"):
        backbone = load_run(name).backbone
        assert (backbone.freeze, backbone.weight_init) == ([], "default")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"preset": "internimage-t", "weight_init": "xavier_uniform"}, "is an InternImage"),
        ({"preset": "internimage-t", "freeze": ["patch_embeddings"]}, "InternImage has no patch embeddings"),
        ({"preset": "dinov3-s/16", "freeze": ["position_embeddings"]}, "DINOv3 has no position embeddings"),
    ],
)
def test_a_setting_without_effect_is_an_error(section: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        backbone_config(BackboneConfig.model_validate(section))
    fixed = section | {"weight_init": "default", "freeze": []}
    assert str(caught.value.where) in ("backbone.weight_init", "backbone.freeze")
    assert str(caught.value.fix) in ("set backbone.weight_init=default", "set backbone.freeze=[]")
    backbone_config(BackboneConfig.model_validate(fixed))


def test_a_fix_keeps_the_parts_that_there_are() -> None:
    section = BackboneConfig(preset="dinov3-s/16", freeze=["patch_embeddings", "position_embeddings"])
    with pytest.raises(ConfigError) as caught:
        backbone_config(section)
    assert caught.value.fix == "set backbone.freeze=['patch_embeddings']"


def test_parts_of_a_frozen_backbone_are_not_frozen_again() -> None:
    task = {"kind": "classification", "freeze": True}
    with pytest.raises(ValueError, match=r"`backbone.freeze` has no effect"):
        RunConfig.model_validate({"task": task, "backbone": {"freeze": ["patch_embeddings"]}})
