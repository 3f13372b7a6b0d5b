"""The row of the paper's table that a recipe is."""

from __future__ import annotations

from typing import Any

from m3i_scale.objective.recipe import InputSpec, Recipe, TargetSpec
from m3i_scale.objective.recipe_rules import kind_of

_REPRESENTATIONS = {
    "category": "category embedding",
    "text": "text embedding",
    "pixels": "dense pixels",
    "dense": "dense feature",
    "pooled": "global feature",
}


def describe(recipe: Recipe) -> dict[str, Any]:
    """Inputs and targets as plain data."""
    return {
        "name": recipe.name,
        "family": recipe.family,
        "inputs": [_input(recipe, spec) for spec in recipe.inputs],
        "targets": [_target(recipe, target) for target in recipe.targets],
        "balance": recipe.balance.kind,
    }


def _target(recipe: Recipe, target: TargetSpec) -> dict[str, Any]:
    return {
        "name": target.name,
        "inputs": target.inputs,
        "modality": target.modality,
        "view": target.view,
        "tokens": target.tokens,
        "representation": _REPRESENTATIONS[kind_of(target)],
        "encoder": target.encoder,
        "decoder": recipe.decoders[target.decoder].kind,
        "distribution": target.distribution,
        "regularizer": target.regularizer,
        "weight": target.weight,
    }


def _input(recipe: Recipe, spec: InputSpec) -> dict[str, Any]:
    mask = f"{spec.mask.form} {spec.mask.ratio:g}" if spec.mask else None
    if recipe.mix is not None:
        mask = f"{recipe.mix.form}, complementary"
    return {"name": spec.name, "view": spec.view, "mask": mask, "mixed": recipe.mix is not None}
