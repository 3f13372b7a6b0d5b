"""Define the heads that find objects: what a Mask R-CNN is made of, and how its regions are chosen; and RF-DETR.

Every default of a Mask R-CNN is detectron2's for ViTDet (`configs/common/models/mask_rcnn_fpn.py` and
`mask_rcnn_vitdet.py`), and every one of RF-DETR that of the rfdetr package 1.4 (`rfdetr/config.py`, `rfdetr/main.py`),
so a run file states what differs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.kinds import Kind
from m3i_scale.config.limits import MAX_ASPECT, MAX_CANDIDATES, MAX_HEADS, MAX_LAYERS, MAX_SIDE, MAX_WIDTH
from m3i_scale.config.sections import Section
from m3i_scale.config.tasks import Task


class Windows(Section):
    """Has a plain Transformer attend within windows in most layers, as ViTDet does."""

    size: int = Field(default=14, ge=0, le=MAX_SIDE)
    """Side of a window in tokens (ViT(window_size=14)); 0: all layers see the whole image."""
    global_layers: tuple[int, ...] | None = None
    """Layers that see the whole image, from 0. Default: the last of every quarter, 2, 5, 8, 11 of 12 layers."""
    relative_positions: bool = True
    """Attention knows how far apart two tokens are, in rows and columns; from zero (ViT(use_rel_pos=True))."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        layers = self.global_layers
        if layers is not None and not self.size:
            raise ValueError("global_layers has no effect: without windows all layers see the whole image")
        if layers is not None and (list(layers) != sorted(set(layers)) or min(layers, default=0) < 0):
            raise ValueError("global_layers are different layers in ascending order, from 0 on")
        return self


class Regions(Section):
    """Says how anchors propose regions (RPN), and which of them are looked at."""

    sizes: tuple[float, float, float, float, float] | None = None
    """Sides of the anchors in pixels, by level (DefaultAnchorGenerator.sizes). Default: eight times the stride of the
    level, which are ViTDet's 32 to 512 of strides 4 to 64."""
    ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Height over width of the anchors (aspect_ratios)."""
    convs: int = Field(default=2, ge=1, le=MAX_LAYERS)
    """Convolutions of the RPN (StandardRPNHead.conv_dims = [-1, -1]; a plain FPN has 1)."""
    positive_iou: float = Field(default=0.7, gt=0, le=1)
    negative_iou: float = Field(default=0.3, ge=0, lt=1)
    """An anchor is an object or ground by its best overlap; what lies between counts for nothing (anchor_matcher)."""
    anchors_per_image: int = Field(default=256, ge=2, le=MAX_CANDIDATES)
    """So many anchors of an image are trained on (batch_size_per_image of RPN), half of them objects at most."""
    before_nms: tuple[int, int] = (2000, 1000)
    """So many best proposals of every level go into NMS, in training and outside of it (pre_nms_topk)."""
    after_nms: tuple[int, int] = (1000, 1000)
    """So many of an image come out of it (post_nms_topk; torchvision keeps 2,000 in training)."""
    nms_iou: float = Field(default=0.7, gt=0, le=1)
    """Of two proposals that overlap by more, one goes (nms_thresh of RPN)."""
    per_image: int = Field(default=512, ge=2, le=MAX_CANDIDATES)
    """So many regions of an image are trained on (batch_size_per_image of StandardROIHeads)."""
    positive_fraction: float = Field(default=0.25, gt=0, lt=1)
    """So much of them are objects at most (positive_fraction of StandardROIHeads)."""
    object_iou: float = Field(default=0.5, gt=0, le=1)
    """A region that overlaps an object by so much is that object (proposal_matcher)."""

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
    """Finds objects on what the backbone gives."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    masks: bool = True
    """Predict masks too. Without, sets that have boxes alone will do."""


