"""Small InternImages, and folders of them as OpenGVLab publishes its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from m3i_scale.backbones.internimage import InternImageConfig, InternImageModel

TINY = {"channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8], "image_size": 64}
FULL = {
    "dw_kernel_size": 5,
    "res_post_norm": True,
    "level2_post_norm": True,
    "level2_post_norm_block_ids": [1],
    "center_feature_scale": True,
    "fusion_width": 32,
}


def model_of(**fields: object) -> InternImageModel:
    torch.manual_seed(0)
    model = InternImageModel(InternImageConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():  # first offsets are zero and first gates all alike; nothing could be told apart
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def published_folder(folder: Path, model: InternImageModel, **fields: object) -> Path:
    """A folder as OpenGVLab's: all names below `model.`, a classifier beside the trunk, its own config fields."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for ours in ("fusion_width", "image_size", "num_channels", "initializer_range", "layer_norm_eps"):
        config.pop(ours, None)
    if config["dw_kernel_size"] == 3:
        config["dw_kernel_size"] = None
    config |= {
        "model_type": "internimage",
        "core_op": "DCNv3",
        "act_layer": "GELU",
        "norm_layer": "LN",
        "remove_center": False,
        "drop_rate": 0.0,
        "with_cp": False,
        "cls_scale": 1.5,
        "num_classes": 1000,
        "use_clip_projector": model.config.fusion_width is not None,
        "architectures": ["InternImageModel"],
        **fields,
    }
    weights = {f"model.{name}": value.contiguous().clone() for name, value in model.state_dict().items()}
    head = ("fc_norm.0.weight", "clip_projector.norm1_q.0.weight", "clip_projector.cross_dcn.q_bias", "head.weight")
    weights |= {f"model.{name}": torch.ones(4) for name in (*head, "conv_head.1.1.running_mean")}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
