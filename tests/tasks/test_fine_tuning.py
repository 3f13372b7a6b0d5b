"""A task is a recipe with more: what is dropped, mixed and frozen is what published code drops, mixes and freezes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from timm.data.mixup import Mixup
from tiny import random_batch

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.config import BackboneConfig, RunConfig
from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.setup import run_yaml
from m3i_scale.tasks.backbone_task import apply_drop_path, drop_path_rates
from m3i_scale.tasks.classification.classification_task import Classification

SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
BACKBONES = {
    "vit": ("vit-ti/16", SHAPE | {"intermediate_size": 128}),
    "dinov2": ("dinov2-s/14", SHAPE),
    "clip": ("clip-b/16", SHAPE | {"intermediate_size": 128}),
    "internimage": (
        "internimage-t",
        {"image_size": 64, "channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]},
    ),
}


def backbone(kind: str) -> Backbone:
    preset, fields = BACKBONES[kind]
    built = build_backbone(backbone_config(BackboneConfig(preset=preset, config=fields)))
    for module in built.modules():
        initialize_module(built.model, module)
    return built


# ---------------------------------------------------------------- run files


def test_a_task_gives_its_recipe_and_is_read_again_as_it_was_written() -> None:
    run = RunConfig.model_validate({"task": {"kind": "classification", "label_smoothing": 0.1, "pool": "mean_pool"}})
    recipe = parse_recipe(run.recipe)
    assert [target.modality for target in recipe.targets] == ["category"]
    assert recipe.decoders["pool"].kind == "mean_pool"
    assert RunConfig.model_validate(yaml_of(run)) == run


def yaml_of(run: RunConfig) -> Any:
    import yaml

    return yaml.safe_load(run_yaml(run))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"task": {"kind": "classification"}, "recipe": {"name": "other"}}, "recipe"),
        ({"task": {"kind": "classification", "freeze": True, "layer_decay": 0.7}}, "layer_decay"),
        ({"task": {"kind": "classification", "switch_prob": 0.3, "mixup": 0.8}}, "switch_prob"),
        ({"task": {"kind": "classification", "mix_prob": 0.3}}, "mix_prob"),
        ({"task": {"kind": "classification"}, "optim": {"layer_decay": 0.7}}, "optim.layer_decay"),
        ({"task": {"kind": "classificaton"}}, "task"),
    ],
)
def test_what_has_no_effect_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        RunConfig.model_validate(values)


# ---------------------------------------------------------------- drop path


def test_drop_path_is_a_linear_ramp() -> None:
    for depth in (1, 2, 12, 40):
        assert drop_path_rates(0.3, depth) == pytest.approx(torch.linspace(0, 0.3, depth).tolist())


@pytest.mark.parametrize("kind", BACKBONES)
def test_branches_are_dropped_while_training_and_not_otherwise(kind: str) -> None:
    plain = backbone(kind)
    dropping = backbone(kind)
    dropping.load_state_dict(plain.state_dict())
    apply_drop_path(dropping, 0.9)
    side = plain.image_size
    images = torch.randn(1, 3, side, side).expand(64, -1, -1, -1)
    with torch.no_grad():
        wanted = plain.eval().encode_whole(images)[1]
        assert torch.equal(dropping.eval().encode_whole(images)[1], wanted)
        outputs = dropping.train().encode_whole(images)[1]
    assert len(outputs.flatten(1).unique(dim=0)) > 4  # each sample drops its own branches


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_a_branch_that_is_kept_is_scaled_by_what_it_is_kept_at(kind: str) -> None:
    dropping = backbone(kind).train()
    apply_drop_path(dropping, 0.5)
    last = dropping.layers[-1]
    plain = next(module for name, module in last.named_children() if name in ("attention", "self_attn"))
    seen: list[torch.Tensor] = []
    plain.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    tokens = torch.randn(1, 5, 64).expand(200, -1, -1)
    with torch.no_grad():
        last(tokens, None)
    dropped = seen[0].flatten(1).abs().sum(1) == 0
    assert 60 < int(dropped.sum()) < 140  # half of 200, 5.6 standard deviations
    kept = seen[0][~dropped]
    with torch.no_grad():
        last.eval()(tokens, None)
    torch.testing.assert_close(kept, 2 * seen[1][~dropped])


# ---------------------------------------------------------------- mixing


@pytest.mark.parametrize("fields", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.9}])
def test_images_and_labels_are_mixed_as_timm_does_for_a_seed(fields: dict[str, float]) -> None:
    task = Classification(label_smoothing=0.1, **fields)
    mixing = task.label_mixing(5)
    for seed in range(8):
        batch = random_batch(6, seed=seed, image=32)
        batch = replace(batch, labels_B=torch.arange(6) % 5, seeds_B=torch.arange(seed, seed + 6))
        theirs = Mixup(task.mixup, task.cutmix, prob=task.mix_prob, switch_prob=0.5, label_smoothing=0.1, num_classes=5)
        np.random.seed(seed)
        images, targets = theirs(batch.images_VBCHW[0].float(), batch.labels_B)
        before = np.random.get_state()[1].copy()
        ours = mixing(batch)
        assert torch.equal(ours.images_VBCHW[0], images)
        assert torch.equal(ours.soft_labels_BK, targets)
        assert np.array_equal(np.random.get_state()[1], before)  # whoever else draws from it draws the same


def test_a_device_is_asked_for_nothing() -> None:
    batch = random_batch(4, image=32).to("meta")  # which has no answer
    mixed = Classification(mixup=0.8, cutmix=1.0).label_mixing(5)(batch)
    assert mixed.images_VBCHW.is_meta
    assert mixed.soft_labels_BK.is_meta


def test_an_image_whose_partner_has_no_label_has_none() -> None:
    batch = random_batch(4, image=32)
    batch = replace(batch, labels_B=torch.tensor([1, -1, 2, 3]))
    assert Classification(mixup=0.8).label_mixing(5)(batch).labels_B.tolist() == [1, -1, -1, 3]
