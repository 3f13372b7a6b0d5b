"""Validation of dataset settings before step 1: settings without effect, or with an unintended one, are errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3i_scale.config import DatasetConfig, RunConfig
from m3i_scale.data.categories import shard_categories
from m3i_scale.data.remote.access import Access
from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS, read_label_sets, shard_folder
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.objective.recipe import Recipe
from m3i_scale.text import without_secrets


def check_sources(run: RunConfig, recipe: Recipe, access: Access | None = None, *, there: bool = True) -> None:
    """Validate that dataset settings have an effect, and that every target has a dataset. If the shards do not exist
    (`there`), files next to them are not checked."""
    sources, file = run.data.datasets, recipe.labels_file
    for name, source in sources.items():
        where = f"data.datasets.{name}"
        if source.captions != "one" and not recipe.uses_text:
            raise ConfigError(
                f"`captions: {source.captions}` has no effect: the recipe has no text target", where=where
            )
        if not source.labels and not recipe.uses_categories:
            raise ConfigError("`labels: false` has no effect: the recipe has no category target", where=where)
        if source.label_set is not None and file is None:
            raise ConfigError("`label_set` has no effect: the recipe predicts no classes", where=where)
        setting = "`labels: false`" if not source.labels else None if source.label_set is None else "`label_set`"
        read = {name: source.model_copy(update={"labels": True})}
        if setting and there and not read_label_sets(read, access, file or LABELS):
            raise ConfigError(
                f"{setting} has no effect: the dataset has no {file}",
                where=f"{where}: {without_secrets(source.path)}",
                fix=f"leave it out, or put {file}, a list of class names, beside the shards",
            )
    if recipe.reads != "labels" and file is not None:
        for kind, named in (("datasets", sources), ("validation", run.data.validation)):
            for name, source in named.items():
                _check_class_names(source, f"data.{kind}.{name}", access, file, there=there)
    if recipe.uses_text and sources and all(source.captions == "none" for source in sources.values()):
        raise ConfigError(
            "the recipe has a text target, and every dataset has `captions: none`",
            where="data.datasets",
            fix="read captions of at least one dataset, or take a recipe without a text target",
        )
    for name, source in run.data.validation.items():
        idle = [key for key in ("epochs", "augment") if getattr(source, key) is not None]
        idle += ["weight, as a schedule"] if isinstance(source.weight, list) else []
        if idle:
            raise ConfigError(
                f"{idle[0]} has no effect: the same validation batches are read every time, without augmentation",
                where=f"data.validation.{name}",
            )


def scored_targets(run: RunConfig, recipe: Recipe, access: Access | None = None) -> list[str]:
    """Return the names of the targets whose scores evaluations compute."""
    targets = recipe.targets if run.data.validation else []
    return [target.name for target in targets if target.check_scores(run, access)]


_NAMED = {
    MASK_LABELS: ("masks", "put it, a list of class names in the order of the masks' numbers, beside the shards"),
    CATEGORIES: ("boxes", "make the shards by `m3i-scale shards make coco`, which writes it"),
}
"""Annotations that use the classes in a file, and how to create the file."""


def _check_class_names(source: DatasetConfig, where: str, access: Access | None, file: str, *, there: bool) -> None:
    """Validate that a file next to the shards names the classes of the masks or boxes."""
    what, fix = _NAMED[file]
    if not source.labels:
        raise ConfigError(f"`labels: false` leaves {file} unread, and {what} need it", where=where)
    if there and not read_label_sets({"source": source}, access, file):
        raise ConfigError(
            f"the dataset has no {file}, which names the classes of its {what}",
            where=f"{where}: {without_secrets(source.path)}",
            fix=fix,
        )
    if there and file == CATEGORIES:
        shard_categories(shard_folder(source.path), f"{where}: ", access)


def check_label_order(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None, checkpoint: Path) -> None:
    """Validate that the label spaces have the same order. Heads are numbered, so each would otherwise resume with
    the weights of another one."""
    if saved and now and set(saved) == set(now) and list(saved) != list(now):
        raise CheckpointError(
            f"the label sets are in another order than those of the checkpoint: {', '.join(saved)}",
            where=str(checkpoint),
            why="every label set has a head of its own, by number; each would go on with the weights of another",
            fix="write data.datasets in the order in which the run began",
        )
