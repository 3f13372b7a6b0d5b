"""A frozen teacher: any `transformers` vision model whose patches lie on the student's grid."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from m3i_scale.backbones.build import pretrained_folder
from m3i_scale.backbones.presets import VisionConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.targets import FrozenTeacher

_WHERE = "recipe.teacher.from_pretrained"


@lru_cache(maxsize=4)
def _read_config(source: str) -> Any:
    if Path(source).parent.is_dir() and not Path(source).is_dir() and str(Path(source).parent) != ".":
        raise ConfigError(f"no such folder '{source}'", where=_WHERE, fix="give a folder with config.json, or a Hub id")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a teacher from '{source}': {str(error).splitlines()[0]}",
            where=_WHERE,
            fix="give a folder with config.json, model.safetensors and preprocessor_config.json, or a Hub id",
        ) from None


def teacher_config(recipe: Recipe) -> Any:
    """The `transformers` configuration of the recipe's teacher.

    Raises:
        ConfigError: there is none, or it is no vision model with patches.
    """
    source = recipe.teacher.from_pretrained if recipe.teacher else ""
    config = _read_config(source)
    for field in ("hidden_size", "patch_size"):
        if not isinstance(getattr(config, field, None), int):
            raise ConfigError(f"a {config.model_type} has no plain `{field}`", where=f"{_WHERE}: {source}")
    return config


def build_teacher(recipe: Recipe, student: VisionConfig) -> FrozenTeacher:
    """The teacher's module, without its weights (see `teacher_weights`).

    Raises:
        ConfigError: another grid than the student's, no image processor, or a head of another width.
    """
    config = teacher_config(recipe)
    source = recipe.teacher.from_pretrained if recipe.teacher else ""
    side = student.image_size // student.patch_size
    theirs = student.image_size // config.patch_size
    if theirs != side:
        raise ConfigError(
            f"the teacher sees {theirs} × {theirs} patches of an image of {student.image_size}, the student"
            f" {side} × {side}",
            where=f"{_WHERE}: {source}",
            fix=f"backbone.config.patch_size={config.patch_size}",
        )
    for name in {t.head for t in recipe.targets if t.encoder == "teacher" and t.head}:
        if recipe.heads[name].width != config.hidden_size:
            raise ConfigError(
                f"head '{name}' predicts {recipe.heads[name].width} numbers, the teacher has {config.hidden_size}",
                where=f"recipe.heads.{name}.width",
                fix=f"recipe.heads.{name}.width={config.hidden_size}",
            )
    config._attn_implementation = "sdpa"
    return FrozenTeacher(config, *_normalisation(source), (side, side))


def _normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = pretrained_folder(source) / "preprocessor_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "the teacher has no image processor with mean and deviation",
            where=str(path),
            why="it would see images that are normalised in another way than it was trained with",
        ) from None


def teacher_weights(recipe: Recipe) -> dict[str, Tensor]:
    """All weights of the teacher, whole, by name.

    Raises:
        ConfigError: they do not fill the model.
    """
    source = recipe.teacher.from_pretrained if recipe.teacher else ""
    try:
        model, report = AutoModel.from_pretrained(
            pretrained_folder(source), use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot read '{source}': {str(error).splitlines()[0]}", where=_WHERE) from None
    # A pooling layer is no part of the tokens that are read.
    bad = [name for key in ("missing_keys", "mismatched_keys") for name in report[key] if "pooler" not in str(name)]
    if bad:
        raise ConfigError(
            f"{len(bad)} weights of '{source}' are missing or have another shape, e.g. {bad[0]}", where=_WHERE
        )
    _check_outputs(model.eval(), source)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _check_outputs(model: PreTrainedModel, source: str) -> None:
    """Tokens are [class token?, registers?, patches], the same at every call, and made of parameters alone.

    Raises:
        ConfigError: they are not.
    """
    where = f"{_WHERE}: {source}"
    kept = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    if kept:
        raise ConfigError(f"the teacher keeps running figures beside its weights, e.g. {min(kept)}", where=where)
    side = int(getattr(model.config, "image_size", 224))
    pixels_BCHW = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    one, two = (model(pixel_values=pixels_BCHW).last_hidden_state for _ in range(2))
    patches = (side // model.config.patch_size) ** 2
    before = (one.shape[1] if one.ndim == 3 else 0) - patches
    if before not in {0, 1, 1 + int(getattr(model.config, "num_register_tokens", 0))}:
        raise ConfigError(
            f"the teacher gives {tuple(one.shape)} for {patches} patches: not one token a patch after a class token",
            where=where,
            fix="take a plain vision Transformer, e.g. a ViT or DINOv2",
        )
    if not torch.equal(one, two):
        raise ConfigError("the teacher gives other tokens at every call: it hides patches at random", where=where)


def teacher_sha256(recipe: Recipe) -> str | None:
    """A hash over the teacher's weight files; None without a teacher."""
    if recipe.teacher is None:
        return None
    return _hash_weights(recipe.teacher.from_pretrained)


@lru_cache(maxsize=4)  # asked at every checkpoint
def _hash_weights(source: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(pretrained_folder(source).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
