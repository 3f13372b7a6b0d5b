"""Config of the detection heads: Mask R-CNN with its region proposals, and RF-DETR.

Mask R-CNN defaults are detectron2's for ViTDet (`configs/common/models/mask_rcnn_fpn.py` and `mask_rcnn_vitdet.py`).
RF-DETR defaults are from the rfdetr package 1.4 (`rfdetr/config.py`, `rfdetr/main.py`). A config file only states
differences.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import (
    MAX_ASPECT,
    MAX_CANDIDATES,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_WIDTH,
    Kind,
    Section,
)


class Windows(Section):
    """Windowed attention in most layers of a plain Transformer, as in ViTDet."""

    size: int = Field(default=14, ge=0, le=MAX_SIDE)
    """Window size in tokens (ViT(window_size=14)). 0: global attention in all layers."""
    global_layers: tuple[int, ...] | None = None
    """Layers with global attention, from 0. Default: the last layer of each quarter, 2, 5, 8, 11 of 12 layers."""
    relative_positions: bool = True
    """Decomposed relative position embeddings for rows and columns, initialized to zero (ViT(use_rel_pos=True))."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        layers = self.global_layers
        if layers is not None and not self.size:
            raise ValueError("global_layers has no effect: without windows all layers see the whole image")
        if layers is not None and (list(layers) != sorted(set(layers)) or min(layers, default=0) < 0):
            raise ValueError("global_layers are different layers in ascending order, from 0 on")
        return self


