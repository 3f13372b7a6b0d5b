"""Task `detection`: boxes, classes and masks of objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from m3i_scale.tasks.base import Task
from m3i_scale.tasks.detection.detection_heads import DetectionHead, MaskRcnn, Regions, RfDetr


class Detection(Task):
    """Object detection task. Its categories come from categories.json next to the shards."""

    kind: ClassVar[str] = "detection"
    dense: ClassVar[bool] = True

    head: DetectionHead = MaskRcnn()
    """Detection head: mask_rcnn | rfdetr, or with options, e.g. {kind: mask_rcnn, channels: 128}."""

    def recipe(self) -> dict[str, Any]:
        """Return a recipe that predicts boxes, classes and masks from the uncropped image."""
        target = {
            "name": "detection",
            "kind": "detection",
            "inputs": ["image"],
            "decoder": "patches",
            "head": self.head.model_dump(mode="json"),
        }
        return {
            "name": "detection",
            "family": "supervised",
            "inputs": [{"name": "image", "view": 1}],
            "decoders": {"patches": {"kind": "pointwise"}},
            "targets": [target],
        }

    @property
    def stretches(self) -> bool:
        """Return whether the head is RF-DETR's, which is trained on stretched images."""
        return isinstance(self.head, RfDetr)

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Yield a warning if NMS of Mask R-CNN's proposals removes none."""
        regions = self.head.regions if isinstance(self.head, MaskRcnn) else Regions()
        if any(before < after for before, after in zip(regions.before_nms, regions.after_nms, strict=True)):
            yield (
                "task.head.regions",
                f"task.head.regions.before_nms is {[*regions.before_nms]}, below after_nms {[*regions.after_nms]}: "
                "fewer proposals of a level go into NMS than may come out of it. Fix: exchange them",
            )
