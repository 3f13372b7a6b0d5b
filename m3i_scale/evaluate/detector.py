"""Load a trained detector, and run it on images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from m3i_scale.data.batch import Collator
from m3i_scale.data.batch import Sample as Shown
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.detections import Prediction, Rle, check_library
from m3i_scale.evaluate.towers import has_head, load_objective
from m3i_scale.objective.detection.boxes import paste_masks
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import normalize
from m3i_scale.objective.targets.detection import shown_sizes

DETECTOR = "detector"
"""The measure of a detector, asked for alone: of features with one in `heads/`."""
DETECTED = 4
"""Images in one forward pass, unless another number is asked for: layers that see whole images of 1,024 pixels take
some 800 MB each."""


@dataclass
class Detector:
    """Runs a model on images."""

    objective: Objective
    size: int
    """Side of the square that an image is shown in, in pixels."""
    view: ViewMaker
    classes: list[str]
    model_type: str
    device: torch.device
    batch_size: int = DETECTED
    """Images in one forward pass."""

    def __call__(self, images: Sequence[NDArray[np.uint8]], numbers: Sequence[int]) -> list[Prediction]:
        """Return what is found on images (3, H, W) of any sizes, at their own; the order is kept.

        Args:
            images: as many as fit into one forward pass.
            numbers: of the images, for the record.
        """
        shown = []
        for pixels_CHW, number in zip(images, numbers, strict=True):
            views = self.view(Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))), 0)
            shown.append(Shown(views, None, -1, None, 0, str(number)))
        batch = Collator(None, 0)(shown).to(self.device)
        pixels_BCHW = normalize(batch.images_VBCHW[0], self.objective.mean, self.objective.std)
        found = self.objective.detect(pixels_BCHW, shown_sizes(batch), batch.sizes_B2)
        return [
            {
                "image_id": number,
                "boxes": one.boxes_N4.cpu().numpy(),
                "scores": one.scores_N.cpu().numpy(),
                "labels": one.labels_N.cpu().numpy(),
                "masks": None
                if one.masks_NMM is None
                else compressed(one.masks_NMM.cpu(), one.boxes_N4.cpu(), (pixels_CHW.shape[1], pixels_CHW.shape[2])),
            }
            for one, pixels_CHW, number in zip(found, images, numbers, strict=True)
        ]


def compressed(masks_NMM: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Return soft masks in their boxes as compressed masks of the whole image.

    Each is pasted within its box alone, and a pixel round it: beyond that it is never one half.

    Args:
        masks_NMM: of `Objective.detect`.
        boxes_N4: x1, y1, x2, y2 in the image.
        size: of the image: H and W.
    """
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
        found.append(library.encode(whole_HW))
    return found


def check_detector(folder: Path, measures: tuple[str, ...]) -> None:
    """Check that a detector is asked for alone, of a folder that has one.

    Raises:
        ConfigError: not so; or what measures it is not installed.
    """
    if len(measures) > 1:
        raise ConfigError("a detector is measured alone", where="--measure", fix=f"--measure {DETECTOR}")
    if not has_head(folder, "detection"):
        raise ConfigError(
            "the folder holds no detector",
            where=str(folder),
            fix="m3i-scale export of a run with `task: detection`, as features",
        )
    check_library()


def load_detector(folder: Path, device: torch.device, batch_size: int) -> Detector:
    """Return the detector that an export of features has in `heads/`, in fp32.

    Raises:
        ExportError: see `load_objective`.
    """
    objective, run, label_sets = load_objective(folder, device)
    (classes,) = label_sets.values()
    size, augment = objective.student.image_size, run.data.augment
    view = ViewMaker(augment, views=1, image_size=size, augment=False, reads="boxes", mean=augment.mean)
    return Detector(objective, size, view, classes, objective.student.model.config.model_type, device, batch_size)
