"""Whole weights from a sharded checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors import safe_open
from torch import Tensor

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.state import TAG, read_meta, tensors_only


def load_weights(checkpoint: Path, weights: Literal["student", "momentum"]) -> dict[str, Tensor]:
    """All weights of a committed checkpoint in fp32, by full parameter name (`student.model.layers.0.…`).

    Args:
        checkpoint: a folder that `verify` finds good.
        weights: which values `student.…` gets: the trained ones, or their moving average.

    Raises:
        CheckpointError: momentum weights of a run without a momentum target, or a tensor that came out empty.
    """
    with tensors_only():
        if read_meta(checkpoint)["zero_stage"] == 0:
            file = checkpoint / TAG / "mp_rank_00_model_states.pt"
            trained = torch.load(file, map_location="cpu", weights_only=True)["module"]
        else:
            trained = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    full = {name: tensor.float().clone() for name, tensor in trained.items() if not name.startswith("momentum.")}
    averaged = _momentum(checkpoint)
    if weights == "momentum":
        if not averaged:
            raise CheckpointError("the run has no momentum target", where=str(checkpoint), fix="--weights student")
        for name, tensor in averaged.items():
            online = name.removeprefix("momentum.")
            online = online.replace("backbone.", "student.", 1) if online.startswith("backbone.") else online
            full[online] = tensor
    full |= averaged
    empty = [name for name, tensor in full.items() if tensor.numel() == 0]
    if empty:
        raise CheckpointError(f"{len(empty)} tensors came out empty, e.g. '{empty[0]}'", where=str(checkpoint))
    return full


def _momentum(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights: shards of all ranks one after the other, without the padding of the last one."""
    folder = checkpoint / "momentum"
    if not (folder / "shapes.json").exists():
        return {}
    shapes: dict[str, list[int]] = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    files = sorted(folder.glob("rank-*.safetensors"))
    full = {}
    opened = [safe_open(file, framework="pt") for file in files]
    for name, shape in shapes.items():
        parts = [file.get_tensor(name).flatten() for file in opened]
        numel = math.prod(shape)
        # Without ZeRO-3 every rank holds the whole average.
        flat = parts[0] if parts[0].numel() == numel else torch.cat(parts)
        full[name] = flat[:numel].view(shape).clone()
    return full
