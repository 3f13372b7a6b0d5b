"""Trained segmenters: loading, and sliding-window inference on images of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from m3i_scale.errors import ExportError
from m3i_scale.evaluate.features import architectures, check_filled, loading
from m3i_scale.evaluate.towers import load_objective
from m3i_scale.objective.inputs import normalize
from m3i_scale.tasks.segmentation.mask_queries import class_scores
from m3i_scale.tasks.segmentation.pixel_heads import resized, segment

SEGMENTER = "segmenter"
"""Metric of a segmenter; excludes other metrics. The folder has a segmenter, or features with one in `heads/`."""
EOMT = "EomtForUniversalSegmentation"
STRIDE = 2 / 3
"""Distance between windows, as a fraction of the window size."""
WINDOWS = 16
"""Default number of windows per forward pass."""
RESIZED = 1 << 26
"""Maximum number of logits resized at a time (256 MiB), for any image size."""


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
    with loading(folder, SEGMENTER):
        model, info = auto.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        size = dict(getattr(processor, "size", None) or {})
    check_filled(info, folder, SEGMENTER)
    if queries:  # its processor splits the image into squares along the longer side
        size = dict.fromkeys(("height", "width"), size.get("shortest_edge"))
    side = size.get("height")
    if not isinstance(side, int) or side < 1 or side != size.get("width"):
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
