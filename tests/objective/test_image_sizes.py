"""Images of another size than the backbone's configuration: everything that depends on the grid follows them."""

from __future__ import annotations

import pytest
import torch
from tiny import DINOV2, DINOV3, LABEL_SETS, MAPS, REGISTERS, random_batch, tiny_objective, tiny_run

from m3i_scale.backbones.families import TokenFamily, family_of
from m3i_scale.backbones.load_plan import fit_positions
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective

SIZE = 48
RECIPES = (
    "m3i",
    "mae",
    "ijepa",
    "capi",
    "global_distillation",
    "densecl",
    "data2vec2",
    "multi_teacher",
    "continue_images",
)
CLIP = (
    "backbone.preset=clip-b/16",
    "backbone.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128, "
    "image_size: 32, patch_size: 8}",
)


def made_for(size: int, objective: Objective, *given: str) -> Objective:
    """The same weights in modules whose backbone is for that size, their tables of positions resized once."""
    other = tiny_objective(*given, f"backbone.config.image_size={size}")
    family = family_of(other.student.model.config)
    table = family.parts.get("positions", "?") if isinstance(family, TokenFamily) else "?"
    wanted, values = other.state_dict(), dict(objective.state_dict())
    for name, value in objective.state_dict().items():
        if name.endswith(f"model.{table}") and (shape := tuple(wanted[name].shape)) != tuple(value.shape):
            values[name] = fit_positions(value, shape, antialias=family.antialias, class_row=True)
    other.load_state_dict(values)
    return other


@pytest.mark.parametrize(
    ("recipe", "backbone", "size"),
    [
        *((recipe, (), SIZE) for recipe in RECIPES),
        *(("m3i", backbone, SIZE) for backbone in (DINOV2, REGISTERS, DINOV3, CLIP)),
        ("dinov2", DINOV3, SIZE),  # the small views of a table would be resized twice
        ("sim", MAPS, 96),
    ],
)
def test_larger_images_have_the_loss_of_modules_that_are_made_for_them(recipe: str, backbone, size: int) -> None:
    objective = tiny_objective(recipe, *backbone)
    other, batch = made_for(size, objective, recipe, *backbone), random_batch(4, image=size)
    loss, figures = objective(batch)
    expected, expected_figures = other(batch)
    assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-6)
    for name, figure in figures.items():
        assert torch.allclose(figure, expected_figures[name], rtol=1e-4, atol=1e-5), name


def test_tables_learn_from_images_of_another_size() -> None:
    objective = tiny_objective("mae", "backbone.freeze=[]")
    objective(random_batch(2, image=SIZE))[0].backward()
    gradient = objective.student.model.embeddings.position_embeddings.grad
    assert bool((gradient[0].abs().sum(dim=-1) > 0).all())  # every place of the smaller grid


@pytest.mark.parametrize(
    ("recipe", "stage", "given", "place"),
    [
        ("m3i", "image_size: 50", (), "image_size"),
        ("dinov2", "image_size: 16", (), "recipe.views"),
        ("ijepa", "image_size: 16", (), "recipe.inputs"),
        ("sim", "image_size: 48", MAPS, "image_size"),
    ],
)
def test_sizes_that_do_not_go_with_the_recipe_are_refused(recipe: str, stage: str, given, place: str) -> None:
    stages = f"stages=[{{steps: 1}}, {{steps: 1, {stage}}}]"
    run = tiny_run(recipe, *given, "optim.steps=2", "optim.warmup_steps=0", stages)
    build_objective(run.in_stage(0), LABEL_SETS, None if "text" not in run.model_fields_set else 50)
    with pytest.raises(ConfigError) as caught:
        build_objective(run.in_stage(1), LABEL_SETS, None if "text" not in run.model_fields_set else 50)
    assert place in str(caught.value.where)
