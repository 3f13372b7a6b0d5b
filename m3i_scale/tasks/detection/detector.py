"""Trained detectors: loading, inference on images of any size, and evaluation, also on batches during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import (
    DeformableDetrImageProcessor,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    SamImageProcessor,
)

from m3i_scale.config import AugmentConfig
from m3i_scale.data.batch import Batch, Collator
from m3i_scale.data.batch import Sample as Shown
from m3i_scale.data.categories import Categories, Category, shard_categories
from m3i_scale.data.instances import Instances, Rle, Segmentation
from m3i_scale.data.order import seed_of
from m3i_scale.data.shards import CATEGORIES, shard_folder
from m3i_scale.data.views import ViewMaker
from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.errors import DataError
from m3i_scale.evaluation.decoding import Sample
from m3i_scale.evaluation.features import architectures, load_stock, loading
from m3i_scale.evaluation.intervals import clusters_of
from m3i_scale.evaluation.job import document_of
from m3i_scale.evaluation.samples import Table, check_groups, open_table, read_samples
from m3i_scale.evaluation.towers import load_objective
from m3i_scale.evaluation.trained_model import Evaluation, EvaluationOptions, find_loader
from m3i_scale.objective.inputs import normalize
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.targets.base import Scores
from m3i_scale.tasks.detection.average_precision import average_precision, detector_metrics
from m3i_scale.tasks.detection.detection_heads import RfDetr
from m3i_scale.tasks.detection.detection_overlays import DetectionOverlays
from m3i_scale.tasks.detection.detections import Kind, Prediction, check_library, sorted_by_score
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections, MaskRcnnForObjectDetection, paste_masks
from m3i_scale.tasks.detection.object_detector import detect, image_sizes
from m3i_scale.tasks.detection.rfdetr import decode_queries

DETECTOR = "detector"
"""Metric of a detector; excludes other metrics. The folder has a detector, or features with one in `heads/`."""
DETECTED = 4
"""Default images per forward pass: layers with global attention need about 800 MB per image of 1,024 pixels."""
_KINDS: dict[str, tuple[Any, Any]] = {
    "MaskRcnnForObjectDetection": (MaskRcnnForObjectDetection, SamImageProcessor),
    "RfDetrForObjectDetection": (RfDetrForObjectDetection, DeformableDetrImageProcessor),
    "RfDetrForInstanceSegmentation": (RfDetrForInstanceSegmentation, DeformableDetrImageProcessor),
}
"""Detector classes and their image processors."""


@dataclass
class Detector:
    """Detection model with its preprocessing."""

    detect: Callable[[Tensor, Tensor, Tensor], list[Detections]]
    """Normalized images, (B, 2) heights and widths before padding, and (B, 2) original sizes → detections."""
    augment: AugmentConfig
    """Mean and std of the images, and whether images are stretched to a square."""
    size: int
    """Input size (side of the square) in pixels."""
    classes: list[str]
    model_type: str
    device: torch.device
    batch_size: int = DETECTED
    """Images per forward pass."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Return detections on at most `batch_size` images (3, H, W) of any size, in original coordinates and in the
        same order."""
        augment, shown = self.augment, []
        view = ViewMaker(
            augment,
            views=1,
            image_size=self.size,
            augment=False,
            reads="boxes",
            mean=augment.mean,
            stretch=augment.stretch,
        )
        for pixels_CHW in images:
            views = view(Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))), 0)
            shown.append(Shown(views, None, -1, None, 0, ""))
        batch = Collator(None, 0)(shown).to(self.device)
        pixels_BCHW = normalize(batch.images_VBCHW[0], augment.mean, augment.std)
        found = self.detect(pixels_BCHW, image_sizes(batch), batch.sizes_B2)
        return [
            prediction_of(one, (pixels_CHW.shape[1], pixels_CHW.shape[2]))
            for one, pixels_CHW in zip(found, images, strict=True)
        ]


def prediction_of(found: Detections, size: tuple[int, int]) -> Prediction:
    """Return the detections of an image of `size` (height, width) in the format of the metrics."""
    boxes_N4 = found.boxes_N4.cpu()
    return {
        "boxes": boxes_N4.numpy(),
        "scores": found.scores_N.cpu().numpy(),
        "labels": found.labels_N.cpu().numpy(),
        "masks": None if found.masks_NMM is None else compressed(found.masks_NMM.cpu(), boxes_N4, size),
    }


def compressed(masks_NMM: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Paste masks in box coordinates, soft or binary, into full images of `size` (H, W) and compress them. Each is
    pasted only within its box plus one pixel, because outside it never reaches 0.5."""
    from faster_coco_eval.core import mask as library

    found: list[Rle] = []
    most = boxes_N4.new_tensor([size[1], size[0]] * 2)
    for mask_MM, box_4 in zip(masks_NMM, boxes_N4, strict=True):
        outer_4 = torch.cat([box_4[:2].floor() - 1, box_4[2:].ceil() + 1]).clamp(min=0).minimum(most)
        left, top, right, bottom = (int(edge) for edge in outer_4.tolist())
        inner_4 = box_4 - box_4.new_tensor([left, top] * 2)
        whole_HW = np.zeros(size, dtype=np.uint8, order="F")
        pasted_1HW = paste_masks(mask_MM[None], inner_4[None], (bottom - top, right - left))
        whole_HW[top:bottom, left:right] = pasted_1HW[0].numpy()
        counts = library.encode(whole_HW)["counts"]
        found.append(Rle(size=list(size), counts=counts.decode("ascii")))
    return found


