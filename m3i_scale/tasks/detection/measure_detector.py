"""Evaluation of a detector on shards: images are read once, at full extent, and scored by the rules of the dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from m3i_scale.data.categories import Categories, shard_categories
from m3i_scale.data.instances import Instances, Segmentation
from m3i_scale.data.shards import CATEGORIES, shard_folder
from m3i_scale.errors import DataError
from m3i_scale.evaluate.intervals import clusters_of
from m3i_scale.evaluate.job import document_of
from m3i_scale.evaluate.samples import Sample, Table, check_groups, open_table, read_samples
from m3i_scale.evaluate.trained_model import Evaluation, EvaluationOptions, find_loader
from m3i_scale.tasks.detection.average_precision import detector_metrics
from m3i_scale.tasks.detection.detection_overlays import DetectionOverlays
from m3i_scale.tasks.detection.detections import Prediction, check_library, sorted_by_score
from m3i_scale.tasks.detection.detector import (
    DETECTED,
    DETECTOR,
    Detector,
    head_of_features,
    is_detector,
    load_detector,
)


def find_model(folder: Path, measures: tuple[str, ...] | None) -> Evaluation | None:
    """Return the function that evaluates the detector; see `find_loader`."""
    stock = load_detector if is_detector(folder) else None
    load = find_loader(folder, measures, DETECTOR, "detection", stock, head_of_features)
    if load is None:
        return None
    check_library()
    return partial(evaluate_detector, load)


def evaluate_detector(
    load: Callable[[Path, torch.device, int], Detector], options: EvaluationOptions
) -> dict[str, Any]:
    """Return the document of `evaluate` for a detector. Its pictures are the worst images. `load` gets the batch size,
    by default `DETECTED`."""
    detector = load(options.folder, options.device, options.batch_size or DETECTED)
    categories = check_categories(detector, options.data)
    drawing = None if options.pictures is None else DetectionOverlays(*options.pictures, categories)
    table = open_table(options.data, "--data")
    progress = None if options.progress is None else partial(options.progress, "data")
    images = find_objects(detector, table, categories, options.exclude_groups, progress, drawing)
    check_groups(options.exclude_groups, [table])
    if not images:
        raise DataError("no usable sample in the test data", where=options.data, why=str(dict(table.left_out)))
    clusters = clusters_of(table)
    figures = detector_metrics(images, categories, clusters)
    if drawing is not None:
        drawing.write()
    warnings = [clusters.warning] if clusters.warning else []
    if table.left_out:
        warnings.append(
            f"{table.left_out.total()} images of the test data are left out: the figures are not those of the whole set"
        )
    model = {"type": detector.model_type, "image_size": detector.size}
    return document_of(options.folder, model, table, options.data, clusters) | {
        "measures": {DETECTOR: figures},
        "not_measured": {},
        "warnings": warnings,
    }


def check_categories(detector: Detector, shards: str) -> Categories:
    """Return the categories of a dataset, after checking that they match the detector's categories."""
    found = shard_categories(shard_folder(shards), "--data: ")
    if found is None or found.names != detector.classes:
        raise DataError(
            f"the shards have no {CATEGORIES}"
            if found is None
            else f"the categories of the shards are not the detector's {len(detector.classes)}, in their order",
            where=shards,
            fix="shards of the set that it was trained on (`shards make coco`), or of one with the same categories",
        )
    return found


def find_objects(
    detector: Detector,
    table: Table,
    categories: Categories,
    exclude_groups: tuple[str, ...],
    progress: Callable[[int], None] | None,
    draw: Callable[[str, Any, Instances, Prediction], None] | None = None,
) -> list[tuple[Instances, Prediction]]:
    """Run the detector on all samples once and fill the empty table. Return ground truth and prediction of every sample
    in it. `draw` gets key, pixels, ground truth and prediction of every sample."""
    images: list[tuple[Instances, Prediction]] = []
    samples = read_samples(table, None, exclude_groups=exclude_groups, categories=len(detector.classes))
    while batch := list(islice(_with_objects(samples), detector.batch_size)):
        new = [instances for _, instances in batch]
        found = detector([sample.pixels for sample, _ in batch])
        # For LVIS most predictions do not count, so they are dropped here.
        found = [sorted_by_score(one, truth, categories) for one, truth in zip(found, new, strict=True)]
        if draw is not None:
            for (sample, _), truth, prediction in zip(batch, new, found, strict=True):
                draw(sample.key, sample.pixels, truth, prediction)
        images += zip(new, found, strict=True)
        if progress is not None:
            progress(len(images))
    return images


def _with_objects(samples: Iterator[Sample]) -> Iterator[tuple[Sample, Instances]]:
    """Yield samples with objects. Masks are RLE-compressed, because polygons need more memory."""
    for sample in samples:
        if sample.instances is not None:
            masks: list[Segmentation | None] = [sample.instances.rle(number) for number in range(len(sample.instances))]
            yield sample, replace(sample.instances, segmentations=masks)
