"""Evaluation of a trained model, i.e. one with predictions of a task, instead of features."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.job import Progress

MODELS = {
    "segmenter": "m3i_scale.tasks.segmentation.measure_segmenter",
    "detector": "m3i_scale.tasks.detection.measure_detector",
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
    progress: Progress | None


Evaluation = Callable[[EvaluationOptions], dict[str, Any]]
"""Returns the document of `evaluate`."""


def load_trained_model(folder: Path, measures: tuple[str, ...] | None, idle: list[str]) -> Evaluation | None:
    """Return the function that evaluates a trained model; None for metrics of features. `idle` are the given options
    that only affect feature metrics."""
    for name, module in MODELS.items():
        evaluate: Evaluation | None = importlib.import_module(module).find_model(folder, measures)
        if evaluate is not None and idle:
            raise ConfigError(f"{', '.join(idle)} has no effect: a {name} is measured", where=str(folder))
        if evaluate is not None:
            return evaluate
    return None
