"""Selection of the evaluation for a trained segmenter or detector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.overlays import Overlays
from m3i_scale.tasks.detection.detector import DETECTED, DETECTOR, Detector, detector_of
from m3i_scale.tasks.detection.measure_detector import evaluate_detector
from m3i_scale.tasks.segmentation.measure_segmenter import evaluate_segmenter
from m3i_scale.tasks.segmentation.segmenter import SEGMENTER, WINDOWS, Segmenter, segmenter_of


def load_trained_model(
    folder: Path, measures: tuple[str, ...] | None, idle: list[str]
) -> Callable[..., dict[str, Any]] | None:
    """Return the function that evaluates a trained segmenter or detector; None for metrics of features.

    Args:
        folder: of the model.
        measures: requested metrics; None: all.
        idle: given options that only affect feature metrics.
    """
    segmenter, detector = segmenter_of(folder, measures), detector_of(folder, measures)
    if idle and (segmenter is not None or detector is not None):
        what = SEGMENTER if detector is None else DETECTOR
        raise ConfigError(f"{', '.join(idle)} has no effect: a {what} is measured", where=str(folder))
    if detector is not None:
        return partial(_detector, detector)
    return None if segmenter is None else partial(_segmenter, segmenter)


def _segmenter(
    load: Callable[[Path, torch.device, int], Segmenter],
    folder: Path,
    data: str,
    where: torch.device,
    batch_size: int | None,
    exclude_groups: tuple[str, ...],
    pictures: tuple[Path, int] | None,
    progress: Callable[[str, int], None] | None,
) -> dict[str, Any]:
    segmenter = load(folder, where, batch_size or WINDOWS)
    drawing = None if pictures is None else Overlays(*pictures, segmenter.classes)
    return evaluate_segmenter(segmenter, folder, data, exclude_groups, drawing, progress)


def _detector(
    load: Callable[[Path, torch.device, int], Detector],
    folder: Path,
    data: str,
    where: torch.device,
    batch_size: int | None,
    exclude_groups: tuple[str, ...],
    pictures: tuple[Path, int] | None,
    progress: Callable[[str, int], None] | None,
) -> dict[str, Any]:
    detector = load(folder, where, batch_size or DETECTED)
    return evaluate_detector(detector, folder, data, exclude_groups, pictures, progress)