class MaskRcnn(DetectionHead):
    """Finds boxes, classes and masks of objects by Mask R-CNN: of a plain Transformer on the simple pyramid of ViTDet,
    of an InternImage on a feature pyramid network of its four maps."""

    kind: ClassVar[str] = "mask_rcnn"

    windows: Windows | None = None
    """Of a plain Transformer. Default: as ViTDet; where an image is less than two windows wide, neither windows nor
    relative positions. An InternImage has none."""
    channels: int = Field(default=256, ge=4, le=MAX_WIDTH)
    """Of the maps and of the heads' convolutions (out_channels)."""
    norm: Literal["layer", "none"] = "layer"
    """Of the convolutions of pyramid and heads ("LN"; a plain FPN has none)."""
    regions: Regions = Regions()
    box_convs: int = Field(default=4, ge=0, le=MAX_LAYERS)
    """Convolutions of the box head (conv_dims = [256] * 4; a plain FPN has none and two linear layers)."""
    box_linears: int = Field(default=1, ge=1, le=MAX_LAYERS)
    box_width: int = Field(default=1024, ge=1, le=MAX_WIDTH)
    """Linear layers of the box head and their width (fc_dims = [1024])."""
    mask_convs: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Convolutions of the mask head, before it doubles the side."""
    box_side: int = Field(default=7, ge=1, le=MAX_SIDE)
    mask_side: int = Field(default=14, ge=1, le=MAX_SIDE)
    """Sides of what RoIAlign cuts out of the maps (box_pooler, mask_pooler); masks have twice that."""
    sampling_ratio: int = Field(default=0, ge=0, le=MAX_SIDE)
    """Samples by side of a cell of RoIAlign; 0: as many as pixels lie in it (torchvision takes 2)."""
    aligned: bool = True
    """RoIAlign knows that the centre of a pixel is half a pixel from its edge (ROIAlignV2; torchvision: false)."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scales of shifts and log-sizes that the box head predicts (Box2BoxTransform)."""
    smooth_l1_beta: float = Field(default=0.0, ge=0)
    """Where the losses of boxes turn from squares to L1; 0: L1 (smooth_l1_beta; torchvision's RPN has 1/9)."""
    class_agnostic_boxes: bool = False
    """One box for all classes (cls_agnostic_bbox_reg; Cascade's is true)."""
    class_agnostic_masks: bool = False
    """One mask for all classes (cls_agnostic_mask)."""
    classifier: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax over classes and ground, or a sigmoid for every class (use_sigmoid_ce, for LVIS)."""
    federated_classes: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)
    """Of a sigmoid: an image trains so many classes alone, its own and others drawn by how frequent they are
    (use_fed_loss, fed_loss_num_classes = 50). Default: all."""
    federated_power: float = Field(default=0.5, ge=0)
    """Others are drawn by the number of their images to this power (get_fed_loss_cls_weights(…, 0.5))."""
    score_above: float = Field(default=0.05, ge=0, lt=1)
    """Lowest score of a detection (test_score_thresh; LVIS 0.02)."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """Of two detections of a class that overlap by more, one goes (test_nms_thresh)."""
    detections: int = Field(default=100, ge=1, le=MAX_CANDIDATES)
    """Of an image at most (test_topk_per_image; LVIS 300)."""

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
    """Finds boxes, classes and masks of objects by queries that a decoder matches with what the image shows, on a plain
    Transformer, as RF-DETR. It is the stock model of `transformers` round the backbone of the run."""

    kind: ClassVar[str] = "rfdetr"

    windows: int = Field(default=2, ge=1, le=MAX_SIDE)
    """Windows along a side of the image, each with a class token of its own, that all layers attend within but for
    those right behind a layer that is read (num_windows); 1: all layers see the whole image."""
    out_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Layers of the backbone that are read, from 1; the last one is among them (out_feature_indexes). Default: the last
    of every quarter, 3, 6, 9, 12 of 12."""
    channels: int = Field(default=256, ge=4, le=MAX_WIDTH, multiple_of=4)
    """Of map and queries (hidden_dim)."""
    queries: int = Field(default=300, ge=1, le=MAX_CANDIDATES)
    """So many objects of an image are found at most (num_queries)."""
    groups: int = Field(default=13, ge=1, le=MAX_HEADS)
    """In training, queries are there so many times, and each group finds all objects by itself (group_detr)."""
    decoder_layers: int = Field(default=3, ge=1, le=MAX_LAYERS)
    """Of the decoder (dec_layers: 2 of Nano, 3 of Small and Base, 4 of Medium and Large)."""
    self_attention_heads: int = Field(default=8, ge=1, le=MAX_HEADS)
    """Of queries among each other (sa_nheads)."""
    cross_attention_heads: int = Field(default=16, ge=1, le=MAX_HEADS)
    """Of queries in the map (ca_nheads)."""
    points: int = Field(default=2, ge=1, le=MAX_SIDE)
    """Places of the map that a head of a query reads (dec_n_points)."""
    decoder_width: int = Field(default=2048, ge=1, le=MAX_WIDTH)
    """Of the decoder's hidden layers (dim_feedforward)."""
    mask_stride: int = Field(default=4, ge=1, le=MAX_SIDE)
    """Pixels along a side that share a value of a mask (mask_downsample_ratio)."""
    class_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss of classes, which knows how well the box fits (cls_loss_coef; with masks the published one is
    5)."""
    box_weight: float = Field(default=5.0, ge=0)
    """Weight of the L1 loss of boxes (bbox_loss_coef)."""
    giou_weight: float = Field(default=2.0, ge=0)
    """Weight of the loss of their generalised overlap (giou_loss_coef)."""
    mask_weight: float = Field(default=5.0, ge=0)
    """Weight of the cross-entropy of masks, in the loss and in the matching (mask_ce_loss_coef)."""
    dice_weight: float = Field(default=5.0, ge=0)
    """Weight of the Dice loss of masks, in the loss and in the matching (mask_dice_loss_coef)."""
    score_above: float = Field(default=0.0, ge=0, lt=1)
    """Lowest score of a detection. The package has none."""
    detections: int = Field(default=300, ge=1, le=MAX_CANDIDATES)
    """Of an image at most (num_select)."""

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
            # The stock matcher compares masks at queries × groups / 4 points: at none, all costs are NaN.
            raise ValueError(f"queries {self.queries} must be at least 4 with masks")
        for name in () if self.masks else ("mask_stride", "mask_weight", "dice_weight"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without masks")
        return self


class Detection(Task):
    """Finds the objects of an image. Its categories are those of categories.json beside the shards."""

    kind: ClassVar[str] = "detection"
    dense: ClassVar[bool] = True

    head: DetectionHead = MaskRcnn()
    """mask_rcnn | rfdetr, or {kind: mask_rcnn, channels: 128}."""

    def recipe(self) -> dict[str, Any]:
        """Return boxes, classes and masks predicted from the whole image."""
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
