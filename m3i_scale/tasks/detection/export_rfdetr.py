"""Conversion of a plain Transformer and its queries to the standard RF-DETR."""

from __future__ import annotations

from typing import cast

from transformers import RfDetrDinov2Config

from m3i_scale.errors import ExportError
from m3i_scale.hub.joint import backbone_part, empty, target_of
from m3i_scale.hub.source import Source
from m3i_scale.hub.tensors import ExportedModule, TensorSource
from m3i_scale.tasks.detection.detection_heads import RfDetr
from m3i_scale.tasks.detection.detection_target import Detection
from m3i_scale.tasks.detection.rfdetr import read_layers
from m3i_scale.tasks.detection.rfdetr_queries import BACKBONE, stock_class, stock_config

_SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "use_swiglu_ffn", "use_mask_token"),
)


def rfdetr_part(source: Source) -> ExportedModule:
    """Return backbone and queries as `RfDetrForInstanceSegmentation`, or `RfDetrForObjectDetection` without masks.

    A ViT is converted to a DINOv2 with layer scales of 1.
    """
    target = cast(Detection, target_of(source, "boxes"))
    spec = cast(RfDetr, target.head)
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
    stock.id2label = dict(enumerate(names))
    stock.score_above, stock.detections = spec.score_above, spec.detections  # read by `evaluate`
    stock.label2id = {name: number for number, name in enumerate(names)}
    model, before = empty(lambda: stock_class(spec)(stock)), ("model.model." if spec.masks else "model.") + BACKBONE
    tensors = {
        name: backbone.tensors[name.removeprefix(before)]
        if name.startswith(before)
        else TensorSource((f"heads.{target.name}.queries.model.{name}",))
        for name in model.state_dict()
    }
    auto = "AutoModelForInstanceSegmentation" if spec.masks else "AutoModelForObjectDetection"
    also = ("pred_boxes", *(["pred_masks"] if spec.masks else []))
    return ExportedModule("detector", model, tensors, auto=auto, output="logits", also=also)
