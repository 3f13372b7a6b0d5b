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
from m3i_scale.scale.checkpoint.state import TAG, tensors_only


def load_weights(checkpoint: Path, weights: Literal["student", "momentum"]) -> dict[str, Tensor]:
    """All weights of a committed checkpoint in fp32, by full parameter name (`student.model.layers.0.…`).

    Args:
        checkpoint: a folder that `verify` finds good.
        weights: which values `student.…` gets: the trained ones, or their moving average.

    Raises:
        CheckpointError: momentum weights of a run without a momentum target, or a tensor that came out empty.
    """
    with tensors_only():
        trained = _bf16_optimizer(checkpoint / TAG) or get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), tag=TAG
        )
    # What is averaged comes from its own files; what heads and balanced weights remember serves only a resumed run.
    left_out = ("momentum.", "states.", "weights.")
    full = {name: tensor.detach().float().clone() for name, tensor in trained.items() if not name.startswith(left_out)}
    averaged = _momentum(checkpoint)
    if weights == "momentum":
        if not averaged:
            raise CheckpointError("the run has no momentum target", where=str(checkpoint), fix="--weights student")
        online: dict[str, str] = json.loads((checkpoint / "momentum" / "online.json").read_text(encoding="utf-8"))
        for name, tensor in averaged.items():
            full[online[name]] = tensor
    full |= averaged
    empty = [name for name, tensor in full.items() if tensor.numel() == 0]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensors came out empty, e.g. '{empty[0]}'",
            where=str(checkpoint),
            why="DeepSpeed's files do not hold what the run trained",
            fix="take another checkpoint of the run",
        )
    return full


def _bf16_optimizer(folder: Path) -> dict[str, Tensor]:
    """fp32 weights out of the files of DeepSpeed's BF16_Optimizer (stage 1 with bf16), which its own consolidation
    refuses; {} where another optimizer wrote the files.

    Every parameter group is one flat tensor, cut evenly over the ranks, padded at the end.
    """
    count = len(list(folder.glob("*_optim_states.pt")))
    files = [folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(count)]
    if not files or not all(file.exists() for file in files):
        return {}
    states = [
        torch.load(file, map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"] for file in files
    ]
    if "zero_stage" in states[0]:
        return {}
    model = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True, weights_only=True)
    full: dict[str, Tensor] = {}
    for number, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([state["single_partition_of_fp32_groups"][number] for state in states])
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = flat[: sum(sizes)].split(sizes)
        full |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
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
