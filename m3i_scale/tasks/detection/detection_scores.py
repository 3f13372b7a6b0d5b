"""Average precision of a detector during training, on the preprocessed squares of batches from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3i_scale.data.batch import Batch
from m3i_scale.data.order import seed_of
from m3i_scale.engine.agree import gather_objects
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.targets.base import Scores
from m3i_scale.tasks.detection.average_precision import average_precision_of_ranks
from m3i_scale.tasks.detection.detections import Categories, GroundTruth, Instance, Kind, Prediction
from m3i_scale.tasks.detection.detector import compressed, prediction_of
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections


class DetectionScores(Scores):
    """Average precision over the unique images from the batches of all ranks, for exhaustively annotated classes
    (COCO).

    Batches may repeat an image, and ranks may share images, so images are identified by key. Without augmentation each
    repetition is identical.
    """

    def __init__(self, classes: Sequence[str], *, masks: bool) -> None:
        self._categories: Categories = {
            "format": "coco",
            "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
        }
        self._kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
        self._images: dict[int, tuple[GroundTruth, Prediction]] = {}

    def add(self, batch: Batch, outputs: dict[str, Any]) -> None:
        """Add the new images of a batch, with their `detections` in pixels of the square."""
        found: list[Detections] = outputs["detections"]
        side = batch.images_VBCHW.shape[-1]
        for row, (key, detections) in enumerate(zip(batch.keys, found, strict=True)):
            image = seed_of(key)
            if image not in self._images:
                self._images[image] = self._truth(batch, row, image), prediction_of(detections, image, (side, side))

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Return `box_ap`, and `mask_ap` if there are masks, from 0 to 1; 0 without objects."""
        by_rank = gather_objects((set(self._images), any(truth["annotations"] for truth, _ in self._images.values())))
        if not any(has_objects for _, has_objects in by_rank):
            return {f"{kind}_ap": 0.0 for kind in self._kinds}
        counted: set[int] = set().union(*(images for images, _ in by_rank[: ranks.rank]))
        mine = [pair for image, pair in self._images.items() if image not in counted]
        truths, predictions = [truth for truth, _ in mine], [prediction for _, prediction in mine]
        figures = average_precision_of_ranks(truths, predictions, self._categories)
        return {f"{kind}_ap": figures[kind]["AP"] for kind in self._kinds}

    def _truth(self, batch: Batch, row: int, image: int) -> GroundTruth:
        side, labels_N = batch.images_VBCHW.shape[-1], batch.box_labels_BN[row]
        there_N = labels_N >= 0
        boxes_N4 = batch.boxes_BN4[row][there_N]
        objects: list[Instance] = [
            {
                "id": number,
                "category": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for number, (label, (x1, y1, x2, y2)) in enumerate(
                zip(labels_N[there_N].tolist(), boxes_N4.tolist(), strict=True)
            )
        ]
        if "mask" in self._kinds:
            masks = compressed(batch.box_masks_BNMM[row][there_N], boxes_N4, (side, side))
            for one, mask in zip(objects, masks, strict=True):
                one["segmentation"] = mask
        return {"image_id": image, "width": side, "height": side, "annotations": objects}
