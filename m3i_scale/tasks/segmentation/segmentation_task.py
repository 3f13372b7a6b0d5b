"""Task `segmentation`: the class of every pixel."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator
from typing_extensions import Self

from m3i_scale.tasks.base import Task
from m3i_scale.tasks.segmentation.segmentation_heads import SegmentationHead, UperNetSegmentation


class Segmentation(Task):
    """Semantic segmentation task. Its classes come from mask_labels.json next to the shards."""

    kind: ClassVar[str] = "segmentation"
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
        target = {
            "name": "segmentation",
            "kind": "segmentation",
            "inputs": ["image"],
            "decoder": "patches",
            "head": self.head.model_dump(mode="json"),
        }
        return {
            "name": "segmentation",
            "family": "supervised",
            "inputs": [{"name": "image", "view": 1}],
            "decoders": {"patches": {"kind": "pointwise"}},
            "targets": [target],
        }
