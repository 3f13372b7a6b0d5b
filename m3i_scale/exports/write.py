"""Files of an export: models, image processor, tokenizer and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    DeformableDetrImageProcessor,
    EomtImageProcessor,
    PreTrainedTokenizerBase,
    SamImageProcessor,
)

from m3i_scale.backbones.build import backbone_config, vision_class
from m3i_scale.config import RunConfig
from m3i_scale.errors import ExportError
from m3i_scale.exports.as_timm import timm_part
from m3i_scale.exports.dual_encoder import text_encoder_config, text_inputs, zero_shot_part
from m3i_scale.exports.fresh import fingerprint
from m3i_scale.exports.joint import backbone_part, classifier_part
from m3i_scale.exports.source import Source, choose_label_set, model_files, portable_section, target_of
from m3i_scale.exports.tensors import (
    DEFAULT_SHARD_SIZE,
    TEXT,
    VISION,
    ExportedModule,
    Resize,
    TensorSource,
    copied,
    empty,
    value_of,
    write_part,
)
from m3i_scale.files import read_json, write_json
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.targets.base import Target
from m3i_scale.objective.text_tower import TextTower, text_family
from m3i_scale.tasks.base import TARGETS
from m3i_scale.text import redact
from m3i_scale.upgrade import upgrade_recipe

Task = Literal["features", "classification", "segmentation", "detection", "zero_shot", "backbone"]
Format = Literal["transformers", "timm", "onnx"]
TASKS: tuple[Task, ...] = get_args(Task)
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class ExportContents:
    """Requested contents of an export folder."""

    task: Task = "features"
    format: Format = "transformers"
    """onnx: the files of transformers, and an ONNX file of the model."""
    label_set: str | None = None
    """Of a classifier; None if the run has only one."""
    max_shard_size: str = DEFAULT_SHARD_SIZE


def plan_parts(
    source: Source, wanted: ExportContents, tokenizer: PreTrainedTokenizerBase | None
) -> list[ExportedModule]:
    """Return the models of a folder, with empty weights."""
    if wanted.label_set is not None and wanted.task != "classification":
        raise ExportError(
            f"--label-set has no effect with --task {wanted.task}",
            where="--label-set",
            fix="leave it out, or use --task classification",
        )
    if wanted.format == "timm":
        return [_in_timm(source, wanted)]
    if wanted.task == "classification":
        return [classifier_part(source, choose_label_set(source, wanted.label_set))]
    if wanted.task in TARGETS:
        kind = cast(type[Target], Target.class_of(wanted.task))
        target: Any = target_of(source, kind.modality)
        if not hasattr(target, "export"):
            raise ExportError(f"no Transformers class has the predictions of {target.title}", fix="use --task features")
        return [target.export(source)]
    if wanted.task == "backbone":
        return [backbone_part(source)]
    if wanted.task == "zero_shot":
        return [zero_shot_part(source, 0 if tokenizer is None else len(tokenizer))]
    return [_vision_part(source), *([] if tokenizer is None else [_text_part(source, tokenizer)])]


def write_folder(
    folder: Path,
    source: Source,
    parts: list[ExportedModule],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: ExportContents,
) -> dict[str, dict[str, str]]:
    """Write models, image processor and tokenizer into an empty folder; for plain features also the heads.

    Weights are read one at a time. Return the fingerprint of every tensor, by part (and `heads`) and name.
    """
    fingerprints = {part.name: write_part(folder, part, weights, dtype, wanted.max_shard_size) for part in parts}
    write_processor(folder, source, parts[0].resize)
    if tokenizer is not None:
        # Truncate to the same length as in training.
        tokenizer.model_max_length = source.run.text.max_tokens
        part = next(part for part in parts if "input_ids" in part.inputs)
        if "attention_mask" not in part.inputs:  # as in SigLIP's tokenizer: padding takes part in attention
            tokenizer.model_input_names = ["input_ids"]
        write_tokenizer(folder / part.folder, tokenizer)
    if wanted.task == "features" and wanted.format != "timm":
        fingerprints["heads"] = write_heads(folder / "heads", source, weights, dtype)
    return fingerprints


def _in_timm(source: Source, wanted: ExportContents) -> ExportedModule:
    if wanted.max_shard_size != DEFAULT_SHARD_SIZE:
        raise ExportError(
            "--max-shard-size has no effect: timm reads one file of weights",
            where="--max-shard-size",
            fix="leave it out",
        )
    if wanted.task == "classification":
        return classifier_part(source, choose_label_set(source, wanted.label_set), timm=True)
    if wanted.task != "features":
        raise ExportError(
            f"a timm folder has features or a classifier, not a {wanted.task}", fix="use --format transformers"
        )
    return timm_part(backbone_config(source.run.backbone), source.run.data.augment)


def _vision_part(source: Source) -> ExportedModule:
    config = backbone_config(source.run.backbone)
    # The folder has no classifier: with classes, a pipeline would add one with random weights and use its output.
    config.num_labels = 0
    kind, options = vision_class(config)
    model = empty(lambda: kind(config, **options))
    auto_map, files = model_files(config)
    if auto_map:
        model.config.auto_map = auto_map
    tensors = copied(model.state_dict(), VISION)
    return ExportedModule("vision", model, tensors, _vision_output, options=options, files=files)


def _vision_output(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    return {"last_hidden_state": objective.student.last_hidden_state(pixels_BCHW)}


def _text_part(source: Source, tokenizer: PreTrainedTokenizerBase) -> ExportedModule:
    config = text_encoder_config(source, len(tokenizer))
    family = text_family(config)
    model = empty(lambda: family.model_class(config, **family.options))
    return ExportedModule(
        "text",
        model,
        copied(model.state_dict(), TEXT),
        _text_output,
        folder="text",
        auto=family.auto,
        options=family.options,
        inputs=text_inputs(config),
    )


def _text_output(
    objective: Objective, input_ids_TL: Tensor, attention_mask_TL: Tensor | None = None
) -> Mapping[str, Tensor]:
    output = cast(TextTower, objective.text).model(input_ids=input_ids_TL, attention_mask=attention_mask_TL)
    return {"last_hidden_state": output.last_hidden_state}


def write_processor(folder: Path, source: Source, shown: Resize) -> None:
    """Write preprocessor_config.json: resize the shorter side, center-crop, and normalize as in training.

    A segmenter gets the full image, and its processor converts outputs to masks. Mask R-CNN uses SAM's processor, which
    resizes the longer side, pads to a square, and passes the original and the resized size to the model. RF-DETR needs
    a processor for sigmoid detections, but its default one resizes with a different filter than training.

    `BitImageProcessor` is the standard class (DINOv2 uses it too) that center-crops in every version of transformers.
    ViT's processor resizes the image to a square in older versions.
    """
    size = int(backbone_config(source.run.backbone).image_size)
    augment, square = source.run.data.augment, {"height": size, "width": size}
    kind, options = {
        "center": (BitImageProcessor, {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}),
        "whole": (BeitImageProcessor, {"size": square, "do_center_crop": False, "crop_size": square}),
        "stretched": (DeformableDetrImageProcessor, {"size": square, "do_pad": False}),
        "windows": (
            EomtImageProcessor,
            {"size": {"shortest_edge": size, "longest_edge": None}, "do_split_image": True, "do_pad": False},
        ),
        "padded": (SamImageProcessor, {"size": {"longest_edge": size}, "do_pad": True, "pad_size": square}),
    }[shown]
    kind(
        **options,
        do_resize=True,
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(augment.mean),
        image_std=list(augment.std),
        do_convert_rgb=True,
    ).save_pretrained(folder)
    if shown == "windows":  # transformers 4 needs the key, and 5 omits it
        path = folder / "preprocessor_config.json"
        values = read_json(path)
        write_json(path, values | {"size": values["size"] | {"longest_edge": None}})


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer files. A generic tokenizer gets the class name that all versions of transformers know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":  # since version 5
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, values)


def write_heads(folder: Path, source: Source, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Write objective.json, which describes the joint space, and weights of heads, decoders and projections."""
    folder.mkdir()
    objective = {
        "run": redact(portable_run(source.run)),
        "label_sets": source.label_sets,
        "vocab_size": source.vocab_size,
    }
    write_json(folder / "objective.json", objective)
    kept = inference_names(source.run, source.label_sets, source.vocab_size)
    names = [name for name in weights if name in kept and not name.startswith((VISION, TEXT))]
    values = {name: value_of(TensorSource((name,)), weights, dtype) for name in names}
    save_file(values, folder / "heads.safetensors", metadata={"format": "pt"})
    return {name: fingerprint(value) for name, value in values.items()}


