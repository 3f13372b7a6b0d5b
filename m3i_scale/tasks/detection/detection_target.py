"""Object detection: boxes, classes and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from m3i_scale.config import RunConfig
from m3i_scale.config.data import Reads
from m3i_scale.data.batch import Batch
from m3i_scale.data.categories import shard_categories
from m3i_scale.data.remote.access import Access
from m3i_scale.data.shards import CATEGORIES, shard_folder
from m3i_scale.errors import ConfigError
from m3i_scale.objective.distributions import Loss
from m3i_scale.objective.targets.base import Context, Encoded, Scores, Sizes, TargetModules
from m3i_scale.tasks.detection.detection_heads import DetectionHead, MaskRcnn, RfDetr
from m3i_scale.tasks.detection.detection_losses import Objects
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector
from m3i_scale.tasks.detection.object_detector import image_sizes
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector
from m3i_scale.tasks.full_image_target import FullImageTarget

if TYPE_CHECKING:
    from m3i_scale.exports.source import Source
    from m3i_scale.exports.tensors import ExportedModule


class Detection(FullImageTarget):
    """Object detection."""

    kind: ClassVar[str] = "detection"
    modality: ClassVar[str] = "boxes"
    representation: ClassVar[str] = "boxes, classes and masks of objects"
    labels_file: ClassVar[str | None] = CATEGORIES

    head: DetectionHead
    """Detection head."""

    @property
    def reads(self) -> Reads:
        return "boxes_and_masks" if self.head.masks else "boxes"

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("box_ap", "mask_ap") if self.reads == "boxes_and_masks" else ("box_ap",)

    def check_scores(self, run: RunConfig, access: Access | None) -> bool:
        """Return whether the validation images have complete annotations.

        LVIS images are only annotated for some categories, and batches do not record which. With COCO's rules, a
        correct prediction of another category would count as false.
        """
        from m3i_scale.tasks.detection.detections import check_library

        for name, source in run.data.validation.items():
            where, best = f"data.validation.{name}", run.checkpoint.keep_best
            categories = shard_categories(shard_folder(source.path), f"{where}: ", access)
            if categories is None or categories.format == "coco":
                continue
            if best is not None and best.metric in [f"evaluation/{self.name}/{figure}" for figure in self.evaluated]:
                raise ConfigError(
                    f"no evaluation of this run writes '{best.metric}': {where} is from LVIS",
                    where="checkpoint.keep_best.metric",
                    why="not all objects of its images are annotated; only `m3i-scale evaluate` computes average "
                    "precision",
                    fix="set checkpoint.keep_best={metric: evaluation/loss, mode: min}",
                )
            return False
        if self.reads == "boxes":  # for masks this has been checked already
            check_library("evaluation.every_steps")
        return True

    def scores(self, label_sets: dict[str, list[str]]) -> Scores:
        from m3i_scale.tasks.detection.detector import DetectionScores

        (classes,) = label_sets.values()
        return DetectionScores(classes, masks=self.reads == "boxes_and_masks")

    def export(self, source: Source) -> ExportedModule:
        from m3i_scale.tasks.detection.export_detector import mask_rcnn_part, rfdetr_part

        if isinstance(self.head, RfDetr):
            return rfdetr_part(source, self.head, self.name)
        return mask_rcnn_part(source, self.head, self.name)

    def build_head(self, sizes: Sizes) -> nn.Module:
        if len(sizes.classes) != 1:
            raise ConfigError(
                f"a detector has one list of categories, but the datasets have {len(sizes.classes)}",
                where="data.datasets",
                fix="use datasets with the same categories.json, under one label_set",
            )
        if isinstance(self.head, RfDetr):
            return RfDetrDetector(self.head, sizes.backbone, sizes.classes[0], sizes.ranks)
        if not isinstance(self.head, MaskRcnn):
            raise ConfigError(
                f"no module implements the head '{self.head.kind}'",
                where="task.head",
                fix="set `module` in the class of the head, or use another task.head",
            )
        return MaskRcnnDetector(self.head, sizes.backbone, sizes.classes[0], sizes.ranks, sizes.image_counts)

    def present(self, batch: Batch) -> Tensor:
        """Return which samples have an object: bool (B)."""
        return (batch.box_labels_BN >= 0).any(dim=1)

    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return the sum of the head's losses; images without objects count as background. In evaluation mode also
        return the detections, in pixels of the view."""
        batch, head = context.batch, given.head
        masks_BNMM = batch.box_masks_BNMM if self.reads == "boxes_and_masks" else None
        sizes_B2 = image_sizes(batch)
        objects = Objects(batch.boxes_BN4, batch.box_labels_BN, masks_BNMM, sizes_B2, batch.seeds_B)
        terms = head.losses(encoded.maps, objects)
        outputs = {} if head.training else {"detections": head.detect(encoded.maps, sizes_B2, sizes_B2)}
        return Loss(torch.stack(list(terms.values())).sum(), terms=terms, outputs=outputs)
