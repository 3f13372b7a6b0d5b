"""The whole objective on a convolutional backbone, whose images are mixed and hidden in the pixels."""

from __future__ import annotations

import pytest
import torch
from tiny import MAPS, RECIPES, random_batch, tiny_objective, tiny_run

from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective

LABELS = {"shapes": ["disc", "square", "cross"], "colors": ["red", "blue"]}


def overrides(recipe: str) -> tuple[str, ...]:
    raw = load_run(recipe).recipe
    blocks = "recipe.inputs.0.mask.form={kind: target_blocks, blocks: 2, scale: 0.25}"
    return (
        *MAPS,
        *(("backbone.attention=across_images",) if raw.get("mix") else ()),
        *((blocks,) if recipe == "ijepa" else ()),  # 0.175 of four cells is none
    )


def reads_class_token(recipe: str) -> bool:
    return any(decoder["kind"] == "class_token" for decoder in load_run(recipe).recipe["decoders"].values())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "teachers" not in load_run(name).recipe])
def test_every_recipe_trains_every_parameter(recipe: str) -> None:
    if reads_class_token(recipe):
        with pytest.raises(ConfigError) as caught:
            tiny_objective(recipe, *overrides(recipe))
        assert caught.value.where == "recipe.decoders"
        return
    if any("size" in view for view in load_run(recipe).recipe.get("views", [])):
        with pytest.raises(ConfigError) as caught:
            tiny_objective(recipe, *overrides(recipe))
        assert caught.value.where == "recipe.views"
        return
    if any(decoder["kind"] == "map_head" for decoder in load_run(recipe).recipe["decoders"].values()):
        with pytest.raises(ConfigError) as caught:
            tiny_objective(recipe, *overrides(recipe))
        assert caught.value.where == "recipe.decoders.pool"
        return
    if any("layers" in target for target in load_run(recipe).recipe["targets"]):
        with pytest.raises(ConfigError) as caught:
            tiny_objective(recipe, *overrides(recipe))
        assert caught.value.where == "recipe.targets"
        return
    objective = tiny_objective(recipe, *overrides(recipe))
    masked = any(spec.mask for spec in objective.recipe.inputs)  # the images of a mix leave no square empty
    with torch.no_grad():  # first offsets are zero, and so are the gradients of what they are made of
        for parameter in objective.student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    objective(random_batch(6, image=64, seed=1))  # queues are empty before
    loss, _ = objective(random_batch(6, image=64))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad or (name == "student.mask_token.token" and not masked):
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name.startswith("student."):
            assert parameter.grad.any(), name


def test_no_masked_pixel_and_no_other_pair_of_a_mix_reaches_a_prediction() -> None:
    objective, batch = tiny_objective("m3i", *overrides("m3i")).eval(), random_batch(4, image=64)
    before = objective._encode(batch).inputs
    changed = random_batch(4, image=64)
    for (spec,) in before.values():
        # Pixels of image 1 that this mix hides
        hidden = spec.where.hidden_BM[1].tolist()
        for token in hidden:
            i, j = token // 4 * 16, token % 4 * 16
            view = changed.images_VBCHW[spec.where.view]
            view[1, :, i : i + 16, j : j + 16] = 255 - view[1, :, i : i + 16, j : j + 16]
    after = objective._encode(changed).inputs
    for name in before:
        torch.testing.assert_close(after[name][0].tokens_BLD, before[name][0].tokens_BLD)
    batch.images_VBCHW[:, 1] = 255 - batch.images_VBCHW[:, 1]
    other = objective._encode(batch).inputs
    for name in before:
        assert not torch.allclose(
            other[name][0].tokens_BLD[0], before[name][0].tokens_BLD[0], atol=1e-4
        )  # 1 mixes with 0
        torch.testing.assert_close(other[name][0].tokens_BLD[2:], before[name][0].tokens_BLD[2:])


def test_keeping_the_images_of_a_mix_apart_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_objective("m3i", *MAPS)
    assert caught.value.where == "backbone.attention: within_image"


def test_a_single_square_cannot_be_dealt_to_two_images() -> None:
    run = tiny_run("m3i", *MAPS, "backbone.attention=across_images", "backbone.config.image_size=32")
    with pytest.raises(ConfigError) as caught:
        build_objective(run, LABELS, 50)
    assert caught.value.where == "backbone.config"
    assert "patches" in caught.value.what


@pytest.mark.parametrize("backbone", [(*MAPS, "backbone.config.image_size=32"), ("backbone.config.patch_size=32",)])
def test_a_single_square_cannot_be_hidden_in_part(backbone: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_objective("mae", *backbone)
    assert caught.value.where == "backbone.config"
    assert "32 pixels" in caught.value.what
