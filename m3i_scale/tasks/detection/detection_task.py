"""Task `detection`: boxes, classes and masks of objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from m3i_scale.config import RunConfig
from m3i_scale.data.shards import CATEGORIES
from m3i_scale.errors import ConfigError
from m3i_scale.tasks.backbone_task import BackboneTask, check_last_layer, full_image_recipe
from m3i_scale.tasks.detection.detection_heads import DetectionHead, MaskRcnn, RfDetr

if TYPE_CHECKING:
    from m3i_scale.backbones.families import VisionConfig
    from m3i_scale.objective.information import Objective


class Detection(BackboneTask):
    """Object detection task. Its categories come from categories.json next to the shards."""

    kind: ClassVar[str] = "detection"
    model: ClassVar[str] = "detector"
    labels_file: ClassVar[str] = CATEGORIES
    metrics: ClassVar[dict[str, str]] = {"box_ap": "box_AP", "mask_ap": "mask_AP"}
    dense: ClassVar[bool] = True

    head: DetectionHead = MaskRcnn()
    """Detection head: mask_rcnn | rfdetr, or with options, e.g. {kind: mask_rcnn, channels: 128}."""

    def recipe(self) -> dict[str, Any]:
        """Return a recipe that predicts boxes, classes and masks from the uncropped image."""
        return full_image_recipe("detection", self.head)

    @property
    def stretches(self) -> bool:
        return isinstance(self.head, RfDetr)

    def check(self, run: RunConfig, model: VisionConfig) -> None:
        super().check(run, model)
        if self.head.masks:
            from m3i_scale.tasks.detection.detections import check_library

            check_library("task.head.masks")
        if isinstance(self.head, RfDetr):
            check_last_layer(self.head.out_layers, model)

    def check_engine(self, run: RunConfig, engine: dict[str, Any]) -> None:
        """Reject partitioned parameters: ranks may run different modules."""
        if engine.get("zero_optimization", {}).get("stage") == 3:
            raise ConfigError(
                "a detector cannot be trained with ZeRO stage 3",
                where=f"deepspeed: {run.deepspeed}",
                why="images decide which modules compute, but stage 3 gathers a module on all ranks together, so that "
                "ranks would wait for each other forever",
                fix="set deepspeed=zero1_bf16 or zero2_bf16; on CPUs zero1_cpu_fp32",
            )

    def check_image_counts(self, counts: list[int] | None) -> None:
        """Check that the number of images per category, which a federated loss needs, is known."""
        if isinstance(self.head, MaskRcnn) and self.head.federated_classes is not None and counts is None:
            raise ConfigError(
                "task.head.federated_classes needs the number of images per category, but no dataset has it",
                where="task.head.federated_classes",
                why=f"{CATEGORIES} next to the shards has no image_count, because it is not from LVIS",
                fix="set task.head.federated_classes=null, or use shards of LVIS",
            )

    def lr_scales(self, objective: Objective) -> dict[str, float]:
        """Return the multipliers of the layers; windowed layers have parameters of the backbone's layers."""
        from m3i_scale.tasks.detection.object_detector import detector_of

        scales = super().lr_scales(objective)
        if scales:
            depth = len(objective.student.layers)
            for name, layer in detector_of(objective).backbone_layers().items():
                scales[f"heads.detection.{name}"] = self.layer_decay ** (depth - layer)
        return scales
