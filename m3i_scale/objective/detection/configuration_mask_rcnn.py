"""Configuration of a Mask R-CNN on a plain Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


@dataclass(frozen=True)
class RegionFields:
    """Says how anchors propose regions; pairs of numbers hold in training and outside of it."""

    sizes: Sequence[float] | None
    """Sides of the anchors in pixels, by level; None: eight times the stride of the level."""
    ratios: Sequence[float]
    """Height over width of the anchors."""
    convs: int
    before_nms: tuple[int, int]
    after_nms: tuple[int, int]
    nms_iou: float


@dataclass(frozen=True)
class HeadFields:
    """Says what the modules of the head are made of, and what counts as found."""

    regions: RegionFields
    masks: bool
    channels: int
    norm: str
    """layer or none."""
    box_convs: int
    box_linears: int
    box_width: int
    mask_convs: int
    box_side: int
    mask_side: int
    """Sides of what RoIAlign cuts out; masks have twice that."""
    sampling_ratio: int
    aligned: bool
    box_weights: tuple[float, float, float, float]
    class_agnostic_boxes: bool
    class_agnostic_masks: bool
    classifier: str
    """softmax or sigmoid."""
    score_above: float
    """Lowest score of a detection."""
    nms_iou: float
    """Of two detections of a class that overlap by more, one goes."""
    detections: int
    """Of an image at most."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> HeadFields:
        """Return those of values by name, which may have others, too."""
        regions = values["regions"]
        read = {field.name: values[field.name] for field in fields(cls)}
        read["regions"] = RegionFields(**{field.name: regions[field.name] for field in fields(RegionFields)})
        return cls(**read)


class MaskRcnnConfig(PretrainedConfig):
    """Holds the shape of a Mask R-CNN, and what it counts as found.

    Args:
        backbone_config: of a ViT, DINOv2 or vision model of CLIP, or its values.
        head: values of `HeadFields`.
        windows: side in tokens of the windows of every layer; that of the image where it sees all of it.
        relative_positions: attention knows how far apart two tokens are.
    """

    model_type = "vitdet_mask_rcnn"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        windows: Sequence[int] = (),
        relative_positions: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = CONFIG_MAPPING[backbone_config["model_type"]](**backbone_config)
        self.backbone_config: Any = backbone_config
        self.head = head
        self.windows, self.relative_positions = list(windows), relative_positions
        super().__init__(**kwargs)
