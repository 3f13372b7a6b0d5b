"""Build a frozen teacher from any `transformers` vision model whose patches lie on the student's grid."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from m3i_scale.backbones.load_plan import LoadPlan, plan_model
from m3i_scale.backbones.presets import VisionConfig
from m3i_scale.backbones.sources import Source, pretrained_folder
from m3i_scale.backbones.sources.files import weight_files
from m3i_scale.backbones.sources.hub import hub_places
from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json, sha256_of
from m3i_scale.objective.encoders import FrozenTeacher
from m3i_scale.objective.recipe import Recipe

_WHERE = "recipe.teacher.from_pretrained"


@lru_cache(maxsize=4)
def teacher_config(source: str) -> Any:
    """Return the `transformers` configuration of a teacher.

    Raises:
        ConfigError: there is none, or it is no vision model with patches.
    """
    if Path(source).parent.is_dir() and not Path(source).is_dir() and str(Path(source).parent) != ".":
        raise ConfigError(f"no such folder '{source}'", where=_WHERE, fix="give a folder with config.json, or a Hub id")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a teacher from '{source}': {str(error).splitlines()[0]}",
            where=_WHERE,
            fix="give a folder with config.json, model.safetensors and preprocessor_config.json, or a Hub id",
        ) from None
    for field in ("hidden_size", "patch_size"):
        if not isinstance(getattr(config, field, None), int):
            raise ConfigError(f"a {config.model_type} has no plain `{field}`", where=f"{_WHERE}: {source}")
    return config


def build_teacher(recipe: Recipe, student: VisionConfig) -> FrozenTeacher:
    """Return the teacher's module, without its weights (see `teacher_plan`).

    Raises:
        ConfigError: another grid than the student's, no image processor, or a head of another width.
    """
    source = _source(recipe)
    config = teacher_config(source)
    side = student.image_size // student.patch_size
    theirs = student.image_size // config.patch_size
    if theirs != side:
        raise ConfigError(
            f"the teacher sees {theirs} × {theirs} patches of an image of {student.image_size}, the student"
            f" {side} × {side}",
            where=f"{_WHERE}: {source}",
            fix=f"backbone.config.patch_size={config.patch_size}",
        )
    for name in {target.head for target in recipe.head_targets if target.encoder == "teacher"}:
        if recipe.heads[name].width != config.hidden_size:
            raise ConfigError(
                f"head '{name}' predicts {recipe.heads[name].width} numbers, the teacher has {config.hidden_size}",
                where=f"recipe.heads.{name}.width",
                fix=f"recipe.heads.{name}.width={config.hidden_size}",
            )
    config._attn_implementation = "sdpa"
    return FrozenTeacher(config, *_normalisation(source), (side, side))


def _source(recipe: Recipe) -> str:
    return recipe.teacher.from_pretrained if recipe.teacher else ""


def _normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = pretrained_folder(source) / "preprocessor_config.json"
    try:
        values = read_json(path)
        return tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "the teacher has no image processor with mean and deviation",
            where=str(path),
            why="it would see images that are normalised in another way than it was trained with",
        ) from None


def teacher_plan(recipe: Recipe) -> LoadPlan:
    """Return which tensors of the teacher's files fill its module (see `build_teacher`); reads no weight.

    Raises:
        ConfigError: they do not fill the model, or its outputs are not one token a patch.
    """
    source = _source(recipe)
    config = teacher_config(source)
    _check_outputs(config, source)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    # A pooling layer is no part of the tokens that are read, and a head no part of the model.
    pooler = [name for name, _ in model.named_parameters() if "pooler" in name]
    files = Source(source, "transformers", pretrained_folder(source, _WHERE), config, hub_places)
    return plan_model(files, model, _WHERE, fresh=pooler, all_placed=False)


@torch.no_grad()
def _check_outputs(config: Any, source: str) -> None:
    """Check that tokens are [class token?, registers?, patches], the same at every call, and made of parameters alone.

    All of that is a matter of the architecture: one layer with random numbers shows it.

    Raises:
        ConfigError: they are not.
    """
    where = f"{_WHERE}: {source}"
    shallow = copy.deepcopy(config)
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        shallow.num_hidden_layers = 1
    with torch.random.fork_rng():
        model = AutoModel.from_config(shallow, trust_remote_code=False).eval()
        kept = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
        if kept:
            raise ConfigError(f"the teacher keeps running figures beside its weights, e.g. {min(kept)}", where=where)
        side = int(getattr(config, "image_size", 224))
        pixels_BCHW = torch.randn(1, 3, side, side)
        one, two = (model(pixel_values=pixels_BCHW).last_hidden_state for _ in range(2))
    patches = (side // config.patch_size) ** 2
    before = (one.shape[1] if one.ndim == 3 else 0) - patches
    if before not in {0, 1, 1 + int(getattr(config, "num_register_tokens", 0))}:
        raise ConfigError(
            f"the teacher gives {tuple(one.shape)} for {patches} patches: not one token a patch after a class token",
            where=where,
            fix="take a plain vision Transformer, e.g. a ViT or DINOv2",
        )
    if not torch.equal(one, two):
        raise ConfigError("the teacher gives other tokens at every call: it hides patches at random", where=where)


def teacher_sha256(recipe: Recipe) -> str | None:
    """Return a hash over the teacher's weight files; None without a teacher."""
    return _hash_weights(_source(recipe)) if recipe.teacher else None


@lru_cache(maxsize=4)  # asked at every checkpoint
def _hash_weights(source: str) -> str:
    return sha256_of(*weight_files(pretrained_folder(source, _WHERE), "transformers", _WHERE))
