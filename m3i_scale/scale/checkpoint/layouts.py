"""Whole weights on the disk, in three layouts, none of which needs the memory that the model would take.

safetensors   model-00001-of-00003.safetensors …, model.safetensors.index.json: as the Hub names them
universal     what DeepSpeed's `checkpoint.load_universal` reads: weights and moments, one file a tensor
deepspeed     what `zero_to_fp32` reads: weights, cut as ZeRO-3 on as many ranks as there are files
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.manifest import sync
from m3i_scale.scale.checkpoint.stream import Streamed, write_safetensors
from m3i_scale.scale.engine_state import MASTER, MOMENTS

BLOCK_ELEMENTS = 1 << 22
"""Read at a time: 16 MiB in fp32."""
TAG = "consolidated"
_RANK_FILE = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""DeepSpeed looks for the first under stages 1 and 2, for the second under stage 3."""


class Weights(Protocol):
    """Tensors by name, read by range."""

    def __iter__(self) -> Iterator[str]:
        """Names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the range that begins at `start`."""


def write_shards(folder: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int, facts: dict[str, str]) -> None:
    """The `safetensors` layout.

    Args:
        folder: to write into.
        weights: what is written.
        dtype: of the files.
        shard_bytes: of one file, at most; a larger tensor has a file of its own.
        facts: written into every file's header.

    Raises:
        OSError: the disk refused.
        CheckpointError: a tensor is not finite.
    """
    planned = {name: torch.empty(weights.shape(name), dtype=dtype, device="meta") for name in weights}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        streamed = [Streamed(name, dtype, weights.shape(name), _blocks(weights, name, dtype)) for name in names]
        write_safetensors(folder / file, streamed, {"format": "pt", **facts})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **facts}, "weight_map": split.tensor_to_filename}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sync(path)


def write_universal(folder: Path, kinds: Mapping[str, Weights], counters: Mapping[str, Any], world_size: int) -> None:
    """The `universal` layout. What belongs to the engine that reads it (learning rate, weight decay, loss scale) is
    left out, so that its own settings hold.

    Args:
        folder: to write into.
        kinds: master weights and both moments, by their kind.
        counters: of the engine that saved.
        world_size: of the run; told, and not used by DeepSpeed.

    Raises:
        OSError, RuntimeError: the disk refused.
        CheckpointError: a tensor is not finite.
    """
    root, steps = folder / TAG, float(counters["optimizer_steps"])
    for name in kinds[MASTER]:
        place = root / "zero" / name
        place.mkdir(parents=True)
        for kind in (MASTER, *MOMENTS):
            _save({"param": _whole(kinds[kind], name)}, place / ("fp32.pt" if kind == MASTER else f"{kind}.pt"))
        _save(torch.tensor(steps), place / "step.pt")
    # DeepSpeed walks its own groups beside these: there can be no more of them than tensors.
    groups: list[dict[str, Any]] = [{"params": []} for _ in kinds[MASTER]]
    inner = {"state": {0: {"step": torch.tensor(steps)}}, "param_groups": groups}
    version = {"ds_version": deepspeed.__version__}
    _save({"param_groups": groups, "optimizer_state_dict": inner, **version}, root / "zero" / "optimizer_state.pt")
    counts = {name: counters[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    sizes = {"dp_world_size": world_size, "mp_world_size": 1}
    for file in _MODEL_FILES:
        _save({"module": {}, **counts, **sizes, **version, "lr_scheduler": None}, root / file)
    _write_latest(folder / "latest_universal")


def write_zero3(folder: Path, weights: Weights, shard_bytes: int) -> None:
    """The `deepspeed` layout: fp32 weights without moments, in files of about `shard_bytes`.

    Raises:
        OSError, RuntimeError: the disk refused.
        CheckpointError: a tensor is not finite.
    """
    root, shapes = folder / TAG, {name: torch.Size(weights.shape(name)) for name in weights}
    root.mkdir()
    ranks = max(math.ceil(4 * sum(shape.numel() for shape in shapes.values()) / shard_bytes), 1)
    for rank in range(ranks):
        states = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [_share(weights, shapes, rank, ranks)]}
        path = root / _RANK_FILE.format(rank)
        _save({"optimizer_state_dict": states, "ds_version": deepspeed.__version__}, path)
        del states  # before the next one is made
    empty: dict[str, Any] = {"module": {}, "buffer_names": [], "shared_params": {}}
    _save({**empty, "param_shapes": [shapes], "ds_version": deepspeed.__version__}, root / _MODEL_FILES[1])
    _write_latest(folder / "latest")


def _whole(weights: Weights, name: str) -> Tensor:
    tensor = torch.empty(weights.shape(name))
    _fill(weights, name, 0, tensor.view(-1))
    return tensor


def _share(weights: Weights, shapes: dict[str, torch.Size], rank: int, ranks: int) -> Tensor:
    """What ZeRO-3 has on a rank: of every tensor an even share, the last ones filled up with zeros."""
    flat = torch.zeros(sum(math.ceil(shape.numel() / ranks) for shape in shapes.values()))
    at = 0
    for name, shape in shapes.items():
        share = math.ceil(shape.numel() / ranks)
        start = min(share * rank, shape.numel())
        _fill(weights, name, start, flat[at : at + min(share, shape.numel() - start)])
        at += share
    return flat


def _blocks(weights: Weights, name: str, dtype: torch.dtype) -> Callable[[], Iterable[Tensor]]:
    numel = math.prod(weights.shape(name))

    def read() -> Iterator[Tensor]:
        for start in range(0, numel, BLOCK_ELEMENTS):
            block = torch.empty(min(BLOCK_ELEMENTS, numel - start), dtype=dtype)
            _fill(weights, name, start, block)
            yield block

    return read


def _fill(weights: Weights, name: str, start: int, out: Tensor) -> None:
    """Read block by block, whatever the size: a change of type takes no second copy of the tensor."""
    for at in range(0, out.numel(), BLOCK_ELEMENTS):
        block = out[at : at + BLOCK_ELEMENTS]
        weights.read_into(name, start + at, block)
        if not bool(torch.isfinite(block).all()):
            raise CheckpointError(
                f"'{name}' has elements that are not finite numbers",
                where=f"elements {start + at:,} to {start + at + block.numel():,}",
                why="a model with these weights computes NaN",
                fix="take an earlier checkpoint of the run",
            )


def _save(value: object, path: Path) -> None:
    """`torch.save` of plain containers and tensors, brought to the disk."""
    torch.save(value, path)
    sync(path)


def _write_latest(path: Path) -> None:
    path.write_text(TAG, encoding="utf-8")
    sync(path)
