"""Layer-wise learning-rate decay: multipliers for every parameter of a backbone by depth.

Sources: MAE (`util/lr_decay.py`) and BEiT (`optim_factory.py`) for plain Transformers; InternImage for classification
(`classification/models/intern_image.py`, `optimizer.py`), and for detection and segmentation
(`mmcv_custom/custom_layer_decay_optimizer_constructor.py`).
"""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from m3i_scale.backbones.internimage import InternImageConfig

_LAYER = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.")
_BLOCK = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.")
_LEVEL = re.compile(r"levels\.(\d+)\.(\w+)(?:\.(\d+))?")
_DCN = ("offset", "center_feature_scale_proj")
"""Substrings in the names of weights of a deformable convolution's offsets and scale."""


def lr_scales(model: PreTrainedModel, decay: float, *, dense: bool, dcn: float = 1.0) -> dict[str, float]:
    """Return learning-rate multipliers by parameter name; heads use the full learning rate.

    Args:
        model: the backbone.
        decay: factor from one layer to the previous one.
        dense: use InternImage's rule for detection and segmentation, which assigns `post_norms.K` to block K. Its rule
            for classification gives them the full learning rate.
        dcn: additional factor for InternImage's offsets of deformable convolutions (`DCN_LR_MUL`).
    """
    config, names = model.config, [name for name, _ in model.named_parameters()]
    if not isinstance(config, InternImageConfig):
        depth = int(config.num_hidden_layers)
        return {name: decay ** (depth + 1 - _layer_of(name, depth)) for name in names}
    rule = _dense_layer_of if dense else _block_of
    depths = tuple(config.depths)
    last = sum(depths) + 1 if dense else sum(depths)
    scales = {name: decay ** (last - rule(name, depths)) for name in names}
    return {name: scale * (dcn if any(part in name for part in _DCN) else 1.0) for name, scale in scales.items()}


def _layer_of(name: str, depth: int) -> int:
    """Return 0 for embeddings and the norm directly after them, N + 1 for layer N, depth + 1 for all others."""
    if name.startswith(("embeddings.", "pre_layrnorm.")):
        return 0
    found = _LAYER.match(name)
    return int(found[1]) + 1 if found else depth + 1


def _block_of(name: str, depths: tuple[int, ...]) -> int:
    """Return the number of a block over all stages, from 1. The stem counts as the first block, layers between stages
    as the next block, and all others as the last block."""
    found = _BLOCK.match(name)
    if found:
        return sum(depths[: int(found[1])]) + int(found[2]) + 1
    if name.startswith("patch_embed"):
        return 1
    level = _LEVEL.match(name)
    if level and level[2] in ("downsample", "norm") and int(level[1]) < len(depths) - 1:
        return sum(depths[: int(level[1]) + 1]) + 1
    return sum(depths)


def _dense_layer_of(name: str, depths: tuple[int, ...]) -> int:
    """Return 0 for the stem and N + 1 for block N over all stages. Downsampling and norm after a stage count as the
    next block; after the last stage, as its first block."""
    if name.startswith("patch_embed"):
        return 0
    level = _LEVEL.match(name)
    if level is None:
        return sum(depths) + 1
    stage = int(level[1])
    if level[2] in ("downsample", "norm"):
        return sum(depths[: min(stage + 1, len(depths) - 1)]) + 1
    return sum(depths[:stage]) + int(level[3] or 0) + 1
