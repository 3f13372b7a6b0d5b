"""The folder of an export, written with the stock classes that will load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertModel, BitImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from m3i_scale.backbones.build import backbone_config, model_files, portable_section, vision_class
from m3i_scale.config import RunConfig
from m3i_scale.errors import ExportError
from m3i_scale.hub.source import Source
from m3i_scale.objective.build import is_kept, text_config
from m3i_scale.objective.recipe import Recipe

VISION, TEXT = "student.model.", "text.model."


def write_folder(
    folder: Path,
    source: Source,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Vision model and image processor; with a text target also text tower and tokenizer; the heads.

    Args:
        folder: exists and is empty.
        source: the checkpoint.
        weights: all of its weights by full name.
        dtype: of the written tensors.
        tokenizer: of the text tower; None without a text target.

    Raises:
        ExportError: weights and configuration do not fit together.
    """
    _refuse_empty(weights)
    write_vision(folder, source, part_of(weights, VISION, dtype))
    write_processor(folder, source)
    if tokenizer is not None:
        write_text(folder / "text", source.run, part_of(weights, TEXT, dtype), tokenizer)
    write_heads(folder / "heads", source, head_weights(source.recipe, weights, dtype))


def write_vision(folder: Path, source: Source, weights: dict[str, Tensor]) -> None:
    """config.json and model.safetensors of the vision model."""
    config = backbone_config(source.run.backbone)
    names = class_names(source.label_sets)
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    with init_empty_weights(include_buffers=False):
        kind, options = vision_class(config)
        model = kind(config, **options)
    auto_map, files = model_files(config)
    if auto_map:
        model.config.auto_map = auto_map
    _fill_and_save(model, weights, folder)
    for path in files:
        shutil.copyfile(path, folder / path.name)


def write_text(folder: Path, run: RunConfig, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
    """config.json, model.safetensors and tokenizer files of the text tower."""
    with init_empty_weights(include_buffers=False):
        model = BertModel(text_config(run.text.config, len(tokenizer), run.text.max_tokens), add_pooling_layer=False)
    _fill_and_save(model, weights, folder)
    # What a user tokenises is cut where training cut it.
    tokenizer.model_max_length = run.text.max_tokens
    tokenizer.save_pretrained(folder)


def write_processor(folder: Path, source: Source) -> None:
    """preprocessor_config.json: cover the square, cut the centre, normalise as training did.

    `BitImageProcessor` is the stock class (DINOv2 uses it too) that cuts the centre in every version of transformers;
    that of ViT squeezes the image into the square in older ones.
    """
    size = int(backbone_config(source.run.backbone).image_size)
    augment = source.run.data.augment
    BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": size},
        resample=3,
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(augment.mean),
        image_std=list(augment.std),
        do_convert_rgb=True,
    ).save_pretrained(folder)


def write_heads(folder: Path, source: Source, weights: dict[str, Tensor]) -> None:
    """objective.json, from which the joint space is built again, and the weights of heads, decoders and projections."""
    folder.mkdir()
    objective = {
        "run": portable_run(source.run),
        "label_sets": source.label_sets,
        "vocab_size": source.vocab_size,
    }
    (folder / "objective.json").write_text(json.dumps(objective, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file(weights, folder / "heads.safetensors", metadata={"format": "pt"})


def portable_run(run: RunConfig) -> dict[str, Any]:
    """The part of a run file that the modules depend on: no path of the training machine, no folder to start from."""
    config = backbone_config(run.backbone)
    return {
        "name": run.name,
        "seed": run.seed,
        "recipe": _portable_recipe(run.recipe),
        "backbone": {"attention": run.backbone.attention, **portable_section(config)},
        "text": {"config": run.text.config, "max_tokens": run.text.max_tokens},
        "data": {"augment": run.data.augment.model_dump(mode="json")},
    }


def _portable_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Of a teacher only its name: the folder lies on the training machine, and nobody reads it again."""
    if not recipe.get("teacher"):
        return recipe
    return recipe | {"teacher": {"from_pretrained": Path(recipe["teacher"]["from_pretrained"]).name}}


def class_names(label_sets: dict[str, list[str]]) -> list[str]:
    """Class names in the order of all label sets' logits side by side, told apart by set where there are several."""
    if len(label_sets) == 1:
        return list(next(iter(label_sets.values())))
    return [f"{label_set}: {name}" for label_set, names in label_sets.items() for name in names]


def part_of(weights: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights below `prefix`, without it, in `dtype`."""
    return {
        name.removeprefix(prefix): _own_storage(tensor, dtype)
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def head_weights(recipe: Recipe, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What is neither vision model, nor text tower, nor only needed in training."""
    return {
        name: _own_storage(tensor, dtype)
        for name, tensor in weights.items()
        if is_kept(recipe, name) and not name.startswith((VISION, TEXT))
    }


def _own_storage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, and no view of a larger buffer: views of one buffer look like tied weights, and would be dropped."""
    converted = tensor.detach().to(dtype).contiguous()
    whole = converted.untyped_storage().nbytes() == converted.numel() * converted.element_size()
    return converted if whole else converted.clone()


def _refuse_empty(weights: dict[str, Tensor]) -> None:
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    if empty:
        raise ExportError(
            f"{len(empty)} tensors have no elements",
            where=empty[0],
            why="they were still partitioned when they were read; the export would load as random weights",
        )


def _fill_and_save(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        nn.Module.load_state_dict(model, weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"the checkpoint does not fill a {type(model).__name__}: {str(error).splitlines()[-1].strip()}",
            where=str(folder),
        ) from None
    model.eval()
    model.save_pretrained(folder)
