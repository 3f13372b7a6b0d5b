"""A teacher's weights: matched by header, read one at a time, and only of models that give one token a patch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config, Dinov2ForImageClassification, ViTMAEConfig, ViTMAEModel
from weights import shaken

from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.teacher import teacher_plan, teacher_sha256

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def recipe_of(folder: Path) -> Recipe:
    from m3i_scale.config import load_run

    return parse_recipe(load_run("dense_distillation", [f"recipe.teacher.from_pretrained={folder}"]).recipe)


def test_every_weight_comes_out_of_its_shard(tmp_path: Path) -> None:
    shaken(Dinov2ForImageClassification(Dinov2Config(**SIZES))).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    plan = teacher_plan(recipe_of(tmp_path))
    found = dict(zip(plan.names, plan.tensors(), strict=True))
    wanted = dict(AutoModel.from_pretrained(tmp_path).named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert plan.report["left_out"]["classifier"] == ["classifier.bias", "classifier.weight"]


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    Dinov2ForImageClassification(Dinov2Config(**SIZES)).save_pretrained(tmp_path)
    recipe, path = recipe_of(tmp_path), tmp_path / "model.safetensors"
    before = teacher_sha256(recipe)
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layernorm.bias" not in name}, path)
    with pytest.raises(ConfigError, match=r"1 weights of .* are missing, e.g. layernorm.bias"):
        teacher_plan(recipe)
    assert len(str(before)) == 64


def test_a_model_that_hides_patches_is_refused(tmp_path: Path) -> None:
    ViTMAEModel(ViTMAEConfig(**SIZES, intermediate_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not one token a patch"):
        teacher_plan(recipe_of(tmp_path))
