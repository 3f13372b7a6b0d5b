"""Validation of the evaluations during training, before step 1."""

from __future__ import annotations

from pathlib import Path

from m3i_scale.backbones.families import family_of
from m3i_scale.backbones.families.base import VisionConfig
from m3i_scale.config import DatasetConfig, RunConfig
from m3i_scale.config.run_control import PROBES, WITH_TEXT, OnlineEvaluationConfig
from m3i_scale.data.remote.access import Access, check_access
from m3i_scale.data.shards import LABELS, expand_shards, read_labels, require_shards, shard_folder
from m3i_scale.errors import ConfigError, DataError
from m3i_scale.objective.recipe import Recipe

_ONLINE = "evaluation.online"


def check_evaluation(run: RunConfig) -> None:
    """Check that evaluations of the losses have validation data and happen during the run."""
    every, steps = run.evaluation.every_steps, run.optim.steps
    if every and not run.data.validation:
        raise ConfigError(
            "evaluation.every_steps needs data.validation", fix="data.validation.val.path=/data/shards/val"
        )
    if every > steps:
        raise ConfigError(
            f"the run has {steps} steps: nothing would ever be evaluated",
            where=f"evaluation.every_steps: {every}",
            fix=f"evaluation.every_steps={steps} or less",
        )


def check_online(run: RunConfig, recipe: Recipe, model: VisionConfig | None, online: OnlineEvaluationConfig) -> None:
    """Check that recipe, backbone and shards support the requested online metrics. Shards are listed, not read.
    `model` is None if the backbone is invalid."""
    if run.task is not None:
        raise ConfigError(
            "the online evaluation measures frozen features, and a task trains a head",
            where=_ONLINE,
            fix="leave it out; use evaluation.every_steps and data.validation",
        )
    metrics = online.metrics or ()
    if not recipe.uses_text_tower and (named := [name for name in metrics if name in WITH_TEXT]):
        raise ConfigError(
            f"the recipe must have a text target for {' and '.join(named)}",
            where=f"{_ONLINE}.metrics",
            fix=f"leave out {' and '.join(named)}, or use a recipe with captions such as clip or m3i",
        )
    if online.pool != "mean" and model is not None and not getattr(family_of(model), "has_class_token", False):
        raise ConfigError(
            "the backbone has no class token",
            where=f"{_ONLINE}.pool: {online.pool}",
            fix=f"set {_ONLINE}.pool=mean",
        )
    paths = {f"{_ONLINE}.data": online.data, f"{_ONLINE}.train_data": online.train_data}
    sources = {key: DatasetConfig(path=path) for key, path in paths.items() if path is not None}
    access = check_access(run.data, sources).at_start()
    require_shards(online.data, f"{_ONLINE}.data", access)
    if online.train_data is not None:
        require_shards(online.train_data, f"{_ONLINE}.train_data", access)
        _check_apart(online.data, online.train_data, access)
        _check_classes(online.data, online.train_data, access)
    elif "zero_shot" in metrics:
        _classes(online.data, "data", access)


def _check_apart(test: str, train: str, access: Access) -> None:
    shards = [
        {str(shard.resolve() if isinstance(shard, Path) else shard) for shard in expand_shards(path, access=access)}
        for path in (test, train)
    ]
    if shared := shards[0] & shards[1]:
        raise DataError(
            f"data and train_data must be different, but share {len(shared)} of {len(shards[0])} shards",
            where=f"{_ONLINE}: {min(shared)}",
            why="kNN would find each test image itself",
            fix=f"set {_ONLINE}.data to shards with other images",
        )


def _check_classes(test: str, train: str, access: Access) -> None:
    one, other = _classes(test, "data", access), _classes(train, "train_data", access)
    if one != other:
        raise DataError(
            f"data and train_data must have the same classes, but have {len(one)} and {len(other)}"
            f" ({len(set(one) & set(other))} in common)",
            where=f"{_ONLINE}: {LABELS}",
            fix="make both with one call of `m3i-scale shards make`",
        )


def _classes(path: str, key: str, access: Access) -> list[str]:
    labels = read_labels(shard_folder(path), access=access)
    if not labels:  # shards of images without classes have an empty list
        metrics = [*PROBES, "zero_shot"]
        raise DataError(
            f"the shards must have class labels for {', '.join(metrics)}",
            where=f"{_ONLINE}.{key}: no class names in {shard_folder(path)}/{LABELS}",
            fix=f"use labeled shards, or leave out {_ONLINE}.train_data and these metrics",
        )
    return labels
