"""Validate that recipe, backbone and data of a run are compatible, before modules are built."""

from __future__ import annotations

import torch

from m3i_scale.backbones.base import Backbone
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.decoders import ClassTokenSpec
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.targets.text import Text


def check_fit(
    run: RunConfig, recipe: Recipe, student: Backbone, label_sets: dict[str, list[str]], vocab_size: int | None
) -> None:
    """Validate a run for the image size of its first stage. For the arguments see `build_objective`."""
    if run.backbone.attention == "across_images" and recipe.mix is None:
        raise ConfigError(
            "`attention: across_images` has no effect: the recipe mixes no images", where="backbone.attention"
        )
    if recipe.labels_file is not None and not label_sets:
        raise ConfigError(
            f"the recipe predicts classes, and no dataset has {recipe.labels_file}",
            fix="put it, a list of class names, beside the shards of masks"
            if recipe.reads_masks
            else "give labels to `shards make`, or take a recipe without a category target",
        )
    if recipe.uses_text and vocab_size is None:
        raise ConfigError(
            "the recipe has a text target, and there is no tokenizer", fix="text.tokenizer=/path/to/folder"
        )
    if recipe.mix is not None and run.optim.micro_batch_size < len(recipe.mix.inputs):
        raise ConfigError(
            f"a mix of {len(recipe.mix.inputs)} images needs a micro-batch of at least as many",
            where=f"optim.micro_batch_size: {run.optim.micro_batch_size}",
        )
    widths = text_widths(recipe)
    if len(widths) > 1:
        raise ConfigError(f"text targets share one tower, so they need one width; got {sorted(widths)}", where="recipe")
    first_is_cls = [
        target.name for target in recipe.targets if isinstance(recipe.decoders[target.decoder], ClassTokenSpec)
    ]
    if first_is_cls and not student.has_class_token:
        raise ConfigError(
            f"this backbone has no class token, and '{first_is_cls[0]}' reads it",
            where="recipe.decoders",
            fix="decode with attention_pool or mean_pool",
        )
    if recipe.mix is not None and run.backbone.attention == "within_image" and student.stage_widths:
        raise ConfigError(
            "a convolutional backbone cannot keep the images of a mix apart",
            where="backbone.attention: within_image",
            fix="backbone.attention=across_images",
        )
    if run.backbone.attention == "across_images" and first_is_cls:
        raise ConfigError(
            f"in mixed attention one class token stands for all images of a mix; '{first_is_cls[0]}' reads it",
            fix="decode with attention_pool or mean_pool",
        )
    image_size = run.image_size(student.image_size)
    _check_image_size(image_size, student)
    side = image_size // student.patch_size // student.cell
    cells = side**2
    masked = [spec.name for spec in recipe.inputs if spec.mask is not None]
    if masked and cells < 2:
        raise ConfigError(
            f"input '{masked[0]}' hides a part of {cells} patch of {student.cell * student.patch_size} pixels",
            where="backbone.config",
            why="what is hidden in part needs at least two patches",
            fix="a larger image_size",
        )
    _check_blocks(recipe, (side, side))
    _check_layers(recipe, student)
    _check_views(recipe, student, image_size)
    if recipe.mix is not None and cells < len(recipe.mix.inputs):
        raise ConfigError(
            f"{cells} patches cannot be dealt to {len(recipe.mix.inputs)} images", where="backbone.config"
        )


def _check_image_size(image_size: int, student: Backbone) -> None:
    cell = student.patch_size * student.cell
    if image_size % cell:
        raise ConfigError(
            f"images of {image_size} pixels are no multiple of {cell}, the side of what is hidden or shown as a whole",
            where=f"image_size: {image_size}",
            fix=f"image_size: {max(round(image_size / cell), 1) * cell}",
        )


def _check_blocks(recipe: Recipe, grid: tuple[int, int]) -> None:
    for spec in recipe.inputs:
        try:
            if spec.mask is not None:
                spec.mask.form.target_blocks(torch.zeros(1, dtype=torch.int64), grid, 0)
        except ValueError as error:
            raise ConfigError(
                f"a target block of input '{spec.name}' has no patch: {error}",
                where="recipe.inputs",
                fix="a larger `scale` of its mask, or a larger image_size",
            ) from None


def _check_layers(recipe: Recipe, student: Backbone) -> None:
    if recipe.averaged_layers == 1:
        return
    if student.stage_widths:
        raise ConfigError(
            "`layers` of a dense target: the stages of a convolutional backbone have grids of several sizes",
            where="recipe.targets",
            fix="layers: 1, the default, or a plain Transformer as backbone",
        )
    if recipe.averaged_layers > len(student.layers):
        raise ConfigError(
            f"a dense target averages {recipe.averaged_layers} layers, and the backbone has {len(student.layers)}",
            where="recipe.targets",
            fix=f"`layers: {len(student.layers)}` of that target, or fewer",
        )


def _check_views(recipe: Recipe, student: Backbone, image_size: int) -> None:
    sizes = {number: spec.size for number, spec in enumerate(recipe.views or []) if spec.size is not None}
    patch = student.patch_size
    for number, size in sizes.items():
        if size >= image_size or size % patch:
            nearest = patch * min(max(round(size / patch), 1), image_size // patch - 1)
            raise ConfigError(
                f"views of {size} pixels do not go with images of {image_size}: they are smaller, and a "
                f"multiple of the backbone's patch of {patch}",
                where=f"recipe.views.{number}.size",
                fix=f"recipe.views.{number}.size={nearest}",
            )
    if sizes and student.stage_widths:
        raise ConfigError(
            "a convolutional backbone takes views of one size",
            where="recipe.views",
            fix="leave `size` out, or take a vision Transformer",
        )
    if recipe.uses_mask_tokens and student.stage_widths:
        raise ConfigError(
            "a convolutional backbone has a mask token of its own, in its stem, and no prediction at hidden places",
            where="recipe.inputs",
            fix="`masked: drop`, or take a vision Transformer",
        )


def text_widths(recipe: Recipe) -> set[int]:
    """Return the widths that text targets require of the text tower."""
    return {target.width for target in recipe.targets if isinstance(target, Text)}
