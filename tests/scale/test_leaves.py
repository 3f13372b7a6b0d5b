"""Layers that ZeRO-3 gathers as units: all that are called as a whole. tests/distributed holds what they compute."""

from __future__ import annotations

from deepspeed.utils import z3_leaf_module
from tiny import MAPS, tiny_objective

from m3i_scale.backbones.internimage.modeling_internimage import InternImageLayer
from m3i_scale.engine.engine import set_leaves


def leaves_of(recipe: str, *overrides: str) -> list[str]:
    objective = tiny_objective(recipe, *overrides)
    set_leaves(objective)
    return [name for name, module in objective.named_modules() if z3_leaf_module(module)]


def test_layers_of_every_branch_are_units_but_those_that_are_called_in_parts() -> None:
    layers = [
        f"{branch}.layers.{number}" for branch in ("student.model", "momentum.backbone.model") for number in (0, 1)
    ]
    text, decoder = ["text.model.encoder.layer.0"], ["decoders.dense.layers.0", "decoders.dense.layers.1"]
    assert sorted(leaves_of("m3i", "recipe.decoders.dense.depth=3")) == sorted([*layers, *text, *decoder])


def test_a_teacher_and_convolutional_layers_are_units() -> None:
    assert any(name.startswith("teachers.") for name in leaves_of("dense_distillation"))
    objective = tiny_objective("supervised", *MAPS)
    set_leaves(objective)
    layers = [module for module in objective.modules() if isinstance(module, InternImageLayer)]
    assert layers
    assert all(map(z3_leaf_module, layers))
