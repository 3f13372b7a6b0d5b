"""Conversion of a plain Transformer and its queries to the standard RF-DETR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor
from transformers import RfDetrDinov2Config

from m3i_scale.errors import ExportError
from m3i_scale.export.joint import backbone_part
from m3i_scale.export.source import Source
from m3i_scale.export.tensors import ExportedModule, TensorSource, empty, label_maps
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.detection.detection_heads import RfDetr
from m3i_scale.tasks.detection.object_detector import detector_of
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector, read_layers
from m3i_scale.tasks.detection.rfdetr_queries import BACKBONE, stock_class, stock_config

_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "use_swiglu_ffn", "use_mask_token"),
)


def rfdetr_part(source: Source, spec: RfDetr, target: str) -> ExportedModule:
    """Return backbone and queries as `RfDetrForInstanceSegmentation`, or `RfDetrForObjectDetection` without masks. A
    ViT is converted to a DINOv2 with layer scales of 1. `target` is the name of the head's target."""
    if not source.run.data.augment.stretch:
        raise ExportError(
            "no stock image processor of RF-DETR shows images as they were shown",
            where="data.augment.stretch: false",
            why="it resizes them to the square; without `stretch` they keep their shape, and the rest is filled up",
            fix="--task features: heads/ holds the head",
        )
    (names,) = source.label_sets.values()
    backbone = backbone_part(source)
    config = backbone.model.config
    shape = RfDetrDinov2Config(
        **{key: getattr(config, key) for key in _SHAPE},
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
        "detector", model, tensors, auto=auto, output="logits", also=also, resize="stretched", trained=_trained
    )


def _trained(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    detector = cast(RfDetrDetector, detector_of(objective))
    return detector.predict(detector.encode(objective.student, pixels_BCHW))[0]
