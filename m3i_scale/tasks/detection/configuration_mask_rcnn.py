"""Configuration of a Mask R-CNN on a plain Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


@dataclass(frozen=True)
class RegionFields:
    """Settings of region proposals; pairs of numbers are for training and inference."""

    sizes: Sequence[float] | None
    """Sizes of the anchors in pixels, by level; None: eight times the stride of the level."""
    ratios: Sequence[float]
    """Aspect ratios (height over width) of the anchors."""
    convs: int
    before_nms: tuple[int, int]
    after_nms: tuple[int, int]
    nms_iou: float


@dataclass(frozen=True)
class HeadFields:
    """Settings of the head's modules and of its detections."""

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
    """Resolutions of RoIAlign; masks have twice that."""
    sampling_ratio: int
    aligned: bool
    box_weights: tuple[float, float, float, float]
    class_agnostic_boxes: bool
    class_agnostic_masks: bool
    classifier: str
    """softmax or sigmoid."""
    score_above: float
    """Minimum score of a detection."""
    nms_iou: float
    """IoU threshold of non-maximum suppression within a class."""
    detections: int
    """Maximum number of detections per image."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> HeadFields:
        """Return the settings from a dictionary, which may have other keys too."""
        regions = values["regions"]
        read = {field.name: values[field.name] for field in fields(cls)}
        read["regions"] = RegionFields(**{field.name: regions[field.name] for field in fields(RegionFields)})
        return cls(**read)


class MaskRcnnConfig(PretrainedConfig):
    """Configuration of a Mask R-CNN model.

    Args:
        backbone_config: configuration (or its values) of a ViT, DINOv2 or CLIP vision model.
        head: values of `HeadFields`.
        windows: attention window size of every layer in tokens; the grid size means global attention.
        relative_positions: whether attention uses relative position embeddings.
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
