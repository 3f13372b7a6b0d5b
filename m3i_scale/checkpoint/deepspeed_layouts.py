"""Write full weights in DeepSpeed's formats, without loading the full model into memory.

universal     for DeepSpeed's `checkpoint.load_universal`: weights and moments, one file per tensor
deepspeed     for `zero_to_fp32`: weights, partitioned as by ZeRO-3 with one rank per file
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from m3i_scale.checkpoint.weights import SavedWeights
from m3i_scale.engine.engine_state import MASTER, MOMENTS

TAG = "consolidated"
_RANK_FILE = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""DeepSpeed looks for the first under stages 1 and 2, for the second under stage 3."""


def write_universal(
    folder: Path, kinds: Mapping[str, SavedWeights], counters: Mapping[str, Any], world_size: int
) -> None:
    """Write the `universal` layout. Learning rate, weight decay and loss scale are omitted, so that the configuration
    of the engine that reads it applies.

    Args:
        folder: output folder.
        kinds: master weights and both moments, by their kind.
        counters: counters of the engine that saved.
        world_size: number of ranks of the run; recorded, and not used by DeepSpeed.
    """
    root, steps = folder / TAG, float(counters["optimizer_steps"])
    for name in kinds[MASTER]:
        place = root / "zero" / name
        place.mkdir(parents=True)
        for kind in (MASTER, *MOMENTS):
            _save({"param": _whole(kinds[kind], name)}, place / ("fp32.pt" if kind == MASTER else f"{kind}.pt"))
        _save(torch.tensor(steps), place / "step.pt")
    # DeepSpeed iterates over its groups and these in parallel: there can be no more of them than tensors.
    groups: list[dict[str, Any]] = [{"params": []} for _ in kinds[MASTER]]
    inner = {"state": {0: {"step": torch.tensor(steps)}}, "param_groups": groups}
    version = {"ds_version": deepspeed.__version__}
    _save({"param_groups": groups, "optimizer_state_dict": inner, **version}, root / "zero" / "optimizer_state.pt")
    counts = {name: counters[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    sizes = {"dp_world_size": world_size, "mp_world_size": 1}
    for file in _MODEL_FILES:
        _save({"module": {}, **counts, **sizes, **version, "lr_scheduler": None}, root / file)
    (folder / "latest_universal").write_text(TAG, encoding="utf-8")


def write_zero3(folder: Path, weights: SavedWeights, shard_bytes: int) -> None:
    """Write the `deepspeed` layout: fp32 weights without moments, in files of about `shard_bytes`."""
    root, shapes = folder / TAG, {name: torch.Size(weights.shape(name)) for name in weights}
    root.mkdir()
    ranks = max(math.ceil(4 * sum(shape.numel() for shape in shapes.values()) / shard_bytes), 1)
    for rank in range(ranks):
        states = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [_share(weights, shapes, rank, ranks)]}
        path = root / _RANK_FILE.format(rank)
        _save({"optimizer_state_dict": states, "ds_version": deepspeed.__version__}, path)
        del states  # free the memory before the next rank's states are made
    empty: dict[str, Any] = {"module": {}, "buffer_names": [], "shared_params": {}}
    _save({**empty, "param_shapes": [shapes], "ds_version": deepspeed.__version__}, root / _MODEL_FILES[1])
    (folder / "latest").write_text(TAG, encoding="utf-8")


def _whole(weights: SavedWeights, name: str) -> Tensor:
    tensor = torch.empty(weights.shape(name))
    weights.read_finite(name, 0, tensor.view(-1))
    return tensor


def _share(weights: SavedWeights, shapes: dict[str, torch.Size], rank: int, ranks: int) -> Tensor:
    """Return a rank's ZeRO-3 shard: an even share of every tensor, the last ones padded with zeros."""
    flat = torch.zeros(sum(math.ceil(shape.numel() / ranks) for shape in shapes.values()))
    at = 0
    for name, shape in shapes.items():
        share = math.ceil(shape.numel() / ranks)
        start = min(share * rank, shape.numel())
        weights.read_finite(name, start, flat[at : at + min(share, shape.numel() - start)])
        at += share
    return flat


def _save(value: object, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause = error.__context__  # torch's writer raises a second error when it is closed
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
