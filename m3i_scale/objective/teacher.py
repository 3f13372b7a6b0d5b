"""A frozen teacher: any `transformers` vision model whose patches lie on the student's grid."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, ViTConfig

from m3i_scale.backbones.vit import pretrained_folder
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import Recipe
from m3i_scale.objective.targets import FrozenTeacher

_WHERE = "recipe.teacher.from_pretrained"


@lru_cache(maxsize=4)
def _read_config(source: str) -> Any:
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


def build_teacher(recipe: Recipe, student: ViTConfig) -> FrozenTeacher:
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
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


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
