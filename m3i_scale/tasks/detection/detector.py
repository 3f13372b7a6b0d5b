"""Trained detectors: loading, and inference on images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from m3i_scale.data.batch import Collator
from m3i_scale.data.batch import Sample as Shown
from m3i_scale.data.instances import Rle
from m3i_scale.data.views import ViewMaker
from m3i_scale.evaluate.features import architectures, check_filled, loading
from m3i_scale.evaluate.towers import load_objective
from m3i_scale.objective.inputs import normalize
from m3i_scale.tasks.detection.detection_heads import RfDetr
from m3i_scale.tasks.detection.detections import Prediction
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


def is_detector(folder: Path) -> bool:
    """Return whether the folder contains a stock detector that can be evaluated."""
    return not _KINDS.keys().isdisjoint(architectures(folder))


def load_detector(folder: Path, device: torch.device, batch_size: int) -> Detector:
    """Load a Mask R-CNN or RF-DETR in fp32. For Mask R-CNN, run the code of this package, not code in the folder."""
    kind, of_images = next(_KINDS[name] for name in architectures(folder) if name in _KINDS)
    with loading(folder, DETECTOR):
        model, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, dtype=torch.float32)
        processor = of_images.from_pretrained(folder, local_files_only=True)
    check_filled(info, folder, DETECTOR)
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
