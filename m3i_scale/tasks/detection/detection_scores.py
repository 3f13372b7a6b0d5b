"""Average precision of a detector during training, on the preprocessed squares of batches from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_scale.data.batch import Batch
from m3i_scale.data.categories import Categories, Category
from m3i_scale.data.instances import Instances
from m3i_scale.data.order import seed_of
from m3i_scale.engine.agree import from_rank_0, gather_objects
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.targets.base import Scores
from m3i_scale.tasks.detection.average_precision import average_precision
from m3i_scale.tasks.detection.detections import Kind, Prediction
from m3i_scale.tasks.detection.detector import compressed, prediction_of
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections


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
