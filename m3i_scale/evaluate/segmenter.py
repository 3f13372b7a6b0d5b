"""Measure a trained segmenter: mIoU over all pixels of a set, at the images' own sizes, by a sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from m3i_scale.config import SourceConfig
from m3i_scale.data.images import NO_CLASS
from m3i_scale.data.samples import MASK_OUT_OF_RANGE
from m3i_scale.data.shards import MASK_LABELS, read_label_sets
from m3i_scale.errors import DataError, ExportError
from m3i_scale.evaluate.dense import iou_of_clusters
from m3i_scale.evaluate.intervals import Clusters
from m3i_scale.evaluate.samples import Sample, Table, read_samples
from m3i_scale.evaluate.towers import load_objective
from m3i_scale.files import read_json
from m3i_scale.objective.inputs import normalize
from m3i_scale.objective.mask_queries import class_scores
from m3i_scale.objective.segmentation import overlaps, resized

EOMT = "EomtForUniversalSegmentation"
STRIDE = 2 / 3
"""Of the window's side: from one window to the next."""
MAX_ASPECT = 20
"""Images that are longer are not measured: logits of every class are held for a side of so many windows."""
RESIZED = 1 << 26
"""At most so many logits are resized at a time (256 MiB), whatever the size of the image."""


@dataclass
class Segmenter:
    """Runs a model on windows of images."""

    logits: Callable[[Tensor], Tensor]
    """uint8 windows (B, 3, S, S) → logits (B, K, S, S)."""
    size: int
    """Side of a window in pixels."""
    classes: list[str]
    model_type: str
    device: torch.device
    batch_size: int = 16
    """Windows in one forward pass."""

    def __call__(self, pixels_CHW: NDArray[np.uint8]) -> Tensor:
        """Return the class of every pixel (H, W) of an image of any size."""
        return classes_at(self.slide(pixels_CHW), (pixels_CHW.shape[1], pixels_CHW.shape[2]))

    @torch.no_grad()
    def slide(self, pixels_CHW: NDArray[np.uint8]) -> Tensor:
        """Return logits (K, H, W) for an image whose shorter side is resized to the window's; where windows overlap,
        the mean of theirs."""
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
    """Return the class of every pixel (H, W) at some size: the argmax of logits that are resized a few classes at a
    time, since those of all classes would not fit for a large image."""
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
    """Return how far one window is from the next, in pixels."""
    return max(int(size * STRIDE), 1)


def starts(length: int, size: int) -> list[int]:
    """Return where windows begin along a side: a stride apart, and the last one at the end."""
    stride = stride_of(size)
    return [min(number * stride, length - size) for number in range(math.ceil((length - size) / stride) + 1)]


def is_segmenter(folder: Path) -> bool:
    """Return whether the folder is that of a semantic segmenter."""
    try:
        values = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False  # loading it as a model of features reports the fault
    if not isinstance(values, dict):
        return False
    names = [str(name) for name in values.get("architectures") or ()]
    return any(name == EOMT or name.endswith("ForSemanticSegmentation") for name in names)


def load_segmenter(folder: Path, device: torch.device, batch_size: int) -> Segmenter:
    """Load a stock segmenter of square inputs from any Hub folder, in fp32.

    Raises:
        ExportError: it does not load, weights do not fill it, or its input is no square.
    """
    try:
        queries = EOMT in (read_json(folder / "config.json").get("architectures") or ())
        auto = AutoModelForUniversalSegmentation if queries else AutoModelForSemanticSegmentation
        model, info = auto.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"the segmenter does not load: {str(error).splitlines()[0]}", where=str(folder)) from None
    faulty = sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str)
    if faulty:
        raise ExportError(f"{len(faulty)} tensors do not fill the segmenter, e.g. {faulty[0]}", where=str(folder))
    size = dict(processor.size)
    if queries:  # whose processor cuts squares along the longer side
        size = dict.fromkeys(("height", "width"), size.get("shortest_edge"))
    if not size.get("height") or size["height"] != size.get("width"):
        raise ExportError(f"the image processor has no square input size: {size}", where=str(folder))
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
        return resized(logits_BKHW, (windows_BCHW.shape[2], windows_BCHW.shape[3]))  # some give a quarter of the input

    return Segmenter(logits, int(size["height"]), classes, model.config.model_type, device, batch_size)


def head_of_features(folder: Path, device: torch.device, batch_size: int) -> Segmenter:
    """Return the segmenter that an export of features has in `heads/`.

    Raises:
        ExportError: see `load_objective`.
    """
    objective, run, label_sets = load_objective(folder, device)
    (classes,) = label_sets.values()
    mean, std = run.data.augment.mean, run.data.augment.std

    def logits(windows_BCHW: Tensor) -> Tensor:
        return objective.segment(normalize(windows_BCHW, mean, std))

    kind = objective.student.model.config.model_type
    return Segmenter(logits, objective.student.image_size, classes, kind, device, batch_size)


def check_classes(segmenter: Segmenter, shards: str) -> None:
    """Check that the masks of a set have the classes of a segmenter.

    Raises:
        DataError: they have others, or nobody says which.
    """
    sets = read_label_sets({"data": SourceConfig(shards=shards)}, file=MASK_LABELS)
    names = next(iter(sets.values()), None)
    if names != segmenter.classes:
        raise DataError(
            f"the shards have no {MASK_LABELS}"
            if names is None
            else f"the classes of the masks are not the segmenter's {len(segmenter.classes)}, in their order",
            where=shards,
            fix=f"{MASK_LABELS} beside the shards: the names in config.json of the model, in the order of the masks",
        )


def count_overlaps(
    segmenter: Segmenter,
    table: Table,
    exclude_groups: tuple[str, ...],
    progress: Callable[[int], None] | None,
    draw: Callable[[Sample, NDArray[np.uint8]], None] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read all samples once; this fills the table.

    Args:
        segmenter: what is measured.
        table: of the samples, still empty.
        exclude_groups: leave out samples that have one of these as `group`.
        progress: called with the number of samples read.
        draw: called with every sample that counts, and the predicted class of its pixels.

    Returns:
        Pixels of every class that truth and prediction share, that are of the truth, and of the prediction: (M, 3, K)
        of the samples that have a mask; and which of the table's they are: (M).
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


def measure_segmenter(
    counts_M3K: NDArray[np.int64], clusters: Clusters, classes: list[str], size: int
) -> dict[str, Any]:
    """Return mIoU over the classes that occur in truth or prediction, with its interval over clusters of images, and
    IoU by class.

    Args:
        counts_M3K: of `count_overlaps`.
        clusters: of the same images.
        classes: of the segmenter.
        size: of its window.
    """
    drawn = np.unique(clusters.of, return_inverse=True)[1]
    by_cluster = np.zeros((int(drawn.max()) + 1, *counts_M3K.shape[1:]))
    np.add.at(by_cluster, drawn, counts_M3K)
    both_CK, truth_CK, predicted_CK = by_cluster.transpose(1, 0, 2)
    either_CK = truth_CK + predicted_CK - both_CK
    estimate = iou_of_clusters(both_CK, either_CK, either_CK, clusters, len(counts_M3K))
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
