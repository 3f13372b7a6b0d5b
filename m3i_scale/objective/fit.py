"""Validate that recipe, backbone and data of a run are compatible, before modules are built."""

from __future__ import annotations

import torch

from m3i_scale.backbones.base import Backbone
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.decoders import ClassTokenSpec
from m3i_scale.objective.recipe import Recipe


def check_fit(
    run: RunConfig, recipe: Recipe, student: Backbone, label_sets: dict[str, list[str]], vocab_size: int | None
) -> None:
    """Validate a run for the image size of its first stage. For the arguments see `build_objective`."""
    _check_global_batch(run, recipe)
    if run.backbone.attention == "across_images" and recipe.mix is None:
        raise ConfigError(
            "`attention: across_images` has no effect: the recipe mixes no images",
            where="backbone.attention",
            fix="leave it out, or use a recipe with `mix`",
        )
    if recipe.labels_file is not None and not label_sets:
        raise ConfigError(
            f"the recipe predicts classes, but no dataset has {recipe.labels_file}",
            fix="put it, a list of class names, next to the shards of masks"
            if recipe.reads_masks
            else "give labels to `shards make`, or use a recipe without a category target",
        )
    if recipe.uses_text and vocab_size is None:
        raise ConfigError(
            "the recipe has a text target, but there is no tokenizer", fix="set text.tokenizer=/path/to/folder"
        )
    if recipe.mix is not None and run.optim.micro_batch_size < len(recipe.mix.inputs):
        raise ConfigError(
            f"optim.micro_batch_size must be at least {len(recipe.mix.inputs)}, the number of mixed images, got "
            f"{run.optim.micro_batch_size}",
            where="optim.micro_batch_size",
            fix=f"set optim.micro_batch_size={len(recipe.mix.inputs)} or more",
        )
    first_is_cls = [
        target.name for target in recipe.targets if isinstance(recipe.decoders[target.decoder], ClassTokenSpec)
    ]
    if first_is_cls and not student.has_class_token:
        raise ConfigError(
            f"'{first_is_cls[0]}' reads the class token, but this backbone has none",
            where="recipe.decoders",
            fix="use the decoder attention_pool or mean_pool",
        )
    if recipe.mix is not None and run.backbone.attention == "within_image" and student.stage_widths:
        raise ConfigError(
            "a convolutional backbone cannot separate the images of a mix",
            where="backbone.attention: within_image",
            fix="set backbone.attention=across_images",
        )
    if run.backbone.attention == "across_images" and first_is_cls:
        raise ConfigError(
            f"'{first_is_cls[0]}' needs a class token per image, but attention across images has one for all images "
            "of a mix",
            fix="use the decoder attention_pool or mean_pool",
        )
    if recipe.reads_before_norm and run.backbone.attention == "across_images":
        raise ConfigError(
            "attention across images ends with the final norm, but the recipe reads tokens before it",
            where="backbone.attention: across_images",
            fix="set backbone.attention=within_image, `ema.projector: mlp` and `final_norm: true` of decoders",
        )
    image_size = run.image_size(student.image_size)
    _check_image_size(image_size, student)
    side = image_size // student.patch_size // student.cell
    cells = side**2
    masked = [spec.name for spec in recipe.inputs if spec.mask is not None]
    if masked and cells < 2:
        raise ConfigError(
            f"input '{masked[0]}' masks a part of the image, but the image is {cells} patch of "
            f"{student.cell * student.patch_size} pixels",
            where="backbone.config",
            why="partial masking needs at least two patches",
            fix="increase backbone.config.image_size",
        )
    _check_blocks(recipe, (side, side))
    _check_layers(recipe, student)
    _check_views(recipe, student, image_size)
    if recipe.mix is not None and cells < len(recipe.mix.inputs):
        raise ConfigError(
            f"the number of patches must be a multiple of the {len(recipe.mix.inputs)} mixed images, got {cells}",
            where="backbone.config",
            fix="change backbone.config.image_size",
        )


def _check_global_batch(run: RunConfig, recipe: Recipe) -> None:
    if run.optim.contrastive_batch == "micro":
        return
    unsupported = next((target for target in recipe.targets if not target.covers_steps), None)
    if run.task is not None:
        what, why = "has no effect for fine-tuning", "a task compares no samples"
    elif unsupported is not None:
        what = f"does not support {unsupported.title}, got '{unsupported.name}'"
        why = "it has statistics or a memory that change with every micro-batch"
    elif recipe.normalizes_tokens is not None:
        what = f"does not support batch norm over tokens: {recipe.normalizes_tokens}"
        why = "the statistics of all tokens of a step would need all micro-batches in memory"
    else:
        return
    raise ConfigError(
        f"`contrastive_batch: global` {what}",
        where="optim.contrastive_batch",
        why=why,
        fix="set optim.contrastive_batch=micro, the default",
    )


def _check_image_size(image_size: int, student: Backbone) -> None:
    cell = student.patch_size * student.cell
    if image_size % cell:
        raise ConfigError(
            f"the image size must be a multiple of {cell}, the size of a masked cell, got {image_size}",
            where=f"image_size: {image_size}",
            fix=f"set image_size: {max(round(image_size / cell), 1) * cell}",
        )


def _check_blocks(recipe: Recipe, grid: tuple[int, int]) -> None:
    for spec in recipe.inputs:
        try:
            if spec.mask is not None:
                spec.mask.form.target_blocks(torch.zeros(1, dtype=torch.int64), grid, 0)
        except ValueError as error:
            raise ConfigError(
                f"a target block of input '{spec.name}' must have at least one patch: {error}",
                where="recipe.inputs",
                fix="increase `scale` of its mask, or backbone.config.image_size",
            ) from None


def _check_layers(recipe: Recipe, student: Backbone) -> None:
    if recipe.averaged_layers == 1:
        return
    if student.stage_widths:
        raise ConfigError(
            "`layers` of a dense target needs a plain Transformer: the stages of a convolutional backbone differ in "
            "resolution",
            where="recipe.targets",
            fix="set `layers: 1`, the default, or use a plain Transformer",
        )
    if recipe.averaged_layers > len(student.layers):
        raise ConfigError(
            f"`layers` of a dense target must be at most the backbone's {len(student.layers)}, got "
            f"{recipe.averaged_layers}",
            where="recipe.targets",
            fix=f"set `layers: {len(student.layers)}` or less in that target",
        )


def _check_views(recipe: Recipe, student: Backbone, image_size: int) -> None:
    sizes = {number: spec.size for number, spec in enumerate(recipe.views or []) if spec.size is not None}
    patch = student.patch_size
    for number, size in sizes.items():
        if size >= image_size or size % patch:
            nearest = patch * min(max(round(size / patch), 1), image_size // patch - 1)
            raise ConfigError(
                f"`size` of a view must be smaller than the image size ({image_size}) and a multiple of the patch "
                f"size ({patch}), got {size}",
                where=f"recipe.views.{number}.size",
                fix=f"set recipe.views.{number}.size={nearest}",
            )
    if sizes and student.stage_widths:
        raise ConfigError(
            "a convolutional backbone needs views of one size",
            where="recipe.views",
            fix="leave out `size`, or use a vision Transformer",
        )
    if recipe.uses_mask_tokens and student.stage_widths:
        raise ConfigError(
            "a convolutional backbone has no predictions for mask tokens of a recipe: it has its own, in its stem",
            where="recipe.inputs",
            fix="set `masked: drop`, or use a vision Transformer",
        )