def inference_names(run: RunConfig, label_sets: dict[str, list[str]], vocab_size: int | None) -> set[str]:
    """Return the tensor names of an objective without target encoders; for the arguments see `build_objective`."""
    with torch.device("meta"):
        return set(build_objective(run, label_sets, vocab_size, target_encoders=False).state_dict())


def portable_run(run: RunConfig) -> dict[str, Any]:
    """Return the part of a config file that the modules depend on, without paths of the training machine."""
    config = backbone_config(run.backbone)
    return {
        "name": run.name,
        "seed": run.seed,
        "recipe": _portable_recipe(run.recipe),
        "backbone": {"attention": run.backbone.attention, **portable_section(config)},
        "text": run.text.model_dump(mode="json", include={"model_type", "config", "max_tokens"}, exclude_none=True),
        "data": {"augment": run.data.augment.model_dump(mode="json", include={"mean", "std", "stretch"})},
    }


def _portable_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with only the names of its teachers: their folders are local and not read again."""
    recipe = upgrade_recipe(recipe)
    for teacher in recipe.get("teachers", {}).values():
        if teacher["from_pretrained"] != "student":  # "student" is the initial backbone
            name = Path(teacher["from_pretrained"]).name
            teacher["from_pretrained"] = f"./{name}" if name == "student" else name
    return recipe