class Regions(Section):
    """Settings of anchors, region proposals (RPN) and region sampling."""

    sizes: tuple[float, float, float, float, float] | None = None
    """Anchor sizes in pixels, by level (DefaultAnchorGenerator.sizes). Default: eight times the stride of the level,
    i.e. ViTDet's 32 to 512 for strides 4 to 64."""
    ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Aspect ratios (height / width) of the anchors (aspect_ratios)."""
    convs: int = Field(default=2, ge=1, le=MAX_LAYERS)
    """Convolutions of the RPN (StandardRPNHead.conv_dims = [-1, -1]; a plain FPN has 1)."""
    positive_iou: float = Field(default=0.7, gt=0, le=1)
    """IoU above which an anchor is positive."""
    negative_iou: float = Field(default=0.3, ge=0, lt=1)
    """IoU below which an anchor is negative. Anchors in between are ignored (anchor_matcher)."""
    anchors_per_image: int = Field(default=256, ge=2, le=MAX_CANDIDATES)
    """Anchors per image in the RPN loss, at most half of them positive (batch_size_per_image of RPN)."""
    before_nms: tuple[int, int] = (2000, 1000)
    """Top-scoring proposals per level before NMS, in training and in evaluation (pre_nms_topk)."""
    after_nms: tuple[int, int] = (1000, 1000)
    """Proposals per image after NMS, in training and in evaluation (post_nms_topk; torchvision keeps 2,000 in
    training)."""
    nms_iou: float = Field(default=0.7, gt=0, le=1)
    """IoU threshold of NMS for proposals (nms_thresh of RPN)."""
    per_image: int = Field(default=512, ge=2, le=MAX_CANDIDATES)
    """Regions per image in the losses of the heads (batch_size_per_image of StandardROIHeads)."""
    positive_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Maximum fraction of positive regions (positive_fraction of StandardROIHeads)."""
    object_iou: float = Field(default=0.5, gt=0, le=1)
    """Minimum IoU of a region with an object to be assigned to it (proposal_matcher)."""

    @model_validator(mode="after")
    def _orders(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError("negative_iou is not above positive_iou: an anchor would be object and ground")
        if int(self.per_image * self.positive_fraction) < 1:
            raise ValueError("per_image times positive_fraction is below 1: no region would be an object")
        if not all(1 <= count <= MAX_CANDIDATES for count in (*self.before_nms, *self.after_nms)):
            raise ValueError(f"before_nms and after_nms must be from 1 to {MAX_CANDIDATES:,}")
        if not all(0 < size <= MAX_SIDE for size in self.sizes or ()):
            raise ValueError(f"sizes must be above 0 and at most {MAX_SIDE:,} pixels: {[*(self.sizes or ())]}")
        if not all(1 / MAX_ASPECT <= ratio <= MAX_ASPECT for ratio in self.ratios):
            raise ValueError(
                f"ratios must be height over width, from {1 / MAX_ASPECT:g} to {MAX_ASPECT:g}: {[*self.ratios]}"
            )
        return self


class DetectionHead(Kind):
    """Head that detects objects on the features of the backbone."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    masks: bool = True
    """Predict masks too. false: datasets with boxes but without masks can be used."""


class MaskRcnn(DetectionHead):
    """Mask R-CNN for boxes, classes and masks. A plain Transformer gets ViTDet's simple feature pyramid, InternImage a
    feature pyramid network on its four feature maps."""

    kind: ClassVar[str] = "mask_rcnn"

    windows: Windows | None = None
    """Windowed attention of a plain Transformer. Default: as ViTDet; neither windows nor relative positions if the
    image is less than two windows wide. Not available for InternImage."""
    channels: int = Field(default=256, ge=4, le=MAX_WIDTH)
    """Channels of the feature maps and of the heads' convolutions (out_channels)."""
    norm: Literal["layer", "none"] = "layer"
    """Normalization of the convolutions in pyramid and heads ("LN"; a plain FPN does not normalize)."""
    regions: Regions = Regions()
    """Anchors, region proposals and region sampling."""
    box_convs: int = Field(default=4, ge=0, le=MAX_LAYERS)
    """Convolutions of the box head (conv_dims = [256] * 4; a plain FPN uses two linear layers instead)."""
    box_linears: int = Field(default=1, ge=1, le=MAX_LAYERS)
    """Number of linear layers of the box head."""
    box_width: int = Field(default=1024, ge=1, le=MAX_WIDTH)
    """Width of the linear layers of the box head (fc_dims = [1024])."""
    mask_convs: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Convolutions of the mask head, before it doubles the resolution."""
    box_side: int = Field(default=7, ge=1, le=MAX_SIDE)
    """RoIAlign output size for boxes (box_pooler)."""
    mask_side: int = Field(default=14, ge=1, le=MAX_SIDE)
    """RoIAlign output size for masks (mask_pooler). Predicted masks are twice as large."""
    sampling_ratio: int = Field(default=0, ge=0, le=MAX_SIDE)
    """RoIAlign sampling points per side of a cell. 0: one per pixel of the cell (torchvision uses 2)."""
    aligned: bool = True
    """Half-pixel alignment of RoIAlign (ROIAlignV2; torchvision: false)."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scales of the predicted box shifts and log-sizes (Box2BoxTransform)."""
    smooth_l1_beta: float = Field(default=0.0, ge=0)
    """Transition point of the smooth L1 box losses; 0: L1 (smooth_l1_beta; torchvision's RPN uses 1/9)."""
    class_agnostic_boxes: bool = False
    """Predict one box for all classes (cls_agnostic_bbox_reg; true for Cascade)."""
    class_agnostic_masks: bool = False
    """Predict one mask for all classes (cls_agnostic_mask)."""
    classifier: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax over classes and background, or a sigmoid per class (use_sigmoid_ce, for LVIS)."""
    federated_classes: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)
    """Federated loss of a sigmoid classifier: classes trained per image, namely its classes and others sampled by
    frequency (use_fed_loss, fed_loss_num_classes = 50). Default: all classes."""
    federated_power: float = Field(default=0.5, ge=0)
    """Exponent of the image count in the sampling probability of other classes (get_fed_loss_cls_weights(…, 0.5))."""
    score_above: float = Field(default=0.05, ge=0, lt=1)
    """Minimum score of a detection (test_score_thresh; LVIS 0.02)."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """IoU threshold of NMS for detections of a class (test_nms_thresh)."""
    detections: int = Field(default=100, ge=1, le=MAX_CANDIDATES)
    """Maximum detections per image (test_topk_per_image; LVIS 300)."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.federated_classes is not None and self.classifier != "sigmoid":
            raise ValueError("federated_classes has no effect on a softmax, which compares all classes")
        if min(self.box_weights) <= 0:
            raise ValueError("box_weights are above 0")
        without = [] if self.masks else ["mask_convs", "mask_side", "class_agnostic_masks"]
        federated = [] if self.federated_classes is not None else ["federated_power"]
        for name in (*without, *federated):
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect {'without masks' if name in without else 'on all classes'}")
        return self


class RfDetr(DetectionHead):
    """RF-DETR for boxes, classes and masks: a query decoder on a plain Transformer. It is the standard model of
    `transformers` around the backbone of the run."""

    kind: ClassVar[str] = "rfdetr"

    windows: int = Field(default=2, ge=1, le=MAX_SIDE)
    """Windows per side of the image, each with its class token. All layers attend within windows, except the layers
    directly after an output layer (num_windows). 1: global attention in all layers."""
    out_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Output layers of the backbone, from 1, including the last one (out_feature_indexes). Default: the last layer of
    each quarter, 3, 6, 9, 12 of 12."""
    channels: int = Field(default=256, ge=4, le=MAX_WIDTH, multiple_of=4)
    """Channels of feature map and queries (hidden_dim)."""
    queries: int = Field(default=300, ge=1, le=MAX_CANDIDATES)
    """Number of queries, i.e. the maximum number of objects per image (num_queries)."""
    groups: int = Field(default=13, ge=1, le=MAX_HEADS)
    """Query groups in training. Each group is matched with all objects independently (group_detr)."""
    decoder_layers: int = Field(default=3, ge=1, le=MAX_LAYERS)
    """Decoder layers (dec_layers: 2 for Nano, 3 for Small and Base, 4 for Medium and Large)."""
    self_attention_heads: int = Field(default=8, ge=1, le=MAX_HEADS)
    """Self-attention heads of the decoder (sa_nheads)."""
    cross_attention_heads: int = Field(default=16, ge=1, le=MAX_HEADS)
    """Cross-attention heads of the decoder (ca_nheads)."""
    points: int = Field(default=2, ge=1, le=MAX_SIDE)
    """Sampling points in the feature map per query and head (dec_n_points)."""
    decoder_width: int = Field(default=2048, ge=1, le=MAX_WIDTH)
    """Width of the decoder's feed-forward layers (dim_feedforward)."""
    mask_stride: int = Field(default=4, ge=1, le=MAX_SIDE)
    """Stride of predicted masks in pixels (mask_downsample_ratio)."""
    class_weight: float = Field(default=1.0, ge=0)
    """Weight of the IoU-aware classification loss (cls_loss_coef; published as 5 with masks)."""
    box_weight: float = Field(default=5.0, ge=0)
    """Weight of the L1 loss of boxes (bbox_loss_coef)."""
    giou_weight: float = Field(default=2.0, ge=0)
    """Weight of the generalized IoU loss of boxes (giou_loss_coef)."""
    mask_weight: float = Field(default=5.0, ge=0)
    """Weight of the cross-entropy of masks, in the loss and in the matching (mask_ce_loss_coef)."""
    dice_weight: float = Field(default=5.0, ge=0)
    """Weight of the Dice loss of masks, in the loss and in the matching (mask_dice_loss_coef)."""
    score_above: float = Field(default=0.0, ge=0, lt=1)
    """Minimum score of a detection. The rfdetr package has no such limit."""
    detections: int = Field(default=300, ge=1, le=MAX_CANDIDATES)
    """Maximum detections per image (num_select)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers = self.out_layers
        if layers is not None and (list(layers) != sorted(set(layers)) or layers[0] < 1):
            raise ValueError("out_layers are different layers in ascending order, from 1 on")
        for name in ("self_attention_heads", "cross_attention_heads"):
            if self.channels % getattr(self, name):
                raise ValueError(f"channels {self.channels} is no multiple of {name} {getattr(self, name)}")
        if not (self.class_weight or self.box_weight or self.giou_weight):
            raise ValueError("class_weight, box_weight and giou_weight are all 0: nothing would be learnt of boxes")
        if self.masks and self.queries < 4:
            # The standard matcher compares masks at queries × groups / 4 points: with no points, all costs are NaN.
            raise ValueError(f"queries {self.queries} must be at least 4 with masks")
        for name in () if self.masks else ("mask_stride", "mask_weight", "dice_weight"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without masks")
        return self


def default_global_layers(depth: int) -> tuple[int, ...]:
    """Return the last layer of every quarter."""
    return tuple(sorted({max(round(depth * quarter / 4), 1) - 1 for quarter in (1, 2, 3, 4)}))
