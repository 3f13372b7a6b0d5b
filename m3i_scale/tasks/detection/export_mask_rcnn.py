"""Conversion of a plain Transformer and its Mask R-CNN to a model that is exported with its source files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.errors import ExportError
from m3i_scale.export.source import Source
from m3i_scale.export.tensors import VISION, ExportedModule, copied, empty, label_maps
from m3i_scale.objective.information import Objective
from m3i_scale.tasks.detection.configuration_mask_rcnn import HeadFields, MaskRcnnConfig
from m3i_scale.tasks.detection.detection_heads import DetectionHead, MaskRcnn
from m3i_scale.tasks.detection.modeling_mask_rcnn import MaskRcnnForObjectDetection, joined
from m3i_scale.tasks.detection.object_detector import detect
from m3i_scale.tasks.detection.windows import default_windows, windowed_layers

SOURCE_FILES = tuple(Path(__file__).with_name(f"{stem}_mask_rcnn.py") for stem in ("configuration", "modeling"))
"""Files that `transformers` needs to load the model without this package, with `trust_remote_code`."""
AUTO_MAP = {
    "AutoConfig": f"{SOURCE_FILES[0].stem}.{MaskRcnnConfig.__name__}",
    "AutoModelForObjectDetection": f"{SOURCE_FILES[1].stem}.{MaskRcnnForObjectDetection.__name__}",
}


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
        windows = windowed_layers(spec.windows or default_windows(backbone.grid[0]), backbone)
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
        trained=_trained,
    )


def _trained(objective: Objective, pixels_BCHW: Tensor) -> Mapping[str, Tensor]:
    sizes_B2 = torch.tensor([pixels_BCHW.shape[2:]] * len(pixels_BCHW), device=pixels_BCHW.device)
    return joined(detect(objective, pixels_BCHW, sizes_B2, sizes_B2))


def _no_class(why: str) -> ExportError:
    return ExportError(
        f"no class for detection computes what was trained: {why}",
        where="--task detection",
        fix="--task features: heads/ holds the detector, which `m3i-scale evaluate --measure detector` measures",
    )
