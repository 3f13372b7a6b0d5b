"""Evaluation of a trained model, i.e. one with predictions of a task, instead of features."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.towers import has_head

LoaderT = TypeVar("LoaderT")

MODELS = {
    "segmenter": "m3i_scale.tasks.segmentation.segmenter",
    "detector": "m3i_scale.tasks.detection.detector",
}
"""Modules of trained models by metric, which excludes other metrics. Each has a function `find_model`."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Model, data and options of one evaluation; see `evaluate`."""

    folder: Path
    data: str
    device: torch.device
    batch_size: int | None
    """Images or windows per forward pass; None: the model's default."""
    exclude_groups: tuple[str, ...]
    pictures: tuple[Path, int] | None
    """New folder for pictures of predictions, and their number."""
    progress: Callable[[int], None] | None
    """Called with the number of samples so far."""


Evaluation = Callable[[EvaluationOptions], dict[str, Any]]
"""Returns the document of `evaluate`."""


def load_trained_model(folder: Path, measures: tuple[str, ...] | None, idle: list[str]) -> Evaluation | None:
    """Return the function that evaluates a trained model; None for metrics of features. `idle` are the given options
    that only affect feature metrics."""
    for name, module in MODELS.items():
        evaluate: Evaluation | None = importlib.import_module(module).find_model(folder, measures)
        if evaluate is not None and idle:
            raise ConfigError(
                f"{', '.join(idle)} has no effect on a {name}", where=str(folder), fix=f"leave out {', '.join(idle)}"
            )
        if evaluate is not None:
            return evaluate
    return None


def find_loader(
    folder: Path,
    measures: tuple[str, ...] | None,
    name: str,
    task: str,
    stock: LoaderT | None,
    head: LoaderT,
) -> LoaderT | None:
    """Return the function that loads a trained model; None if other metrics are requested.

    Args:
        measures: requested metrics; None: all.
        name: metric of the model, a key of `MODELS`.
        task: task that trains such a model.
        stock: loads the stock model of the folder; None: it has no such model.
        head: loads a model from `heads/` of a feature export.
    """
    if stock is not None and measures not in (None, (name,)):
        raise ConfigError(
            f"--measure must be {name} for this folder: it is a {name}", where=str(folder), fix=f"use --measure {name}"
        )
    if stock is None and (measures is None or name not in measures):
        return None
    if measures is not None and len(measures) > 1:
        raise ConfigError(
            f"--measure {name} cannot be combined with others", where="--measure", fix=f"use --measure {name} alone"
        )
    if stock is None and not has_head(folder, task):
        raise ConfigError(
            f"the folder has no {name}", where=str(folder), fix=f"run `m3i-scale export` on a run with `task: {task}`"
        )
    return head if stock is None else stock
