"""Conversion of a backbone and its detection head: Mask R-CNN with its source files, or the standard RF-DETR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import RfDetrDinov2Config

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.errors import ExportError
from m3i_scale.exports.joint import backbone_part
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import VISION, ExportedModule, TensorSource, copied, empty, label_maps
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.detection.configuration_mask_rcnn import HeadFields, MaskRcnnConfig
from m3i_scale.tasks.detection.detection_heads import DetectionHead, MaskRcnn, RfDetr
from m3i_scale.tasks.detection.mask_rcnn import windowed_layers
from m3i_scale.tasks.detection.modeling_mask_rcnn import MaskRcnnForObjectDetection, joined
from m3i_scale.tasks.detection.object_detector import detect, detector_of
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector, read_layers
from m3i_scale.tasks.detection.rfdetr_queries import BACKBONE, stock_class, stock_config

SOURCE_FILES = tuple(Path(__file__).with_name(f"{stem}_mask_rcnn.py") for stem in ("configuration", "modeling"))
"""Files that `transformers` needs to load the model without this package, with `trust_remote_code`."""
AUTO_MAP = {
    "AutoConfig": f"{SOURCE_FILES[0].stem}.{MaskRcnnConfig.__name__}",
    "AutoModelForObjectDetection": f"{SOURCE_FILES[1].stem}.{MaskRcnnForObjectDetection.__name__}",
}
_DINOV2_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "use_swiglu_ffn", "use_mask_token"),
)


def mask_rcnn_part(source: Source, spec: DetectionHead, target: str) -> ExportedModule:
    """Return backbone and Mask R-CNN as `MaskRcnnForObjectDetection`; the folder includes its source files. `target` is
    the name of the head's target."""
    config = backbone_config(source.run.backbone)
    if not isinstance(spec, MaskRcnn):
        raise _no_class(f"none has a head of kind {spec.kind}")
    if isinstance(config, InternImageConfig):
        raise _no_class("an InternImage brings source files of its own, and a folder holds those of one model")
    with torch.device("meta"):
        backbone = build_backbone(config)
        windows = windowed_layers(spec.windows, backbone)
    config.name_or_path = ""  # the path of the pretrained weights is private
    (names,) = source.label_sets.values()
    shape = MaskRcnnConfig(
        config,
        asdict(HeadFields.of(spec.model_dump(mode="json"))),
        windows.sides,
        windows.relative,
        **label_maps(names),
        auto_map=AUTO_MAP,
    )
    model = empty(lambda: MaskRcnnForObjectDetection(shape))
    tensors = copied(model.backbone.state_dict(), VISION, "backbone.")
    tensors |= copied(model.detector.state_dict(), f"heads.{target}.", "detector.")
    return ExportedModule(
        "detector",
        model,
        tensors,
        auto="AutoModelForObjectDetection",
        output="scores",
        also=("labels", "boxes", *(["masks"] if spec.masks else [])),
        files=SOURCE_FILES,
        resize="padded",
        trained=_trained_mask_rcnn,
    )


def _trained_mask_rcnn(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    sizes_B2 = torch.tensor([pixels_BCHW.shape[2:]] * len(pixels_BCHW), device=pixels_BCHW.device)
    return joined(detect(objective, pixels_BCHW, sizes_B2, sizes_B2))


def rfdetr_part(source: Source, spec: RfDetr, target: str) -> ExportedModule:
    """Return backbone and queries as `RfDetrForInstanceSegmentation`, or `RfDetrForObjectDetection` without masks. A
    ViT is converted to a DINOv2 with layer scales of 1. `target` is the name of the head's target."""
    if not source.run.data.augment.stretch:
        raise ExportError(
            "the image processor of RF-DETR needs `data.augment.stretch: true`",
            where="data.augment.stretch: false",
            why="it resizes images to a square; without `stretch` the run padded them instead",
            fix="use --task features; heads/ then has the detection head",
        )
    (names,) = source.label_sets.values()
    backbone = backbone_part(source)
    config = backbone.model.config
    shape = RfDetrDinov2Config(
        **{key: getattr(config, key) for key in _DINOV2_FIELDS},
        num_windows=spec.windows,
        out_indices=list(read_layers(spec, config.num_hidden_layers)),
    )
    stock = stock_config(spec, shape, len(names))
    stock.update(label_maps(names))
    stock.score_above, stock.detections = spec.score_above, spec.detections  # read by `evaluate`
    model, before = empty(lambda: stock_class(spec)(stock)), ("model.model." if spec.masks else "model.") + BACKBONE
    tensors = {
        name: backbone.tensors[name.removeprefix(before)]
        if name.startswith(before)
        else TensorSource((f"heads.{target}.queries.model.{name}",))
        for name in model.state_dict()
    }
    auto = "AutoModelForInstanceSegmentation" if spec.masks else "AutoModelForObjectDetection"
    also = ("pred_boxes", *(["pred_masks"] if spec.masks else []))
    return ExportedModule(
        "detector", model, tensors, auto=auto, output="logits", also=also, resize="stretched", trained=_trained_rfdetr
    )


def _trained_rfdetr(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    detector = cast(RfDetrDetector, detector_of(objective))
    return detector.predict(detector.encode(objective.student, pixels_BCHW))[0]


def _no_class(why: str) -> ExportError:
    return ExportError(
        f"no Transformers class computes this detector: {why}",
        where="--task detection",
        fix="use --task features; heads/ then has the detector for `m3i-scale evaluate --measure detector`",
    )
