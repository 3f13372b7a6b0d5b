"""Summarize a recipe as a row of the paper's table."""

from __future__ import annotations

from typing import Any

from m3i_scale.objective.inputs import InputSpec
from m3i_scale.objective.recipe import Recipe


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return inputs and targets as plain data."""
    return {
        "name": recipe.name,
        "family": recipe.family,
        "inputs": [_input(recipe, spec) for spec in recipe.inputs],
        "targets": [target.summary() | {"decoder": recipe.decoders[target.decoder].kind} for target in recipe.targets],
        "balance": recipe.balance.kind,
    }


def _input(recipe: Recipe, spec: InputSpec) -> dict[str, Any]:
    mask = f"{spec.mask.form.kind} {spec.mask.amount}" if spec.mask else None
    if recipe.mix is not None:
        mask = f"{recipe.mix.form.kind}, complementary"
    told = {"name": spec.name, "view": spec.view, "mask": mask, "mixed": recipe.mix is not None}
    return told | ({"views": spec.views} if spec.views > 1 else {})