def load_detector(folder: Path, device: torch.device, batch_size: int) -> Detector:
    """Load a Mask R-CNN or RF-DETR in fp32. For Mask R-CNN, run the code of this package, not code in the folder."""
    kind, of_images = next(_KINDS[name] for name in architectures(folder) if name in _KINDS)
    model = load_stock(kind, folder, DETECTOR)
    with loading(folder, DETECTOR):
        processor = of_images.from_pretrained(folder, local_files_only=True)
    queried = kind is not MaskRcnnForObjectDetection
    augment = AugmentConfig(mean=tuple(processor.image_mean), std=tuple(processor.image_std), stretch=queried)
    shape, names = model.config.backbone_config, model.config.id2label
    classes = [str(names[number]) for number in sorted(names)]
    model = model.to(device).eval()
    detect = partial(_by_queries, model) if queried else model.detect
    return Detector(detect, augment, shape.image_size, classes, shape.model_type, device, batch_size)


@torch.no_grad()
def _by_queries(model: Any, pixels_BCHW: Tensor, sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
    """Return the detections of the standard RF-DETR. The score threshold is in its config.json if `export` wrote it."""
    output, usual = model(pixel_values=pixels_BCHW), RfDetr()
    prediction = {name: output[name] for name in ("logits", "pred_boxes", "pred_masks") if name in output}
    lowest, most = (getattr(model.config, name, getattr(usual, name)) for name in ("score_above", "detections"))
    return decode_queries(prediction, sizes_B2, own_B2, pixels_BCHW.shape[-1], score_above=lowest, most=most)


def head_of_features(folder: Path, device: torch.device, batch_size: int) -> Detector:
    """Load the detector in `heads/` of a feature export, in fp32."""
    objective, run, label_sets = load_objective(folder, device)
    (classes,) = label_sets.values()
    size, model_type = objective.student.image_size, objective.student.model.config.model_type
    return Detector(partial(detect, objective), run.data.augment, size, classes, model_type, device, batch_size)


def find_model(folder: Path, measures: tuple[str, ...] | None) -> Evaluation | None:
    """Return the function that evaluates the detector; see `find_loader`."""
    stock = load_detector if _KINDS.keys() & set(architectures(folder)) else None
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
    images = find_objects(detector, table, categories, options.exclude_groups, options.progress, drawing)
    check_groups(options.exclude_groups, [table])
    if not images:
        raise DataError(
            "no usable sample in the test data",
            where=options.data,
            why=str(dict(table.left_out)),
            fix="run `m3i-scale shards check` on the data",
        )
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
            fix="use shards (`shards make coco`) with the categories of its training data",
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
