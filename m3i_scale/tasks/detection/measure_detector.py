"""Evaluation of a detector on shards: images are read once, at full extent, and scored by the rules of the dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from m3i_scale.data.categories import shard_categories
from m3i_scale.data.instances import Instances
from m3i_scale.data.shards import CATEGORIES, shard_folder
from m3i_scale.errors import DataError
from m3i_scale.evaluate.intervals import clusters_of
from m3i_scale.evaluate.job import document_of
from m3i_scale.evaluate.samples import Sample, Table, check_groups, open_table, read_samples
from m3i_scale.evaluate.trained_model import Evaluation, EvaluationOptions
from m3i_scale.tasks.detection.average_precision import measure_detector
from m3i_scale.tasks.detection.detection_overlays import DetectionOverlays, draw_curves
from m3i_scale.tasks.detection.detections import Categories, GroundTruth, Instance, Prediction, sorted_by_score
from m3i_scale.tasks.detection.detector import DETECTED, DETECTOR, Detector, detector_of

CURVES = "precision_recall.png"
"""File next to the pictures of the worst images."""


def find_model(folder: Path, measures: tuple[str, ...] | None) -> Evaluation | None:
    """Return the function that evaluates the detector; arguments as for `detector_of`."""
    load = detector_of(folder, measures)
    return None if load is None else partial(evaluate_detector, load)


def evaluate_detector(
    load: Callable[[Path, torch.device, int], Detector], options: EvaluationOptions
) -> dict[str, Any]:
    """Return the document of `evaluate` for a detector. Its pictures are the worst images and precision-recall curves.
    `load` gets the batch size, by default `DETECTED`."""
    detector = load(options.folder, options.device, options.batch_size or DETECTED)
    categories = check_categories(detector, options.data)
    drawing = None if options.pictures is None else DetectionOverlays(*options.pictures, categories)
    table = open_table(options.data, "--data")
    progress = None if options.progress is None else partial(options.progress, "data")
    truths, predictions = find_objects(detector, table, categories, options.exclude_groups, progress, drawing)
    check_groups(options.exclude_groups, [table])
    if not truths:
        raise DataError("no usable sample in the test data", where=options.data, why=str(dict(table.left_out)))
    clusters = clusters_of(table)
    figures = measure_detector(truths, predictions, categories, clusters)
    if drawing is not None and options.pictures is not None:
        drawing.write()
        draw_curves(figures, options.pictures[0] / CURVES)
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
    return cast(Categories, found.to_json())


def find_objects(
    detector: Detector,
    table: Table,
    categories: Categories,
    exclude_groups: tuple[str, ...],
    progress: Callable[[int], None] | None,
    draw: Callable[[str, Any, GroundTruth, Prediction], None] | None = None,
) -> tuple[list[GroundTruth], list[Prediction]]:
    """Run the detector on all samples once and fill the empty table. Return ground truth and prediction of every sample
    in it. `draw` gets key, pixels, ground truth and prediction of every sample."""
    truths: list[GroundTruth] = []
    predictions: list[Prediction] = []
    samples = read_samples(table, None, exclude_groups=exclude_groups, categories=len(detector.classes))
    while batch := list(islice(_with_objects(samples), detector.batch_size)):
        new = [truth_of(instances) for _, instances in batch]
        found = detector([sample.pixels for sample, _ in batch], [truth["image_id"] for truth in new])
        if draw is not None:
            for (sample, _), truth, prediction in zip(batch, new, found, strict=True):
                draw(sample.key, sample.pixels, truth, prediction)
        truths += new
        # For LVIS most predictions do not count, so they are dropped here.
        predictions += [sorted_by_score(one, truth, categories) for one, truth in zip(found, new, strict=True)]
        if progress is not None:
            progress(len(truths))
    return truths, predictions


def _with_objects(samples: Iterator[Sample]) -> Iterator[tuple[Sample, Instances]]:
    return ((sample, sample.instances) for sample in samples if sample.instances is not None)


def truth_of(instances: Instances) -> GroundTruth:
    """Return the ground truth of an image. Masks are RLE-compressed, because polygons need more memory."""
    annotations: list[Instance] = []
    for number in range(len(instances)):
        one: Instance = {
            "id": int(instances.ids_N[number]),
            "category": int(instances.labels_N[number]),
            "bbox": instances.boxes_N4[number].tolist(),
            "area": float(instances.areas_N[number]),
            "iscrowd": int(instances.crowds_N[number]),
        }
        mask = instances.rle(number)
        if mask is not None:
            one["segmentation"] = {"size": mask["size"], "counts": mask["counts"]}
        annotations.append(one)
    truth: GroundTruth = {
        "image_id": instances.image_id,
        "width": instances.width,
        "height": instances.height,
        "annotations": annotations,
    }
    if instances.negative is not None:
        truth["neg_category_ids"] = list(instances.negative)
    if instances.not_exhaustive is not None:
        truth["not_exhaustive_category_ids"] = list(instances.not_exhaustive)
    return truth
