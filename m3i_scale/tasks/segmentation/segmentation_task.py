"""Task `segmentation`: the class of every pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator
from typing_extensions import Self

from m3i_scale.config import RunConfig
from m3i_scale.data.shards import MASK_LABELS
from m3i_scale.shards.annotation_checks import check_mask_classes
from m3i_scale.tasks.backbone_task import BackboneTask, check_last_layer, full_image_recipe
from m3i_scale.tasks.segmentation.segmentation_heads import SegmentationHead, UperNetSegmentation

if TYPE_CHECKING:
    from m3i_scale.backbones.families import VisionConfig


class Segmentation(BackboneTask):
    """Semantic segmentation task. Its classes come from mask_labels.json next to the shards."""

    kind: ClassVar[str] = "segmentation"
    model: ClassVar[str] = "segmenter"
    labels_file: ClassVar[str] = MASK_LABELS
    metrics: ClassVar[dict[str, str]] = {"miou": "mIoU"}
    dense: ClassVar[bool] = True
    reads_masks: ClassVar[bool] = True

    head: SegmentationHead = UperNetSegmentation()
    """Segmentation head: upernet | linear | eomt, or with options, e.g. {kind: upernet, channels: 768}."""

    @model_validator(mode="after")
    def _averages_no_statistics(self) -> Self:
        if self.ema is not None:
            raise ValueError(
                "ema averages weights alone, and a segmentation head may keep more: batch norm has statistics"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """Return a recipe that predicts the class of every pixel from the uncropped image."""
        return full_image_recipe("segmentation", self.head)

    def check(self, run: RunConfig, model: VisionConfig) -> None:
        super().check(run, model)
        if isinstance(self.head, UperNetSegmentation):
            check_last_layer(self.head.out_layers, model)

    def check_classes(self, label_sets: dict[str, list[str]]) -> None:
        """Check the list of classes. Datasets without classes are reported elsewhere."""
        super().check_classes(label_sets)
        for name, names in label_sets.items():
            check_mask_classes(names, f"data.datasets, label set '{name}': {MASK_LABELS}")
