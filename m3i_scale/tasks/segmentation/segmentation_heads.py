"""Config of the segmentation heads: a linear one, UPerNet and EoMT."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import MAX_CANDIDATES, MAX_LAYERS, MAX_WIDTH, Kind


class SegmentationHead(Kind):
    """Head that predicts the class of every pixel from the features of the backbone."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    module: ClassVar[str]
    """Import path of the `PixelHead` to build; user-defined kinds set it to their class."""


class LinearSegmentation(SegmentationHead):
    """Linear classifier on the batch-normalized patch tokens of the last layer."""

    kind: ClassVar[str] = "linear"
    module: ClassVar[str] = "m3i_scale.tasks.segmentation.pixel_heads.LinearPixelHead"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Channel dropout probability before the classifier, in training."""


class UperNetSegmentation(SegmentationHead):
    """UPerNet on four feature maps. For a plain Transformer they are four of its layers, scaled ×4, ×2, ×1, ×½ by
    transposed convolutions and pooling as in BEiT and MAE. For InternImage they are its stages."""

    kind: ClassVar[str] = "upernet"
    module: ClassVar[str] = "m3i_scale.tasks.segmentation.pixel_heads.UperNet"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Channel dropout probability before the classifiers, in training."""
    channels: int = Field(default=512, ge=1, le=MAX_WIDTH)
    """Width of the head in channels."""
    out_layers: tuple[int, int, int, int] | None = None
    """Output layers of the backbone, from 1. Default: the layers at a third, a half and two thirds of the depth, and
    the last: 4, 6, 8, 12 of 12."""
    auxiliary_weight: float = Field(default=0.4, ge=0)
    """Loss weight of an auxiliary convolutional head on the third feature map. 0 disables it."""

    @field_validator("out_layers")
    @classmethod
    def _ascend(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (list(layers) != sorted(set(layers)) or layers[0] < 1):
            raise ValueError("out_layers are four different layers in ascending order, from 1 on")
        return layers


class EomtSegmentation(SegmentationHead):
    """EoMT mask classification: queries pass through the last blocks of a plain Transformer."""

    kind: ClassVar[str] = "eomt"
    module: ClassVar[str] = "m3i_scale.tasks.segmentation.mask_queries.MaskQueries"

    queries: int = Field(default=100, ge=1, le=MAX_CANDIDATES)
    """Number of queries."""
    blocks: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Number of last backbone blocks that process the queries."""
    class_weight: float = Field(default=2.0, ge=0)
    """Weight of the cross-entropy of query classes, in the loss and in the matching."""
    mask_weight: float = Field(default=5.0, ge=0)
    """Weight of the pixel-wise cross-entropy of matched masks."""
    dice_weight: float = Field(default=5.0, ge=0)
    """Weight of the Dice loss of matched masks."""
    no_object_weight: float = Field(default=0.1, gt=0, le=1)
    """Weight of unmatched queries (class "no object") in the cross-entropy of query classes."""
    points: int = Field(default=12544, ge=1, le=MAX_CANDIDATES)
    """Sampled pixels per mask for its losses, mostly where the prediction is uncertain."""

    @model_validator(mode="after")
    def _matches(self) -> Self:
        if not (self.class_weight or self.mask_weight or self.dice_weight):
            raise ValueError("class_weight, mask_weight and dice_weight are all 0: nothing would be learnt")
        return self
