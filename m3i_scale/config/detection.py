"""Define the heads that find objects: what a Mask R-CNN is made of, and how its regions are chosen.

Every default is detectron2's for ViTDet (`configs/common/models/mask_rcnn_fpn.py` and `mask_rcnn_vitdet.py`), so a run
file states what differs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config.kinds import Kind
from m3i_scale.config.sections import Section
from m3i_scale.config.tasks import Task


class Windows(Section):
    """Has a plain Transformer attend within windows in most layers, as ViTDet does."""

    size: int = Field(default=14, ge=0)
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
    """Sides of the anchors in pixels, by level (DefaultAnchorGenerator.sizes). Default: from a thirty-second of the
    image's side to half of it, which are ViTDet's 32 to 512 of 1,024."""
    ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Height over width of the anchors (aspect_ratios)."""
    convs: int = Field(default=2, ge=1)
    """Convolutions of the RPN (StandardRPNHead.conv_dims = [-1, -1]; a plain FPN has 1)."""
    positive_iou: float = Field(default=0.7, gt=0, le=1)
    negative_iou: float = Field(default=0.3, ge=0, lt=1)
    """An anchor is an object or ground by its best overlap; what lies between counts for nothing (anchor_matcher)."""
    anchors_per_image: int = Field(default=256, ge=2)
    """So many anchors of an image are trained on (batch_size_per_image of RPN), half of them objects at most."""
    before_nms: tuple[int, int] = (2000, 1000)
    """So many best proposals of every level go into NMS, in training and outside of it (pre_nms_topk)."""
    after_nms: tuple[int, int] = (1000, 1000)
    """So many of an image come out of it (post_nms_topk; torchvision keeps 2,000 in training)."""
    nms_iou: float = Field(default=0.7, gt=0, le=1)
    """Of two proposals that overlap by more, one goes (nms_thresh of RPN)."""
    per_image: int = Field(default=512, ge=2)
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
        if min(*self.before_nms, *self.after_nms) < 1:
            raise ValueError("before_nms and after_nms are at least 1")
        if min([*(self.sizes or ()), *self.ratios]) <= 0:
            raise ValueError("sizes and ratios are above 0")
        return self


class DetectionHead(Kind):
    """Finds objects on what the backbone gives."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}


class MaskRcnn(DetectionHead):
    """Finds boxes, classes and masks of objects by Mask R-CNN: of a plain Transformer on the simple pyramid of ViTDet,
    of an InternImage on a feature pyramid network of its four maps."""

    kind: ClassVar[str] = "mask_rcnn"

    windows: Windows | None = None
    """Of a plain Transformer. Default: as ViTDet; where an image is less than two windows wide, neither windows nor
    relative positions. An InternImage has none."""
    masks: bool = True
    """Predict masks too. Without, it is a Faster R-CNN, for sets that have boxes alone."""
    channels: int = Field(default=256, ge=4)
    """Of the maps and of the heads' convolutions (out_channels)."""
    norm: Literal["layer", "none"] = "layer"
    """Of the convolutions of pyramid and heads ("LN"; a plain FPN has none)."""
    regions: Regions = Regions()
    box_convs: int = Field(default=4, ge=0)
    """Convolutions of the box head (conv_dims = [256] * 4; a plain FPN has none and two linear layers)."""
    box_linears: int = Field(default=1, ge=1)
    box_width: int = Field(default=1024, ge=1)
    """Linear layers of the box head and their width (fc_dims = [1024])."""
    mask_convs: int = Field(default=4, ge=1)
    """Convolutions of the mask head, before it doubles the side."""
    box_side: int = Field(default=7, ge=1)
    mask_side: int = Field(default=14, ge=1)
    """Sides of what RoIAlign cuts out of the maps (box_pooler, mask_pooler); masks have twice that."""
    sampling_ratio: int = Field(default=0, ge=0)
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
    federated_classes: int | None = Field(default=None, ge=1)
    """Of a sigmoid: an image trains so many classes alone, its own and others drawn by how frequent they are
    (use_fed_loss, fed_loss_num_classes = 50). Default: all."""
    federated_power: float = Field(default=0.5, ge=0)
    """Others are drawn by the number of their images to this power (get_fed_loss_cls_weights(…, 0.5))."""
    score_above: float = Field(default=0.05, ge=0, lt=1)
    """Lowest score of a detection (test_score_thresh; LVIS 0.02)."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """Of two detections of a class that overlap by more, one goes (test_nms_thresh)."""
    detections: int = Field(default=100, ge=1)
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


class Detection(Task):
    """Finds the objects of an image. Its categories are those of categories.json beside the shards."""

    kind: ClassVar[str] = "detection"
    dense: ClassVar[bool] = True

    head: DetectionHead = MaskRcnn()
    """mask_rcnn, or {kind: mask_rcnn, channels: 128}."""

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
