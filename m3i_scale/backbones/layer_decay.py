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
    depths = tuple(config.depths)
    scales = {name: decay ** (sum(depths) + dense - _block_of(name, depths, dense)) for name in names}
    return {name: scale * (dcn if any(part in name for part in _DCN) else 1.0) for name, scale in scales.items()}


def _layer_of(name: str, depth: int) -> int:
    """Return 0 for embeddings and the norm directly after them, N + 1 for layer N, depth + 1 for all others."""
    if name.startswith(("embeddings.", "pre_layrnorm.")):
        return 0
    found = _LAYER.match(name)
    return int(found[1]) + 1 if found else depth + 1


def _block_of(name: str, depths: tuple[int, ...], dense: bool) -> int:
    """Return the number of a block over all stages, from 1. Downsampling and norm after a stage count as the next
    block. Classification: the stem counts as the first block, and all others as the last block. Dense: the stem is 0,
    downsampling and norm after the last stage count as its first block, and others outside of stages are behind all."""
    if name.startswith("patch_embed"):
        return 0 if dense else 1
    level = _LEVEL.match(name)
    if level is None:
        return sum(depths) + dense
    stage, part, last = int(level[1]), level[2], len(depths) - 1
    if part in ("downsample", "norm") and (dense or stage < last):
        return sum(depths[: min(stage + 1, last)]) + 1
    if part == "blocks" or dense:
        return sum(depths[:stage]) + int(level[3] or 0) + 1
    return sum(depths)
