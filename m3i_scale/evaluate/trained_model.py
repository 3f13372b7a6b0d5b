"""Evaluation of a trained model, i.e. one with predictions of a task, instead of features."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3i_scale.errors import ConfigError

MODELS = {
    "segmenter": "m3i_scale.tasks.segmentation.measure_segmenter",
    "detector": "m3i_scale.tasks.detection.measure_detector",
}
"""Modules of trained models by metric, which excludes other metrics. Each has a function `find_model`."""


def load_trained_model(
    folder: Path, measures: tuple[str, ...] | None, idle: list[str]
) -> Callable[..., dict[str, Any]] | None:
    """Return the function that evaluates a trained model; None for metrics of features.

    Args:
        folder: of the model.
        measures: requested metrics; None: all.
        idle: given options that only affect feature metrics.
    """
    for name, module in MODELS.items():
        evaluate: Callable[..., dict[str, Any]] | None = importlib.import_module(module).find_model(folder, measures)
        if evaluate is not None and idle:
            raise ConfigError(f"{', '.join(idle)} has no effect: a {name} is measured", where=str(folder))
        if evaluate is not None:
            return evaluate
    return None
