"""Trained segmenters: loading, sliding-window inference on images of any size, and mIoU over a dataset's pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from m3i_scale.config import DatasetConfig
from m3i_scale.data.samples import MASK_OUT_OF_RANGE
from m3i_scale.data.shards import MASK_LABELS, read_label_sets
from m3i_scale.defaults import NO_CLASS
from m3i_scale.errors import DataError, ExportError
from m3i_scale.evaluation.decoding import Sample
from m3i_scale.evaluation.dense import iou_of_clusters
from m3i_scale.evaluation.features import architectures, load_stock, loading
from m3i_scale.evaluation.intervals import Clusters, clusters_of
from m3i_scale.evaluation.job import document_of
from m3i_scale.evaluation.pictures.draw import PALETTE, SIDE, file_stem, make_folder, side_by_side, write_error
from m3i_scale.evaluation.samples import Table, check_groups, open_table, read_samples
from m3i_scale.evaluation.towers import load_objective
from m3i_scale.evaluation.trained_model import Evaluation, EvaluationOptions, find_loader
from m3i_scale.files import write_json
from m3i_scale.objective.inputs import normalize
from m3i_scale.tasks.segmentation.mask_queries import class_scores
from m3i_scale.tasks.segmentation.pixel_heads import overlaps, resized, segment

SEGMENTER = "segmenter"
"""Metric of a segmenter; excludes other metrics. The folder has a segmenter, or features with one in `heads/`."""
EOMT = "EomtForUniversalSegmentation"
STRIDE = 2 / 3
"""Distance between windows, as a fraction of the window size."""
WINDOWS = 16
"""Default number of windows per forward pass."""
RESIZED = 1 << 26
"""Maximum number of logits resized at a time (256 MiB), for any image size."""
MAX_ASPECT = 20
"""Images with a larger aspect ratio are skipped: memory must hold logits of every class for that many windows."""
LEGEND = "palette.json"
"""File next to the pictures: number, name and color (red, green, blue) of every class."""


@dataclass
class Segmenter:
    """Segmentation model applied to windows of images."""

    logits: Callable[[Tensor], Tensor]
    """uint8 windows (B, 3, S, S) → logits (B, K, S, S)."""
    size: int
    """Window size in pixels."""
    classes: list[str]
    model_type: str
    device: torch.device
    batch_size: int = WINDOWS
    """Windows per forward pass."""

    def __call__(self, pixels_CHW: NDArray[np.uint8]) -> Tensor:
        """Return the class of every pixel (H, W) of an image of any size."""
        return classes_at(self.slide(pixels_CHW), (pixels_CHW.shape[1], pixels_CHW.shape[2]))

    @torch.no_grad()
    def slide(self, pixels_CHW: NDArray[np.uint8]) -> Tensor:
        """Return logits (K, H, W) for an image with its shorter side resized to the window size. Overlapping windows
        are averaged."""
        height, width = pixels_CHW.shape[1:]
        scale = self.size / min(height, width)
        shown = max(round(height * scale), self.size), max(round(width * scale), self.size)
        image = Image.fromarray(pixels_CHW.transpose(1, 2, 0)).resize(shown[::-1], Image.Resampling.BICUBIC)
        resized_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        places = [(top, left) for top in starts(shown[0], self.size) for left in starts(shown[1], self.size)]
        total_KHW = torch.zeros(len(self.classes), *shown, device=self.device)
        count_HW = torch.zeros(shown, device=self.device)
        for first in range(0, len(places), self.batch_size):
            chosen = places[first : first + self.batch_size]
            windows = [resized_CHW[:, top : top + self.size, left : left + self.size] for top, left in chosen]
            logits_BKHW = self.logits(torch.stack(windows).to(self.device)).float()
            for (top, left), logits_KHW in zip(chosen, logits_BKHW, strict=True):
                total_KHW[:, top : top + self.size, left : left + self.size] += logits_KHW
                count_HW[top : top + self.size, left : left + self.size] += 1
        return total_KHW.div_(count_HW)


def classes_at(logits_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class of every pixel (H, W) at a given size. Logits are resized a few classes at a time, because the
    logits of all classes would not fit into memory for a large image."""
    step = max(RESIZED // (size[0] * size[1]), 1)
    best_HW = torch.full(size, -math.inf, device=logits_KHW.device)
    classes_HW = torch.zeros(size, dtype=torch.int64, device=logits_KHW.device)
    for first in range(0, len(logits_KHW), step):
        largest_HW, place_HW = resized(logits_KHW[None, first : first + step], size)[0].max(dim=0)
        better_HW = largest_HW > best_HW
        best_HW = torch.where(better_HW, largest_HW, best_HW)
        classes_HW = torch.where(better_HW, place_HW + first, classes_HW)
    return classes_HW


def stride_of(size: int) -> int:
    """Return the distance between windows in pixels."""
    return max(int(size * STRIDE), 1)


def starts(length: int, size: int) -> list[int]:
    """Return the window positions along a side: a stride apart, and the last one at the end."""
    stride = stride_of(size)
    return [min(number * stride, length - size) for number in range(math.ceil((length - size) / stride) + 1)]


def is_segmenter(folder: Path) -> bool:
    """Return whether the folder contains a semantic segmenter."""
    return any(name == EOMT or name.endswith("ForSemanticSegmentation") for name in architectures(folder))


def load_segmenter(folder: Path, device: torch.device, batch_size: int) -> Segmenter:
    """Load a standard segmenter with square inputs from any Hub folder, in fp32."""
    queries = EOMT in architectures(folder)
    auto = AutoModelForUniversalSegmentation if queries else AutoModelForSemanticSegmentation
    model = load_stock(auto, folder, SEGMENTER)
    with loading(folder, SEGMENTER):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        size = dict(getattr(processor, "size", None) or {})
    if queries:  # its processor splits the image into squares along the longer side
        size = dict.fromkeys(("height", "width"), size.get("shortest_edge"))
    side = size.get("height")
    if not isinstance(side, int) or side < 1 or side != size.get("width"):
        raise ExportError(
            f"the image processor must have a square input size, got {size}",
            where=str(folder),
            fix="export the checkpoint again",
        )
    names: dict[int, str] = model.config.id2label
    classes = [str(names[number]) for number in sorted(names)]
    model = model.to(device).eval()

    def logits(windows_BCHW: Tensor) -> Tensor:
        alone = {"do_split_image": False} if queries else {"do_center_crop": False}
        inputs = processor(images=list(windows_BCHW), do_resize=False, **alone, return_tensors="pt")
        output = model(pixel_values=inputs["pixel_values"].to(device))
        if queries:
            masks_BQHW = resized(output.masks_queries_logits, (windows_BCHW.shape[2], windows_BCHW.shape[3]))
            return class_scores(output.class_queries_logits, masks_BQHW)
        logits_BKHW: Tensor = output.logits
        return resized(logits_BKHW, (windows_BCHW.shape[2], windows_BCHW.shape[3]))  # some return a quarter of the size

    return Segmenter(logits, side, classes, model.config.model_type, device, batch_size)


def head_of_features(folder: Path, device: torch.device, batch_size: int) -> Segmenter:
    """Load the segmenter in `heads/` of a feature export."""
    objective, run, label_sets = load_objective(folder, device)
    (classes,) = label_sets.values()
    mean, std = run.data.augment.mean, run.data.augment.std

    def logits(windows_BCHW: Tensor) -> Tensor:
        return segment(objective, normalize(windows_BCHW, mean, std))

    kind = objective.student.model.config.model_type
    return Segmenter(logits, objective.student.image_size, classes, kind, device, batch_size)


def find_model(folder: Path, measures: tuple[str, ...] | None) -> Evaluation | None:
    """Return the function that evaluates the segmenter; see `find_loader`."""
    stock = load_segmenter if is_segmenter(folder) else None
    load = find_loader(folder, measures, SEGMENTER, "segmentation", stock, head_of_features)
    return None if load is None else partial(evaluate_segmenter, load)


def evaluate_segmenter(
    load: Callable[[Path, torch.device, int], Segmenter], options: EvaluationOptions
) -> dict[str, Any]:
    """Return the document of `evaluate` for a segmenter. Its pictures are prediction overlays. `load` gets the batch
    size in windows, by default `WINDOWS`."""
    segmenter = load(options.folder, options.device, options.batch_size or WINDOWS)
    overlays = None if options.pictures is None else Overlays(*options.pictures, segmenter.classes)
    check_classes(segmenter, options.data)
    table = open_table(options.data, "--data")
    counts_M3K, masked = count_overlaps(segmenter, table, options.exclude_groups, options.progress, overlays)
    check_groups(options.exclude_groups, [table])
    if not len(masked):
        raise DataError(
            "no pixel of the test data has a class",
            where=options.data,
            why=str(dict(table.bad_masks)),
            fix="run `m3i-scale shards check` on the data",
        )
    clusters = clusters_of(table).take(masked)
    warnings = [clusters.warning] if clusters.warning else []
    warnings += [f"{count} masks of the test data cannot be used: {why}" for why, count in table.bad_masks.items()]
    if without := len(table) - len(masked) - table.bad_masks.total():
        warnings.append(f"{without} images of the test data have no mask, and count for nothing")
    model = {"type": segmenter.model_type, "image_size": segmenter.size}
    return document_of(options.folder, model, table, options.data, clusters) | {
        "measures": {SEGMENTER: segmenter_metrics(counts_M3K, clusters, segmenter.classes, segmenter.size)},
        "not_measured": {},
        "warnings": warnings,
    }


def check_classes(segmenter: Segmenter, shards: str) -> None:
    """Check that the masks of a dataset have the classes of a segmenter."""
    sets = read_label_sets({"data": DatasetConfig(path=shards)}, file=MASK_LABELS)
    names = next(iter(sets.values()), None)
    if names != segmenter.classes:
        raise DataError(
            f"the shards have no {MASK_LABELS}"
            if names is None
            else f"the classes of the masks are not the segmenter's {len(segmenter.classes)}, in their order",
            where=shards,
            fix=f"put {MASK_LABELS} next to the shards: the names in config.json of the model, in the order of the "
            "mask values",
        )
    if len(names) > NO_CLASS:
        raise DataError(
            f"masks must have at most {NO_CLASS} classes, got {len(names)}",
            where=shards,
            why=f"a pixel of a mask has one byte, and {NO_CLASS} means no class",
            fix="merge classes, and make the shards again",
        )


def count_overlaps(
    segmenter: Segmenter,
    table: Table,
    exclude_groups: tuple[str, ...],
    progress: Callable[[int], None] | None,
    draw: Callable[[Sample, NDArray[np.uint8]], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Run the segmenter on all samples once, and fill the empty table. `draw` gets every counted sample and its
    predicted classes.

    Returns:
        Pixel counts per class of intersection, ground truth and prediction: (M, 3, K) for samples with a mask; and
            their indices in the table: (M).
    """
    counts: list[NDArray[np.int64]] = []
    masked: list[int] = []
    for number, sample in enumerate(read_samples(table, None, exclude_groups=exclude_groups, masks=True)):
        if progress is not None:
            progress(number + 1)
        if sample.mask is None:
            continue
        truth_HW = torch.from_numpy(sample.mask).long().to(segmenter.device)
        valid_HW = truth_HW != NO_CLASS
        if bool((truth_HW[valid_HW] >= len(segmenter.classes)).any()):
            table.bad_masks[MASK_OUT_OF_RANGE] += 1
            continue
        if max(truth_HW.shape) > MAX_ASPECT * min(truth_HW.shape):
            table.bad_masks[f"the image is more than {MAX_ASPECT} times as long as wide"] += 1
            continue
        if not bool(valid_HW.any()):
            table.bad_masks["no pixel has a class"] += 1
            continue
        predicted_HW = segmenter(sample.pixels)
        truth_HW = truth_HW.where(valid_HW, 0)
        overlaps_3K = overlaps(predicted_HW[None], truth_HW[None], valid_HW[None], len(segmenter.classes))
        counts.append(overlaps_3K.cpu().numpy())
        masked.append(number)
        if draw is not None:
            draw(sample, predicted_HW.cpu().numpy().astype(np.uint8))
    shape = (len(counts), 3, len(segmenter.classes))
    return np.asarray(counts, dtype=np.int64).reshape(shape), np.asarray(masked, dtype=np.int64)


def segmenter_metrics(
    counts_M3K: NDArray[np.int64], clusters: Clusters, classes: list[str], size: int
) -> dict[str, Any]:
    """Return mIoU over the classes in ground truth or prediction, with its interval over clusters of images, and IoU
    per class. `counts_M3K` are from `count_overlaps`, `clusters` of the same images, and `size` is the window size."""
    drawn = np.unique(clusters.of, return_inverse=True)[1]
    by_cluster = np.zeros((int(drawn.max()) + 1, *counts_M3K.shape[1:]))
    np.add.at(by_cluster, drawn, counts_M3K)
    both_CK, truth_CK, predicted_CK = by_cluster.transpose(1, 0, 2)
    either_CK = truth_CK + predicted_CK - both_CK
    estimate = iou_of_clusters(both_CK, either_CK, either_CK, clusters, len(counts_M3K)).estimate
    both_K, truth_K, predicted_K = counts_M3K.sum(axis=0)
    either_K = truth_K + predicted_K - both_K
    iou_K = both_K / np.maximum(either_K, 1)
    commonest = truth_K.max() / truth_K.sum() / max(int((truth_K > 0).sum()), 1)
    return {
        "mIoU": estimate.as_dict() | {"majority": float(commonest)},
        "pixel_accuracy": float(both_K.sum() / truth_K.sum()),
        "classes": [
            {"name": name, "iou": float(iou), "pixels": int(pixels)}
            for name, iou, pixels, either in zip(classes, iou_K, truth_K, either_K, strict=True)
            if either
        ],
        "window": size,
        "stride": stride_of(size),
    }


class Overlays:
    """Writer of pictures (image | ground truth | prediction) of the first `count` samples with a mask, and of the class
    colors. `folder` is created if missing; it must be empty."""

    def __init__(self, folder: Path, count: int, classes: list[str]) -> None:
        self._folder, self._count, self._classes, self._drawn = folder, count, classes, 0
        make_folder(folder)

    def __call__(self, sample: Sample, predicted_HW: NDArray[np.uint8]) -> None:
        """Draw a sample with the predicted class of every pixel, unless it has no mask or `count` samples are drawn."""
        if sample.mask is None or self._drawn == self._count:
            return
        self._drawn += 1
        image = Image.fromarray(sample.pixels.transpose(1, 2, 0))
        image.thumbnail((SIDE, SIDE))
        picture = side_by_side([image, *(_coloured(image, classes_HW) for classes_HW in (sample.mask, predicted_HW))])
        try:
            if self._drawn == 1:
                names = enumerate(self._classes)
                legend = [{"class": number, "name": name, "rgb": PALETTE[number].tolist()} for number, name in names]
                write_json(self._folder / LEGEND, legend)
            picture.save(self._folder / f"{self._drawn:04d}-{file_stem(sample.key)}.png")
        except OSError as error:
            raise write_error(self._folder, error) from None


def _coloured(image: Image.Image, classes_HW: NDArray[np.uint8]) -> Image.Image:
    """Return the image with class colors blended over it; pixels without a class are unchanged."""
    classes = np.asarray(Image.fromarray(classes_HW).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image, dtype=np.float64)
    mixed = 0.35 * pixels + 0.65 * PALETTE[classes]
    return Image.fromarray(np.where((classes == NO_CLASS)[..., None], pixels, mixed).round().astype(np.uint8))
