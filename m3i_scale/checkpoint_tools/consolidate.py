"""Read full weights from a sharded checkpoint one by one or block by block, and write them into safetensors files with
the Hub's names, without loading the full model into memory."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from torch import Tensor

from m3i_scale.checkpoint.commit import cause_of
from m3i_scale.checkpoint.layout import BUFFERS, read_meta
from m3i_scale.checkpoint.stream import Streamed, write_safetensors
from m3i_scale.checkpoint.tensors import AVERAGE, SavedTensors
from m3i_scale.checkpoint_tools.paths import resolve_checkpoint
from m3i_scale.engine.engine_state import MASTER
from m3i_scale.errors import CheckpointError, did_you_mean
from m3i_scale.files import atomic_dir, write_json
from m3i_scale.text import size_text

Which = Literal["student", "ema"]
Dtype = Literal["float32", "bfloat16"]
HEADS = "heads."
"""Buffers of heads affect their outputs: the running statistics of batch norm."""
BLOCK_ELEMENTS = 1 << 22
"""Elements read at a time: 16 MiB in fp32."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILES_BYTES = 1 << 20
"""Extra free space for headers, indices and small files."""


class SavedWeights(Mapping[str, Tensor]):
    """Full fp32 tensors of a checkpoint by parameter name (`student.model.layers.0.…`), read on access and not cached.

    Args:
        saved: the tensors of the checkpoint.
        keys: keys of the saved tensors by parameter name.
        buffers: further tensors by name, which have no optimizer state.
    """

    def __init__(self, saved: SavedTensors, keys: dict[str, str], buffers: dict[str, Tensor]) -> None:
        self._saved, self._keys, self._buffers = saved, keys, buffers

    def __getitem__(self, name: str) -> Tensor:
        return (self._buffers[name] if name in self._buffers else self._saved.whole(self._keys[name])).float()

    def __iter__(self) -> Iterator[str]:
        yield from self._keys
        yield from self._buffers

    def __len__(self) -> int:
        return len(self._keys) + len(self._buffers)

    @property
    def trained_parts(self) -> list[str]:
        """Return the parts of the model whose tensors have their trained values instead of an EMA."""
        trained = {name for name, key in self._keys.items() if key == f"{MASTER}/{name}"}
        averaged = {name.partition(".")[0] for name in self._keys.keys() - trained}
        return sorted({".".join(name.split(".")[: 1 + (name.partition(".")[0] in averaged)]) for name in trained})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return tuple(self._buffers[name].shape) if name in self._buffers else self._saved.shape(self._keys[name])

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a tensor as flat blocks; raise CheckpointError for non-finite elements."""
        numel = math.prod(self.shape(name))
        for start in range(0, numel, BLOCK_ELEMENTS):
            block = torch.empty(min(BLOCK_ELEMENTS, numel - start), dtype=dtype)
            if name in self._buffers:
                block.copy_(self._buffers[name].flatten()[start : start + block.numel()])
            else:
                self._saved.read_into(self._keys[name], start, block)
            if not bool(torch.isfinite(block).all()):
                raise CheckpointError(
                    f"'{name}' has non-finite values",
                    where=f"elements {start:,} to {start + block.numel():,}",
                    why="a model with these weights computes NaN",
                    fix="use an earlier checkpoint of the run",
                )
            yield block


def saved_weights(checkpoint: Path, which: Which) -> SavedWeights:
    """Return the weights of a committed checkpoint that passes `verify`. `which` selects the values for `student.…`:
    the trained weights, or their EMA."""
    saved = SavedTensors(checkpoint)
    keys = {name: f"{MASTER}/{name}" for name in saved.names(MASTER)}
    # Loss-weighting state serves only a resumed run.
    keys = {name: key for name, key in keys.items() if not name.startswith(("states.", "weights."))}
    if which == "ema":
        averages: dict[str, str] = read_meta(checkpoint).get("averages") or {}
        if not averages:
            raise CheckpointError("the run has no EMA teacher", where=str(checkpoint), fix="use --weights student")
        keys |= {online: f"{AVERAGE}/{target}" for target, online in averages.items()}
        return SavedWeights(saved, keys, {})  # the statistics of heads belong to the trained weights only
    buffers = load_file(checkpoint / BUFFERS)
    return SavedWeights(saved, keys, {name: buffer for name, buffer in buffers.items() if name.startswith(HEADS)})


def consolidate(
    checkpoint: Path,
    target: Path,
    *,
    weights: Which = "student",
    dtype: Dtype = "float32",
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write full tensors of a checkpoint. Memory holds a block of a tensor, independent of the model size.

    Args:
        checkpoint: one checkpoint, or a run's output folder, which means its newest valid checkpoint.
        target: the folder to create.
        weights: values for `student.…`: the trained weights, or their EMA.
        dtype: dtype of the tensors.
        max_shard_size: of a file, such as "5GB" or "500MB" (10⁹ and 10⁶ bytes, as the Hub counts); default: 5GB.

    Returns:
        {output, checkpoint, step, weights, not_averaged: parts of the model without an EMA, dtype, tensors, parameters,
        files: {path: bytes}, bytes}.
    """
    for option, value, known in (("weights", weights, ("student", "ema")), ("dtype", dtype, tuple(_DTYPES))):
        if value not in known:
            raise CheckpointError(f"unknown {option} '{value}'", fix=did_you_mean(value, known))
    shard_bytes = _bytes_of(max_shard_size)
    if os.path.lexists(target):
        raise CheckpointError(
            "the output folder already exists", where=str(target), fix="use a new folder, or remove this one"
        )
    source, _ = resolve_checkpoint(checkpoint)
    step = read_meta(source).get("step")
    chosen = saved_weights(source, weights)
    parameters = _count_parameters(chosen, source)
    facts = {"checkpoint": source.name, "weights": weights}
    with _new_folder(target, parameters * _DTYPES[dtype].itemsize + _FILES_BYTES) as folder:
        _write_shards(folder, chosen, _DTYPES[dtype], shard_bytes, facts)
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    files = {path.relative_to(target).as_posix(): path.stat().st_size for path in paths}
    return {
        "output": str(target),
        "checkpoint": str(source),
        "step": step,
        "weights": weights,
        "not_averaged": chosen.trained_parts if weights == "ema" else [],
        "dtype": dtype,
        "tensors": len(chosen),
        "parameters": parameters,
        "files": files,
        "bytes": sum(files.values()),
    }


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not count:
        raise CheckpointError(
            f"--max-shard-size must be a file size, got '{size}'",
            where="--max-shard-size",
            fix="use e.g. --max-shard-size 5GB",
        )
    return count


