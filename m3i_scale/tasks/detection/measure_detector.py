"""Evaluation of a detector: on shards, by the rules of the dataset, and during training, on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3i_scale.data.batch import Batch
from m3i_scale.data.categories import Categories, Category, shard_categories
from m3i_scale.data.instances import Instances, Segmentation
from m3i_scale.data.order import seed_of
from m3i_scale.data.shards import CATEGORIES, shard_folder
from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.errors import DataError
from m3i_scale.evaluate.intervals import clusters_of
from m3i_scale.evaluate.job import document_of
from m3i_scale.evaluate.samples import Sample, Table, check_groups, open_table, read_samples
from m3i_scale.evaluate.trained_model import Evaluation, EvaluationOptions, find_loader
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.targets.base import Scores
from m3i_scale.tasks.detection.average_precision import average_precision, detector_metrics
from m3i_scale.tasks.detection.detection_overlays import DetectionOverlays
from m3i_scale.tasks.detection.detections import Kind, Prediction, check_library, sorted_by_score
from m3i_scale.tasks.detection.detector import (
    DETECTED,
    DETECTOR,
    Detector,
    compressed,
    head_of_features,
    is_detector,
    load_detector,
    prediction_of,
)
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections


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


class DetectionScores(Scores):
    """Average precision over the unique images from the batches of all ranks, for exhaustively annotated classes
    (COCO).

    Batches may repeat an image, and ranks may share images, so images are identified by key. Without augmentation each
    repetition is identical.
    """

    def __init__(self, classes: Sequence[str], *, masks: bool) -> None:
        self._categories = Categories("coco", tuple(Category(number, name) for number, name in enumerate(classes)))
        self._kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
        self._images: dict[int, tuple[Instances, Prediction]] = {}

    def add(self, batch: Batch, outputs: dict[str, Any]) -> None:
        """Add the new images of a batch, with their `detections` in pixels of the square."""
        found: list[Detections] = outputs["detections"]
        side = batch.images_VBCHW.shape[-1]
        for row, (key, detections) in enumerate(zip(batch.keys, found, strict=True)):
            image = seed_of(key)
            if image not in self._images:
                self._images[image] = self._truth(batch, row, image), prediction_of(detections, (side, side))

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Return `box_ap`, and `mask_ap` if there are masks, from 0 to 1; 0 without objects."""
        images: dict[int, tuple[Instances, Prediction]] = {}
        for of_rank in gather_objects(self._images):
            images = of_rank | images  # the first rank counts
        if not any(len(truth) for truth, _ in images.values()):
            return {f"{kind}_ap": 0.0 for kind in self._kinds}
        figures = from_rank_0(lambda: average_precision(images.values(), self._categories))
        return {f"{kind}_ap": figures[kind]["AP"] for kind in self._kinds}

    def _truth(self, batch: Batch, row: int, image: int) -> Instances:
        side, labels_N = batch.images_VBCHW.shape[-1], batch.box_labels_BN[row].cpu()
        there_N = labels_N >= 0
        boxes_N4 = batch.boxes_BN4[row].cpu()[there_N]
        masks: list[Any] = [None] * len(boxes_N4)
        if "mask" in self._kinds:
            masks = compressed(batch.box_masks_BNMM[row].cpu()[there_N], boxes_N4, (side, side))
        corners_N4 = boxes_N4.double().numpy()
        sized_N4 = np.concatenate([corners_N4[:, :2], corners_N4[:, 2:] - corners_N4[:, :2]], axis=1)
        return Instances(
            image,
            side,
            side,
            np.arange(len(sized_N4), dtype=np.int64),
            labels_N[there_N].numpy(),
            sized_N4,
            sized_N4[:, 2] * sized_N4[:, 3],
            np.zeros(len(sized_N4), dtype=np.bool_),
            masks,
        )
