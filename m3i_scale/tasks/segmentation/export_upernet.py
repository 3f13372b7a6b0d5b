"""Conversion of a plain Transformer with UPerNet to standard classes: BEiT, which has the pyramid, and UPerNet."""

from __future__ import annotations

import torch
from transformers import BeitConfig, Dinov2Config, UperNetConfig, UperNetForSemanticSegmentation, ViTConfig

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.export.joint import part_of, vision_names
from m3i_scale.export.source import Source
from m3i_scale.export.tensors import VISION, ExportedModule, TensorSource, empty, label_maps
from m3i_scale.tasks.segmentation.export_eomt import no_class
from m3i_scale.tasks.segmentation.pixel_heads import read_layers, segment
from m3i_scale.tasks.segmentation.segmentation_heads import SegmentationHead, UperNetSegmentation

_BEIT = {
    "patch": "embeddings.patch_embeddings.projection",
    "class": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "norm1": "layers.{}.layernorm_before",
    **{part: f"layers.{{}}.attention.{part}_proj" for part in "qkvo"},
    "scale1": "layers.{}.lambda_1",
    "norm2": "layers.{}.layernorm_after",
    **{part: f"layers.{{}}.mlp.{part}" for part in ("fc1", "fc2")},
    "scale2": "layers.{}.lambda_2",
}
"""Names of BEiT's parts, by the keys of `TokenFamily.parts`; without the final norm, which feature maps do not use."""
_COUNT = "num_batches_tracked"


def upernet_part(source: Source, spec: SegmentationHead, target: str) -> ExportedModule:
    """Return backbone and head as `UperNetForSemanticSegmentation`; `target` is the name of the head's target."""
    config = backbone_config(source.run.backbone)
    if not isinstance(spec, UperNetSegmentation):
        raise no_class(f"none has a head of kind {spec.kind}")
    (names,) = source.label_sets.values()
    shape = _as_beit(config, spec)
    upernet = UperNetConfig(
        backbone_config=shape,
        hidden_size=spec.channels,
        use_auxiliary_head=spec.auxiliary_weight > 0,
        auxiliary_loss_weight=spec.auxiliary_weight,
        auxiliary_in_channels=None,
        **label_maps(names),
    )
    model = empty(lambda: UperNetForSemanticSegmentation(upernet))
    head = f"heads.{target}."
    tensors = _backbone_tensors(config)
    for name in model.state_dict():
        if name.endswith(_COUNT):
            tensors[name] = TensorSource((), lambda: torch.zeros((), dtype=torch.int64))
        elif name.startswith("backbone.fpn."):
            tensors[name] = TensorSource((head + "neck." + name.removeprefix("backbone.fpn."),))
        elif not name.startswith("backbone."):
            tensors[name] = TensorSource((head + name,))
    return ExportedModule(
        "segmenter",
        model,
        tensors,
        auto="AutoModelForSemanticSegmentation",
        output="logits",
        resize="whole",
        trained=lambda objective, pixels_BCHW: {"logits": segment(objective, pixels_BCHW)},
    )


def _as_beit(config: VisionConfig, spec: UperNetSegmentation) -> BeitConfig:
    if not isinstance(config, ViTConfig | Dinov2Config):
        raise no_class(f"a {config.model_type} is no BEiT")
    gated = isinstance(config, Dinov2Config) and config.use_swiglu_ffn
    if gated or not config.qkv_bias:
        raise no_class("BEiT has biases, and no gates in its MLP")
    hidden = config.hidden_size * config.mlp_ratio if isinstance(config, Dinov2Config) else config.intermediate_size
    return BeitConfig(
        **{
            key: getattr(config, key)
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
        },
        **{key: getattr(config, key) for key in ("image_size", "patch_size", "num_channels")},
        intermediate_size=int(hidden),
        use_absolute_position_embeddings=True,
        use_relative_position_bias=False,
        use_mask_token=False,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
        add_fpn=True,
        batch_norm_eps=1e-5,  # the same in every version; transformers 4 reads it here and has no default
        out_indices=list(read_layers(spec, config.num_hidden_layers)),
    )


def _backbone_tensors(config: VisionConfig) -> dict[str, TensorSource]:
    width, tensors = config.hidden_size, {}
    for name in vision_names(config):
        part, number, suffix = part_of(name, token_family(config).parts)
        # The bias of keys shifts all logits of a query equally, which softmax ignores; BEiT does not have it.
        if part in _BEIT and (part, suffix) != ("k", ".bias"):
            tensors["backbone.beit." + _BEIT[part].format(number) + suffix] = TensorSource((VISION + name,))
    if not isinstance(config, Dinov2Config):
        for layer in range(config.num_hidden_layers):
            for part in ("scale1", "scale2"):
                tensors["backbone.beit." + _BEIT[part].format(layer)] = TensorSource((), lambda: torch.ones(width))
    return tensors