def _count_parameters(weights: SavedWeights, source: Path) -> int:
    sizes = {name: math.prod(weights.shape(name)) for name in weights}
    if empty := [name for name, size in sizes.items() if not size]:
        raise CheckpointError(
            f"'{empty[0]}' has no elements",
            where=str(source),
            why="an empty parameter was never gathered, or never created",
            fix="use another checkpoint of the run",
        )
    return sum(sizes.values())


@contextmanager
def _new_folder(target: Path, bytes_wanted: int) -> Iterator[Path]:
    """Create a folder under a temporary name; rename it when all data is on disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < bytes_wanted:
            raise CheckpointError(
                f"not enough space: {size_text(bytes_wanted)} needed, {size_text(free)} free",
                where=str(target.parent),
                fix="free space, or use a folder on another disk",
            )
        with atomic_dir(target) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be written: {cause_of(error, target.parent, bytes_wanted)}",
            where=str(error.filename or target),
            why="the checkpoint is unchanged, and the partial output is removed",
            fix="free space, or use a folder on another disk",
        ) from None


def _write_shards(
    folder: Path, weights: SavedWeights, dtype: torch.dtype, shard_bytes: int, facts: dict[str, str]
) -> None:
    """Write safetensors files, with `facts` in every header. A tensor above `shard_bytes` gets a separate file."""
    planned = {name: torch.empty(weights.shape(name), dtype=dtype, device="meta") for name in weights}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        streamed = [Streamed(name, dtype, weights.shape(name), partial(weights.blocks, name, dtype)) for name in names]
        write_safetensors(folder / file, streamed, {"format": "pt", **facts})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **facts}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
